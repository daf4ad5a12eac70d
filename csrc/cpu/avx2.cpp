// AVX2 with FMA and F16C: 16 registers of 8 floats. 6 x 2 sums, two vectors of weights and a broadcast take 15 of them.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BAFT_LANES 8
#define BAFT_TILE_ROWS 6
#define BAFT_EXPAND_VECTORS 2
#define BAFT_PAIRS false
#define BAFT_NAME "avx2"
#define BAFT_VARIANT avx2_kernels
#include "kernels.inl"
#else
#include "kernels.h"
namespace baft::cpu {
const Kernels* avx2_kernels() { return nullptr; }
} // namespace baft::cpu
#endif
