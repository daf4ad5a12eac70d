// The dtypes of the kernels' numbers: which one a type stands for, and packing in one of them.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "pack.cuh"

template <class T>
constexpr baft::cuda::Dtype kDtype = std::is_same_v<T, baft::cuda::Bfloat16>  ? baft::cuda::Dtype::bfloat16
                                     : std::is_same_v<T, baft::cuda::Float16> ? baft::cuda::Dtype::float16
                                                                              : baft::cuda::Dtype::float32;

inline void pack_in(baft::cuda::Dtype dtype, const baft::cuda::PackTable& table, int share) {
  switch (dtype) {
    case baft::cuda::Dtype::bfloat16: return baft::cuda::pack<baft::cuda::Bfloat16>(table, share);
    case baft::cuda::Dtype::float16: return baft::cuda::pack<baft::cuda::Float16>(table, share);
    case baft::cuda::Dtype::float32: return baft::cuda::pack<baft::cuda::Float32>(table, share);
  }
}
