// The backward pass over many rows, in one sweep of device memory.
//
// As in the forward pass, a cluster splits d among its CTAs, and a CTA its slice among its warps. A warp also keeps the
// parameters' gradients of its strip of columns, over all tiles of the cluster. With g, gw and gu the gradients of out,
// w and u, for each tile of rows:
//
//   producer   copies the rows' slices of g and h into a stage of shared memory
//   warps      multiply their strips of g by R, and leave partial sums
//   reduce     partial sums go to the CTA that owns the row, which adds them up in the order of warps and CTAs
//   gate       warps of the owner find dp and dz of its rows from du = R g + gu, w, u and gw, and send them on with u
//   warps      add (dp, dz)^T h and u^T g to the gradients of (D, G) and R, and dp D + dz G to g, in the stage
//   producer   copies the stage out
//
// Buffers between CTAs need not say that they are empty, for the reasons that forward_stream.cuh gives, with dp, dz and
// u in the place of u. What a cluster added up goes to slots of its own (kernels.h); backward_reduce.cuh adds them up.
//
// Rows are the inner dimension of the parameters' gradients, where a NaN would reach every sum. Rows that aren't
// edited, and those that a tile lacks, are therefore zeroed as they are read for these products, and not in the stage:
// from there they are copied out as they came.
#pragma once

#include "backward_strip.cuh"
#include "fragments.h"
#include "kernels.h"
#include "machine.cuh"
#include "rows.cuh"
#include "shared_rows.cuh"
#include "tiles.cuh"

namespace baft::cuda {

template <class T_, int kCluster_, int kWarps_, int kStrip_, int kRank_, int kRows_, int kStages_>
struct BackwardStream {
  // -- types and shapes --
  using T = T_;
  using Number = typename T::Number;
  static constexpr int kCluster = kCluster_; // CTAs
  static constexpr int kWarps = kWarps_;     // that compute, of a CTA; others copy, and find dp and dz
  static constexpr int kStrip = kStrip_;     // columns of a warp
  static constexpr int kRank = kRank_;       // padded
  static constexpr int kRows = kRows_;       // of a tile
  static constexpr int kStages = kStages_;   // tiles in shared memory
  static constexpr int kDeltas = 2 * kRank;  // dp and dz of a row
  static constexpr int kBlocks = kStrip / kBlockColumns;
  static constexpr int kSlice = kWarps * kStrip;
  static constexpr int kSliceBytes = kSlice * sizeof(Number); // of a row
  static constexpr int kWidth = kCluster * kSlice;            // d
  static constexpr int kOwned = kRows / kCluster;             // rows of a tile that a CTA finds dp and dz of
  static constexpr int kGating = kOwned * kRank / 2;          // threads that do, each for two bases of a row
  static constexpr int kGatingWarps = (kGating + 31) / 32;
  static constexpr int kParts = kCluster * kGatingWarps; // of the sums for b and c in a slot
  static constexpr int kComputing = 32 * kWarps;

  // -- warps and their registers --
  // Up to eight warps have all the registers that a thread can address. More are twelve, in groups of four, between
  // which registers move: two groups that compute take most of the share of the third, which copies and gates.
  static constexpr bool kMovesRegisters = kWarps + 1 + kGatingWarps > 8;
  static constexpr int kCopying = kMovesRegisters ? 8 : kWarps;
  static constexpr int kFirstGating = kCopying + 1;
  static constexpr int kThreads = 32 * (kMovesRegisters ? 12 : kFirstGating + kGatingWarps);
  static constexpr int kFewRegisters = 40, kManyRegisters = 232;
  // Of each lane, the gradients of a strip take 3/32 rank registers a column, and its parameters as many words. Where
  // all that is too much, (D, G) is kept in shared memory, and then R.
  static constexpr int kGradients = 3 * kStrip * kRank / 32, kBasisWords = kStrip * kRank / 32 / kPerWord<T>;
  static constexpr bool kSharedProjection = kGradients + 3 * kBasisWords > 144;
  static constexpr bool kSharedBasis = kGradients + kBasisWords > 128;
  // Where they leave the fewest registers, the compiler for sm_100 spills some: Triton serves that there.
  static BAFT_BOTH constexpr bool runs_on(int architecture) {
    return architecture < 1000 || !kMovesRegisters || kStrip * kRank <= 640 * kPerWord<T>;
  }

