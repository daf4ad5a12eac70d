// The operator on the CPU: forward and backward over flat rows, by the kernels of the best variant.
//
// Formulas: baft_kernels/reference.py. Nothing here depends on the number of threads: sums are split by shape alone and
// added in a fixed order, so that results are bitwise the same on any number of them.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace baft::cpu {

enum class Gate : int64_t { sigmoid, softmax, none };

// body(begin, end) for ranges that cover [0, count), maybe at the same time; each range of at least `grain`, if it can.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                             void* context);

// The rows to work on: rows[i], or i where rows is null.
struct Rows {
  const int64_t* rows;
  int64_t count;
};

struct Forward {
  Matrix h, out; // [*, d]; may be the same
  Rows rows;     // of h, out, weights and update
  int64_t d, r;
  Gate gate;
  Packed projection; // panels of (D, G), or of D alone without a gate
  Packed basis;      // blocks of R
  const float* bias; // b, then c
  float* weights;    // w [*, r]
  float* update;     // u [*, r]
};

// The rows of a call shared out among parameter sets: those from first[i] to first[i + 1] are of set number[i]. Where
// the call has its parameters stand those of set 0, and each next one so many bytes, or floats, further on.
struct Sets {
  int64_t count;
  const int64_t *number, *first;
  int64_t projection_bytes, basis_bytes, bias_floats;
};

struct Backward {
  Matrix grad_out, h, grad_h; // [*, d]; grad_h.data null: not wanted
  Rows rows;
  int64_t d, r;
  Gate gate;
  Packed basis;                                            // panels of R
  Packed projection;                                       // blocks of (D, G), or of D alone
  const float* weights;                                    // w [*, r]
  const float* update;                                     // u [*, r]
  const float* grad_weights;                               // [*, r], or null
  const float* grad_update;                                // [*, r], or null
  float *basis_gradient, *source_gradient, *gate_gradient; // [r, d]; source_gradient null: none is wanted
  float *source_bias_gradient, *gate_bias_gradient;        // [r]
};

void forward(const Forward& call, ParallelFor parallel_for);
void grouped_forward(const Forward& call, const Sets& sets, ParallelFor parallel_for);
void backward(const Backward& call, ParallelFor parallel_for);

} // namespace baft::cpu
