// What warps do with a tile of rows: the pieces that the kernels share.
#pragma once

#include "float32.cuh"
#include "fragments.h"
#include "kernels.h"
#include "machine.cuh"
#include "parameters.cuh"
#include "rows.cuh"
#include "shared_rows.cuh"

namespace baft::cuda {

// As many stages as fit into shared memory, up to `kMost`, of a kernel that `With` makes for a number of them.
template <template <int> class With, int kMost>
constexpr int most_stages() {
  if constexpr (With<kMost>::kSharedBytes <= kLargestSharedBytes)
    return kMost;
  else
    return most_stages<With, kMost - 1>();
}

// Of each stage, which rows of its tile there are and are edited: bit i for row i. The producer asks once for all, when
// it begins to copy them.
template <class K>
BAFT_DEVICE uint32_t* edited_rows() {
  return reinterpret_cast<uint32_t*>(shared_memory() + K::kEditedAt);
}

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

// Two coefficients as operands of a product. They saturate: an infinity would make NaN of every zero that it meets.
template <class T>
BAFT_DEVICE typename T::Pair pack_saturated(float first, float second) {
  const auto bounded = [](float x) { return x > T::kLargest ? T::kLargest : x < -T::kLargest ? -T::kLargest : x; };
  return T::pack(bounded(first), bounded(second));
}

// -- c M, for 16 rows of coefficients c --

// A lane's part of 16 rows and 8 columns: the sums of a product, from the words of half a left factor, ...
template <class T>
BAFT_DEVICE void unpack(float (&sums)[4], const uint32_t* words) {
  BAFT_UNROLL
  for (int half = 0; half < 2; ++half) {
    if constexpr (kPerWord<T> == 2) {
      sums[2 * half] = T::low(words[half]), sums[2 * half + 1] = T::high(words[half]);
    } else {
      sums[2 * half] = as_float(words[half]), sums[2 * half + 1] = as_float(words[2 + half]);
    }
  }
}
// ... and the other way round, word `q`.
template <class T>
BAFT_DEVICE uint32_t word_of(const float (&sums)[4], int q) {
  const int half = q % 2;
  if constexpr (kPerWord<T> == 2)
    return T::pack(sums[2 * half], sums[2 * half + 1]);
  else
    return as_word(sums[2 * half + q / 2]);
}

// The same part in shared memory, in rows `kPitch` bytes apart. `first` is its first row's first column.
template <class T, int kPitch>
struct EightColumns {
  unsigned char* first;

  BAFT_DEVICE uint32_t& word(int q) const {
    const Element at = left_element<T>(lane(), q);
    return *reinterpret_cast<uint32_t*>(first + at.row * kPitch + at.column * sizeof(typename T::Number));
  }
  BAFT_DEVICE void load(float (&sums)[4]) const {
    uint32_t words[kLeftWords<T> / 2];
    BAFT_UNROLL
    for (int q = 0; q < kLeftWords<T> / 2; ++q) words[q] = word(q);
    unpack<T>(sums, words);
  }
  // Of the lane's two rows, those that are to be written.
  BAFT_DEVICE void store(const float (&sums)[4], bool upper, bool lower) const {
    BAFT_UNROLL
    for (int q = 0; q < kLeftWords<T> / 2; ++q)
      if (q % 2 == 0 ? upper : lower) word(q) = word_of<T>(sums, q);
  }
};

// Coefficients [16, kCount] as left factors, and their products with M. There is one product of depth 8 for 8 of them,
// else there are those of depth 16.
template <class T, int kCount>
struct Coefficients {
  static constexpr int kDepths = kCount > 8 ? kCount / 16 : 1;
  static constexpr int kWords = kCount > 8 ? kLeftWords<T> : kLeftWords<T> / 2; // of a factor
  uint32_t words[kDepths][kWords] = {};

  // `word(row, first)` has the coefficients of a row from `first` on.
  template <class WordAt>
  BAFT_DEVICE void load(WordAt word) {
    BAFT_UNROLL
    for (int depth = 0; depth < kDepths; ++depth) {
      BAFT_UNROLL
      for (int q = 0; q < kWords; ++q) {
        const Element at = left_element<T>(lane(), q);
        words[depth][q] = word(at.row, depth * 16 + at.column);
      }
    }
  }

  // sums += c M, of the n-th 8 columns of a block.
  BAFT_DEVICE void multiply(float (&sums)[4], const Fragments<T, kCount>& matrix, int n) const {
    BAFT_UNROLL
    for (int depth = 0; depth < kDepths; ++depth)
      T::multiply(sums, words[depth], matrix.words + n * (matrix.kWords / 2) + depth * kRightWords<T>);
  }
};

// rows += c M in place, for 16 rows from `row` of a tile on and the columns of `kBlocks` blocks; rows whose bit of
// `edited` isn't set keep theirs. `coefficients` is [*, kCoefficients], `columns` points to the first column of the
// tile's first row.
template <class T, int kCoefficients, int kBlocks, int kPitch, class Matrix>
BAFT_DEVICE void add_expansion(uint32_t edited, int row, const uint32_t* coefficients, const Matrix& matrix,
                               unsigned char* columns) {
  Coefficients<T, kCoefficients> left;
  left.load([&](int of_sixteen, int first) {
    return coefficients[((row + of_sixteen) * kCoefficients + first) / kPerWord<T>];
  });
  const bool writes_upper = edited >> (row + sum_element(lane(), 0).row) & 1;
  const bool writes_lower = edited >> (row + sum_element(lane(), 2).row) & 1;
  BAFT_UNROLL
  for (int b = 0; b < kBlocks; ++b) {
    const auto eight = [&](int n) {
      return EightColumns<T, kPitch>{columns + row * kPitch + (b * kBlockColumns + n * 8) * sizeof(typename T::Number)};
    };
    const auto& right = matrix.at(b);
    float sums[2][4];
    BAFT_UNROLL
    for (int n = 0; n < 2; ++n) { // both products before either is stored, so that one doesn't wait for the other
      eight(n).load(sums[n]);
      left.multiply(sums[n], right, n);
    }
    BAFT_UNROLL
    for (int n = 0; n < 2; ++n) eight(n).store(sums[n], writes_upper, writes_lower);
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
