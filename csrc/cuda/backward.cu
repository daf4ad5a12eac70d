// Launches the backward kernels.
#include "backward_reduce.cuh"
#include "backward_stream.cuh"
#include "instances.h"
#include "launch.h"
#include "launches.h"

namespace baft::cuda {
namespace {

// `act` on the instance for a width and a rank: true if there is one.
template <class T, class Act>
bool with_instance(int64_t width, int64_t rank, Act act) {
#define BAFT_CASE(BITS, WIDTH, RANK, CLUSTER, WARPS, STRIP, ROWS)                         \
  if constexpr (BITS == 8 * sizeof(typename T::Number)) {                                 \
    static_assert(WIDTH == CLUSTER * WARPS * STRIP, "the strips don't cover the width");  \
    if (width == WIDTH && padded_rank(rank) == RANK) {                                    \
      act(typename BackwardStreamInstance<T, CLUSTER, WARPS, STRIP, RANK, ROWS>::Type()); \
      return true;                                                                        \
    }                                                                                     \
  }
  BAFT_BACKWARD_STREAM(BAFT_CASE)
#undef BAFT_CASE
  return false;
}

template <class Act>
bool with_instance(Dtype dtype, int64_t width, int64_t rank, Act act) {
  switch (dtype) {
    case Dtype::bfloat16: return with_instance<Bfloat16>(width, rank, act);
    case Dtype::float16: return with_instance<Float16>(width, rank, act);
    default: return with_instance<Float32>(width, rank, act);
  }
}

template <class K>
int64_t clusters_for(const Rows& rows) {
  const int64_t tiles = rows.sequences * ((rows.length + K::kRows - 1) / K::kRows);
  const int at_a_time = clusters_at_a_time<backward_stream<K>>(K::kCluster, K::kThreads, K::kSharedBytes);
  return tiles < at_a_time ? tiles : at_a_time;
}

} // namespace

bool has_backward(int64_t width, int64_t rank, Dtype dtype, int architecture) {
  bool runs = false;
  with_instance(dtype, width, rank, [&](auto instance) { runs = decltype(instance)::runs_on(architecture); });
  return runs;
}

BackwardSlots backward_slots(const Rows& rows, int64_t width, int64_t rank, Dtype dtype) {
  BackwardSlots slots = {0, 0};
  with_instance(dtype, width, rank, [&](auto instance) {
    using K = decltype(instance);
    slots = {rows.sequences + clusters_for<K>(rows), K::kParts};
  });
  return slots;
}

const char* launch_backward(const Backward& call, int64_t width, Dtype dtype, void* stream) {
  const char* problem = "no kernel is compiled for this width and rank";
  with_instance(dtype, width, call.rank, [&](auto instance) {
    using K = decltype(instance);
    const int64_t clusters = clusters_for<K>(call.rows);
    problem = clusters == 0 ? kCannotRun
                            : launch_clusters(backward_stream<K>, clusters, K::kCluster, K::kThreads, K::kSharedBytes,
                                              stream, call);
  });
  return problem;
}

const char* launch_backward_reduce(const BackwardReduce& call, void* stream) {
  const int64_t share = (call.rank * call.width / 4 + kReduceThreads - 1) / kReduceThreads;
  backward_reduce<<<static_cast<unsigned>(call.sets * share), kReduceThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      call, static_cast<int>(share));
  return problem_of(cudaGetLastError());
}

} // namespace baft::cuda
