// Rows of numbers in shared memory, as factors of products.
#pragma once

#include "fragments.h"
#include "machine.cuh"

namespace baft::cuda {

// Each row begins 16 bytes, or 4 banks, after the end of the one before it: eight rows of a matrix, or a row of each of
// eight lanes, or every other row for four lanes then lie in different banks.
template <class T, int kColumns>
struct SharedRows {
  static constexpr int kNumber = sizeof(typename T::Number);
  static constexpr int kPitch = kColumns * kNumber + 16;

  // The left factor [16 x 16] at (row, column).
  static BAFT_DEVICE void load_left(uint32_t (&words)[kLeftWords<T>], const unsigned char* rows, int row, int column) {
    const Address mine = address_of(rows) + (row + lane() % 16) * kPitch + lane() / 16 * 16 + column * kNumber;
    BAFT_UNROLL
    for (int i = 0; i < kLeftWords<T> / 4; ++i) load_matrices(words + 4 * i, mine + i * 32);
  }

  // Sixteen rows and columns from there on as the left factor of a product over rows, transposed.
  static BAFT_DEVICE void load_left_over_rows(uint32_t (&words)[kLeftWords<T>], const unsigned char* rows, int row,
                                              int column) {
    if constexpr (kPerWord<T> == 2) {
      const int its_row = row + lane() / 16 * 8 + lane() % 8, its_column = column + lane() / 8 % 2 * 8;
      load_matrices_transposed(words, address_of(rows) + its_row * kPitch + its_column * kNumber);
    } else {
      BAFT_UNROLL
      for (int q = 0; q < kLeftWords<T>; ++q)
        words[q] = word_at(rows, row + inner_row<T>(lane(), q / 2), column + q % 2 * 8 + lane() / 4);
    }
  }

  // Sixteen rows of all columns as right factors of such products, eight columns in each.
  static BAFT_DEVICE void load_right_over_rows(uint32_t (&words)[kColumns / 8][kRightWords<T>],
                                               const unsigned char* rows, int row) {
    if constexpr (kPerWord<T> == 2) {
      BAFT_UNROLL
      for (int n = 0; n < kColumns / 8; n += 2) { // two factors at a time; of 8 columns in all, both are the same
        uint32_t two[4];
        const int its_column = (n * 8 + lane() / 16 * 8) % kColumns;
        load_matrices_transposed(two, address_of(rows) + (row + lane() % 16) * kPitch + its_column * kNumber);
        words[n][0] = two[0], words[n][1] = two[1];
        if (n + 1 < kColumns / 8) words[n + 1][0] = two[2], words[n + 1][1] = two[3];
      }
    } else {
      BAFT_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        BAFT_UNROLL
        for (int i = 0; i < kRightWords<T>; ++i)
          words[n][i] = word_at(rows, row + inner_row<T>(lane(), i), n * 8 + lane() / 4);
      }
    }
  }

 private:
  static BAFT_DEVICE uint32_t word_at(const unsigned char* rows, int row, int column) {
    return *reinterpret_cast<const uint32_t*>(rows + row * kPitch + column * kNumber);
  }
};

} // namespace baft::cuda
