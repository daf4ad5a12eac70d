// The retraction kernel for the emulator, as functions that Python calls.
#include "retract.cuh"

#include "reported.h"

using namespace baft::cuda;

namespace {

template <class K>
void run(const Basis* bases, int count, float* distances, int iterations, float near, uint64_t seed) {
  RetractTable table{};
  int bytes = 0;
  for (int i = 0; i < count; ++i) {
    table.bases[i] = bases[i];
    bytes = std::max(bytes, typename K::Plan(bases[i].rank, bases[i].width).bytes);
  }
  if (bytes > K::kSharedBytes) throw std::runtime_error("more shared memory than there is");
  const auto kernel = [&] { retract<K>(table, distances, iterations, near); };
  emulator::launch(count, K::kCluster, K::kThreads, bytes, seed, kernel);
}

} // namespace

extern "C" {

// Clusters of 8, 4, and 1; and of 2 whose CTAs have little memory, so that a slice comes in chunks.
const char* emulate_retract(const Basis* bases, int count, float* distances, int iterations, float near, int shape,
                            uint64_t seed) {
  return reported([&] {
    switch (shape) {
      case 0: return run<Retraction<8>>(bases, count, distances, iterations, near, seed);
      case 1: return run<Retraction<4>>(bases, count, distances, iterations, near, seed);
      case 2: return run<Retraction<1>>(bases, count, distances, iterations, near, seed);
      case 3: return run<Retraction<2, 100 << 10>>(bases, count, distances, iterations, near, seed);
    }
    throw std::runtime_error("no such shape");
  });
}

} // extern "C"
