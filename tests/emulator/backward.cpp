// The backward kernels for the emulator, in shapes small enough for it, as functions that Python calls.
#include "backward_reduce.cuh"
#include "backward_stream.cuh"
#include "numbers.h"
#include "reported.h"

using namespace baft::cuda;

namespace {

template <class K>
struct Streamed {
  static void run(const Backward& call, int clusters, uint64_t seed) {
    emulator::launch(clusters, K::kCluster, K::kThreads, K::kSharedBytes, seed, [&] { backward_stream<K>(call); });
  }
};

} // namespace

extern "C" {

#define BAFT_SHAPES(DO)                                \
  DO(0, BackwardStream<Bfloat16, 2, 2, 32, 8, 32, 2>)  \
  DO(1, BackwardStream<Bfloat16, 4, 2, 32, 16, 16, 3>) \
  DO(2, BackwardStream<Float16, 8, 4, 16, 16, 16, 2>)  \
  DO(3, BackwardStream<Float16, 1, 4, 32, 8, 16, 2>)   \
  DO(4, BackwardStream<Float16, 4, 2, 32, 32, 16, 2>)  \
  DO(5, BackwardStream<Bfloat16, 4, 5, 64, 32, 16, 2>) \
  DO(6, BackwardStream<Bfloat16, 8, 8, 64, 16, 32, 2>) \
  DO(7, BackwardStream<Float32, 2, 2, 32, 8, 32, 2>)   \
  DO(8, BackwardStream<Float32, 4, 2, 32, 16, 16, 3>)  \
  DO(9, BackwardStream<Float32, 4, 2, 32, 32, 16, 2>)  \
  DO(10, BackwardStream<Float32, 8, 5, 64, 16, 16, 2>)

const char* emulate_backward_stream(const Backward* call, int shape, int clusters, uint64_t seed) {
  return reported([&] {
    switch (shape) {
#define BAFT_CASE(NUMBER, ...) \
  case NUMBER: return Streamed<__VA_ARGS__>::run(*call, clusters, seed);
      BAFT_SHAPES(BAFT_CASE)
#undef BAFT_CASE
    }
    throw std::runtime_error("no such shape");
  });
}

const char* emulate_backward_reduce(const BackwardReduce* call, uint64_t seed) {
  return reported([&] {
    const int share = static_cast<int>((call->rank * call->width / 4 + kReduceThreads - 1) / kReduceThreads);
    emulator::launch(static_cast<int>(call->sets) * share, 1, kReduceThreads, 0, seed,
                     [&] { backward_reduce(*call, share); });
  });
}

// Width, padded rank, dtype and parts of a shape.
int backward_stream_shape(int shape, int* width, int* rank, int* dtype, int* parts) {
  switch (shape) {
#define BAFT_CASE(NUMBER, ...)                         \
  case NUMBER:                                         \
    *width = __VA_ARGS__::kWidth;                      \
    *rank = __VA_ARGS__::kRank;                        \
    *dtype = static_cast<int>(kDtype<__VA_ARGS__::T>); \
    *parts = __VA_ARGS__::kParts;                      \
    return 1;
    BAFT_SHAPES(BAFT_CASE)
#undef BAFT_CASE
  }
  return 0;
}

} // extern "C"
