// The kernels for bfloat16 on processors that multiply and add pairs of it: twice the work of float32 in an
// instruction. A part of kernels.inl, which has the same three for float32.
namespace baft::cpu {
namespace {

constexpr int64_t kPairDepth = 2 * kDepth; // columns of h at a time: as many bytes as of float32

// As store() rounds, for one number.
inline Bfloat16 rounded(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : nearest)};
}

inline uint32_t pair_of(Bfloat16 low, Bfloat16 high) { return low.bits | uint32_t{high.bits} << 16; }

inline Vector add_products(Vector sum, const void* pairs, uint32_t broadcast) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(pairs),
                                  (__m512bh)_mm512_set1_epi32(static_cast<int>(broadcast)));
}

// -- projection --

template <int ROWS, int VECTORS>
void project_pairs_tile(const Bfloat16* x, const Bfloat16* w, int64_t pairs, float* sums) {
  constexpr int UNROLL = ROWS > 6 ? 1 : ROWS > 3 ? 2 : ROWS > 1 ? 4 : 8;
  Vector total[UNROLL][ROWS][VECTORS] = {};
  const auto step = [&](Vector(&of_step)[ROWS][VECTORS], int64_t k) {
    for (int i = 0; i < ROWS; ++i) {
      const uint32_t pair = reinterpret_cast<const uint32_t*>(x + i * kPairDepth)[k];
      for (int v = 0; v < VECTORS; ++v)
        of_step[i][v] = add_products(of_step[i][v], w + (k * kPanel + v * kLanes) * 2, pair);
    }
  };
  int64_t k = 0;
  for (; k + UNROLL <= pairs; k += UNROLL)
    for (int u = 0; u < UNROLL; ++u) step(total[u], k + u);
  for (; k < pairs; ++k) step(total[0], k);
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      for (int half = UNROLL / 2; half > 0; half /= 2)
        for (int u = 0; u < half; ++u) total[u][i][v] += total[u + half][i][v];
      float* sum = sums + i * kPanel + v * kLanes;
      store(sum, load(sum) + total[0][i][v]);
    }
}

template <int VECTORS>
inline void project_pairs_rows(int64_t count, const Bfloat16* x, const Bfloat16* w, int64_t pairs, float* sums) {
  switch (count) {
#define BAFT_CASE(ROWS) \
  case ROWS: return project_pairs_tile<ROWS, VECTORS>(x, w, pairs, sums);
    BAFT_CASE(1)
    BAFT_CASE(2)
    BAFT_CASE(3)
    BAFT_CASE(4)
    BAFT_CASE(5)
    BAFT_CASE(6)
    BAFT_CASE(7)
    BAFT_CASE(8)
    BAFT_CASE(9)
    BAFT_CASE(10)
    BAFT_CASE(11)
    BAFT_CASE(12)
#undef BAFT_CASE
  }
}

void project_pairs(const Matrix& x, const int64_t* rows, int64_t count, int64_t first, int64_t width,
                   const Packed& panels, int64_t panel_count, int64_t outputs, int64_t dim, float* sums) {
  alignas(64) Bfloat16 copied[kTileRows * kPairDepth];
  const int64_t even_dim = dim + dim % 2;
  for (int64_t from = first; from < first + width; from += kPairDepth) {
    const int64_t depth = smaller(kPairDepth, first + width - from), pairs = (depth + 1) / 2;
    const int64_t next = smaller(kPairDepth, first + width - from - depth);
    for (int64_t i = 0; i < count; ++i) {
      const Bfloat16* row = row_of<Bfloat16>(x, rows[i]) + from;
      __builtin_memcpy(copied + i * kPairDepth, row, depth * sizeof(Bfloat16));
      if (depth % 2) copied[i * kPairDepth + depth] = {0};
      ask_for(row + depth, next);
    }
    for (int64_t panel = 0; panel < panel_count; ++panel) {
      const Bfloat16* w = static_cast<const Bfloat16*>(panels.data) + (panel * even_dim + from) * kPanel;
      const int64_t used = smaller(kPanel, outputs - panel * kPanel);
      for (int64_t run = 0; run < pairs; run += kRun) {
        const int64_t some = smaller(kRun, pairs - run);
        float* sum = sums + panel * count * kPanel;
        if (used > kLanes)
          project_pairs_rows<2>(count, copied + 2 * run, w + run * kPanel * 2, some, sum);
        else
          project_pairs_rows<1>(count, copied + 2 * run, w + run * kPanel * 2, some, sum);
      }
    }
  }
}

// -- write-back --

// Round C [count, k] to pairs of neighbours along k: [count][k / 2], the last with a zero if k is odd.
inline void pair_columns(const float* coefficients, int64_t stride, int64_t count, int64_t k, uint32_t* pairs) {
  for (int64_t i = 0; i < count; ++i, coefficients += stride, pairs += (k + 1) / 2) {
    for (int64_t j = 0; j + 1 < k; j += 2)
      pairs[j / 2] = pair_of(rounded(coefficients[j]), rounded(coefficients[j + 1]));
    if (k % 2) pairs[k / 2] = pair_of(rounded(coefficients[k - 1]), {0});
  }
}

