// Packed parameters as a lane holds them.
#pragma once

#include "fragments.h"
#include "machine.cuh"

namespace baft::cuda {

// A lane's share of one block of packed parameters.
template <class T, int kParameterRows>
struct Fragments {
  static constexpr int kWords = kParameterRows / 2 / kPerWord<T>;
  uint32_t words[kWords];

  BAFT_DEVICE void load(const uint32_t* packed, int64_t block) {
    const uint32_t* mine = packed + (block * 32 + lane()) * kWords;
    if constexpr (kWords == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(mine);
      words[0] = two.x, words[1] = two.y;
    } else {
      BAFT_UNROLL
      for (int i = 0; i < kWords; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(mine + i);
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    }
  }
};

// A lane's share of the packed parameters of its warp's strip: in registers, or where there are too few, in shared
// memory. There a lane reads only what it wrote itself, so that no lanes need to meet.
template <class T, int kParameterRows, int kBlocks, bool kShared>
struct StripParameters {
  static constexpr int kBytes = 0; // of shared memory, for a warp
  Fragments<T, kParameterRows> blocks[kBlocks];

  BAFT_DEVICE explicit StripParameters(unsigned char*) {}
  BAFT_DEVICE void load(const uint32_t* packed, int64_t first_block) {
    BAFT_UNROLL
    for (int b = 0; b < kBlocks; ++b) blocks[b].load(packed, first_block + b);
  }
  BAFT_DEVICE const Fragments<T, kParameterRows>& at(int b) const { return blocks[b]; }
};

template <class T, int kParameterRows, int kBlocks>
struct StripParameters<T, kParameterRows, kBlocks, true> {
  using Block = Fragments<T, kParameterRows>;
  static constexpr int kVectors = Block::kWords / 4; // of 16 bytes, of a lane's share of a block
  static constexpr int kBytes = kBlocks * kVectors * 32 * 16;
  static_assert(Block::kWords % 4 == 0, "whole vectors");
  uint4* mine;

  BAFT_DEVICE explicit StripParameters(unsigned char* of_warp) : mine(reinterpret_cast<uint4*>(of_warp) + lane()) {}
  BAFT_DEVICE void load(const uint32_t* packed, int64_t first_block) {
    BAFT_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      Block block;
      block.load(packed, first_block + b);
      BAFT_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        const uint32_t* words = block.words + 4 * i;
        mine[(b * kVectors + i) * 32] = {words[0], words[1], words[2], words[3]};
      }
    }
  }
  BAFT_DEVICE Block at(int b) const {
    Block block;
    BAFT_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const uint4 four = mine[(b * kVectors + i) * 32];
      uint32_t* words = block.words + 4 * i;
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    }
    return block;
  }
};

} // namespace baft::cuda
