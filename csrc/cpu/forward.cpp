#include <cmath>

#include "parallel.h"

namespace baft::cpu {
namespace {

// w and u of one row from its projections p = D h + b and z = G h + c; `at(j)` is output j without its bias.
template <class At>
void gate_row(const Forward& call, const At& at, float* weights, float* update) {
  const int64_t r = call.r;
  const float *b = call.bias, *c = call.bias + r;
  if (call.gate == Gate::none) {
    for (int64_t j = 0; j < r; ++j) weights[j] = 1.0f;
  } else if (call.gate == Gate::sigmoid) {
    for (int64_t j = 0; j < r; ++j) weights[j] = 1.0f / (1.0f + std::exp(-(at(r + j) + c[j])));
  } else {
    float largest = at(r) + c[0], sum = 0.0f;
    for (int64_t j = 1; j < r; ++j) largest = std::max(largest, at(r + j) + c[j]);
    for (int64_t j = 0; j < r; ++j) sum += weights[j] = std::exp(at(r + j) + c[j] - largest);
    for (int64_t j = 0; j < r; ++j) weights[j] /= sum;
  }
  for (int64_t j = 0; j < r; ++j) update[j] = weights[j] * (at(j) + b[j]);
}

// w and u of a tile, written out; u also to `coefficients` [rows of the tile, r] for the write-back.
void gate_tile(const Forward& call, const TileRows& tile, const float* sums, float* coefficients) {
  for (int64_t i = 0; i < tile.count; ++i) {
    const auto at = [&](int64_t j) { return sums[((j / kPanel) * tile.count + i) * kPanel + j % kPanel]; };
    float* update = call.update + tile.rows[i] * call.r;
    gate_row(call, at, call.weights + tile.rows[i] * call.r, update);
    std::copy(update, update + call.r, coefficients + i * call.r);
  }
}

Packed further(const Packed& packed, int64_t bytes) {
  return {static_cast<const char*>(packed.data) + bytes, packed.pairs};
}

} // namespace

void forward(const Forward& call, ParallelFor parallel_for) {
  const Kernels& k = kernels();
  const int64_t outputs = call.gate == Gate::none ? call.r : 2 * call.r;
  const Projection shape(call.rows.count, call.d, outputs, k.tile_rows);
  const auto project = [&](const TileRows& tile, int64_t split, float* sums) {
    k.project(call.h, tile.rows, tile.count, split * shape.width, shape.width_of(split), call.projection, shape.panels,
              outputs, call.d, sums);
  };
  const auto expand = [&](const TileRows& tile, int64_t split, const float* coefficients) {
    k.expand(call.h, call.out, tile.rows, tile.count, split * shape.width, shape.width_of(split), coefficients, call.r,
             call.r, call.basis);
  };

  if (shape.splits == 1) { // one pass: a tile of h stays in the second-level cache between projection and write-back
    parallel(parallel_for, shape.tiles, shape.grain(), [&](int64_t index) {
      const TileRows tile(call.rows, index * shape.tile_rows, shape.tile_rows);
      std::vector<float> sums(shape.tile_size()), coefficients(shape.tile_rows * call.r);
      project(tile, 0, sums.data());
      gate_tile(call, tile, sums.data(), coefficients.data());
      expand(tile, 0, coefficients.data());
    });
    return;
  }

  std::vector<float> sums(shape.tiles * shape.splits * shape.tile_size());
  std::vector<float> coefficients(shape.tiles * shape.tile_rows * call.r);
  parallel(parallel_for, shape.tiles * shape.splits, shape.grain(), [&](int64_t task) {
    const TileRows tile(call.rows, task / shape.splits * shape.tile_rows, shape.tile_rows);
    project(tile, task % shape.splits, sums.data() + task * shape.tile_size());
  });
  for (int64_t index = 0; index < shape.tiles; ++index) {
    const TileRows tile(call.rows, index * shape.tile_rows, shape.tile_rows);
    float* of_tile = sums.data() + index * shape.splits * shape.tile_size();
    shape.add_splits(of_tile);
    gate_tile(call, tile, of_tile, coefficients.data() + index * shape.tile_rows * call.r);
  }
  parallel(parallel_for, shape.tiles * shape.splits, shape.grain(), [&](int64_t task) {
    const int64_t index = task / shape.splits;
    const TileRows tile(call.rows, index * shape.tile_rows, shape.tile_rows);
    expand(tile, task % shape.splits, coefficients.data() + index * shape.tile_rows * call.r);
  });
}

void grouped_forward(const Forward& call, const Sets& sets, ParallelFor parallel_for) {
  const auto edit = [&](int64_t i, ParallelFor share_out) {
    Forward own = call;
    own.rows = {call.rows.rows + sets.first[i], sets.first[i + 1] - sets.first[i]};
    own.projection = further(call.projection, sets.number[i] * sets.projection_bytes);
    own.basis = further(call.basis, sets.number[i] * sets.basis_bytes);
    own.bias = call.bias + sets.number[i] * sets.bias_floats;
    forward(own, share_out);
  };
  // Where each set has a few rows, as when a batch of texts under different edits gets its next token, threads take
  // whole sets: there are more of these than there is to share out of each. Where sets are large, all work on each.
  const int64_t shares = std::min(Projection::kTasks, ceil_div(call.d, Projection::kMinWidth));
  if (sets.count >= shares && call.rows.count < 4 * kernels().tile_rows * sets.count) {
    const ParallelFor alone = [](int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
      body(0, count, context);
    };
    const int64_t outputs = call.gate == Gate::none ? call.r : 2 * call.r;
    const int64_t work = call.rows.count * outputs * call.d / std::max<int64_t>(sets.count, 1);
    parallel(parallel_for, sets.count, std::max<int64_t>(1, Projection::kGrainWork / (work + 1)),
             [&](int64_t i) { edit(i, alone); });
    return;
  }
  for (int64_t i = 0; i < sets.count; ++i) edit(i, parallel_for);
}

} // namespace baft::cpu
