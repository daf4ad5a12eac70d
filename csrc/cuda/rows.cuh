// Which rows a cluster works on: tiles of a call's items, none of which spans two sequences.
#pragma once

#include "kernels.h"
#include "machine.cuh"

namespace baft::cuda {

struct Tile {
  int64_t sequence;
  int64_t first; // item
  int count;     // of items
};

// The tiles of one cluster, fewer than 2^31: equally many for each, neighbours together, so that parameters are seldom
// loaded anew.
template <int kRows>
struct Tiles {
  int64_t length;
  unsigned per_sequence, begin;
  int count;

  BAFT_DEVICE Tiles(const Rows& rows, int cluster, int clusters)
      : length(rows.length), per_sequence(static_cast<unsigned>((rows.length + kRows - 1) / kRows)) {
    const int64_t all = rows.sequences * per_sequence;
    begin = static_cast<unsigned>(all * cluster / clusters);
    count = static_cast<int>(all * (cluster + 1) / clusters - begin);
  }

  BAFT_DEVICE Tile at(int j) const {
    const unsigned tile = begin + j, sequence = tile / per_sequence;
    const int64_t start = static_cast<int64_t>(tile % per_sequence) * kRows, left = length - start;
    return {sequence, sequence * length + start, static_cast<int>(left < kRows ? left : kRows)};
  }
};

BAFT_DEVICE int64_t row_of(const Rows& rows, int64_t item) { return rows.list ? rows.list[item] : item; }
BAFT_DEVICE bool is_edited(const Rows& rows, int64_t row) { return !rows.mask || rows.mask[row]; }
BAFT_DEVICE int64_t set_of(const Rows& rows, int64_t sequence) { return rows.adapters ? rows.adapters[sequence] : 0; }

} // namespace baft::cuda
