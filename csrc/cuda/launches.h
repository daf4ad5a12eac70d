// Launching the kernels, for the bindings. Neither torch nor CUDA: a stream is a pointer, an error a text or null.
#pragma once

#include <vector>

#include "kernels.h"

namespace baft::cuda {

// The rank that a kernel for rank r is compiled for: 8, 16 or 32; 0 if there is none.
constexpr int padded_rank(int64_t rank) { return rank <= 8 ? 8 : rank <= 16 ? 16 : rank <= 32 ? 32 : 0; }

// Bytes of a number.
constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// The widths that kernels are compiled for, and whether those of the forward pass are for a width and a rank.
std::vector<int64_t> widths();
bool has_forward(int64_t width, int64_t rank, Dtype dtype);

const char* launch_forward(const Forward& call, int64_t width, Dtype dtype, void* stream);
// The slots that a backward pass takes for parameters' gradients, and the parts of each for b and c (kernels.h).
struct BackwardSlots {
  int64_t slots, parts;
};

bool has_backward(int64_t width, int64_t rank, Dtype dtype, int architecture); // as 900 for sm_90
BackwardSlots backward_slots(const Rows& rows, int64_t width, int64_t rank, Dtype dtype);
const char* launch_backward(const Backward& call, int64_t width, Dtype dtype, void* stream);
const char* launch_backward_reduce(const BackwardReduce& call, void* stream);

const char* launch_retract(const Basis* bases, int count, float* distances, int iterations, float near, void* stream);
const char* launch_pack(const Pack* layers, int count, Dtype dtype, void* stream);

} // namespace baft::cuda