  static_assert(kSliceBytes % 128 == 0, "rows in shared memory begin 4 banks apart");
  static_assert(kRows == 16 || kRows == 32, "a product has 16 rows, and a lane of the producer copies one row");
  static_assert(kStrip % kBlockColumns == 0, "parameters are packed in blocks of 16 columns");
  static_assert(kRank == 8 || kRank == 16 || kRank == 32, "ranks are padded to 8, 16 or 32");
  static_assert(kRows % kCluster == 0, "every CTA owns equally many rows of a tile");
  static_assert(kWarps <= 8, "two groups compute");
  static_assert(kGatingWarps <= 3, "a warp of the third group copies");
  static_assert(kStages >= 2, "one tile is computed while the next one arrives");

  // -- shared memory, in bytes --
  using Stage = SharedRows<T, kSlice>;
  using Partial = PartialSums<kWarps, kRows, kRank>;
  using Deltas = SharedRows<T, kDeltas>;
  using Update = SharedRows<T, kRank>;
  using Basis = StripParameters<T, kRank, kBlocks, kSharedBasis>;
  using Projection = StripParameters<T, kDeltas, kBlocks, kSharedProjection>;
  static constexpr int kMatrixBytes = kRows * Stage::kPitch;       // a tile of g, or of h
  static constexpr int kSumsBytes = kCluster * kOwned * kRank * 4; // what a CTA gets of one tile: sums of its rows
  static constexpr int kOperandBytes = kRows * (kDeltas + kRank) * sizeof(Number); // and dp, dz and u of all rows
  static constexpr int kPartialAt = kStages * 2 * kMatrixBytes;
  static constexpr int kSumsAt = kPartialAt + Partial::kBytes;
  static constexpr int kDeltasAt = kSumsAt + kSumsBytes;
  static constexpr int kUpdateAt = kDeltasAt + kRows * Deltas::kPitch;
  static constexpr int kBasisAt = kUpdateAt + kRows * Update::kPitch;
  static constexpr int kProjectionAt = kBasisAt + kWarps * Basis::kBytes;
  static constexpr int kBarriersAt = kProjectionAt + kWarps * Projection::kBytes;
  static constexpr int kEditedAt = kBarriersAt + 8 * (2 * kStages + 2);
  static constexpr int kSharedBytes = kEditedAt + 4 * kStages;
};

// An instance with as many stages as fit, up to what hides the latency of memory.
template <class T, int kCluster, int kWarps, int kStrip, int kRank, int kRows>
struct BackwardStreamInstance {
  template <int kStages>
  using With = BackwardStream<T, kCluster, kWarps, kStrip, kRank, kRows, kStages>;
  using Type = With<most_stages<With, 4>()>;
};

template <class K>
struct BackwardStreamBarriers {
  Address first = address_of(shared_memory() + K::kBarriersAt);
  BAFT_DEVICE Address full(int stage) const { return first + 8 * stage; }                // rows have arrived
  BAFT_DEVICE Address done(int stage) const { return first + 8 * (K::kStages + stage); } // and are used
  BAFT_DEVICE Address sums() const { return first + 8 * (2 * K::kStages); }
  BAFT_DEVICE Address operands() const { return first + 8 * (2 * K::kStages + 1); }
};

// -- producer: one warp, a lane for each row --

template <class K>
BAFT_DEVICE void copy_tiles(const Backward& call, const Tiles<K::kRows>& tiles,
                            const BackwardStreamBarriers<K>& barriers) {
  const int first_column = cluster_rank() * K::kSlice;
  const auto staged = [&](int stage) { // this lane's row of g; that of h is a matrix further on
    return address_of(shared_memory()) + stage * 2 * K::kMatrixBytes + lane() * K::Stage::kPitch;
  };
  const auto load = [&](int j) {
    const auto tile = tiles.at(j);
    const int stage = j % K::kStages;
    const bool exists = lane() < tile.count;
    const int64_t row = exists ? row_of(call.rows, tile.first + lane()) : 0;
    const bool edited = exists && is_edited(call.rows, row);
    const uint32_t all_edited = ballot(edited);
    if (lane() == 0) edited_rows<K>()[stage] = all_edited;
    const bool needs_g = edited || (exists && call.grad_input), needs_h = edited && call.partial;
    barrier_expect(barriers.full(stage), (needs_g + needs_h) * K::kSliceBytes);
    if (needs_g)
      copy_in(staged(stage),
              static_cast<const typename K::Number*>(call.grad_out) + row * call.grad_out_stride + first_column,
              K::kSliceBytes, barriers.full(stage));
    if (needs_h)
      copy_in(staged(stage) + K::kMatrixBytes,
              static_cast<const typename K::Number*>(call.h) + row * call.h_stride + first_column, K::kSliceBytes,
              barriers.full(stage));
  };
  for (int j = 0; j < tiles.count && j < K::kStages - 1; ++j) load(j);
  for (int j = 0; j < tiles.count; ++j) {
    const int stage = j % K::kStages;
    if (j + K::kStages - 1 < tiles.count) { // into the stage of tile j - 1, once that has been copied out
      wait_copies_read();
      load(j + K::kStages - 1);
    }
    barrier_wait_local(barriers.done(stage), j / K::kStages % 2);
    const auto tile = tiles.at(j);
    if (call.grad_input && lane() < tile.count)
      copy_out(static_cast<typename K::Number*>(call.grad_input) +
                   row_of(call.rows, tile.first + lane()) * call.grad_input_stride + first_column,
               staged(stage), K::kSliceBytes);
    close_copies_out();
  }
  wait_copies_out();
}

// Cluster c has the slots from c + s on, s being the sequence that its first tile is of, up to those of the next
// cluster: every slot is some cluster's. Sums go to those of the last of neighbouring sequences that share a set.
template <class K>
BAFT_DEVICE void mark_slots(const Backward& call, const Tiles<K::kRows>& tiles, int cluster) {
  const int64_t first = tiles.begin / tiles.per_sequence, end = tiles.begin + tiles.count;
  for (int64_t sequence = first + lane(); sequence <= end / tiles.per_sequence; sequence += 32) {
    const bool has_tiles = tiles.count > 0 && sequence * tiles.per_sequence < end;
    const bool goes_on =
        (sequence + 1) * tiles.per_sequence < end && set_of(call.rows, sequence + 1) == set_of(call.rows, sequence);
    const int64_t set = has_tiles && !goes_on ? set_of(call.rows, sequence) : -1;
    call.slot_sets[cluster + sequence] = static_cast<int32_t>(set);
  }
}

// Whether the sums go out after tile j.
template <int kRows>
BAFT_DEVICE bool sums_end(const Backward& call, const Tiles<kRows>& tiles, int j) {
  if (j + 1 == tiles.count) return true;
  const int64_t sequence = tiles.at(j).sequence, next = tiles.at(j + 1).sequence;
  return next != sequence && set_of(call.rows, next) != set_of(call.rows, sequence);
}

// -- gate: dp, dz and u of two neighbouring bases of one row --

// Two values from `from` on, of which `count` are there; zeros for the others, and without a matrix.
BAFT_DEVICE float2 load_pair(const float* matrix, int64_t from, int count) {
  return make_float2(matrix && count > 0 ? load_constant(matrix + from) : 0.0f,
                     matrix && count > 1 ? load_constant(matrix + from + 1) : 0.0f);
}

template <class K>
struct BackwardGate {
  static constexpr int kPairs = K::kRank / 2;
  const int index = thread() - 32 * K::kFirstGating;
  const bool mine = index < K::kGating; // whole warps come here, since they shuffle
  const int owned = mine ? index / kPairs : 0, k = index % kPairs * 2;
  const int in_tile = cluster_rank() * K::kOwned + owned;
  bool edited = false;
  float2 w = {}, u = {}, grad_w = {}, grad_u = {};

