// Launches the packing.
#include "launch.h"
#include "launches.h"
#include "pack.cuh"

namespace baft::cuda {

const char* launch_pack(const Pack* layers, int count, Dtype dtype, void* stream) {
  constexpr int kShare = 32; // blocks of threads for a layer: its few hundred KB in some microseconds
  for (int first = 0; first < count; first += kPackLayers) {
    PackTable table = {};
    const int some = count - first < kPackLayers ? count - first : kPackLayers;
    for (int i = 0; i < some; ++i) table.layers[i] = layers[first + i];
    const auto kernel = dtype == Dtype::bfloat16  ? pack<Bfloat16>
                        : dtype == Dtype::float16 ? pack<Float16>
                                                  : pack<Float32>;
    kernel<<<some * kShare, kPackThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, kShare);
  }
  return problem_of(cudaGetLastError());
}

} // namespace baft::cuda
