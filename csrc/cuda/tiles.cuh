// What warps do with a tile of rows: the pieces that the kernels share.
#pragma once

#include "fragments.h"
#include "kernels.h"
#include "machine.cuh"
#include "rows.cuh"

namespace baft::cuda {

// As many stages as fit into shared memory, up to `kMost`, of a kernel that `With` makes for a number of them.
template <template <int> class With, int kMost>
constexpr int most_stages() {
  if constexpr (With<kMost>::kSharedBytes <= kLargestSharedBytes)
    return kMost;
  else
    return most_stages<With, kMost - 1>();
}

// Rows of `kSlice` numbers of 16 bits in shared memory. Each begins 16 bytes, or 4 banks, after the one before it:
// eight rows of a matrix, or a row of each of eight lanes, then lie in different banks.
template <int kSlice>
struct StagedRows {
  static constexpr int kPitch = kSlice * 2 + 16;
  static_assert(kSlice % 64 == 0, "a pitch of 16 bytes more than whole lines");

  // What this lane tells load_matrices(), for the left factor at (row, column).
  static BAFT_DEVICE Address left_row(Address rows, int row, int column) {
    return rows + (row + lane() % 16) * kPitch + (column + lane() / 16 * 8) * 2;
  }
};

// Sums of every warp over its strip of columns, [kWarps][kRows][kColumns], in shared memory.
template <int kWarps, int kRows, int kColumns>
struct PartialSums {
  static constexpr int kPitch = kColumns + 8; // floats: what half a warp stores at a time lies in different banks
  static constexpr int kBytes = kWarps * kRows * kPitch * 4;

  static BAFT_DEVICE void store(float* partial, int of_warp, int row, const float (&sums)[kColumns / 8][4]) {
    float* mine = partial + (of_warp * kRows + row) * kPitch;
    BAFT_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      const Element upper = sum_element(lane(), 0), lower = sum_element(lane(), 2);
      *reinterpret_cast<float2*>(mine + upper.row * kPitch + n * 8 + upper.column) =
          make_float2(sums[n][0], sums[n][1]);
      *reinterpret_cast<float2*>(mine + lower.row * kPitch + n * 8 + lower.column) =
          make_float2(sums[n][2], sums[n][3]);
    }
  }

  // The same for tiles of 8 rows: the lower half of the sums is of none.
  static BAFT_DEVICE void store_upper(float* partial, int of_warp, const float (&sums)[kColumns / 8][4]) {
    const Element at = sum_element(lane(), 0);
    float* mine = partial + (of_warp * kRows + at.row) * kPitch + at.column;
    BAFT_UNROLL
    for (int n = 0; n < kColumns / 8; ++n)
      *reinterpret_cast<float2*>(mine + n * 8) = make_float2(sums[n][0], sums[n][1]);
  }

  // Over the warps, in their order: four neighbouring columns of a row.
  static BAFT_DEVICE float4 sum(const float* partial, int row, int four) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    BAFT_UNROLL
    for (int of_warp = 0; of_warp < kWarps; ++of_warp) {
      const float4 part = *reinterpret_cast<const float4*>(partial + (of_warp * kRows + row) * kPitch + four * 4);
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    return total;
  }
};

// A lane's share of one block of packed parameters.
template <int kParameterRows>
struct Fragments {
  static constexpr int kWords = kParameterRows / 4;
  uint32_t words[kWords];