  // What doesn't depend on the sums. Rows that aren't edited may hold anything.
  BAFT_DEVICE void load(const Backward& call, const Tile& tile, uint32_t edited_rows) {
    edited = mine && (edited_rows >> in_tile & 1);
    const int count = edited ? call.rank - k : 0; // the bases beyond pad the rank
    const int64_t from = (edited ? row_of(call.rows, tile.first + in_tile) : 0) * call.rank + k;
    w = load_pair(call.weights, from, count);
    u = load_pair(call.update, from, count);
    grad_w = load_pair(call.grad_weights, from, count);
    grad_u = load_pair(call.grad_update, from, count);
  }

  // dp_k, dz_k, dp_k+1 and dz_k+1.
  BAFT_DEVICE float4 find(const Backward& call, const float2* sums) const {
    float2 du = grad_u;
    BAFT_UNROLL
    for (int rank = 0; rank < K::kCluster; ++rank) {
      const float2 part = sums[(rank * K::kOwned + owned) * kPairs + k / 2];
      du.x += part.x, du.y += part.y;
    }
    if (!edited) du = make_float2(0.0f, 0.0f);
    const float2 s = make_float2(u.x * du.x + w.x * grad_w.x, u.y * du.y + w.y * grad_w.y);
    float2 dz = make_float2(0.0f, 0.0f);
    if (call.gate == Gate::sigmoid) dz = make_float2((1.0f - w.x) * s.x, (1.0f - w.y) * s.y);
    if (call.gate == Gate::softmax) {
      float total = s.x + s.y;
      BAFT_UNROLL
      for (int mask = 1; mask < kPairs; mask *= 2) total += shuffle_xor(total, mask);
      dz = make_float2(s.x - w.x * total, s.y - w.y * total);
    }
    return make_float4(w.x * du.x, dz.x, w.y * du.y, dz.y);
  }

