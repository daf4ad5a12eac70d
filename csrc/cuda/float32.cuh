// float32 on tensor cores, which multiply TF32: numbers of 11 bits, where float32 has 24.
//
// A number is taken apart into the nearest TF32 number and what that lacks, of which TF32 loses a bit at most. Of the
// four products of two numbers' parts, that of the low ones is below 2^-22 of the whole and left out.
//
// Tensor cores truncate what they add up, and over a long sum all these errors would go one way. So they add up the
// parts of one product only, the small ones first, and the sums grow by ordinary additions, which round to nearest.
#pragma once

#include "fragments.h"
#include "machine.cuh"

namespace baft::cuda {

// Float32 numbers in two parts.
template <int kCount>
struct Parts {
  uint32_t high[kCount], low[kCount];

  explicit BAFT_DEVICE Parts(const uint32_t* numbers) {
    BAFT_UNROLL
    for (int i = 0; i < kCount; ++i) {
      high[i] = to_tf32(as_float(numbers[i]));
      low[i] = as_word(as_float(numbers[i]) - as_float(high[i]));
    }
  }
};

struct Float32 {
  using Number = float;
  using Pair = float2;
  static constexpr float kLargest = 3.4011621e38f; // above it, the nearest TF32 number is infinite

  static BAFT_DEVICE Pair pack(float first, float second) { return make_float2(first, second); }

  // sums [16 x 8] += a [16 x 16] b [16 x 8], or with half the depth: of eight words of a or four.
  template <int kWords>
  static BAFT_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[kWords], const uint32_t* b) {
    const Parts<kWords> left(a);
    const Parts<kWords / 2> right(b);
    float product[4] = {};
    BAFT_UNROLL
    for (int i = 0; i < kWords / 4; ++i) {
      multiply_tf32(product, left.low + 4 * i, right.high + 2 * i);
      multiply_tf32(product, left.high + 4 * i, right.low + 2 * i);
    }
    BAFT_UNROLL
    for (int i = 0; i < kWords / 4; ++i) multiply_tf32(product, left.high + 4 * i, right.high + 2 * i);
    BAFT_UNROLL
    for (int q = 0; q < 4; ++q) sums[q] += product[q];
  }
};

} // namespace baft::cuda
