// Who holds what of a matrix, when a warp multiplies [16 x 16] by [16 x 8]: maps from lanes and registers to rows and
// columns, for the kernels, the packing, and the tests alike.
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

struct Element {
  int row, column;
};

// Register `q` of the left factor holds this element [16 x 16] and its right neighbour.
BAFT_BOTH Element left_element(int lane, int q) { return {lane / 4 + q % 2 * 8, lane % 4 * 2 + q / 2 * 8}; }

// Number `q` of the sums is this element [16 x 8].
BAFT_BOTH Element sum_element(int lane, int q) { return {lane / 4 + q / 2 * 8, lane % 4 * 2 + q % 2}; }

// A matrix [rows, d] as the right factor of x M^T, x [16, 16 columns]: register `q` of a block holds this element, row
// of M and column within the block, and its right neighbour. There are rows / 4 registers: for each 8 rows, two.
BAFT_BOTH Element projection_element(int lane, int q) { return {q / 2 * 8 + lane / 4, q % 2 * 8 + lane % 4 * 2}; }

// A matrix [rows, d] as the right factor of c M, c [16, rows]: register `q` of a block holds this element and the one
// below it. There are rows / 4 registers: for each 8 columns, rows / 8.
BAFT_BOTH Element expansion_element(int lane, int q, int rows) {
  const int per_eight = rows / 8;
  return {q % per_eight * 8 + lane % 4 * 2, q / per_eight * 8 + lane / 4};
}

} // namespace baft::cuda
