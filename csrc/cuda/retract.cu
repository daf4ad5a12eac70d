// Launches the retraction.
#include <algorithm>

#include "launch.h"
#include "launches.h"
#include "retract.cuh"

namespace baft::cuda {
namespace {

template <class K>
const char* retract_some(const Basis* bases, int count, float* distances, int iterations, float near, void* stream) {
  RetractTable table = {};
  int bytes = 0;
  for (int i = 0; i < count; ++i) {
    table.bases[i] = bases[i];
    bytes = std::max(bytes, typename K::Plan(bases[i].rank, bases[i].width).bytes);
  }
  if (clusters_at_a_time<retract<K>>(K::kCluster, K::kThreads, K::kSharedBytes) == 0) return kCannotRun;
  return launch_clusters(retract<K>, count, K::kCluster, K::kThreads, bytes, stream, table, distances, iterations,
                         near);
}

// Whether each CTA holds all of its slice at a time.
template <class K>
bool all_fit(const Basis* bases, int count) {
  return std::all_of(bases, bases + count, [](const Basis& basis) {
    const typename K::Plan plan(basis.rank, basis.width);
    return plan.chunk == plan.slice;
  });
}

} // namespace

const char* launch_retract(const Basis* bases, int count, float* distances, int iterations, float near, void* stream) {
  for (int first = 0; first < count; first += kRetractBases) {
    const int some = std::min(count - first, kRetractBases);
    // Clusters of 4, of which the GPU runs 32 or more at once: the layers of a model. Larger ones for what they can't
    // hold.
    const auto launch =
        all_fit<Retraction<4>>(bases + first, some) ? retract_some<Retraction<4>> : retract_some<Retraction<8>>;
    if (const char* problem = launch(bases + first, some, distances + first, iterations, near, stream)) return problem;
  }
  return nullptr;
}

} // namespace baft::cuda
