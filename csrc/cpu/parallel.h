// Pieces that forward and backward share: loops over row tiles, and the split of d where there are few of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "op.h"

namespace baft::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(index) for each index below count, on several threads.
template <class Body>
void parallel(ParallelFor parallel_for, int64_t count, int64_t grain, const Body& body) {
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t index = begin; index < end; ++index) (*static_cast<const Body*>(context))(index);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The row numbers first, first + 1, ... of a tile.
struct TileRows {
  int64_t rows[kMaxTileRows];
  int64_t count;

  TileRows(const Rows& all, int64_t first, int64_t size) : count(std::min(size, all.count - first)) {
    for (int64_t i = 0; i < count; ++i) rows[i] = all.rows ? all.rows[first + i] : first + i;
  }
};

// A projection of all rows, its outputs left in `sums` [tiles][splits][panels][rows of the tile][kPanel].
//
// Few rows are few tiles: then d is split as well, so that several threads have work. How, depends on the shape alone.
struct Projection {
  static constexpr int64_t kTasks = 16;          // pieces of work that are enough for the processors of today
  static constexpr int64_t kMinWidth = 512;      // columns below which a piece isn't worth a thread
  static constexpr int64_t kGrainWork = 1 << 16; // multiplications below which a thread isn't

  int64_t tile_rows, tiles, splits, width, outputs, panels, d;

  Projection(int64_t rows, int64_t d, int64_t outputs, int64_t most_rows)
      : tiles(ceil_div(rows, most_rows)), outputs(outputs), panels(ceil_div(outputs, kPanel)), d(d) {
    tile_rows = ceil_div(rows, std::max<int64_t>(tiles, 1)); // tiles alike: the threads get equal shares
    const int64_t wanted = std::min(ceil_div(kTasks, std::max<int64_t>(tiles, 1)), ceil_div(d, kMinWidth));
    width = ceil_div(ceil_div(d, wanted), kBlock) * kBlock;
    splits = ceil_div(d, width);
  }

  int64_t tile_size() const { return panels * tile_rows * kPanel; }
  int64_t width_of(int64_t split) const { return std::min(width, d - split * width); }
  int64_t grain() const { return std::max<int64_t>(1, kGrainWork / (tile_rows * outputs * width + 1)); }

  // Add the splits of a tile, in order, into the first.
  void add_splits(float* sums) const {
    for (int64_t split = 1; split < splits; ++split)
      for (int64_t i = 0; i < tile_size(); ++i) sums[i] += sums[split * tile_size() + i];
  }
};

} // namespace baft::cpu
