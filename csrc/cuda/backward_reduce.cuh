// The end of the backward pass: what the clusters of backward_stream.cuh added up, slot by slot.
#pragma once

#include "kernels.h"
#include "machine.cuh"

namespace baft::cuda {

constexpr int kReduceThreads = 128;
constexpr int kReduceSlots = 8; // read at a time, since a sum waits for each of them

BAFT_DEVICE float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Four neighbouring columns of the gradients of one base's R, A and G.
BAFT_DEVICE void add_columns(const BackwardReduce& call, int64_t set, int64_t k, int64_t column) {
  const float4 zeros = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const int64_t rows[3] = {2 * k, 2 * k + 1, 2 * call.padded_rank + k}; // of a slot: D, G and u^T g
  float4 sums[3] = {zeros, zeros, zeros};
  for (int first = 0; first < call.slots; first += kReduceSlots) {
    float4 parts[kReduceSlots][3];
    BAFT_UNROLL
    for (int i = 0; i < kReduceSlots; ++i) {
      const int64_t slot = first + i;
      const bool counts = slot < call.slots && load_constant(call.slot_sets + slot) == set;
      const float* from = call.partial + slot * 3 * call.padded_rank * call.width + column;
      BAFT_UNROLL
      for (int m = 0; m < 3; ++m)
        parts[i][m] = counts ? load_constant(reinterpret_cast<const float4*>(from + rows[m] * call.width)) : zeros;
    }
    BAFT_UNROLL
    for (int i = 0; i < kReduceSlots; ++i) {
      BAFT_UNROLL
      for (int m = 0; m < 3; ++m) sums[m] = plus(sums[m], parts[i][m]);
    }
  }
  // D = A - R, so that A has the gradient of D, and R that of the expansion less that of D.
  const int64_t at = (set * call.rank + k) * call.width + column;
  const float4 of_d = sums[0], of_u = sums[2];
  *reinterpret_cast<float4*>(call.source + at) = of_d;
  *reinterpret_cast<float4*>(call.basis + at) =
      make_float4(of_u.x - of_d.x, of_u.y - of_d.y, of_u.z - of_d.z, of_u.w - of_d.w);
  if (call.gate) *reinterpret_cast<float4*>(call.gate + at) = sums[1];
}

// The gradients of one base's b and c, by a warp: each lane adds up every 32nd part, then they meet.
BAFT_DEVICE void add_biases(const BackwardReduce& call, int64_t set, int64_t k) {
  float of_b = 0.0f, of_c = 0.0f;
  for (int64_t i = lane(); i < static_cast<int64_t>(call.slots) * call.parts; i += 32) {
    if (load_constant(call.slot_sets + i / call.parts) != set) continue;
    const float* from = call.partial_bias + (i * call.padded_rank + k) * 2;
    of_b += load_constant(from), of_c += load_constant(from + 1);
  }
  BAFT_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) of_b += shuffle_xor(of_b, mask), of_c += shuffle_xor(of_c, mask);
  if (lane() != 0) return;
  call.source_bias[set * call.rank + k] = of_b;
  if (call.gate_bias) call.gate_bias[set * call.rank + k] = of_c;
}

// Of the grid, each set has `share` blocks, enough for a thread for every four columns of every base.
BAFT_KERNEL(kReduceThreads) backward_reduce(const BackwardReduce call, int share) {
  const int64_t set = block() / share, first_thread = static_cast<int64_t>(block() % share) * kReduceThreads;
  const int64_t first_warp = first_thread / 32, warps = static_cast<int64_t>(share) * kReduceThreads / 32;
  for (int64_t k = first_warp + warp(); k < call.rank; k += warps) add_biases(call, set, k);
  const int64_t fours = call.width / 4, mine = first_thread + thread();
  if (mine < call.rank * fours) add_columns(call, set, mine / fours, mine % fours * 4);
}

} // namespace baft::cuda
