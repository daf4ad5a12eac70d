// Which shapes the kernels are compiled for: one line for each width d and padded rank. Other calls go to Triton.
//
// For few rows, loading parameters takes longest, so that many CTAs share them: the largest portable cluster, or 4 CTAs
// where the hop between them would cost as much as more of them save. Seven to twelve warps keep the reduction short.
//
// A warp of the streaming kernels holds the parameters of its strip in registers, 3/64 rank words a column and lane: a
// strip of 2048 / rank columns takes 96 of the 168 registers that twelve warps leave each thread. The cluster is the
// smallest that covers d so; clusters of more than 8 CTAs aren't portable, which leaves d = 8192 at rank 32 to Triton.
//
// Numbers of 32 bits take twice the words, and their parts (float32.cuh) more registers: strips have at most half the
// columns, and slices leave room for three tiles. What takes more than 8 CTAs in one of the kernels is in none of them.
#pragma once

// DO(bits of a number, width, rank, CTAs of a cluster, warps, columns of a warp's strip)
#define BAFT_FORWARD_STREAM(DO) \
  DO(16, 768, 8, 1, 6, 128)     \
  DO(16, 768, 16, 1, 6, 128)    \
  DO(16, 768, 32, 2, 6, 64)     \
  DO(16, 1024, 8, 1, 8, 128)    \
  DO(16, 1024, 16, 1, 8, 128)   \
  DO(16, 1024, 32, 2, 8, 64)    \
  DO(16, 2048, 8, 1, 8, 256)    \
  DO(16, 2048, 16, 2, 8, 128)   \
  DO(16, 2048, 32, 4, 8, 64)    \
  DO(16, 2560, 8, 2, 10, 128)   \
  DO(16, 2560, 16, 2, 10, 128)  \
  DO(16, 2560, 32, 4, 10, 64)   \
  DO(16, 3072, 8, 2, 6, 256)    \
  DO(16, 3072, 16, 4, 6, 128)   \
  DO(16, 3072, 32, 8, 6, 64)    \
  DO(16, 3584, 8, 2, 7, 256)    \
  DO(16, 3584, 16, 4, 7, 128)   \
  DO(16, 3584, 32, 8, 7, 64)    \
  DO(16, 4096, 8, 2, 8, 256)    \
  DO(16, 4096, 16, 4, 8, 128)   \
  DO(16, 4096, 32, 8, 8, 64)    \
  DO(16, 5120, 8, 4, 10, 128)   \
  DO(16, 5120, 16, 4, 10, 128)  \
  DO(16, 5120, 32, 8, 10, 64)   \
  DO(16, 8192, 8, 4, 8, 256)    \
  DO(16, 8192, 16, 8, 8, 128)   \
  DO(32, 768, 8, 1, 6, 128)     \
  DO(32, 768, 16, 2, 6, 64)     \
  DO(32, 768, 32, 4, 6, 32)     \
  DO(32, 1024, 8, 2, 8, 64)     \
  DO(32, 1024, 16, 2, 8, 64)    \
  DO(32, 1024, 32, 4, 8, 32)    \
  DO(32, 2048, 8, 4, 8, 64)     \
  DO(32, 2048, 16, 4, 8, 64)    \
  DO(32, 2560, 8, 4, 10, 64)    \
  DO(32, 2560, 16, 8, 5, 64)    \
  DO(32, 3072, 8, 4, 6, 128)    \
  DO(32, 3072, 16, 8, 6, 64)    \
  DO(32, 3584, 8, 4, 7, 128)    \
  DO(32, 3584, 16, 8, 7, 64)    \
  DO(32, 4096, 8, 8, 8, 64)     \
  DO(32, 4096, 16, 8, 8, 64)    \
  DO(32, 5120, 8, 8, 10, 64)

