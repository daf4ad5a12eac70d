// Launching the kernels, for the bindings. Neither torch nor CUDA: a stream is a pointer, an error a text or null.
#pragma once

#include "kernels.h"

namespace baft::cuda {

// The rank that a kernel for rank r is compiled for: 8, 16 or 32; 0 if there is none.
constexpr int padded_rank(int64_t rank) { return rank <= 8 ? 8 : rank <= 16 ? 16 : rank <= 32 ? 32 : 0; }

// Whether the forward kernels are compiled for this width and rank.
bool has_forward(int64_t width, int64_t rank);

const char* launch_forward(const Forward& call, int64_t width, Dtype dtype, void* stream);
const char* launch_pack(const Pack* layers, int count, Dtype dtype, void* stream);

} // namespace baft::cuda
