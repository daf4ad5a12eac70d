// The CPU kernels' interface: plain structs, raw pointers, no torch. One table of functions for each instruction set.
//
// Layouts. A projection x W^T reads W packed in panels: [panels][d][kPanel], outputs padded with zeros to a multiple of
// kPanel, so that one k reads one contiguous run. A write-back C E reads E packed in column blocks:
// [blocks][k][kBlock], columns padded with zeros to a multiple of kBlock. Both keep what a register tile needs
// contiguous: rows of h are d apart, and at a power of two they would all fall into the same few sets of the
// first-level cache.
//
// For a bfloat16 matrix the packed parameters may be bfloat16 too, in pairs, as the processor's dot products want them:
// panels are [panels][d / 2][kPanel][2], two neighbours along d together, and blocks [blocks][k / 2][kBlock][2].
// Coefficients are rounded to bfloat16 for it; sums stay float32.
#pragma once

#include <cstdint>

namespace baft::cpu {

constexpr int64_t kPanel = 32;       // outputs of a packed projection panel
constexpr int64_t kBlock = 64;       // columns of a packed write-back block
constexpr int64_t kMaxTileRows = 12; // rows of the largest register tile of any variant

enum class Dtype : int64_t { float32, bfloat16, float16 };

// Rows of a matrix [*, columns] in any of the dtypes, `stride` elements apart.
struct Matrix {
  void* data;
  int64_t stride;
  Dtype dtype;
};

// Packed parameters: float, or pairs of bfloat16, which only a variant with `pairs` takes.
struct Packed {
  const void* data;
  bool pairs;
};

constexpr int64_t kMostPairs = 256; // coefficients of a row that are rounded to pairs at a time

// What a variant offers. `rows` are row numbers of the matrices, `count` <= tile_rows of them.
struct Kernels {
  const char* name;
  int64_t tile_rows; // rows that one call of project takes at most
  bool pairs;        // whether it has dot products of bfloat16

  // sums[panel][i][kPanel] += x[rows[i]][first : first + width] W^T, for every panel; W is packed over `dim` columns.
  void (*project)(const Matrix& x, const int64_t* rows, int64_t count, int64_t first, int64_t width,
                  const Packed& panels, int64_t panel_count, int64_t outputs, int64_t dim, float* sums);

  // out[rows[i]] = x[rows[i]] + C[i] E on columns first : first + width; C is [count, k] with `stride` elements a row.
  // `first` is a multiple of kBlock, k at most kMostPairs with pairs. x and out may be the same.
  void (*expand)(const Matrix& x, const Matrix& out, const int64_t* rows, int64_t count, int64_t first, int64_t width,
                 const float* coefficients, int64_t stride, int64_t k, const Packed& blocks);

  // sums[j][kBlock] += sum over i of C[i][j] x[rows[i]][first : first + width], for j < k; width <= kBlock, any count.
  // C has `stride` numbers a row: floats, or with pairs what `pair_rows` made of them.
  void (*outer)(const Matrix& x, const int64_t* rows, int64_t count, int64_t first, int64_t width,
                const void* coefficients, int64_t stride, int64_t k, bool pairs, float* sums);

  // Round C [count, k] to pairs of neighbouring rows, [count / 2][k], the last with zeros if count is odd.
  void (*pair_rows)(const float* coefficients, int64_t count, int64_t k, uint32_t* pairs);
};

// The variants that this library was built with, null where the compiler or the processor's family has none.
const Kernels* avx512bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

// The fastest variant that this processor runs; BAFT_CPU_VARIANT names another one, for tests.
const Kernels& kernels();

} // namespace baft::cpu