// DO(bits of a number, width, rank, CTAs of a cluster, warps, columns of a warp's strip)
#define BAFT_FORWARD_DECODE(DO) \
  DO(16, 768, 8, 4, 6, 32)      \
  DO(16, 768, 16, 4, 6, 32)     \
  DO(16, 768, 32, 4, 6, 32)     \
  DO(16, 1024, 8, 4, 8, 32)     \
  DO(16, 1024, 16, 4, 8, 32)    \
  DO(16, 1024, 32, 4, 8, 32)    \
  DO(16, 2048, 8, 8, 8, 32)     \
  DO(16, 2048, 16, 8, 8, 32)    \
  DO(16, 2048, 32, 8, 8, 32)    \
  DO(16, 2560, 8, 8, 10, 32)    \
  DO(16, 2560, 16, 8, 10, 32)   \
  DO(16, 2560, 32, 8, 10, 32)   \
  DO(16, 3072, 8, 8, 12, 32)    \
  DO(16, 3072, 16, 8, 12, 32)   \
  DO(16, 3072, 32, 8, 12, 32)   \
  DO(16, 3584, 8, 8, 7, 64)     \
  DO(16, 3584, 16, 8, 7, 64)    \
  DO(16, 3584, 32, 8, 7, 64)    \
  DO(16, 4096, 8, 8, 8, 64)     \
  DO(16, 4096, 16, 8, 8, 64)    \
  DO(16, 4096, 32, 8, 8, 64)    \
  DO(16, 5120, 8, 8, 10, 64)    \
  DO(16, 5120, 16, 8, 10, 64)   \
  DO(16, 5120, 32, 8, 10, 64)   \
  DO(16, 8192, 8, 8, 16, 64)    \
  DO(16, 8192, 16, 8, 16, 64)   \
  DO(32, 768, 8, 4, 6, 32)      \
  DO(32, 768, 16, 4, 6, 32)     \
  DO(32, 768, 32, 4, 6, 32)     \
  DO(32, 1024, 8, 4, 8, 32)     \
  DO(32, 1024, 16, 4, 8, 32)    \
  DO(32, 1024, 32, 4, 8, 32)    \
  DO(32, 2048, 8, 8, 8, 32)     \
  DO(32, 2048, 16, 8, 8, 32)    \
  DO(32, 2560, 8, 8, 10, 32)    \
  DO(32, 2560, 16, 8, 10, 32)   \
  DO(32, 3072, 8, 8, 12, 32)    \
  DO(32, 3072, 16, 8, 12, 32)   \
  DO(32, 3584, 8, 8, 7, 64)     \
  DO(32, 3584, 16, 8, 7, 64)    \
  DO(32, 4096, 8, 8, 8, 64)     \
  DO(32, 4096, 16, 8, 8, 64)    \
  DO(32, 5120, 8, 8, 10, 64)

// A warp also holds the gradients of its strip, twice as many numbers as parameters.
// DO(bits of a number, width, rank, CTAs of a cluster, warps, columns of a warp's strip, rows of a tile)
#define BAFT_BACKWARD_STREAM(DO) \
  DO(16, 768, 8, 1, 6, 128, 16)  \
  DO(16, 768, 16, 2, 6, 64, 16)  \
  DO(16, 768, 32, 4, 6, 32, 16)  \
  DO(16, 1024, 8, 1, 8, 128, 16) \
  DO(16, 1024, 16, 2, 8, 64, 16) \
  DO(16, 1024, 32, 4, 8, 32, 16) \
  DO(16, 2048, 8, 2, 8, 128, 16) \
  DO(16, 2048, 16, 4, 8, 64, 32) \
  DO(16, 2048, 32, 4, 8, 64, 16) \
  DO(16, 2560, 8, 4, 5, 128, 16) \
  DO(16, 2560, 16, 8, 5, 64, 32) \
  DO(16, 2560, 32, 8, 5, 64, 16) \
  DO(16, 3072, 8, 4, 6, 128, 16) \
  DO(16, 3072, 16, 8, 6, 64, 32) \
  DO(16, 3072, 32, 8, 6, 64, 16) \
  DO(16, 3584, 8, 4, 7, 128, 16) \
  DO(16, 3584, 16, 8, 7, 64, 32) \
  DO(16, 3584, 32, 8, 7, 64, 16) \
  DO(16, 4096, 8, 4, 8, 128, 16) \
  DO(16, 4096, 16, 8, 8, 64, 32) \
  DO(16, 4096, 32, 8, 8, 64, 16) \
  DO(16, 5120, 8, 8, 5, 128, 16) \
  DO(16, 5120, 16, 8, 8, 80, 16) \
  DO(16, 8192, 8, 8, 8, 128, 16) \
  DO(32, 768, 8, 2, 6, 64, 16)   \
  DO(32, 768, 16, 4, 6, 32, 16)  \
  DO(32, 768, 32, 8, 6, 16, 16)  \
  DO(32, 1024, 8, 2, 8, 64, 16)  \
  DO(32, 1024, 16, 4, 8, 32, 16) \
  DO(32, 1024, 32, 8, 8, 16, 16) \
  DO(32, 2048, 8, 4, 8, 64, 16)  \
  DO(32, 2048, 16, 8, 8, 32, 16) \
  DO(32, 2560, 8, 4, 8, 80, 16)  \
  DO(32, 2560, 16, 8, 5, 64, 16) \
  DO(32, 3072, 8, 8, 6, 64, 16)  \
  DO(32, 3072, 16, 8, 6, 64, 16) \
  DO(32, 3584, 8, 8, 7, 64, 16)  \
  DO(32, 3584, 16, 8, 7, 64, 16) \
  DO(32, 4096, 8, 8, 8, 64, 16)  \
  DO(32, 4096, 16, 8, 8, 64, 16) \
  DO(32, 5120, 8, 8, 8, 80, 16)
