// Packing: D = A - R in float32, rounded once if at all, and every matrix in the order in which lanes read it
// (fragments.h).
#pragma once

#include "float32.cuh"
#include "fragments.h"
#include "kernels.h"
#include "machine.cuh"

namespace baft::cuda {

constexpr int kPackLayers = 32; // of one launch: as many as fit into a kernel's arguments
constexpr int kPackThreads = 256;

struct PackTable {
  Pack layers[kPackLayers];
};

// Row `row` of (D, G), interleaved, at `column`; zero beyond the rank.
BAFT_DEVICE float gated_projection(const Pack& layer, int64_t set, int row, int64_t column) {
  const int64_t k = row / 2, at = (set * layer.rank + k) * layer.width + column;
  if (k >= layer.rank) return 0.0f;
  if (row % 2 == 0) return layer.source[at] - layer.basis[at];
  return layer.gate ? layer.gate[at] : 0.0f;
}

BAFT_DEVICE float basis_at(const Pack& layer, int64_t set, int row, int64_t column) {
  return row < layer.rank ? layer.basis[(set * layer.rank + row) * layer.width + column] : 0.0f;
}

// Word `index` of a packed matrix with so many rows. `at(set, row, column)` is the matrix, `first(lane, q)` the element
// of a word in its block, and `next` the way from there to the second one, if a word has two.
template <class T, class At, class First>
BAFT_DEVICE uint32_t packed_word(int64_t index, int rows, int64_t blocks, At at, First first, Element next) {
  const int words = rows / 2 / kPerWord<T>, q = index % words, of_lane = index / words % 32;
  const int64_t block = index / words / 32;
  const Element e = first(of_lane, q);
  const int64_t set = block / blocks, column = block % blocks * kBlockColumns + e.column;
  if constexpr (kPerWord<T> == 2)
    return T::pack(at(set, e.row, column), at(set, e.row + next.row, column + next.column));
  else
    return as_word(at(set, e.row, column));
}
template <class T, class At>
BAFT_DEVICE uint32_t projection_word(int64_t index, int rows, int64_t blocks, At at) {
  const auto first = [](int of_lane, int q) { return projection_element<T>(of_lane, q); };
  return packed_word<T>(index, rows, blocks, at, first, {0, 1});
}
template <class T, class At>
BAFT_DEVICE uint32_t expansion_word(int64_t index, int rows, int64_t blocks, At at) {
  const auto first = [rows](int of_lane, int q) { return expansion_element<T>(of_lane, q, rows); };
  return packed_word<T>(index, rows, blocks, at, first, {1, 0});
}

// Blocks of threads share out the words of one layer; the grid has `share` blocks for each layer.
template <class T>
BAFT_KERNEL(kPackThreads)
pack(const PackTable table, int share) {
  const Pack& layer = table.layers[block() / share];
  const int64_t blocks = layer.width / kBlockColumns;
  const int rank = layer.padded_rank;
  const auto projection = [&](int64_t set, int row, int64_t column) {
    return gated_projection(layer, set, row, column);
  };
  const auto basis = [&](int64_t set, int row, int64_t column) { return basis_at(layer, set, row, column); };
  const int64_t words = layer.sets * blocks * 32 * (rank / 2 / kPerWord<T>);
  const int64_t step = static_cast<int64_t>(share) * kPackThreads;
  const int64_t first = static_cast<int64_t>(block() % share) * kPackThreads + thread();
  for (int64_t i = first; i < words; i += step) {
    if (layer.forward_basis) layer.forward_basis[i] = expansion_word<T>(i, rank, blocks, basis);
    if (layer.backward_basis) layer.backward_basis[i] = projection_word<T>(i, rank, blocks, basis);
  }
  for (int64_t i = first; i < 2 * words; i += step) {
    if (layer.forward_projection) layer.forward_projection[i] = projection_word<T>(i, 2 * rank, blocks, projection);
    if (layer.backward_projection) layer.backward_projection[i] = expansion_word<T>(i, 2 * rank, blocks, projection);
  }
  if (!layer.bias) return;
  for (int64_t i = first; i < layer.sets * layer.rank; i += step) {
    layer.bias[2 * i] = layer.source_bias[i];
    layer.bias[2 * i + 1] = layer.gate_bias ? layer.gate_bias[i] : 0.0f;
  }
}

} // namespace baft::cuda
