// AVX-512: 32 registers of 16 floats. 12 x 2 sums, two vectors of weights and a broadcast take 27 of them.
#if defined(__AVX512F__)
#define BAFT_LANES 16
#define BAFT_TILE_ROWS 12
#define BAFT_EXPAND_VECTORS 4
#define BAFT_PAIRS false
#define BAFT_NAME "avx512"
#define BAFT_VARIANT avx512_kernels
#include "kernels.inl"
#else
#include "kernels.h"
namespace baft::cpu {
const Kernels* avx512_kernels() { return nullptr; }
} // namespace baft::cpu
#endif