  BAFT_DEVICE void send_operands(float4 found, const BackwardStreamBarriers<K>& barriers) const {
    if (!mine) return;
    using T = typename K::T;
    constexpr int kNumber = sizeof(typename K::Number);
    const auto first = pack_saturated<T>(found.x, found.y), second = pack_saturated<T>(found.z, found.w);
    const auto updates = pack_saturated<T>(u.x, u.y);
    const Address shared = address_of(shared_memory());
    const Address deltas = shared + K::kDeltasAt + in_tile * K::Deltas::kPitch + 2 * k * kNumber;
    const Address update = shared + K::kUpdateAt + in_tile * K::Update::kPitch + k * kNumber;
    BAFT_UNROLL
    for (int rank = 0; rank < K::kCluster; ++rank) {
      const Address barrier = in_cta(barriers.operands(), rank);
      send(in_cta(deltas, rank), first, barrier);
      send(in_cta(deltas + 2 * kNumber, rank), second, barrier);
      send(in_cta(update, rank), updates, barrier);
    }
  }

  // A warp's sums of what find() gave, over the rows that it owns.
  BAFT_DEVICE void write(const Backward& call, int64_t slot, float4 sums) const {
    BAFT_UNROLL
    for (int mask = kPairs; mask < 32; mask *= 2) {
      sums.x += shuffle_xor(sums.x, mask), sums.y += shuffle_xor(sums.y, mask);
      sums.z += shuffle_xor(sums.z, mask), sums.w += shuffle_xor(sums.w, mask);
    }
    const int64_t part = slot * K::kParts + cluster_rank() * K::kGatingWarps + index / 32;
    if (lane() < kPairs) *reinterpret_cast<float4*>(call.partial_bias + part * K::kDeltas + k * 2) = sums;
  }
};

template <class K>
BAFT_DEVICE void gate_tiles(const Backward& call, const Tiles<K::kRows>& tiles, int cluster,
                            const BackwardStreamBarriers<K>& barriers) {
  BackwardGate<K> gate;
  float4 bias_sums = {};
  for (int j = 0; j < tiles.count; ++j) {
    const auto tile = tiles.at(j);
    const int stage = j % K::kStages;
    barrier_wait_local(barriers.full(stage), j / K::kStages % 2);
    gate.load(call, tile, edited_rows<K>()[stage]);
    barrier_wait(barriers.sums(), j % 2);
    const float4 found = gate.find(call, reinterpret_cast<const float2*>(shared_memory() + K::kSumsAt));
    sync_warp(); // once all have sent, barriers go on, and a lane that still waited would miss its phase
    gate.send_operands(found, barriers);
    bias_sums.x += found.x, bias_sums.y += found.y, bias_sums.z += found.z, bias_sums.w += found.w;
    if (sums_end(call, tiles, j)) {
      if (call.partial) gate.write(call, cluster + tile.sequence, bias_sums);
      bias_sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
}

// -- compute --

template <class K>
BAFT_DEVICE void differentiate_tiles(const Backward& call, const Tiles<K::kRows>& tiles, int cluster,
                                     const BackwardStreamBarriers<K>& barriers) {
  using T = typename K::T;
  const int strip = warp() * K::kStrip; // first column, within the slice
  const int first_column = cluster_rank() * K::kSlice + strip;
  float* partial = reinterpret_cast<float*>(shared_memory() + K::kPartialAt);
  typename K::Basis basis(shared_memory() + K::kBasisAt + warp() * K::Basis::kBytes);
  typename K::Projection projection(shared_memory() + K::kProjectionAt + warp() * K::Projection::kBytes);
  StripGradients<K> gradients;
  int64_t set = -1;
  for (int j = 0; j < tiles.count; ++j) {
    const auto tile = tiles.at(j);
    const int stage = j % K::kStages;
    unsigned char* rows = shared_memory() + stage * 2 * K::kMatrixBytes; // of g
    if (const int64_t its_set = set_of(call.rows, tile.sequence); its_set != set) {
      set = its_set;
      const int64_t block = set * (K::kWidth / kBlockColumns) + first_column / kBlockColumns;
      basis.load(call.basis, block);
      projection.load(call.projection, block);
      gradients.clear();
    }
    if (thread() == 0) {
      barrier_expect(barriers.sums(), K::kSumsBytes);
      barrier_expect(barriers.operands(), K::kOperandBytes);
    }
    barrier_wait_local(barriers.full(stage), j / K::kStages % 2);
    const uint32_t edited = edited_rows<K>()[stage];

    // project
    BAFT_UNROLL
    for (int m = 0; m < K::kRows / 16; ++m) {
      float sums[K::kRank / 8][4] = {};
      BAFT_UNROLL
      for (int b = 0; b < K::kBlocks; ++b) {
        uint32_t left[kLeftWords<T>];
        K::Stage::load_left(left, rows, m * 16, strip + b * kBlockColumns);
        const auto& right = basis.at(b);
        BAFT_UNROLL
        for (int n = 0; n < K::kRank / 8; ++n) T::multiply(sums[n], left, right.words + n * kRightWords<T>);
      }
      K::Partial::store(partial, warp(), m * 16, sums);
    }
    sync_threads(1, K::kComputing);

    // reduce: to the CTA that owns the row
    for (int e = 32 * warp() + lane_anew(); e < K::kRows * K::kRank / 4; e += K::kComputing) {
      const int row = e / (K::kRank / 4), four = e % (K::kRank / 4);
      const int owner = row / K::kOwned;
      const int place = (cluster_rank() * K::kOwned + row % K::kOwned) * K::kRank + four * 4;
      const Address to = address_of(shared_memory() + K::kSumsAt) + place * 4;
      send(in_cta(to, owner), K::Partial::sum(partial, row, four), in_cta(barriers.sums(), owner));
    }

    // the parameters' gradients, once the owners have found dp, dz and u
    barrier_wait(barriers.operands(), j % 2);
    if (call.partial) {
      BAFT_UNROLL
      for (int m = 0; m < K::kRows / 16; ++m) gradients.add(rows, m * 16, strip, edited);
      sync_warp(); // before g is overwritten
    }

    // the gradient of h
    if (call.grad_input) {
      BAFT_UNROLL
      for (int m = 0; m < K::kRows / 16; ++m)
        add_to_input_gradient<K>(rows + strip * sizeof(typename K::Number), m * 16, edited, projection);
      fence_for_copies();
    }
    sync_warp();
    if (lane() == 0) barrier_arrive(barriers.done(stage));

    if (call.partial && sums_end(call, tiles, j))
      gradients.write(call.partial + (cluster + tile.sequence) * 3 * K::kRank * K::kWidth, first_column);
  }
}

template <class K>
BAFT_DEVICE void differentiate(const Backward& call) {
  const BackwardStreamBarriers<K> barriers;
  if (thread() == 0) {
    for (int stage = 0; stage < K::kStages; ++stage) {
      barrier_init(barriers.full(stage), 32);
      barrier_init(barriers.done(stage), K::kWarps);
    }
    barrier_init(barriers.sums(), 1);
    barrier_init(barriers.operands(), 1);
    fence_barrier_init();
  }
  sync_block();
  cluster_arrive_relaxed(); // the barriers are ready for what other CTAs send
  cluster_wait();
  const int cluster = block() / K::kCluster;
  const Tiles<K::kRows> tiles(call.rows, cluster, blocks() / K::kCluster);
  if (warp() < K::kCopying) {
    if constexpr (K::kMovesRegisters) take_registers<K::kManyRegisters>();
    if (warp() < K::kWarps) differentiate_tiles<K>(call, tiles, cluster, barriers);
  } else {
    if constexpr (K::kMovesRegisters) give_registers<K::kFewRegisters>();
    if (warp() == K::kCopying) {
      copy_tiles<K>(call, tiles, barriers);
      if (call.partial && cluster_rank() == 0) mark_slots<K>(call, tiles, cluster);
    } else if (warp() < K::kFirstGating + K::kGatingWarps) {
      gate_tiles<K>(call, tiles, cluster, barriers);
    }
  }
  // Whoever leaves here has got all that is sent to it.
}

template <class K>
BAFT_KERNEL(K::kThreads)
backward_stream(const Backward call) {
  if constexpr (K::runs_on(kArchitecture)) differentiate<K>(call);
}

} // namespace baft::cuda
