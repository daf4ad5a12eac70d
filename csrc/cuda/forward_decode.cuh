// The forward pass over few rows, with the least delay.
//
// A cluster edits one tile of rows: it splits d among its CTAs, a CTA its slice among its warps. Nothing is staged: a
// lane reads its elements of the rows into registers, where the left factor of a product has them, and writes them from
// there.
//
//   warps      read D, G and R of their strips, and h
//   warps      multiply their strips by (D, G), and leave partial sums
//   reduce     a thread for each two bases of a row adds up the sums of the warps, and sends them to all CTAs
//   gate       it adds up what all CTAs sent, in their order, and finds w and u
//   warps      add u R to their strips, and write them
//
// Every CTA gates all rows, in the same order and so with the same bits: one hop between CTAs is enough. The fewer rows
// a tile has, the less it carries, so how many they are is up to the call.
//
// Launched as a programmatic dependent, the kernel may begin before the previous one has ended. It waits for that
// before it reads or writes anything; but for parameters and adapters, if the caller says that they are settled:
// loading them takes longest. Nothing is loaded as a constant here, since that could pass the wait.
#pragma once

#include "fragments.h"
#include "kernels.h"
#include "machine.cuh"
#include "rows.cuh"
#include "tiles.cuh"

namespace baft::cuda {

template <class T_, int kCluster_, int kWarps_, int kStrip_, int kRank_, int kRows_>
struct ForwardDecode {
  // -- types and shapes --
  using T = T_;
  using Number = typename T::Number;
  static constexpr int kCluster = kCluster_; // CTAs
  static constexpr int kWarps = kWarps_;     // of a CTA
  static constexpr int kStrip = kStrip_;     // columns of a warp
  static constexpr int kRank = kRank_;       // padded
  static constexpr int kRows = kRows_;       // of a tile, at most
  static constexpr int kHalves = kRows / 8;  // of the 16 rows of a product
  static constexpr int kBlocks = kStrip / kBlockColumns;
  static constexpr int kOutputs = 2 * kRank;     // p and z
  static constexpr int kPairs = kRank / 2;       // of bases
  static constexpr int kGating = kRows * kPairs; // threads that reduce and gate
  static constexpr int kSlice = kWarps * kStrip;
  static constexpr int kWidth = kCluster * kSlice; // d
  static constexpr int kThreads = 32 * kWarps;
  // All parameters at once are too many registers if numbers have 32 bits. R then arrives while sums go between CTAs.
  static constexpr bool kReadsBasisLate = kPerWord<T> == 1;

  static_assert(kRows == 8 || kRows == 16, "a product has 16 rows, of which a tile fills the upper half or both");
  static_assert(kStrip % kBlockColumns == 0, "parameters are packed in blocks of 16 columns");
  static_assert(kRank == 8 || kRank == 16 || kRank == 32, "ranks are padded to 8, 16 or 32");
  static_assert(kGating <= kThreads, "a thread finds two bases of one row");
  static_assert(kGating % 32 == 0, "whole warps do so, since they shuffle");
  static_assert(kCluster <= 8, "larger clusters are not portable");

  // -- shared memory, in bytes --
  using Partial = PartialSums<kWarps, kRows, kOutputs>;
  static constexpr int kUpdatePitch = (kRank / kPerWord<T>) | 4; // words: eight rows lie in different banks
  static constexpr int kSumsBytes = kCluster > 1 ? kCluster * kGating * 16 : 0;
  static constexpr int kSumsAt = Partial::kBytes;
  static constexpr int kUpdateAt = kSumsAt + kSumsBytes;
  static constexpr int kBarrierAt = kUpdateAt + kRows * kUpdatePitch * 4;
  static constexpr int kSharedBytes = kBarrierAt + 8;
};

// -- rows --

// The tiles of a call, one for each cluster of a launch; none spans two sequences.
struct ClusterTiles {
  int rows; // of a tile, at most
  int per_sequence;

  BAFT_BOTH ClusterTiles(const Rows& all, int rows)
      : rows(rows), per_sequence((static_cast<int>(all.length) + rows - 1) / rows) {}

  BAFT_BOTH int count(const Rows& all) const { return static_cast<int>(all.sequences) * per_sequence; }

  BAFT_DEVICE Tile at(const Rows& all, int cluster) const {
    const int sequence = cluster / per_sequence, start = cluster % per_sequence * rows;
    const int left = static_cast<int>(all.length) - start;
    return {sequence, sequence * all.length + start, left < rows ? left : rows};
  }
};

// A row of the tile, and what becomes of it.
struct TileRow {
  int64_t row = 0;
  bool exists = false, edited = false;

