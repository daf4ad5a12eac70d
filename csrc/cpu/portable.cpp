// Vectors of four floats, which any compiler maps to what the processor has (SSE2, NEON, or scalars).
#define BAFT_LANES 4
#define BAFT_TILE_ROWS 6
#define BAFT_EXPAND_VECTORS 2
#define BAFT_PAIRS false
#define BAFT_NAME "portable"
#define BAFT_VARIANT portable_kernels
#include "kernels.inl"
