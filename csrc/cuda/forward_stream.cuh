// The forward pass over many rows, in one sweep of device memory.
//
// A cluster splits d among its CTAs, a CTA its slice among its warps. A warp keeps the D, G and R of its strip of
// columns in registers and never touches other columns, so that nothing but h moves through the chip. For each tile of
// rows:
//
//   producer   copies the rows' slices into a stage of shared memory
//   warps      multiply their strips by (D, G), and leave partial sums
//   reduce     partial sums go to the CTA that owns the row, which adds them up in the order of warps and CTAs
//   gate       the owner finds w and u of its rows, writes them out, and sends u to all CTAs
//   warps      add u R to their strips, in the stage
//   producer   copies the stage out
//
// No buffer between CTAs needs to say that it is empty, and one of each is enough. A CTA sends sums of the next tile
// only after it got u of this one from every owner, who by then has read all sums of this tile; and an owner sends u of
// the next tile only after it got its sums from every CTA, all of whose warps have by then used u of this one.
#pragma once

#include "fragments.h"
#include "kernels.h"
#include "machine.cuh"
#include "rows.cuh"
#include "tiles.cuh"

namespace baft::cuda {

template <class T_, int kCluster_, int kWarps_, int kStrip_, int kRank_, int kRows_, int kStages_>
struct ForwardStream {
  // -- types and shapes --
  using T = T_;
  using Number = typename T::Number;
  static constexpr int kCluster = kCluster_; // CTAs
  static constexpr int kWarps = kWarps_;     // that compute, of a CTA; one more copies
  static constexpr int kStrip = kStrip_;     // columns of a warp
  static constexpr int kRank = kRank_;       // padded
  static constexpr int kRows = kRows_;       // of a tile
  static constexpr int kStages = kStages_;   // tiles in shared memory
  static constexpr int kOutputs = 2 * kRank; // p and z
  static constexpr int kBlocks = kStrip / kBlockColumns;
  static constexpr int kSlice = kWarps * kStrip;
  static constexpr int kSliceBytes = kSlice * sizeof(Number); // of a row
  static constexpr int kWidth = kCluster * kSlice;            // d
  static constexpr int kOwned = kRows / kCluster;             // rows of a tile that a CTA finds w and u of
  static constexpr int kGating = kOwned * kRank / 2;          // threads that do, each for two bases of a row
  static constexpr int kComputing = 32 * kWarps;
  static constexpr int kThreads = kComputing + 32;
  static constexpr bool kSharedBasis = kPerWord<T> == 1; // since parts of numbers (float32.cuh) take registers, too

  static_assert(kSliceBytes % 128 == 0, "rows in shared memory begin 4 banks apart");
  static_assert(kRows % 16 == 0 && kRows <= 32, "a product has 16 rows, and a lane of the producer copies one row");
  static_assert(kStrip % kBlockColumns == 0, "parameters are packed in blocks of 16 columns");
  static_assert(kRank == 8 || kRank == 16 || kRank == 32, "ranks are padded to 8, 16 or 32");
  static_assert(kRows % kCluster == 0, "every CTA owns equally many rows of a tile");
  static_assert(kGating <= kComputing, "each of them computes, too");
  static_assert(kStages >= 2, "one tile is computed while the next one arrives");

