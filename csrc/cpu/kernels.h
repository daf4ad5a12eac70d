// The CPU kernels' interface: plain structs, raw pointers, no torch. One table of functions for each instruction set.
//
// Layouts. A projection x W^T reads W packed in panels: [panels][d][kPanel], outputs padded with zeros to a multiple of
// kPanel, so that one k reads one contiguous run. A write-back C E reads E packed in column blocks: [blocks][k][kBlock],
// columns padded with zeros to a multiple of kBlock. Both keep what a register tile needs contiguous: rows of h are d
// apart, and at a power of two they would all fall into the same few sets of the first-level cache.
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

// What a variant offers. `rows` are row numbers of the matrices, `count` <= tile_rows of them.
struct Kernels {
  const char* name;
  int64_t tile_rows; // rows that one call of project and expand takes at most

  // sums[panel][i][kPanel] += x[rows[i]][first : first + width] W^T, for every panel; W is packed over `dim` columns.
  void (*project)(const Matrix& x, const int64_t* rows, int64_t count, int64_t first, int64_t width, const float* panels,
                  int64_t panel_count, int64_t outputs, int64_t dim, float* sums);

  // out[rows[i]] = x[rows[i]] + C[i] E on columns first : first + width; C is [count, k] with `stride` elements a row.
  // `first` is a multiple of kBlock. x and out may be the same.
  void (*expand)(const Matrix& x, const Matrix& out, const int64_t* rows, int64_t count, int64_t first, int64_t width,
                 const float* coefficients, int64_t stride, int64_t k, const float* blocks);

  // sums[j][kBlock] += sum over i of C[i][j] x[rows[i]][first : first + width], for j < k; width <= kBlock, any count.
  void (*outer)(const Matrix& x, const int64_t* rows, int64_t count, int64_t first, int64_t width,
                const float* coefficients, int64_t stride, int64_t k, float* sums);
};

// The variants that this library was built with, null where the compiler or the processor's family has none.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

// The fastest variant that this processor runs; BAFT_CPU_VARIANT names another one, for tests.
const Kernels& kernels();

} // namespace baft::cpu
