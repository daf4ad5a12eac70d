// Two phases. The first, over rows: dp and dz, r numbers a row each. The second, over columns: every thread has columns
// of its own for all rows, so that the parameters' gradients need no partial sums and no order of threads; it reads
// grad_out a second time, which costs less than adding up r x d sums for each thread.
#include "parallel.h"
#include "subnormals.h"

namespace baft::cpu {
namespace {

constexpr int64_t kStripBlocks = 8; // blocks of columns whose gradients, 3 r x 512 floats, stay in the caches meanwhile
constexpr int64_t kStripRows = 48;  // rows that a strip works on at a time; even, for pairs of them

// dp and dz of one row from du without grad_update; `at(j)` is (R g)_j.
template <class At>
void gate_gradient(const Backward& call, const At& at, int64_t row, float* dp, float* dz) {
  const int64_t r = call.r;
  const float *w = call.weights + row * r, *u = call.update + row * r;
  const float* gw = call.grad_weights ? call.grad_weights + row * r : nullptr;
  const float* gu = call.grad_update ? call.grad_update + row * r : nullptr;
  float sum = 0.0f;
  for (int64_t j = 0; j < r; ++j) {
    const float du = at(j) + (gu ? gu[j] : 0.0f);
    dp[j] = w[j] * du;
    if (call.gate == Gate::none) continue;
    const float s = u[j] * du + (gw ? w[j] * gw[j] : 0.0f);
    dz[j] = call.gate == Gate::sigmoid ? (1.0f - w[j]) * s : s;
    sum += s;
  }
  if (call.gate == Gate::softmax)
    for (int64_t j = 0; j < r; ++j) dz[j] -= w[j] * sum;
}

} // namespace

void backward(const Backward& call, ParallelFor parallel_for) {
  const Kernels& k = kernels();
  const int64_t r = call.r, d = call.d, count = call.rows.count;
  const int64_t inputs = call.gate == Gate::none ? r : 2 * r; // dp, and dz where there is a gate
  const int64_t stride = inputs + r;                          // and a copy of u beside them
  std::vector<float> coefficients(count * stride);
  std::vector<int64_t> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = call.rows.rows ? call.rows.rows[i] : i;

  // -- over rows --
  const Projection shape(count, d, r, k.tile_rows);
  const auto finish = [&](int64_t index, const float* sums) {
    const TileRows tile(call.rows, index * shape.tile_rows, shape.tile_rows);
    for (int64_t i = 0; i < tile.count; ++i) {
      float* of_row = coefficients.data() + (index * shape.tile_rows + i) * stride;
      const auto at = [&](int64_t j) { return sums[((j / kPanel) * tile.count + i) * kPanel + j % kPanel]; };
      gate_gradient(call, at, tile.rows[i], of_row, of_row + r);
      const float* update = call.update + tile.rows[i] * r;
      std::copy(update, update + r, of_row + inputs);
    }
  };
  std::vector<float> split_sums(shape.splits == 1 ? 0 : shape.tiles * shape.splits * shape.tile_size());
  parallel(parallel_for, shape.tiles * shape.splits, shape.grain(), [&](int64_t task) {
    const SubnormalsAreZero here;
    const int64_t index = task / shape.splits, split = task % shape.splits;
    const TileRows tile(call.rows, index * shape.tile_rows, shape.tile_rows);
    std::vector<float> own(shape.splits == 1 ? shape.tile_size() : 0);
    float* sums = shape.splits == 1 ? own.data() : split_sums.data() + task * shape.tile_size();
    k.project(call.grad_out, tile.rows, tile.count, split * shape.width, shape.width_of(split), call.basis,
              shape.panels, r, d, sums);
    if (shape.splits == 1) finish(index, sums);
  });
  if (shape.splits > 1) {
    const SubnormalsAreZero here;
    for (int64_t index = 0; index < shape.tiles; ++index) {
      float* sums = split_sums.data() + index * shape.splits * shape.tile_size();
      shape.add_splits(sums);
      finish(index, sums);
    }
  }

  // -- over columns --
  const bool pairs = call.basis.pairs;
  std::vector<uint32_t> paired(pairs ? ceil_div(count, 2) * stride : 0);
  if (pairs) k.pair_rows(coefficients.data(), count, stride, paired.data());
  // Of row `row`, which is even, and coefficient `j`.
  const auto factors = [&](int64_t row, int64_t j) -> const void* {
    if (pairs) return paired.data() + row / 2 * stride + j;
    return coefficients.data() + row * stride + j;
  };
  const bool wants_input = call.grad_h.data, wants_parameters = call.source_gradient;
  const int64_t blocks = ceil_div(d, kBlock);
  const auto strip = [&](int64_t first_block, int64_t end_block) {
    const SubnormalsAreZero here;
    std::vector<float> sums(wants_parameters ? (end_block - first_block) * stride * kBlock : 0);
    for (int64_t start = 0; start < count; start += kStripRows) {
      const int64_t some = std::min(kStripRows, count - start);
      const int64_t* of_some = rows.data() + start;
      if (wants_parameters)
        for (int64_t block = first_block; block < end_block; ++block) {
          const int64_t column = block * kBlock, width = std::min(kBlock, d - column);
          float* sum = sums.data() + (block - first_block) * stride * kBlock;
          k.outer(call.h, of_some, some, column, width, factors(start, 0), stride, inputs, pairs, sum);
          k.outer(call.grad_out, of_some, some, column, width, factors(start, inputs), stride, r, pairs,
                  sum + inputs * kBlock);
        }
      if (wants_input) {
        const int64_t column = first_block * kBlock, width = std::min(end_block * kBlock, d) - column;
        k.expand(call.grad_out, call.grad_h, of_some, some, column, width, coefficients.data() + start * stride, stride,
                 inputs, call.projection);
      }
    }
    if (!wants_parameters) return;
    for (int64_t j = 0; j < r; ++j) // a row of a gradient at a time: the blocks of a strip lie side by side in it
      for (int64_t block = first_block; block < end_block; ++block) {
        const float* sum = sums.data() + (block - first_block) * stride * kBlock;
        const int64_t column = block * kBlock, width = std::min(kBlock, d - column);
        const float *difference = sum + j * kBlock, *basis = sum + (inputs + j) * kBlock;
        std::copy(difference, difference + width, call.source_gradient + j * d + column);
        float* of_basis = call.basis_gradient + j * d + column;
        for (int64_t i = 0; i < width; ++i) of_basis[i] = basis[i] - difference[i];
        if (call.gate == Gate::none) continue;
        const float* gate = sum + (r + j) * kBlock;
        std::copy(gate, gate + width, call.gate_gradient + j * d + column);
      }
  };
  // A strip's width changes nothing but the order of the work.
  const int64_t grain = std::max<int64_t>(1, Projection::kGrainWork / (count * stride * kBlock + 1));
  const int64_t strip_blocks = std::max<int64_t>(1, std::min(kStripBlocks, blocks / Projection::kTasks));
  parallel(parallel_for, ceil_div(blocks, strip_blocks), ceil_div(grain, strip_blocks),
           [&](int64_t index) { strip(index * strip_blocks, std::min(blocks, (index + 1) * strip_blocks)); });

  if (!wants_parameters) return;
  std::vector<double> bias_sums(inputs);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < inputs; ++j) bias_sums[j] += coefficients[i * stride + j];
  std::copy(bias_sums.begin(), bias_sums.begin() + r, call.source_bias_gradient);
  if (call.gate != Gate::none) std::copy(bias_sums.begin() + r, bias_sums.end(), call.gate_bias_gradient);
}

} // namespace baft::cpu
