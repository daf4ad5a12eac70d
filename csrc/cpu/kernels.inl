// The kernels, written once over vectors of kLanes floats and compiled once for each instruction set. The including
// file sets BAFT_LANES, BAFT_TILE_ROWS, BAFT_EXPAND_VECTORS, BAFT_PAIRS, BAFT_NAME and BAFT_VARIANT.
//
// Everything is in an unnamed namespace, and nothing of the C++ library is called: an inline function that two variants
// share would be linked once, maybe with instructions that the processor doesn't have.
#include <cstdint>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace baft::cpu {
namespace {

constexpr int kLanes = BAFT_LANES;
constexpr int kTileRows = BAFT_TILE_ROWS;
constexpr int kExpandVectors = BAFT_EXPAND_VECTORS; // vectors of columns in a write-back tile
constexpr int kExpandRows = 6;                      // rows of it, and coefficients of an outer-product tile
constexpr int kProjectVectors = 2;                  // vectors of outputs in a projection tile
constexpr int64_t kDepth = 256;                     // columns of h that are unpacked at a time: 12 KiB of rows
constexpr int64_t kRun = 64;                        // products summed in a row before the sum is added to a longer one
constexpr int64_t kOuterRows = 48;                  // rows that an outer product sums in registers before it stores

static_assert(kPanel % (kProjectVectors * kLanes) == 0, "a panel is made of whole tiles");
static_assert(kBlock % (kExpandVectors * kLanes) == 0, "a block is made of whole tiles");
static_assert(kTileRows <= kMaxTileRows, "buffers are sized by kMaxTileRows");

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// -- conversions: to float32 exactly, from it to the nearest, ties to even --

inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }

inline Vector load(const Bfloat16* x) {
  Bits bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(x), Bits) << 16;
  return reinterpret_cast<Vector&>(bits);
}

inline void store(float* out, Vector x) { *reinterpret_cast<Vector*>(out) = x; }

inline void store(Bfloat16* out, Vector x) {
  Bits bits = reinterpret_cast<Bits&>(x);
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Bits nan = (bits >> 16) | 0x40; // rounding could carry a NaN into infinity
  auto is_nan = x != x;
  Bits chosen = is_nan ? nan : rounded;
  *reinterpret_cast<Halves*>(out) = __builtin_convertvector(chosen, Halves);
}

#if defined(__AVX512F__)
inline Vector load(const Float16* x) {
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline void store(Float16* out, Vector x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Vector load(const Float16* x) {
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline void store(Float16* out, Vector x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vector load(const Float16* x) {
  Vector result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = (float)reinterpret_cast<const _Float16*>(x)[lane];
  return result;
}
inline void store(Float16* out, Vector x) {
  for (int lane = 0; lane < kLanes; ++lane) reinterpret_cast<_Float16*>(out)[lane] = (_Float16)x[lane];
}
#endif

// Unpack x[first : first + width] to float32, padded with zeros to `padded`, a multiple of kLanes.
template <class T>
inline void unpack(const T* x, int64_t width, int64_t padded, float* out) {
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) store(out + column, load(x + column));
  if (column < width) {
    T rest[kLanes] = {};
    for (int64_t i = column; i < width; ++i) rest[i - column] = x[i];
    store(out + column, load(rest));
    column += kLanes;
  }
  for (; column < padded; column += kLanes) store(out + column, Vector{});
}

template <class T>
inline const T* row_of(const Matrix& x, int64_t row) {
  return static_cast<const T*>(x.data) + row * x.stride;
}

template <class T>
struct Tag {
  using type = T;
};

// Call `function` with the tag of the matrix' element type.
template <class F>
inline void with_type(Dtype dtype, F function) {
  if (dtype == Dtype::float32) return function(Tag<float>{});
  if (dtype == Dtype::bfloat16) return function(Tag<Bfloat16>{});
  return function(Tag<Float16>{});
}

// Write a tile's row: x + sums, whole vectors or the `width` columns that are left.
template <class T>
inline void add_row(const T* from, T* to, int64_t width, const Vector* sums) {
  constexpr int64_t COLUMNS = kExpandVectors * kLanes;
  if (width >= COLUMNS) {
    for (int v = 0; v < kExpandVectors; ++v) store(to + v * kLanes, load(from + v * kLanes) + sums[v]);
    return;
  }
  T padded[COLUMNS] = {};
  for (int64_t column = 0; column < width; ++column) padded[column] = from[column];
  for (int v = 0; v < kExpandVectors; ++v) store(padded + v * kLanes, load(padded + v * kLanes) + sums[v]);
  for (int64_t column = 0; column < width; ++column) to[column] = padded[column];
}

// Ask for x[first : first + width] of a row, to have it in the second-level cache when its turn comes: a tile reads
// many rows at once, a kilobyte of each, and the hardware takes that for no stream.
template <class T>
inline void ask_for(const T* x, int64_t width) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t column = 0; column < width; column += LINE) __builtin_prefetch(x + column, 0, 2);
}

#if BAFT_PAIRS
} // namespace
} // namespace baft::cpu
#include "pairs.inl"
namespace baft::cpu {
namespace {
#endif

// -- projection: a tile of ROWS x (VECTORS * kLanes) sums in registers, along k --

// Few rows leave few sums in flight; UNROLL steps of k in sums of their own hide the latency of the additions.
template <int ROWS>
constexpr int unrolled() {
  return ROWS > kTileRows / 2 ? 1 : ROWS > kTileRows / 4 ? 2 : ROWS > 1 ? 4 : 8;
}

template <int ROWS, int VECTORS>
void project_tile(const float* x, const float* w, int64_t depth, float* sums) {
  constexpr int UNROLL = unrolled<ROWS>();
  Vector total[UNROLL][ROWS][VECTORS] = {};
  int64_t k = 0;
  for (; k + UNROLL <= depth; k += UNROLL)
    for (int step = 0; step < UNROLL; ++step) {
      Vector weights[VECTORS];
      for (int v = 0; v < VECTORS; ++v) weights[v] = load(w + (k + step) * kPanel + v * kLanes);
      for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) total[step][i][v] += x[i * kDepth + k + step] * weights[v];
    }
  for (; k < depth; ++k)
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECTORS; ++v) total[0][i][v] += x[i * kDepth + k] * load(w + k * kPanel + v * kLanes);
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      for (int half = UNROLL / 2; half > 0; half /= 2)
        for (int step = 0; step < half; ++step) total[step][i][v] += total[step + half][i][v];
      float* sum = sums + i * kPanel + v * kLanes;
      store(sum, load(sum) + total[0][i][v]);
    }
}