  BAFT_DEVICE void load(const uint32_t* packed, int64_t block) {
    const uint32_t* mine = packed + (block * 32 + lane()) * kWords;
    if constexpr (kWords == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(mine);
      words[0] = two.x, words[1] = two.y;
    } else {
      BAFT_UNROLL
      for (int i = 0; i < kWords; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(mine + i);
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    }
  }
};

// Two coefficients as operands of a product. float16 saturates: an infinity would make NaN of every zero that it meets.
template <class T>
BAFT_DEVICE uint32_t pack_saturated(float low, float high) {
  const auto bounded = [](float x) { return x > T::kLargest ? T::kLargest : x < -T::kLargest ? -T::kLargest : x; };
  return T::pack(bounded(low), bounded(high));
}

// rows += c M in place, for 16 rows from `row` of a tile on and the columns of `kBlocks` blocks; rows that aren't
// edited keep their bits. `coefficients` is [*, kCoefficients], `columns` points to the first column of the tile's
// first row.
template <class T, int kCoefficients, int kBlocks>
BAFT_DEVICE void add_expansion(const Rows& rows, const Tile& tile, int row, const uint16_t* coefficients,
                               const Fragments<kCoefficients> (&matrix)[kBlocks], unsigned char* columns, int pitch) {
  constexpr int kDepths = kCoefficients / 16; // products of depth 16; 0 for one of depth 8
  const uint32_t* words = reinterpret_cast<const uint32_t*>(coefficients);
  const auto left_word = [&](int q, int depth) {
    const Element at = left_element(lane(), q);
    return words[((row + at.row) * kCoefficients + depth * 16 + at.column) / 2];
  };
  uint32_t left[kDepths ? kDepths : 1][kDepths ? 4 : 2];
  BAFT_UNROLL
  for (int depth = 0; depth < (kDepths ? kDepths : 1); ++depth) {
    BAFT_UNROLL
    for (int q = 0; q < (kDepths ? 4 : 2); ++q) left[depth][q] = left_word(q, depth);
  }
  const Element upper = sum_element(lane(), 0), lower = sum_element(lane(), 2);
  const auto writes = [&](int in_tile) {
    return !rows.mask || (in_tile < tile.count && is_edited(rows, row_of(rows, tile.first + in_tile)));
  };
  const bool writes_upper = writes(row + upper.row), writes_lower = writes(row + lower.row);
  BAFT_UNROLL
  for (int b = 0; b < kBlocks; ++b) {
    uint32_t *first[2], *second[2];
    float sums[2][4];
    BAFT_UNROLL
    for (int n = 0; n < 2; ++n) { // both products before either is stored, so that one doesn't wait for the other
      unsigned char* here = columns + row * pitch + (b * kBlockColumns + n * 8 + upper.column) * 2;
      first[n] = reinterpret_cast<uint32_t*>(here + upper.row * pitch);
      second[n] = reinterpret_cast<uint32_t*>(here + lower.row * pitch);
      sums[n][0] = T::low(*first[n]), sums[n][1] = T::high(*first[n]);
      sums[n][2] = T::low(*second[n]), sums[n][3] = T::high(*second[n]);
      const uint32_t* right = matrix[b].words + n * (kCoefficients / 8);
      if constexpr (kDepths == 0) {
        T::multiply(sums[n], left[0], right[0]);
      } else {
        BAFT_UNROLL
        for (int depth = 0; depth < kDepths; ++depth)
          T::multiply(sums[n], left[depth], right[2 * depth], right[2 * depth + 1]);
      }
    }
    BAFT_UNROLL
    for (int n = 0; n < 2; ++n) {
      if (writes_upper) *first[n] = T::pack(sums[n][0], sums[n][1]);
      if (writes_lower) *second[n] = T::pack(sums[n][2], sums[n][3]);
    }
  }
}

// -- gates --

// b and c of bases k and k + 1, as (b_k, c_k, b_k+1, c_k+1); zeros for the bases that pad the rank.
BAFT_DEVICE float4 load_bias(const Forward& call, int64_t set, int k) {
  const float* bias = call.bias + (set * call.rank + k) * 2;
  float4 found = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (k < call.rank) found.x = bias[0], found.y = bias[1];
  if (k + 1 < call.rank) found.z = bias[2], found.w = bias[3];
  return found;
}

// w of bases k and k + 1 of a row from their z; the row's `kPairs` pairs are in neighbouring lanes.
template <int kPairs>
BAFT_DEVICE float2 gates(const Forward& call, int k, float z, float next_z) {
  if (call.gate == Gate::none) return make_float2(1.0f, 1.0f);
  if (call.gate == Gate::sigmoid)
    return make_float2(1.0f / (1.0f + exponential(-z)), 1.0f / (1.0f + exponential(-next_z)));
  const bool first = k < call.rank, second = k + 1 < call.rank;
  float largest = first ? (second && next_z > z ? next_z : z) : -3.4e38f;
  BAFT_UNROLL
  for (int mask = 1; mask < kPairs; mask *= 2) {
    const float other = shuffle_xor(largest, mask);
    largest = other > largest ? other : largest;
  }
  const float2 e = make_float2(first ? exponential(z - largest) : 0.0f, second ? exponential(next_z - largest) : 0.0f);
  float sum = e.x + e.y;
  BAFT_UNROLL
  for (int mask = 1; mask < kPairs; mask *= 2) sum += shuffle_xor(sum, mask);
  return make_float2(e.x / sum, e.y / sum);
}

BAFT_DEVICE void store_pair(float* row, int rank, int k, float2 values) {
  if (k < rank) row[k] = values.x;
  if (k + 1 < rank) row[k + 1] = values.y;
}

} // namespace baft::cuda
