// AVX-512 with dot products of bfloat16: two products a lane and instruction, summed in float32.
#if defined(__AVX512BF16__)
#define BAFT_LANES 16
#define BAFT_TILE_ROWS 12
#define BAFT_EXPAND_VECTORS 4
#define BAFT_PAIRS true
#define BAFT_NAME "avx512bf16"
#define BAFT_VARIANT avx512bf16_kernels
#include "kernels.inl"
#else
#include "kernels.h"
namespace baft::cpu {
const Kernels* avx512bf16_kernels() { return nullptr; }
} // namespace baft::cpu
#endif