template <int VECTORS>
inline void project_rows(int64_t count, const float* x, const float* w, int64_t depth, float* sums) {
  switch (count) {
#define BAFT_CASE(ROWS) \
  case ROWS: return project_tile<ROWS, VECTORS>(x, w, depth, sums);
    BAFT_CASE(1)
    BAFT_CASE(2)
    BAFT_CASE(3)
    BAFT_CASE(4)
    BAFT_CASE(5)
    BAFT_CASE(6)
#if BAFT_TILE_ROWS > 6
    BAFT_CASE(7)
    BAFT_CASE(8)
    BAFT_CASE(9)
    BAFT_CASE(10)
    BAFT_CASE(11)
    BAFT_CASE(12)
#endif
#undef BAFT_CASE
  }
}

void project(const Matrix& x, const int64_t* rows, int64_t count, int64_t first, int64_t width, const Packed& panels,
             int64_t panel_count, int64_t outputs, int64_t dim, float* sums) {
#if BAFT_PAIRS
  if (panels.pairs) return project_pairs(x, rows, count, first, width, panels, panel_count, outputs, dim, sums);
#endif
  alignas(64) float unpacked[kTileRows * kDepth];
  for (int64_t from = first; from < first + width; from += kDepth) {
    const int64_t depth = smaller(kDepth, first + width - from);
    with_type(x.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const int64_t next = smaller(kDepth, first + width - from - depth);
      for (int64_t i = 0; i < count; ++i) {
        const T* row = row_of<T>(x, rows[i]) + from;
        unpack(row, depth, depth, unpacked + i * kDepth);
        ask_for(row + depth, next);
      }
    });
    for (int64_t panel = 0; panel < panel_count; ++panel) {
      const float* w = static_cast<const float*>(panels.data) + (panel * dim + from) * kPanel;
      const int64_t used = smaller(kPanel, outputs - panel * kPanel);
      float* sum = sums + panel * count * kPanel;
      for (int64_t output = 0; output < used; output += kProjectVectors * kLanes)
        for (int64_t run = 0; run < depth; run += kRun) {
          const float* of_run = w + run * kPanel + output;
          if (used - output > kLanes)
            project_rows<kProjectVectors>(count, unpacked + run, of_run, smaller(kRun, depth - run), sum + output);
          else
            project_rows<1>(count, unpacked + run, of_run, smaller(kRun, depth - run), sum + output);
        }
    }
  }
}

// -- write-back: a tile of ROWS x (kExpandVectors * kLanes) results in registers, along the coefficients --

