// What a warp of the backward pass does with its strip of columns: it holds the parameters of it and adds up their
// gradients, and it adds to the gradient of h. `K` is a BackwardStream.
#pragma once

#include "fragments.h"
#include "kernels.h"
#include "machine.cuh"
#include "tiles.cuh"

namespace baft::cuda {

// Rows of `kColumns` operands of 16 bits in shared memory, each 16 bytes after the end of the one before it: see
// StagedRows.
template <int kColumns>
struct OperandRows {
  static constexpr int kPitch = kColumns * 2 + 16;

  // What this lane tells load_matrices() for the left factor [16 x 16] at (row, column), and the other way round,
  // load_matrices_transposed() for two right factors [16 x 8]; of 8 columns in all, both are the same.
  static BAFT_DEVICE Address row_at(Address rows, int row, int column) {
    return rows + (row + lane() % 16) * kPitch + (column + lane() / 16 * 8) % kColumns * 2;
  }
};

// A lane's share of the packed parameters of its warp's strip: in registers, or where the gradients leave too few, in
// shared memory. There a lane reads only what it wrote itself, so that no lanes need to meet.
template <int kParameterRows, int kBlocks, bool kShared>
struct StripParameters {
  static constexpr int kBytes = 0; // of shared memory, for a warp
  Fragments<kParameterRows> blocks[kBlocks];

  BAFT_DEVICE explicit StripParameters(unsigned char*) {}
  BAFT_DEVICE void load(const uint32_t* packed, int64_t first_block) {
    BAFT_UNROLL
    for (int b = 0; b < kBlocks; ++b) blocks[b].load(packed, first_block + b);
  }
  BAFT_DEVICE const Fragments<kParameterRows>& at(int b) const { return blocks[b]; }
};

template <int kParameterRows, int kBlocks>
struct StripParameters<kParameterRows, kBlocks, true> {
  static constexpr int kVectors = kParameterRows / 16; // of 16 bytes, of a lane's share of a block
  static constexpr int kBytes = kBlocks * kVectors * 32 * 16;
  static_assert(kParameterRows % 16 == 0, "whole vectors");
  uint4* mine;

  BAFT_DEVICE explicit StripParameters(unsigned char* of_warp) : mine(reinterpret_cast<uint4*>(of_warp) + lane()) {}
  BAFT_DEVICE void load(const uint32_t* packed, int64_t first_block) {
    BAFT_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      Fragments<kParameterRows> block;
      block.load(packed, first_block + b);
      BAFT_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        const uint32_t* words = block.words + 4 * i;
        mine[(b * kVectors + i) * 32] = {words[0], words[1], words[2], words[3]};
      }
    }
  }
  BAFT_DEVICE Fragments<kParameterRows> at(int b) const {
    Fragments<kParameterRows> block;
    BAFT_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const uint4 four = mine[(b * kVectors + i) * 32];
      uint32_t* words = block.words + 4 * i;
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    }
    return block;
  }
};

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

  // Sixteen rows from `row` of the tile on. `rows` is of g, `column` the strip's first in the slice.
  BAFT_DEVICE void add(Address rows, int row, int column, uint32_t edited) {
    const Address shared = address_of(shared_memory());
    const uint32_t pairs = edited >> (row + lane() % 4 * 2);
    const auto kept = [](uint32_t two) { return (two & 1 ? 0xffffu : 0u) | (two & 2 ? 0xffff0000u : 0u); };
    const uint32_t keep[2] = {kept(pairs), kept(pairs >> 8)};
    const int its_row = row + lane() / 16 * 8 + lane() % 8, its_column = column + lane() / 8 % 2 * 8;
    const Address g = rows + its_row * K::Stage::kPitch + its_column * 2;
    add_product(of_update, g, K::Update::row_at(shared + K::kUpdateAt, row, 0), keep);
    add_product(of_deltas, g + K::kMatrixBytes, K::Deltas::row_at(shared + K::kDeltasAt, row, 0), keep);
  }

  // sums += left^T right, sixteen rows of each. A register of the left factor, of columns by rows, has two neighbouring
  // rows, and `keep` the bits of those that count.
  template <int kEights>
  static BAFT_DEVICE void add_product(float (&sums)[K::kBlocks][kEights][4], Address left_row, Address right_row,
                                      const uint32_t (&keep)[2]) {
    uint32_t right[(kEights + 1) / 2][4]; // two factors in four registers
    BAFT_UNROLL
    for (int n = 0; n < (kEights + 1) / 2; ++n) load_matrices_transposed(right[n], right_row + n * 32);
    BAFT_UNROLL
    for (int b = 0; b < K::kBlocks; ++b) {
      uint32_t left[4];
      load_matrices_transposed(left, left_row + b * kBlockColumns * 2);
      BAFT_UNROLL
      for (int q = 0; q < 4; ++q) left[q] &= keep[q / 2];
      BAFT_UNROLL
      for (int n = 0; n < kEights; ++n)
        T::multiply(sums[b][n], left, right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]);
    }
  }

  // To a slot [3 kRank, d]: the rows of (D, G), and then those of R.
  BAFT_DEVICE void write(float* slot, int column) const {
    BAFT_UNROLL
    for (int b = 0; b < K::kBlocks; ++b) {
      BAFT_UNROLL
      for (int q = 0; q < 4; ++q) {
        const Element at = sum_element(lane(), q);
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
  constexpr int kDepths = K::kDeltas / 16;
  uint32_t left[kDepths][4];
  BAFT_UNROLL
  for (int depth = 0; depth < kDepths; ++depth)
    load_matrices(left[depth], K::Deltas::row_at(address_of(shared_memory() + K::kDeltasAt), row, depth * 16));
  const Element upper = sum_element(lane(), 0), lower = sum_element(lane(), 2);
  const bool writes_upper = edited >> (row + upper.row) & 1, writes_lower = edited >> (row + lower.row) & 1;
  BAFT_UNROLL
  for (int b = 0; b < K::kBlocks; ++b) {
    const auto& right = projection.at(b);
    BAFT_UNROLL
    for (int half = 0; half < 2; ++half) {
      unsigned char* here = strip + row * K::Stage::kPitch + (b * kBlockColumns + half * 8 + upper.column) * 2;
      uint32_t* first = reinterpret_cast<uint32_t*>(here + upper.row * K::Stage::kPitch);
      uint32_t* second = reinterpret_cast<uint32_t*>(here + lower.row * K::Stage::kPitch);
      float sums[4] = {T::low(*first), T::high(*first), T::low(*second), T::high(*second)};
      const uint32_t* words = right.words + half * (K::kDeltas / 8);
      BAFT_UNROLL
      for (int depth = 0; depth < kDepths; ++depth)
        T::multiply(sums, left[depth], words[2 * depth], words[2 * depth + 1]);
      if (writes_upper) *first = T::pack(sums[0], sums[1]);
      if (writes_lower) *second = T::pack(sums[2], sums[3]);
    }
  }
}

} // namespace baft::cuda
