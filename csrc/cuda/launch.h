// Launching a kernel whose CTAs form clusters.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>

namespace baft::cuda {

constexpr const char* kCannotRun = "this device can't run the kernel: it takes clusters, and 227 KiB of shared memory";

inline const char* problem_of(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// How many clusters of a kernel run on the current device at a time, 0 if none can; asked once for each device.
template <auto kernel>
int clusters_at_a_time(int cluster, int threads, int shared_bytes) {
  constexpr int kDevices = 64;
  static std::mutex asking;
  static int known[kDevices] = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  const std::lock_guard<std::mutex> guard(asking);
  if (known[device]) return known[device];
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) != cudaSuccess) return 0;
  cudaLaunchAttribute shape;
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &shape;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) return 0;
  return known[device] = clusters;
}

// A stream, and whether a kernel may begin there while the previous one still runs: as a programmatic dependent, for
// which nothing but its own wait_for_previous_kernel() waits.
struct Turn {
  void* stream;
  bool early;
  Turn(void* stream, bool early = false) : stream(stream), early(early) {}
};

// Launch on so many clusters; null, or what CUDA says is wrong.
template <class... Parameters, class... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int cluster, int threads, int shared_bytes,
                            const Turn& turn, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(turn.stream);
  config.attrs = attributes;
  config.numAttrs = turn.early ? 2 : 1;
  return problem_of(cudaLaunchKernelEx(&config, kernel, arguments...));
}

} // namespace baft::cuda
