// The CUDA kernels' interface: plain structs, raw pointers, neither torch nor CUDA. Pointers are to device memory.
//
// Parameters are packed in blocks of 16 columns of d, [sets, d / 16, 32 lanes, words of each], with ranks padded by
// zeros to 8, 16 or 32: of 16 bits rows / 4 words, of 32 rows / 2 (fragments.h). The rows of (D, G) lie interleaved,
// D_k at 2k and G_k at 2k + 1.
#pragma once

#include <cstdint>

namespace baft::cuda {

enum class Gate : int { sigmoid, softmax, none };
enum class Dtype : int { bfloat16, float16, float32 };

// Which rows a call works on: `sequences` of `length` items each. An item is a row, or a place in a list of rows.
struct Rows {
  const int64_t* list;     // the rows, or null
  const uint8_t* mask;     // by row, which ones are edited, or null
  const int64_t* adapters; // the parameter set of each sequence, or null: all use set 0
  int64_t sequences, length;
};

struct Forward {
  const void* h;
  void* out;                    // may be h: then rows that aren't edited are not written
  int64_t h_stride, out_stride; // elements from row to row; rows begin at multiples of 16 bytes
  Rows rows;
  int rank; // r, before padding
  Gate gate;
  bool settled; // whether no kernel that may still run writes the parameters, packed as below, or `adapters`
  const uint32_t* projection; // (D, G) for x M^T
  const uint32_t* basis;      // R for c M
  const float* bias;          // [sets, 2 r], b_k and c_k interleaved like D and G
  float* weights;             // w [T, r]
  float* update;              // u [T, r]
};

// Parameters as they are trained, float32, and where their packed forms go. Any form may be null.
struct Pack {
  const float *basis, *source, *source_bias, *gate, *gate_bias; // R, A, b, G, c; G and c null without a gate
  int64_t sets, rank, width;
  int padded_rank;
  uint32_t *forward_projection, *forward_basis;   // (D, G) for x M^T, R for c M
  uint32_t *backward_basis, *backward_projection; // R for x M^T, (D, G) for c M
  float* bias;                                    // [sets, 2 r]
};

// The backward pass over many rows. A cluster adds up the parameters' gradients over its tiles, and writes its sums out
// whenever the set changes and at its end: those that end with sequence s in cluster c to slot c + s. There are
// `sequences` + clusters slots, whatever the adapters are; `slot_sets` gets the set of each, or -1 if nothing is in it.
struct Backward {
  const void *grad_out, *h; // h is read only for the parameters' gradients
  void* grad_input;         // null if it isn't wanted; may be grad_out. Rows that aren't edited get grad_out's bits
  int64_t grad_out_stride, h_stride, grad_input_stride; // elements from row to row; rows begin at multiples of 16 bytes
  Rows rows;
  int rank; // r, before padding
  Gate gate;
  const uint32_t* basis;                   // R for x M^T
  const uint32_t* projection;              // (D, G) for c M
  const float *weights, *update;           // w and u [T, r], as the forward pass wrote them
  const float *grad_weights, *grad_update; // [T, r], or null
  float* partial;                          // [slots, 3 padded ranks, d]; null if parameters' gradients aren't wanted
  float* partial_bias;                     // [slots, parts, 2 padded ranks]; parts as the kernel was compiled for
  int32_t* slot_sets;                      // [slots]
};

// The sum of the slots of each set: the parameters' gradients [sets, r, d] and [sets, r], float32.
struct BackwardReduce {
  const float *partial, *partial_bias; // as above
  const int32_t* slot_sets;
  int slots, parts;
  int64_t sets, rank, padded_rank, width;
  float *basis, *source, *source_bias, *gate, *gate_bias; // gate and gate_bias null without a gate
};

// A basis [rank, width] as it is trained: float32, contiguous, any alignment.
struct Basis {
  float* values;
  int rank, width;
};

} // namespace baft::cuda