template <int ROWS, class T>
void expand_tile(const Matrix& x, const Matrix& out, const int64_t* rows, int64_t first, int64_t width,
                 const float* coefficients, int64_t stride, int64_t k, const float* e) {
  Vector total[ROWS][kExpandVectors] = {};
  for (int64_t j = 0; j < k; ++j) {
    Vector basis[kExpandVectors];
    for (int v = 0; v < kExpandVectors; ++v) basis[v] = load(e + j * kBlock + v * kLanes);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < kExpandVectors; ++v) total[i][v] += coefficients[i * stride + j] * basis[v];
  }
  for (int i = 0; i < ROWS; ++i)
    add_row(row_of<T>(x, rows[i]) + first, const_cast<T*>(row_of<T>(out, rows[i])) + first, width, total[i]);
}

template <class T>
inline void expand_rows(const Matrix& x, const Matrix& out, const int64_t* rows, int64_t count, int64_t first,
                        int64_t width, const float* coefficients, int64_t stride, int64_t k, const float* e) {
  switch (count) {
#define BAFT_CASE(ROWS) \
  case ROWS: return expand_tile<ROWS, T>(x, out, rows, first, width, coefficients, stride, k, e);
    BAFT_CASE(1)
    BAFT_CASE(2)
    BAFT_CASE(3)
    BAFT_CASE(4)
    BAFT_CASE(5)
    BAFT_CASE(6)
#undef BAFT_CASE
  }
}

void expand(const Matrix& x, const Matrix& out, const int64_t* rows, int64_t count, int64_t first, int64_t width,
            const float* coefficients, int64_t stride, int64_t k, const Packed& blocks) {
#if BAFT_PAIRS
  if (blocks.pairs) return expand_pairs(x, out, rows, count, first, width, coefficients, stride, k, blocks);
#endif
  constexpr int64_t COLUMNS = kExpandVectors * kLanes;
  with_type(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t column = first; column < first + width; column += COLUMNS) {
      const float* e = static_cast<const float*>(blocks.data) + (column / kBlock) * k * kBlock + column % kBlock;
      for (int64_t i = 0; i < count; i += kExpandRows)
        expand_rows<T>(x, out, rows + i, smaller(kExpandRows, count - i), column,
                       smaller(COLUMNS, first + width - column), coefficients + i * stride, stride, k, e);
    }
  });
}

// -- outer products: a tile of COEFFICIENTS x (kExpandVectors * kLanes) sums in registers, along the rows --

template <int COEFFICIENTS>
void outer_tile(const float* x, int64_t count, const float* coefficients, int64_t stride, float* sums) {
  Vector total[COEFFICIENTS][kExpandVectors] = {}; // summed apart first: long sums in float32 lose digits
  for (int64_t i = 0; i < count; ++i) {
    Vector row[kExpandVectors];
    for (int v = 0; v < kExpandVectors; ++v) row[v] = load(x + i * kBlock + v * kLanes);
    for (int j = 0; j < COEFFICIENTS; ++j)
      for (int v = 0; v < kExpandVectors; ++v) total[j][v] += coefficients[i * stride + j] * row[v];
  }
  for (int j = 0; j < COEFFICIENTS; ++j)
    for (int v = 0; v < kExpandVectors; ++v) {
      float* sum = sums + j * kBlock + v * kLanes;
      store(sum, load(sum) + total[j][v]);
    }
}

void outer(const Matrix& x, const int64_t* rows, int64_t count, int64_t first, int64_t width, const void* coefficients,
           int64_t stride, int64_t k, bool pairs, float* sums) {
#if BAFT_PAIRS
  if (pairs)
    return outer_pairs(x, rows, count, first, width, static_cast<const uint32_t*>(coefficients), stride, k, sums);
#else
  (void)pairs;
#endif
  alignas(64) float unpacked[kOuterRows * kBlock];
  for (int64_t start = 0; start < count; start += kOuterRows) {
    const int64_t some = smaller(kOuterRows, count - start);
    with_type(x.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (int64_t i = 0; i < some; ++i)
        unpack(row_of<T>(x, rows[start + i]) + first, width, kBlock, unpacked + i * kBlock);
    });
    for (int64_t column = 0; column < width; column += kExpandVectors * kLanes) {
      const float* c = static_cast<const float*>(coefficients) + start * stride;
      int64_t j = 0;
      for (; j + kExpandRows <= k; j += kExpandRows)
        outer_tile<kExpandRows>(unpacked + column, some, c + j, stride, sums + j * kBlock + column);
      for (; j < k; ++j) outer_tile<1>(unpacked + column, some, c + j, stride, sums + j * kBlock + column);
    }
  }
}

} // namespace

const Kernels* BAFT_VARIANT() {
#if !BAFT_PAIRS
  constexpr decltype(Kernels::pair_rows) pair_rows = nullptr;
#endif
  static const Kernels table = {BAFT_NAME, kTileRows, BAFT_PAIRS, project, expand, outer, pair_rows};
  return &table;
}

} // namespace baft::cpu
