// What a warp of the backward pass does with its strip of columns: it holds the parameters of it and adds up their
// gradients, and it adds to the gradient of h. `K` is a BackwardStream.
#pragma once

#include "fragments.h"
#include "kernels.h"
#include "machine.cuh"
#include "shared_rows.cuh"
#include "tiles.cuh"

namespace baft::cuda {

// -- the parameters' gradients of a warp's strip --

template <class K>
struct StripGradients {
  using T = typename K::T;
  float of_deltas[K::kBlocks][K::kDeltas / 8][4]; // (dp, dz)^T h, transposed
  float of_update[K::kBlocks][K::kRank / 8][4];   // u^T g, transposed

  BAFT_DEVICE void clear() {
    BAFT_UNROLL
    for (int b = 0; b < K::kBlocks; ++b) {
      BAFT_UNROLL
      for (int q = 0; q < 4; ++q) {
        BAFT_UNROLL
        for (int n = 0; n < K::kDeltas / 8; ++n) of_deltas[b][n][q] = 0.0f;
        BAFT_UNROLL
        for (int n = 0; n < K::kRank / 8; ++n) of_update[b][n][q] = 0.0f;
      }
    }
  }

  // Sixteen rows from `row` of the tile on. `g` is its first row, `column` the strip's first in the slice.
  BAFT_DEVICE void add(const unsigned char* g, int row, int column, uint32_t edited) {
    uint32_t keep[kRightWords<T>]; // of a register with such an inner row, the bits of rows that count
    BAFT_UNROLL
    for (int i = 0; i < kRightWords<T>; ++i) {
      const uint32_t rows = edited >> (row + inner_row<T>(lane(), i));
      const uint32_t first = rows & 1 ? ~0u : 0u, second = rows & 2 ? ~0u : 0u;
      keep[i] = kPerWord<T> == 2 ? (first & 0xffffu) | (second & 0xffff0000u) : first;
    }
    const unsigned char* h = g + K::kMatrixBytes;
    add_product<typename K::Update>(of_update, g, shared_memory() + K::kUpdateAt, row, column, keep);
    add_product<typename K::Deltas>(of_deltas, h, shared_memory() + K::kDeltasAt, row, column, keep);
  }

  // sums += left^T right, sixteen rows of each.
  template <class Operands, int kEights>
  static BAFT_DEVICE void add_product(float (&sums)[K::kBlocks][kEights][4], const unsigned char* left_rows,
                                      const unsigned char* right_rows, int row, int column,
                                      const uint32_t (&keep)[kRightWords<T>]) {
    uint32_t right[kEights][kRightWords<T>];
    Operands::load_right_over_rows(right, right_rows, row);
    BAFT_UNROLL
    for (int b = 0; b < K::kBlocks; ++b) {
      uint32_t left[kLeftWords<T>];
      K::Stage::load_left_over_rows(left, left_rows, row, column + b * kBlockColumns);
      BAFT_UNROLL
      for (int q = 0; q < kLeftWords<T>; ++q) left[q] &= keep[q / 2];
      BAFT_UNROLL
      for (int n = 0; n < kEights; ++n) T::multiply(sums[b][n], left, right[n]);
    }
  }

  // To a slot [3 kRank, d]: the rows of (D, G), and then those of R.
  BAFT_DEVICE void write(float* slot, int column) const {
    const int mine = lane_anew();
    BAFT_UNROLL
    for (int b = 0; b < K::kBlocks; ++b) {
      BAFT_UNROLL
      for (int q = 0; q < 4; ++q) {
        const Element at = sum_element(mine, q);
        float* here = slot + static_cast<int64_t>(at.column) * K::kWidth + column + b * kBlockColumns + at.row;
        BAFT_UNROLL
        for (int n = 0; n < K::kDeltas / 8; ++n) here[n * 8 * K::kWidth] = of_deltas[b][n][q];
        BAFT_UNROLL
        for (int n = 0; n < K::kRank / 8; ++n) here[(K::kDeltas + n * 8) * K::kWidth] = of_update[b][n][q];
      }
    }
  }
};

// -- the gradient of h --

// g += dp D + dz G in the stage, for sixteen rows from `row` of the tile on. `strip` is the first row's first column.
template <class K>
BAFT_DEVICE void add_to_input_gradient(unsigned char* strip, int row, uint32_t edited,
                                       const typename K::Projection& projection) {
  using T = typename K::T;
  Coefficients<T, K::kDeltas> left;
  BAFT_UNROLL
  for (int depth = 0; depth < left.kDepths; ++depth)
    K::Deltas::load_left(left.words[depth], shared_memory() + K::kDeltasAt, row, depth * 16);
  const int upper = row + sum_element(lane(), 0).row, lower = row + sum_element(lane(), 2).row;
  const bool writes_upper = edited >> upper & 1, writes_lower = edited >> lower & 1;
  BAFT_UNROLL
  for (int b = 0; b < K::kBlocks; ++b) {
    const auto& right = projection.at(b);
    BAFT_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int column = b * kBlockColumns + n * 8;
      const EightColumns<T, K::Stage::kPitch> here = {strip + row * K::Stage::kPitch +
                                                      column * sizeof(typename K::Number)};
      float sums[4];
      here.load(sums);
      left.multiply(sums, right, n);
      here.store(sums, writes_upper, writes_lower);
    }
  }
}

} // namespace baft::cuda