template <int ROWS>
void expand_pairs_tile(const Matrix& x, const Matrix& out, const int64_t* rows, int64_t first, int64_t width,
                       const uint32_t* coefficients, int64_t half, const Bfloat16* e) {
  Vector total[ROWS][kExpandVectors] = {};
  for (int64_t j = 0; j < half; ++j)
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < kExpandVectors; ++v)
        total[i][v] = add_products(total[i][v], e + (j * kBlock + v * kLanes) * 2, coefficients[i * half + j]);
  for (int i = 0; i < ROWS; ++i) {
    const Bfloat16* from = row_of<Bfloat16>(x, rows[i]) + first;
    add_row(from, const_cast<Bfloat16*>(row_of<Bfloat16>(out, rows[i])) + first, width, total[i]);
  }
}

void expand_pairs(const Matrix& x, const Matrix& out, const int64_t* rows, int64_t count, int64_t first, int64_t width,
                  const float* coefficients, int64_t stride, int64_t k, const Packed& blocks) {
  const int64_t half = (k + 1) / 2;
  uint32_t pairs[kTileRows * kMostPairs / 2];
  for (int64_t start = 0; start < count; start += kTileRows) {
    const int64_t some = smaller(kTileRows, count - start);
    pair_columns(coefficients + start * stride, stride, some, k, pairs);
    for (int64_t column = first; column < first + width; column += kBlock) {
      const Bfloat16* e = static_cast<const Bfloat16*>(blocks.data) + (column / kBlock) * 2 * half * kBlock;
      const int64_t columns = smaller(kBlock, first + width - column);
      for (int64_t i = 0; i < some; i += kExpandRows) {
        const int64_t* of_tile = rows + start + i;
        switch (smaller(kExpandRows, some - i)) {
#define BAFT_CASE(ROWS) \
  case ROWS: expand_pairs_tile<ROWS>(x, out, of_tile, column, columns, pairs + i * half, half, e); break;
          BAFT_CASE(1)
          BAFT_CASE(2)
          BAFT_CASE(3)
          BAFT_CASE(4)
          BAFT_CASE(5)
          BAFT_CASE(6)
#undef BAFT_CASE
        }
      }
    }
  }
}

// -- outer products: here the pairs are of neighbouring rows --

template <int COEFFICIENTS>
void outer_pairs_tile(const uint32_t* x, int64_t half, const uint32_t* coefficients, int64_t stride, float* sums) {
  Vector total[COEFFICIENTS][kExpandVectors] = {};
  for (int64_t i = 0; i < half; ++i)
    for (int j = 0; j < COEFFICIENTS; ++j)
      for (int v = 0; v < kExpandVectors; ++v)
        total[j][v] = add_products(total[j][v], x + i * kBlock + v * kLanes, coefficients[i * stride + j]);
  for (int j = 0; j < COEFFICIENTS; ++j)
    for (int v = 0; v < kExpandVectors; ++v) {
      float* sum = sums + j * kBlock + v * kLanes;
      store(sum, load(sum) + total[j][v]);
    }
}

void pair_rows(const float* coefficients, int64_t count, int64_t k, uint32_t* pairs) {
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t j = 0; j < k; ++j) {
      const float upper = coefficients[i * k + j], lower = i + 1 < count ? coefficients[(i + 1) * k + j] : 0.0f;
      pairs[i / 2 * k + j] = pair_of(rounded(upper), rounded(lower));
    }
}

// Two rows of 16 bit as one of pairs.
inline void interleave(const Bfloat16* upper, const Bfloat16* lower, uint32_t* pairs) {
  for (int64_t column = 0; column < kBlock; column += kLanes) {
    Bits low = __builtin_convertvector(*reinterpret_cast<const Halves*>(upper + column), Bits);
    Bits high = __builtin_convertvector(*reinterpret_cast<const Halves*>(lower + column), Bits);
    *reinterpret_cast<Bits*>(pairs + column) = low | high << 16;
  }
}

void outer_pairs(const Matrix& x, const int64_t* rows, int64_t count, int64_t first, int64_t width,
                 const uint32_t* coefficients, int64_t stride, int64_t k, float* sums) {
  alignas(64) uint32_t paired[kOuterRows / 2 * kBlock];
  Bfloat16 padded[2][kBlock];
  for (int64_t start = 0; start < count; start += kOuterRows) {
    const int64_t some = smaller(kOuterRows, count - start), half = (some + 1) / 2;
    for (int64_t i = 0; i < half; ++i) {
      const bool alone = 2 * i + 1 == some;
      const Bfloat16* upper = row_of<Bfloat16>(x, rows[start + 2 * i]) + first;
      const Bfloat16* lower = alone ? nullptr : row_of<Bfloat16>(x, rows[start + 2 * i + 1]) + first;
      if (alone || width < kBlock) {
        __builtin_memset(padded, 0, sizeof padded);
        __builtin_memcpy(padded[0], upper, width * sizeof(Bfloat16));
        if (!alone) __builtin_memcpy(padded[1], lower, width * sizeof(Bfloat16));
        upper = padded[0];
        lower = padded[1];
      }
      interleave(upper, lower, paired + i * kBlock);
    }
    const uint32_t* c = coefficients + start / 2 * stride;
    int64_t j = 0;
    for (; j + kExpandRows <= k; j += kExpandRows)
      outer_pairs_tile<kExpandRows>(paired, half, c + j, stride, sums + j * kBlock);
    for (; j < k; ++j) outer_pairs_tile<1>(paired, half, c + j, stride, sums + j * kBlock);
  }
}

} // namespace
} // namespace baft::cpu
