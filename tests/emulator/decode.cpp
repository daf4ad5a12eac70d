// The forward kernel for few rows for the emulator, in small shapes and in a real one, as functions that Python calls.
#include "forward_decode.cuh"
#include "numbers.h"
#include "reported.h"

using namespace baft::cuda;

namespace {

template <class K>
struct Decoded {
  static void run(const Forward& call, int tile_rows, const std::vector<emulator::Written>& previous, uint64_t seed) {
    const ClusterTiles tiles(call.rows, tile_rows);
    const auto kernel = [&] { forward_decode<K>(call, tiles); };
    emulator::launch(tiles.count(call.rows), K::kCluster, K::kThreads, K::kSharedBytes, seed, kernel, previous);
  }
};

} // namespace

struct Unfinished { // what a kernel that still runs writes, and what lies there until it has ended
  void* at;
  const unsigned char* before;
  int64_t bytes;
};

extern "C" {

#define BAFT_SHAPES(DO)                            \
  DO(0, ForwardDecode<Bfloat16, 1, 4, 16, 8, 8>)   \
  DO(1, ForwardDecode<Bfloat16, 4, 2, 32, 16, 8>)  \
  DO(2, ForwardDecode<Float16, 2, 5, 32, 32, 8>)   \
  DO(3, ForwardDecode<Float16, 8, 4, 16, 16, 16>)  \
  DO(4, ForwardDecode<Bfloat16, 1, 8, 16, 32, 16>) \
  DO(5, ForwardDecode<Bfloat16, 8, 8, 64, 16, 8>)  \
  DO(6, ForwardDecode<Float32, 1, 4, 16, 8, 8>)    \
  DO(7, ForwardDecode<Float32, 4, 2, 32, 16, 8>)   \
  DO(8, ForwardDecode<Float32, 2, 8, 16, 32, 16>)  \
  DO(9, ForwardDecode<Float32, 8, 8, 64, 16, 8>)

const char* emulate_forward_decode(const Forward* call, int shape, int tile_rows, const Unfinished* unfinished,
                                   int count, uint64_t seed) {
  return reported([&] {
    std::vector<emulator::Written> previous;
    for (int i = 0; i < count; ++i)
      previous.push_back({unfinished[i].at, {unfinished[i].before, unfinished[i].before + unfinished[i].bytes}});
    switch (shape) {
#define BAFT_CASE(NUMBER, ...) \
  case NUMBER: return Decoded<__VA_ARGS__>::run(*call, tile_rows, previous, seed);
      BAFT_SHAPES(BAFT_CASE)
#undef BAFT_CASE
    }
    throw std::runtime_error("no such shape");
  });
}

// Width, padded rank, dtype, and most rows of a tile, of a shape.
int forward_decode_shape(int shape, int* width, int* rank, int* dtype, int* rows) {
  switch (shape) {
#define BAFT_CASE(NUMBER, ...)                         \
  case NUMBER:                                         \
    *width = __VA_ARGS__::kWidth;                      \
    *rank = __VA_ARGS__::kRank;                        \
    *dtype = static_cast<int>(kDtype<__VA_ARGS__::T>); \
    *rows = __VA_ARGS__::kRows;                        \
    return 1;
    BAFT_SHAPES(BAFT_CASE)
#undef BAFT_CASE
  }
  return 0;
}

} // extern "C"
