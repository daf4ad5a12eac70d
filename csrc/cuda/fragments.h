// Who holds what of a matrix, when a warp multiplies [16 x 16] by [16 x 8]: maps from lanes and registers to rows and
// columns, for the kernels, the packing, and the tests alike.
//
// A register is a word: two neighbouring numbers of 16 bits, or one of 32. The maps name the first number of a word.
//
// The unit of packed parameters is a block of 16 columns of d: for each lane, the registers of it that a warp needs, so
// that a lane reads them in whole vectors, whatever strip of columns its warp works on.
#pragma once

#if defined(__CUDACC__)
#define BAFT_BOTH __host__ __device__ __forceinline__
#else
#define BAFT_BOTH inline
#endif

namespace baft::cuda {

constexpr int kBlockColumns = 16;

template <class T>
constexpr int kPerWord = 4 / sizeof(typename T::Number);
template <class T>
constexpr int kLeftWords = 8 / kPerWord<T>; // registers of the left factor
template <class T>
constexpr int kRightWords = 4 / kPerWord<T>; // and of the right one

struct Element {
  int row, column;
};

// Register `q` of the left factor [16 x 16]. The first half of them holds its first 8 columns.
template <class T>
BAFT_BOTH Element left_element(int lane, int q) {
  return {lane / 4 + q % 2 * 8, (lane % 4 + q / 2 * 4) * kPerWord<T>};
}

// Number `q` of the sums [16 x 8].
BAFT_BOTH Element sum_element(int lane, int q) { return {lane / 4 + q / 2 * 8, lane % 4 * 2 + q % 2}; }

// A matrix [rows, d] as the right factor of x M^T, x [16, 16 columns]: register `q` of a block holds this element, row
// of M and column within the block. For each 8 rows there are kRightWords registers.
template <class T>
BAFT_BOTH Element projection_element(int lane, int q) {
  return {q / kRightWords<T> * 8 + lane / 4, (lane % 4 + q % kRightWords<T> * 4) * kPerWord<T>};
}

// A matrix [rows, d] as the right factor of c M, c [16, rows]: register `q` of a block holds this element, and the one
// below it if a word has two. The first half of the registers is for the first 8 columns. Words of 32 bits take these
// in an order such that a lane has its sums of c M where a left factor has its words.
template <class T>
BAFT_BOTH Element expansion_element(int lane, int q, int rows) {
  const int per_eight = rows / (4 * kPerWord<T>), n = lane / 4;
  return {(lane % 4 + q % per_eight * 4) * kPerWord<T>, q / per_eight * 8 + (kPerWord<T> == 2 ? n : n / 2 + n % 2 * 4)};
}

// In a product x^T y of matrices with 16 rows: the row that register `i` of y holds, and the next one if a word has
// two; of x, registers 2 i and 2 i + 1. Columns are those of lane / 4, of x in the second case 8 more.
template <class T>
BAFT_BOTH int inner_row(int lane, int i) {
  return lane % 4 * 2 + (kPerWord<T> == 2 ? i * 8 : i % 2 + i / 2 * 8);
}

} // namespace baft::cuda