  // -- shared memory, in bytes --
  using Stage = SharedRows<T, kSlice>;
  using Partial = PartialSums<kWarps, kRows, kOutputs>;
  using Projection = StripParameters<T, kOutputs, kBlocks, false>;
  using Basis = StripParameters<T, kRank, kBlocks, kSharedBasis>;
  static constexpr int kSumsBytes = kCluster * kOwned * kOutputs * 4; // what a CTA gets of one tile: sums of its rows
  static constexpr int kUpdateBytes = kRows * kRank * sizeof(Number); // and u of all rows
  static constexpr int kPartialAt = kStages * kRows * Stage::kPitch;
  static constexpr int kSumsAt = kPartialAt + Partial::kBytes;
  static constexpr int kUpdateAt = kSumsAt + kSumsBytes;
  static constexpr int kBasisAt = kUpdateAt + kUpdateBytes;
  static constexpr int kBarriersAt = kBasisAt + kWarps * Basis::kBytes;
  static constexpr int kEditedAt = kBarriersAt + 8 * (2 * kStages + 2);
  static constexpr int kSharedBytes = kEditedAt + 4 * kStages;
};

// The tile and the stages of an instance. Wide slices fill shared memory with 16 rows a tile; narrow ones take 32,
// since the exchange between CTAs costs the same for both, unless the parts of numbers of 32 bits take their registers.
// Then as many stages as fit, up to what hides the latency of memory.
template <class T, int kCluster, int kWarps, int kStrip, int kRank>
struct ForwardStreamInstance {
  static constexpr bool kNarrow =
      kPerWord<T> == 2 && kWarps * kStrip <= 512 && 32 / kCluster * kRank / 2 <= 32 * kWarps;
  template <int kStages>
  using With = ForwardStream<T, kCluster, kWarps, kStrip, kRank, kNarrow ? 32 : 16, kStages>;
  using Type = With<most_stages<With, 6>()>;
};

template <class K>
struct ForwardStreamBarriers {
  Address first = address_of(shared_memory() + K::kBarriersAt);
  BAFT_DEVICE Address full(int stage) const { return first + 8 * stage; }                // rows have arrived
  BAFT_DEVICE Address done(int stage) const { return first + 8 * (K::kStages + stage); } // and are edited
  BAFT_DEVICE Address sums() const { return first + 8 * (2 * K::kStages); }
  BAFT_DEVICE Address update() const { return first + 8 * (2 * K::kStages + 1); }
};

// -- producer: one warp, a lane for each row --

template <class K>
BAFT_DEVICE void copy_tiles(const Forward& call, const Tiles<K::kRows>& tiles,
                            const ForwardStreamBarriers<K>& barriers) {
  const int first_column = cluster_rank() * K::kSlice;
  const Address stages = address_of(shared_memory());
  const bool in_place = call.out == call.h;
  const auto load = [&](int j) {
    const auto tile = tiles.at(j);
    const int stage = j % K::kStages;
    const bool exists = lane() < tile.count;
    const int64_t row = exists ? row_of(call.rows, tile.first + lane()) : 0;
    const uint32_t edited = ballot(exists && is_edited(call.rows, row));
    if (lane() == 0) {
      edited_rows<K>()[stage] = edited;
      barrier_expect(barriers.full(stage), tile.count * K::kSliceBytes);
    }
    sync_warp();
    if (exists)
      copy_in(stages + (stage * K::kRows + lane()) * K::Stage::kPitch,
              static_cast<const typename K::Number*>(call.h) + row * call.h_stride + first_column, K::kSliceBytes,
              barriers.full(stage));
  };
  for (int j = 0; j < tiles.count && j < K::kStages - 1; ++j) load(j);
  for (int j = 0; j < tiles.count; ++j) {
    const int stage = j % K::kStages;
    if (j + K::kStages - 1 < tiles.count) { // into the stage of tile j - 1, once that has been copied out
      wait_copies_read();
      sync_warp();
      load(j + K::kStages - 1);
    }
    barrier_wait_local(barriers.done(stage), j / K::kStages % 2);
    const auto tile = tiles.at(j);
    if (in_place ? edited_rows<K>()[stage] >> lane() & 1 : lane() < tile.count)
      copy_out(static_cast<typename K::Number*>(call.out) +
                   row_of(call.rows, tile.first + lane()) * call.out_stride + first_column,
               stages + (stage * K::kRows + lane()) * K::Stage::kPitch, K::kSliceBytes);
    close_copies_out();
  }
  wait_copies_read(); // shared memory lasts as long as its CTA
}

// -- gate: w and u of two neighbouring bases of one row --

template <class K>
BAFT_DEVICE void gate_and_send(const Forward& call, const Tile& tile, int64_t set, uint32_t edited_rows,
                               const float4* sums, const ForwardStreamBarriers<K>& barriers) {
  constexpr int kPairs = K::kRank / 2;
  const bool mine = thread() < K::kGating; // whole warps come here, since they shuffle
  const int owned = mine ? thread() / kPairs : 0, k = thread() % kPairs * 2;
  const int in_tile = cluster_rank() * K::kOwned + owned;
  float4 pz = load_bias(call, set, k);
  BAFT_UNROLL
  for (int rank = 0; rank < K::kCluster; ++rank) {
    const float4 part = sums[(rank * K::kOwned + owned) * kPairs + k / 2];
    pz.x += part.x, pz.y += part.y, pz.z += part.z, pz.w += part.w;
  }
  const float2 w = gates<kPairs>(call, k, pz.y, pz.w);
  const bool exists = mine && in_tile < tile.count;
  const int64_t row = exists ? row_of(call.rows, tile.first + in_tile) : 0;
  const bool edited = edited_rows >> in_tile & 1;
  const float2 u = make_float2(w.x * pz.x, w.y * pz.z);
  if (exists) {
    store_pair(call.weights + row * call.rank, call.rank, k, edited ? w : make_float2(0.0f, 0.0f));
    store_pair(call.update + row * call.rank, call.rank, k, edited ? u : make_float2(0.0f, 0.0f));
  }
  const auto pair = pack_saturated<typename K::T>(u.x, u.y);
  const Address to = address_of(shared_memory() + K::kUpdateAt) + (in_tile * K::kRank + k) * sizeof(typename K::Number);
  if (!mine) return;
  BAFT_UNROLL
  for (int rank = 0; rank < K::kCluster; ++rank) send(in_cta(to, rank), pair, in_cta(barriers.update(), rank));
}

// -- compute --

template <class K>
BAFT_DEVICE void edit_tiles(const Forward& call, const Tiles<K::kRows>& tiles,
                            const ForwardStreamBarriers<K>& barriers) {
  using T = typename K::T;
  const int strip = warp() * K::kStrip; // first column, within the slice
  const int first_block = (cluster_rank() * K::kSlice + strip) / kBlockColumns;
  float* partial = reinterpret_cast<float*>(shared_memory() + K::kPartialAt);
  typename K::Projection projection(nullptr);
  typename K::Basis basis(shared_memory() + K::kBasisAt + warp() * K::Basis::kBytes);
  int64_t set = -1;
  for (int j = 0; j < tiles.count; ++j) {
    const auto tile = tiles.at(j);
    const int stage = j % K::kStages;
    unsigned char* rows = shared_memory() + stage * K::kRows * K::Stage::kPitch;
    if (const int64_t its_set = set_of(call.rows, tile.sequence); its_set != set) {
      set = its_set;
      const int64_t block = set * (K::kWidth / kBlockColumns) + first_block;
      projection.load(call.projection, block);
      basis.load(call.basis, block);
    }
    if (thread() == 0) {
      barrier_expect(barriers.sums(), K::kSumsBytes);
      barrier_expect(barriers.update(), K::kUpdateBytes);
    }
    barrier_wait_local(barriers.full(stage), j / K::kStages % 2);
    const uint32_t edited = edited_rows<K>()[stage];

    // project
    BAFT_UNROLL
    for (int m = 0; m < K::kRows / 16; ++m) {
      float sums[K::kOutputs / 8][4] = {};
      BAFT_UNROLL
      for (int b = 0; b < K::kBlocks; ++b) {
        uint32_t left[kLeftWords<T>];
        K::Stage::load_left(left, rows, m * 16, strip + b * kBlockColumns);
        BAFT_UNROLL
        for (int n = 0; n < K::kOutputs / 8; ++n)
          T::multiply(sums[n], left, projection.at(b).words + n * kRightWords<T>);
      }
      K::Partial::store(partial, warp(), m * 16, sums);
    }
    sync_threads(1, K::kComputing);

    // reduce: to the CTA that owns the row
    for (int e = thread(); e < K::kRows * K::kOutputs / 4; e += K::kComputing) {
      const int row = e / (K::kOutputs / 4), four = e % (K::kOutputs / 4);
      const int owner = row / K::kOwned;
      const int place = (cluster_rank() * K::kOwned + row % K::kOwned) * K::kOutputs + four * 4;
      const Address to = address_of(shared_memory() + K::kSumsAt) + place * 4;
      send(in_cta(to, owner), K::Partial::sum(partial, row, four), in_cta(barriers.sums(), owner));
    }

    // gate
    if (thread() < (K::kGating + 31) / 32 * 32) {
      barrier_wait(barriers.sums(), j % 2);
      const auto* sums = reinterpret_cast<const float4*>(shared_memory() + K::kSumsAt);
      gate_and_send<K>(call, tile, set, edited, sums, barriers);
    }
    barrier_wait(barriers.update(), j % 2);

    // write back
    const uint32_t* update = reinterpret_cast<const uint32_t*>(shared_memory() + K::kUpdateAt);
    BAFT_UNROLL
    for (int m = 0; m < K::kRows / 16; ++m)
      add_expansion<T, K::kRank, K::kBlocks, K::Stage::kPitch>(edited, m * 16, update, basis,
                                                               rows + strip * sizeof(typename K::Number));
    fence_for_copies();
    sync_warp();
    if (lane() == 0) barrier_arrive(barriers.done(stage));
  }
}

template <class K>
BAFT_KERNEL(K::kThreads)
forward_stream(const Forward call) {
  const ForwardStreamBarriers<K> barriers;
  if (thread() == 0) {
    for (int stage = 0; stage < K::kStages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.done(stage), K::kWarps);
    }
    barrier_init(barriers.sums(), 1);
    barrier_init(barriers.update(), 1);
    fence_barrier_init();
  }
  sync_block();
  cluster_arrive_relaxed(); // the barriers are ready for what other CTAs send
  cluster_wait();
  const Tiles<K::kRows> tiles(call.rows, block() / K::kCluster, blocks() / K::kCluster);
  if (warp() == K::kWarps)
    copy_tiles<K>(call, tiles, barriers);
  else
    edit_tiles<K>(call, tiles, barriers);
  // Whoever leaves here has got all that is sent to it.
}

} // namespace baft::cuda