  BAFT_DEVICE void find(const Rows& rows, const Tile& tile, int in_tile) {
    exists = in_tile < tile.count;
    if (exists) row = row_of(rows, tile.first + in_tile), edited = is_edited(rows, row);
  }
};

// A lane's two rows of the left factor of a product, and its words of them. Tiles of 8 rows lack the second one.
template <class K>
struct LaneRows {
  using T = typename K::T;
  TileRow rows[2];
  uint32_t words[K::kBlocks][kLeftWords<T>] = {}; // of rows[q % 2]

  BAFT_DEVICE void find(const Rows& all, const Tile& tile) {
    BAFT_UNROLL
    for (int half = 0; half < K::kHalves; ++half) rows[half].find(all, tile, left_element<T>(lane(), half).row);
  }

  // Those of the n-th 8 columns.
  BAFT_DEVICE const uint32_t* eight(int n) const { return words[n / 2] + n % 2 * (kLeftWords<T> / 2); }

  BAFT_DEVICE void read(const Forward& call, int first_column) {
    BAFT_UNROLL
    for (int q = 0; q < kLeftWords<T>; ++q) {
      if (!rows[q % 2].exists) continue;
      const auto* from =
          static_cast<const typename K::Number*>(call.h) + rows[q % 2].row * call.h_stride + first_column;
      BAFT_UNROLL
      for (int b = 0; b < K::kBlocks; ++b)
        words[b][q] = *reinterpret_cast<const uint32_t*>(from + b * kBlockColumns + left_element<T>(lane(), q).column);
    }
  }
};

// -- products --

template <class K>
BAFT_DEVICE void project(const LaneRows<K>& h, const Fragments<typename K::T, K::kOutputs> (&projection)[K::kBlocks],
                         float* partial) {
  using T = typename K::T;
  float sums[K::kOutputs / 8][4] = {};
  BAFT_UNROLL
  for (int b = 0; b < K::kBlocks; ++b) {
    BAFT_UNROLL
    for (int n = 0; n < K::kOutputs / 8; ++n)
      T::multiply(sums[n], h.words[b], projection[b].words + n * kRightWords<T>);
  }
  if constexpr (K::kRows == 8)
    K::Partial::store_upper(partial, warp(), sums);
  else
    K::Partial::store(partial, warp(), 0, sums);
}

// h + u R, from registers to device memory.
template <class K>
BAFT_DEVICE void add_and_write(const Forward& call, const LaneRows<K>& h, const uint32_t* update,
                               const Fragments<typename K::T, K::kRank> (&basis)[K::kBlocks], int first_column) {
  using T = typename K::T;
  Coefficients<T, K::kRank> left;
  left.load(
      [&](int row, int first) { return row < K::kRows ? update[row * K::kUpdatePitch + first / kPerWord<T>] : 0; });
  float sums[2 * K::kBlocks][4]; // all of them before the first is written: no product waits behind a branch
  BAFT_UNROLL
  for (int n = 0; n < 2 * K::kBlocks; ++n) {
    unpack<T>(sums[n], h.eight(n));
    left.multiply(sums[n], basis[n / 2], n % 2);
  }

  BAFT_UNROLL
  for (int half = 0; half < K::kHalves; ++half) {
    const TileRow& its = h.rows[half];
    if (!its.exists || (!its.edited && call.out == call.h)) continue;
    auto* to = static_cast<typename K::Number*>(call.out) + its.row * call.out_stride + first_column;
    BAFT_UNROLL
    for (int n = 0; n < 2 * K::kBlocks; ++n) {
      BAFT_UNROLL
      for (int q = half; q < kLeftWords<T> / 2; q += 2)
        *reinterpret_cast<uint32_t*>(to + n * 8 + left_element<T>(lane(), q).column) =
            its.edited ? word_of<T>(sums[n], q) : h.eight(n)[q];
    }
  }
}

// -- between CTAs: each thread that gates tells its sums to the same thread of every CTA --

template <class K>
BAFT_DEVICE void expect_sums(const Tile& tile) {
  if (thread() == 0) {
    const Address arrived = address_of(shared_memory() + K::kBarrierAt);
    barrier_init(arrived, 1);
    fence_barrier_init();
    barrier_expect(arrived, K::kCluster * tile.count * K::kPairs * 16);
  }
  sync_warp();
  cluster_arrive_relaxed(); // the barrier is ready for what other CTAs send; they wait for that later
}

template <class K>
BAFT_DEVICE void send_sums(float4 sums) {
  const Address to = address_of(shared_memory() + K::kSumsAt) + (cluster_rank() * K::kGating + thread()) * 16;
  const Address arrived = address_of(shared_memory() + K::kBarrierAt);
  BAFT_UNROLL
  for (int rank = 0; rank < K::kCluster; ++rank) send(in_cta(to, rank), sums, in_cta(arrived, rank));
}

template <class K>
BAFT_DEVICE float4 sums_of_cta(int rank) {
  return reinterpret_cast<const float4*>(shared_memory() + K::kSumsAt)[rank * K::kGating + thread()];
}

// -- the kernel --

// Launch it on as many clusters as there are tiles, of at most kRows rows. h and out are read and written in words, so
// that their rows need only lie at multiples of 4 bytes.
template <class K>
BAFT_KERNEL(K::kThreads)
forward_decode(const Forward call, const ClusterTiles tiles) {
  using T = typename K::T;
  const Tile tile = tiles.at(call.rows, block() / K::kCluster);
  if constexpr (K::kCluster > 1) expect_sums<K>(tile);

  // read
  if (!call.settled) wait_for_previous_kernel();
  const int first_column = cluster_rank() * K::kSlice + warp() * K::kStrip;
  const int64_t set = set_of(call.rows, tile.sequence);
  Fragments<T, K::kOutputs> projection[K::kBlocks];
  Fragments<T, K::kRank> basis[K::kBlocks];
  const int64_t first_block = set * (K::kWidth / kBlockColumns) + first_column / kBlockColumns;
  BAFT_UNROLL
  for (int b = 0; b < K::kBlocks; ++b) {
    projection[b].load(call.projection, first_block + b);
    if constexpr (!K::kReadsBasisLate) basis[b].load(call.basis, first_block + b);
  }
  wait_for_previous_kernel();
  LaneRows<K> h;
  h.find(call.rows, tile);
  h.read(call, first_column);
  let_next_kernel_start(); // not ahead of the wait: whoever comes next has this kernel to wait for, and no earlier one
  const int gated = thread() / K::kPairs, k = thread() % K::kPairs * 2; // row and basis of a thread that gates
  TileRow gated_row;
  gated_row.find(call.rows, tile, gated);

  // project
  float* partial = reinterpret_cast<float*>(shared_memory());
  project<K>(h, projection, partial);
  float4 pz = load_bias(call, set, k);
  if constexpr (K::kCluster > 1) cluster_wait();
  sync_block();
  if constexpr (K::kReadsBasisLate) {
    BAFT_UNROLL
    for (int b = 0; b < K::kBlocks; ++b) basis[b].load(call.basis, first_block + b);
  }

  // reduce and gate; also rows that don't exist, from whatever lies there, since no product mixes rows
  uint32_t* update = reinterpret_cast<uint32_t*>(shared_memory() + K::kUpdateAt);
  float2 w, u;
  if (thread() < K::kGating) {
    const float4 mine = K::Partial::sum(partial, gated, k / 2);
    if constexpr (K::kCluster > 1) {
      if (gated_row.exists) send_sums<K>(mine);
      barrier_wait(address_of(shared_memory() + K::kBarrierAt), 0);
    }
    BAFT_UNROLL
    for (int rank = 0; rank < K::kCluster; ++rank) {
      const float4 part = K::kCluster > 1 ? sums_of_cta<K>(rank) : mine;
      pz.x += part.x, pz.y += part.y, pz.z += part.z, pz.w += part.w;
    }
    w = gates<K::kPairs>(call, k, pz.y, pz.w);
    u = make_float2(w.x * pz.x, w.y * pz.z);
    *reinterpret_cast<typename T::Pair*>(update + gated * K::kUpdatePitch + k / kPerWord<T>) =
        pack_saturated<T>(u.x, u.y);
  }
  sync_block(); // whoever passes has got all that is sent to its CTA, and may leave

  // expand, and write
  add_and_write<K>(call, h, update, basis, first_column);
  if (cluster_rank() == 0 && thread() < K::kGating && gated_row.exists) {
    const float2 zeros = make_float2(0.0f, 0.0f);
    store_pair(call.weights + gated_row.row * call.rank, call.rank, k, gated_row.edited ? w : zeros);
    store_pair(call.update + gated_row.row * call.rank, call.rank, k, gated_row.edited ? u : zeros);
  }
}

} // namespace baft::cuda
