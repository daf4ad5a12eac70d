// Launches the forward kernels.
#include <set>

#include "forward_decode.cuh"
#include "forward_stream.cuh"
#include "instances.h"
#include "launch.h"
#include "launches.h"

namespace baft::cuda {
namespace {

constexpr int64_t kFewRows = 64; // up to which parameters take longer to load than h

template <class T, int kCluster, int kWarps, int kStrip, int kRank>
const char* decode_rows(const Forward& call, void* stream) {
  using K = ForwardDecode<T, kCluster, kWarps, kStrip, kRank, 8>;
  const int at_a_time = clusters_at_a_time<forward_decode<K>>(K::kCluster, K::kThreads, K::kSharedBytes);
  if (at_a_time == 0) return kCannotRun;
  // As few rows a tile as let all clusters run at once: less goes from CTA to CTA.
  const int64_t rows = (call.rows.sequences * call.rows.length + at_a_time - 1) / at_a_time;
  const ClusterTiles tiles(call.rows, static_cast<int>(rows < K::kRows ? rows : K::kRows));
  return launch_clusters(forward_decode<K>, tiles.count(call.rows), K::kCluster, K::kThreads, K::kSharedBytes,
                         Turn(stream, true), call, tiles);
}

template <class T, int kCluster, int kWarps, int kStrip, int kRank>
const char* stream_rows(const Forward& call, void* stream) {
  using K = typename ForwardStreamInstance<T, kCluster, kWarps, kStrip, kRank>::Type;
  const int64_t tiles = call.rows.sequences * ((call.rows.length + K::kRows - 1) / K::kRows);
  const int at_a_time = clusters_at_a_time<forward_stream<K>>(K::kCluster, K::kThreads, K::kSharedBytes);
  if (at_a_time == 0) return kCannotRun;
  const int64_t clusters = tiles < at_a_time ? tiles : at_a_time;
  return launch_clusters(forward_stream<K>, clusters, K::kCluster, K::kThreads, K::kSharedBytes, stream, call);
}

template <class T>
const char* launch_in(const Forward& call, int64_t width, void* stream) {
  const int rank = padded_rank(call.rank);
  const bool few = call.rows.sequences * call.rows.length <= kFewRows;
#define BAFT_CASE(ROWS, BITS, WIDTH, RANK, CLUSTER, WARPS, STRIP)                                  \
  if constexpr (BITS == 8 * sizeof(typename T::Number)) {                                          \
    static_assert(WIDTH == CLUSTER * WARPS * STRIP, "the strips don't cover the width");           \
    if (width == WIDTH && rank == RANK) return ROWS<T, CLUSTER, WARPS, STRIP, RANK>(call, stream); \
  }
#define BAFT_DECODE(...) BAFT_CASE(decode_rows, __VA_ARGS__)
#define BAFT_STREAM(...) BAFT_CASE(stream_rows, __VA_ARGS__)
  if (few) {
    BAFT_FORWARD_DECODE(BAFT_DECODE)
  } else {
    BAFT_FORWARD_STREAM(BAFT_STREAM)
  }
#undef BAFT_DECODE
#undef BAFT_STREAM
#undef BAFT_CASE
  return "no kernel is compiled for this width and rank";
}

} // namespace

std::vector<int64_t> widths() {
  std::set<int64_t> found;
#define BAFT_CASE(BITS, WIDTH, ...) found.insert(WIDTH);
  BAFT_FORWARD_STREAM(BAFT_CASE)
#undef BAFT_CASE
  return {found.begin(), found.end()};
}

bool has_forward(int64_t width, int64_t rank, Dtype dtype) {
#define BAFT_CASE(BITS, WIDTH, RANK, ...) \
  if (BITS == 8 * bytes_of(dtype) && width == WIDTH && padded_rank(rank) == RANK) return true;
  BAFT_FORWARD_STREAM(BAFT_CASE)
#undef BAFT_CASE
  return false;
}

const char* launch_forward(const Forward& call, int64_t width, Dtype dtype, void* stream) {
  if (call.rows.sequences * call.rows.length == 0) return nullptr;
  switch (dtype) {
    case Dtype::bfloat16: return launch_in<Bfloat16>(call, width, stream);
    case Dtype::float16: return launch_in<Float16>(call, width, stream);
    default: return launch_in<Float32>(call, width, stream);
  }
}

} // namespace baft::cuda
