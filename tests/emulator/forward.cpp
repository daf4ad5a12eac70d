// The forward kernels and the packing for the emulator, in shapes small enough for it, as functions that Python calls.
#include "forward_stream.cuh"
#include "numbers.h"
#include "reported.h"

using namespace baft::cuda;

namespace {

template <class K>
struct Streamed {
  static void run(const Forward& call, int clusters, uint64_t seed) {
    emulator::launch(clusters, K::kCluster, K::kThreads, K::kSharedBytes, seed, [&] { forward_stream<K>(call); });
  }
};

} // namespace

extern "C" {

const char* emulate_pack(const Pack* layer, int dtype, uint64_t seed) {
  return reported([&] {
    PackTable table{};
    table.layers[0] = *layer;
    emulator::launch(3, 1, kPackThreads, 0, seed, [&] { pack_in(static_cast<Dtype>(dtype), table, 3); });
  });
}

#define BAFT_SHAPES(DO)                                \
  DO(0, ForwardStream<Bfloat16, 2, 2, 32, 8, 16, 2>)   \
  DO(1, ForwardStream<Bfloat16, 4, 2, 32, 16, 16, 3>)  \
  DO(2, ForwardStream<Float16, 8, 4, 16, 16, 32, 2>)   \
  DO(3, ForwardStream<Float16, 1, 8, 16, 32, 16, 2>)   \
  DO(4, ForwardStream<Bfloat16, 4, 16, 64, 16, 16, 4>) \
  DO(5, ForwardStream<Float32, 2, 2, 32, 8, 32, 2>)    \
  DO(6, ForwardStream<Float32, 4, 2, 32, 16, 16, 3>)   \
  DO(7, ForwardStream<Float32, 1, 8, 16, 32, 16, 2>)   \
  DO(8, ForwardStream<Float32, 8, 5, 64, 16, 16, 3>)

const char* emulate_forward_stream(const Forward* call, int shape, int clusters, uint64_t seed) {
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

// Width, padded rank and dtype of a shape.
int forward_stream_shape(int shape, int* width, int* rank, int* dtype) {
  switch (shape) {
#define BAFT_CASE(NUMBER, ...)                         \
  case NUMBER:                                         \
    *width = __VA_ARGS__::kWidth;                      \
    *rank = __VA_ARGS__::kRank;                        \
    *dtype = static_cast<int>(kDtype<__VA_ARGS__::T>); \
    return 1;
    BAFT_SHAPES(BAFT_CASE)
#undef BAFT_CASE
  }
  return 0;
}

} // extern "C"
