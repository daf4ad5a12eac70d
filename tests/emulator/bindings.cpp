// csrc/cuda_bindings.cpp on the emulated GPU: the launches of csrc/cuda/*.cu in shapes small enough for it.
#include <utility>

#include "../../csrc/cuda_bindings.cpp"
#include "backward_reduce.cuh"
#include "backward_stream.cuh"
#include "forward_decode.cuh"
#include "forward_stream.cuh"
#include "numbers.h"
#include "reported.h"
#include "retract.cuh"

namespace baft::cuda {
namespace {

constexpr int kClusters = 2, kFewRows = 16;
constexpr uint64_t kSeed = 0;

// DO(width, rank, dtype, the kernel for many rows, that for few, that of the backward pass)
#define BAFT_SHAPES(DO)                                                                  \
  DO(128, 8, Bfloat16, (2, 2, 32, 8, 16, 2), (2, 2, 32, 8, 8), (2, 2, 32, 8, 16, 2))     \
  DO(256, 16, Bfloat16, (4, 2, 32, 16, 16, 3), (4, 2, 32, 16, 8), (4, 2, 32, 16, 16, 3)) \
  DO(512, 16, Float16, (8, 4, 16, 16, 32, 2), (8, 2, 32, 16, 8), (8, 4, 16, 16, 32, 2))  \
  DO(128, 8, Float32, (2, 2, 32, 8, 16, 2), (2, 2, 32, 8, 8), (2, 2, 32, 8, 16, 2))      \
  DO(256, 16, Float32, (4, 2, 32, 16, 16, 3), (4, 2, 32, 16, 8), (4, 2, 32, 16, 16, 3))
#define BAFT_OPEN(...) __VA_ARGS__

// Packs that the last kernel wrote, and what was there before: a kernel that needn't wait for it may still find that.
std::vector<emulator::Written> last_packed;

void remember(void* at, int64_t words) {
  const unsigned char* bytes = static_cast<const unsigned char*>(at);
  if (at) last_packed.push_back({at, {bytes, bytes + 4 * words}});
}

template <class K>
const char* run(int64_t clusters, const std::function<void()>& kernel,
                const std::vector<emulator::Written>& previous = {}) {
  last_packed.clear();
  return reported([&] {
    emulator::launch(static_cast<int>(clusters), K::kCluster, K::kThreads, K::kSharedBytes, kSeed, kernel, previous);
  });
}

} // namespace

std::vector<int64_t> widths() {
#define BAFT_CASE(WIDTH, ...) WIDTH,
  return {BAFT_SHAPES(BAFT_CASE)};
#undef BAFT_CASE
}

bool has_forward(int64_t width, int64_t rank, Dtype dtype) { return has_backward(width, rank, dtype, 900); }

bool has_backward(int64_t width, int64_t rank, Dtype dtype, int) {
#define BAFT_CASE(WIDTH, RANK, T, ...) \
  if (width == WIDTH && padded_rank(rank) == RANK && dtype == kDtype<T>) return true;
  BAFT_SHAPES(BAFT_CASE)
#undef BAFT_CASE
  return false;
}

const char* launch_forward(const Forward& call, int64_t width, Dtype dtype, void*) {
#define BAFT_CASE(WIDTH, RANK, T, STREAM, DECODE, _)                                                           \
  if (width == WIDTH && padded_rank(call.rank) == RANK && dtype == kDtype<T>) {                                \
    using Stream = ForwardStream<T, BAFT_OPEN STREAM>;                                                         \
    using Decode = ForwardDecode<T, BAFT_OPEN DECODE>;                                                         \
    if (call.rows.sequences * call.rows.length > kFewRows)                                                     \
      return run<Stream>(kClusters, [&] { forward_stream<Stream>(call); });                                    \
    const ClusterTiles tiles(call.rows, 8);                                                                    \
    return run<Decode>(                                                                                        \
        tiles.count(call.rows), [&] { forward_decode<Decode>(call, tiles); }, std::exchange(last_packed, {})); \
  }
  BAFT_SHAPES(BAFT_CASE)
#undef BAFT_CASE
  return "no kernel is compiled for this width and rank";
}

BackwardSlots backward_slots(const Rows& rows, int64_t width, int64_t rank, Dtype dtype) {
#define BAFT_CASE(WIDTH, RANK, T, _, __, BACKWARD)                       \
  if (width == WIDTH && padded_rank(rank) == RANK && dtype == kDtype<T>) \
    return {rows.sequences + kClusters, BackwardStream<T, BAFT_OPEN BACKWARD>::kParts};
  BAFT_SHAPES(BAFT_CASE)
#undef BAFT_CASE
  return {0, 0};
}

const char* launch_backward(const Backward& call, int64_t width, Dtype dtype, void*) {
#define BAFT_CASE(WIDTH, RANK, T, _, __, BACKWARD)                              \
  if (width == WIDTH && padded_rank(call.rank) == RANK && dtype == kDtype<T>) { \
    using K = BackwardStream<T, BAFT_OPEN BACKWARD>;                            \
    return run<K>(kClusters, [&] { backward_stream<K>(call); });                \
  }
  BAFT_SHAPES(BAFT_CASE)
#undef BAFT_CASE
  return "no kernel is compiled for this width and rank";
}

const char* launch_backward_reduce(const BackwardReduce& call, void*) {
  const int share = static_cast<int>((call.rank * call.width / 4 + kReduceThreads - 1) / kReduceThreads);
  last_packed.clear();
  return reported([&] {
    emulator::launch(static_cast<int>(call.sets) * share, 1, kReduceThreads, 0, kSeed,
                     [&] { backward_reduce(call, share); });
  });
}

const char* launch_retract(const Basis* bases, int count, float* distances, int iterations, float near, void*) {
  using K = Retraction<4>;
  RetractTable table = {};
  std::copy(bases, bases + count, table.bases);
  return run<K>(count, [&] { retract<K>(table, distances, iterations, near); });
}

const char* launch_pack(const Pack* layers, int count, Dtype dtype, void*) {
  constexpr int kShare = 3;
  PackTable table = {};
  std::copy(layers, layers + count, table.layers);
  last_packed.clear();
  for (int i = 0; i < count; ++i) {
    const int64_t words = layers[i].sets * layers[i].width * layers[i].padded_rank * bytes_of(dtype) / 4;
    remember(layers[i].forward_projection, 2 * words);
    remember(layers[i].forward_basis, words);
    remember(layers[i].bias, layers[i].sets * 2 * layers[i].rank);
  }
  return reported(
      [&] { emulator::launch(count * kShare, 1, kPackThreads, 0, kSeed, [&] { pack_in(dtype, table, kShare); }); });
}

} // namespace baft::cuda
