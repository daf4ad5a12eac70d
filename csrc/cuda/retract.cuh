// Retraction: each basis moved to its polar factor (R R^T)^(-1/2) R, those of all layers in one launch.
//
// A cluster has one basis and splits its columns among its CTAs. A CTA holds its slice in shared memory, so that device
// memory is read once and written once; a slice that is too large comes in chunks, and comes again to be moved.
//
//   gram    threads multiply pairs of rows, each thread a tile of 4 x 4 pairs over a share of the slice's columns
//   send    the slice's sums go to all CTAs, which add them up in the order of the slices
//   root    every CTA finds N = (R R^T)^(-1/2) - I by itself, and all find the same bits
//   move    R + N R, from shared memory to device memory
//
// Of every matrix near I, only the difference to I is kept. It is small, and so are its roundings: nothing is left that
// a second Gram matrix, and a polish with it, could correct. That saves half of the products, and an exchange.
#pragma once

#include "fragments.h"
#include "kernels.h"
#include "machine.cuh"

namespace baft::cuda {

constexpr int kRetractBases = 64; // of one launch

struct RetractTable {
  Basis bases[kRetractBases];
};

template <int kCluster_, int kSharedBytes_ = kLargestSharedBytes>
struct Retraction {
  static constexpr int kCluster = kCluster_;         // CTAs
  static constexpr int kSharedBytes = kSharedBytes_; // that a CTA can have
  static constexpr int kMostRank = 64;
  static constexpr int kThreads = 256;

  static_assert(kThreads >= kMostRank / 4 * (kMostRank / 4 + 1) / 2, "a thread has one tile of the Gram matrix");
  static_assert(kThreads >= kMostRank, "a thread copies one row");

  // Who does what, and where it lies in shared memory. It follows from the shape alone: a basis gets the same bits
  // whatever else is in the launch.
  struct Plan {
    int rank, width;
    int tile_rows, tiles; // of the lower triangle of the Gram matrix, in tiles of 4 x 4
    int groups;           // of threads, one thread for each tile; fours of columns are dealt out to them
    int group_pitch;      // odd, so that what the groups leave of different rows lies in different banks
    int order;            // of the small matrices: the rank, padded
    int slice, chunk;     // columns of a CTA, and of them in shared memory at a time

    static constexpr int kGramAt = 16; // after two barriers: what the groups leave, and later the first small matrix
    int sums_at;                       // what the CTAs send, and later the other four small matrices
    int chunk_at, bytes;

    BAFT_BOTH Plan(int rank, int width) : rank(rank), width(width) {
      tile_rows = (rank + 3) / 4;
      tiles = tile_rows * (tile_rows + 1) / 2;
      groups = kThreads / tiles;
      group_pitch = groups | 1;
      order = (rank + 15) / 16 * 16;
      slice = ((width + kCluster - 1) / kCluster + 3) / 4 * 4;
      const int groups_bytes = tiles * 4 * group_pitch * 16;
      sums_at = kGramAt + (groups_bytes > matrix_bytes() ? groups_bytes : matrix_bytes());
      chunk_at = sums_at + (sums_bytes() > 4 * matrix_bytes() ? sums_bytes() : 4 * matrix_bytes());
      const int fitting = (kSharedBytes - chunk_at) / (rank * 16) * 4;
      chunk = slice < fitting ? slice : fitting;
      bytes = chunk_at + rank * chunk * 4;
    }
    BAFT_BOTH int pitch() const { return order + 4; } // of a small matrix: eight rows begin in different banks
    BAFT_BOTH int matrix_bytes() const { return order * pitch() * 4; }
    BAFT_BOTH int sums_bytes() const { return kCluster * tiles * 64; }
  };

  static constexpr int kChunkArrivedAt = 0, kSumsArrivedAt = 8;
};

// -- places in a lower triangle, row by row --

BAFT_DEVICE int triangle_index(int row, int column) { return row * (row + 1) / 2 + column; }
BAFT_DEVICE Element triangle_element(int index) {
  int row = 0;
  while (triangle_index(row + 1, 0) <= index) ++row;
  return {row, index - triangle_index(row, 0)};
}

BAFT_DEVICE void add_product(float4& sum, float factor, const float4& x) {
  sum.x += factor * x.x, sum.y += factor * x.y, sum.z += factor * x.z, sum.w += factor * x.w;
}

// -- this CTA's columns --

template <class K>
class RetractSlice {
 public:
  const int count; // of chunks; 0 where the basis has too few columns for this CTA

  BAFT_DEVICE RetractSlice(const Basis& basis, const typename K::Plan& plan)
      : count((columns_of(plan) + plan.chunk - 1) / plan.chunk),
        values_(basis.values),
        plan_(plan),
        by_fours_(reinterpret_cast<uintptr_t>(basis.values) % 16 == 0 && basis.width % 4 == 0) {}

  // Bring a chunk into shared memory, if it isn't there. All threads call it.
  BAFT_DEVICE void load(int number) {
    if (number == held_) return;
    held_ = number;
    first_ = cluster_rank() * plan_.slice + number * plan_.chunk;
    const int left = columns_of(plan_) - number * plan_.chunk;
    columns_ = left < plan_.chunk ? left : plan_.chunk;
    const Address arrived = address_of(shared_memory() + K::kChunkArrivedAt);
    sync_block(); // nobody reads the chunk before it any more
    if (by_fours_) {
      if (thread() == 0) barrier_expect(arrived, plan_.rank * columns_ * 4);
      if (thread() < plan_.rank)
        copy_in(address_of(chunk() + thread() * fours()), row(thread()), columns_ * 4, arrived);
      barrier_wait_local(arrived, loads_++ % 2);
    } else {
      const int padded = 4 * fours();
      float* to = reinterpret_cast<float*>(chunk());
      for (int e = thread(); e < plan_.rank * padded; e += K::kThreads)
        to[e] = e % padded < columns_ ? row(e / padded)[e % padded] : 0.0f;
      sync_block();
    }
  }

  // The chunk that is there, [rank, fours()]; the last four is filled up with zeros.
  BAFT_DEVICE float4* chunk() const { return reinterpret_cast<float4*>(shared_memory() + plan_.chunk_at); }
  BAFT_DEVICE int fours() const { return (columns_ + 3) / 4; }

  BAFT_DEVICE void store(int at_row, int four, const float4& x) const {
    float* to = row(at_row) + four * 4;
    const int left = columns_ - four * 4;
    if (by_fours_) {
      *reinterpret_cast<float4*>(to) = x;
    } else {
      to[0] = x.x;
      if (left > 1) to[1] = x.y;
      if (left > 2) to[2] = x.z;
      if (left > 3) to[3] = x.w;
    }
  }

 private:
  static BAFT_DEVICE int columns_of(const typename K::Plan& plan) {
    const int left = plan.width - cluster_rank() * plan.slice;
    return left < 0 ? 0 : left < plan.slice ? left : plan.slice;
  }
  BAFT_DEVICE float* row(int number) const { return values_ + static_cast<int64_t>(number) * plan_.width + first_; }

  float* values_;
  const typename K::Plan& plan_;
  bool by_fours_; // every row begins at a multiple of 16 bytes
  int held_ = -1, loads_ = 0, first_ = 0, columns_ = 0;
};

// -- gram --

// Add up the products of a tile's pairs of rows, over this thread's columns of a chunk. The sums are compensated: what
// rounding adds too much is taken off the next term, which costs no time, since the loads take as long. Rows beyond the
// rank are the last one again, and what comes of them isn't used.
template <class K>
BAFT_DEVICE void multiply_rows(float (&sums)[4][4], float (&excess)[4][4], const RetractSlice<K>& slice,
                               const typename K::Plan& plan, const Element& tile, int group) {
  const auto row = [&](int number) {
    return slice.chunk() + (number < plan.rank ? number : plan.rank - 1) * slice.fours();
  };
  for (int four = group; four < slice.fours(); four += plan.groups) {
    float4 left[4], right[4];
    BAFT_UNROLL
    for (int i = 0; i < 4; ++i) left[i] = row(tile.row * 4 + i)[four], right[i] = row(tile.column * 4 + i)[four];
    BAFT_UNROLL
    for (int i = 0; i < 4; ++i) {
      BAFT_UNROLL
      for (int j = 0; j < 4; ++j) {
        float of_four = left[i].x * right[j].x;
        of_four += left[i].y * right[j].y, of_four += left[i].z * right[j].z, of_four += left[i].w * right[j].w;
        const float wanted = of_four - excess[i][j], sum = sums[i][j] + wanted;
        excess[i][j] = (sum - sums[i][j]) - wanted;
        sums[i][j] = sum;
      }
    }
  }
}

// R R^T over this CTA's columns, to all CTAs. It is added up in float64, and sent as float32: a slice has a part of 1.
template <class K>
BAFT_DEVICE void send_gram(RetractSlice<K>& slice, const typename K::Plan& plan) {
  float4* of_groups = reinterpret_cast<float4*>(shared_memory() + K::Plan::kGramAt);
  const int tile = thread() / plan.groups, group = thread() % plan.groups;
  const Element place = triangle_element(tile);
  float sums[4][4] = {}, excess[4][4] = {};
  for (int i = 0; i < slice.count; ++i) {
    slice.load(i);
    if (tile < plan.tiles) multiply_rows<K>(sums, excess, slice, plan, place, group);
  }
  if (tile < plan.tiles) {
    float4* mine = of_groups + tile * 4 * plan.group_pitch + group;
    BAFT_UNROLL
    for (int i = 0; i < 4; ++i)
      mine[i * plan.group_pitch] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  }
  sync_block();
  cluster_wait(); // the others' barriers are ready
  const Address to = address_of(shared_memory() + plan.sums_at) + cluster_rank() * plan.tiles * 64;
  const Address arrived = address_of(shared_memory() + K::kSumsArrivedAt);
  for (int e = thread(); e < plan.tiles * 16; e += K::kThreads) {
    const float* parts = reinterpret_cast<const float*>(of_groups + e / 4 * plan.group_pitch) + e % 4;
    double even = 0.0, odd = 0.0; // two, since each addition waits for the one before it
    for (int g = 0; g < plan.groups; g += 2) {
      even += parts[4 * g];
      if (g + 1 < plan.groups) odd += parts[4 * g + 4];
    }
    const float sum = static_cast<float>(even + odd);
    BAFT_UNROLL
    for (int rank = 0; rank < K::kCluster; ++rank) send(in_cta(to + e * 4, rank), sum, in_cta(arrived, rank));
  }
}

// R R^T - I from the sums of all slices.
template <class K>
BAFT_DEVICE void find_error(float* error, const typename K::Plan& plan) {
  const float* sums = reinterpret_cast<const float*>(shared_memory() + plan.sums_at);
  for (int e = thread(); e < plan.order * plan.pitch(); e += K::kThreads) {
    const int i = e / plan.pitch(), j = e % plan.pitch();
    double sum = 0.0; // also of what pads the matrix
    if (i < plan.rank && j < plan.rank) {
      const int row = i > j ? i : j, column = i > j ? j : i;
      const float* first = sums + (triangle_index(row / 4, column / 4) * 4 + row % 4) * 4 + column % 4;
      BAFT_UNROLL
      for (int rank = 0; rank < K::kCluster; ++rank) sum += first[rank * plan.tiles * 16];
      if (i == j) sum -= 1.0;
    }
    error[e] = static_cast<float>(sum);
  }
}

// The Frobenius norm of a small matrix, found by each warp for itself.
BAFT_DEVICE float matrix_norm(const float* matrix, int numbers) {
  float sum = 0.0f;
  for (int e = lane(); e < numbers; e += 32) sum += matrix[e] * matrix[e];
  BAFT_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return square_root(sum);
}

// -- root --

// A tile of 2 x 2 of a small symmetric matrix: rows `at.row` and half the order further, and such columns, so that
// neighbouring lanes read neighbouring rows, which begin in different banks.
struct RootTile {
  Element at;
  int order;

  BAFT_DEVICE int place(int i, int j) const {
    return (at.row + i * (order / 2)) * (order + 4) + at.column + j * (order / 2);
  }
  BAFT_DEVICE int mirrored(int i, int j) const {
    return (at.column + j * (order / 2)) * (order + 4) + at.row + i * (order / 2);
  }

  // The tile of left right. Both are symmetric: rows of the right one are its columns.
  BAFT_DEVICE void multiply(float (&sums)[2][2], const float* left, const float* right) const {
    const float4 *rows[2], *columns[2];
    BAFT_UNROLL
    for (int i = 0; i < 2; ++i) {
      rows[i] = reinterpret_cast<const float4*>(left + (at.row + i * (order / 2)) * (order + 4));
      columns[i] = reinterpret_cast<const float4*>(right + (at.column + i * (order / 2)) * (order + 4));
    }
    for (int first = 0; first < order / 4; first += 4) {
      BAFT_UNROLL
      for (int four = first; four < first + 4; ++four) {
        BAFT_UNROLL
        for (int i = 0; i < 2; ++i) {
          BAFT_UNROLL
          for (int j = 0; j < 2; ++j) {
            const float4 a = rows[i][four], b = columns[j][four];
            sums[i][j] += a.x * b.x, sums[i][j] += a.y * b.y, sums[i][j] += a.z * b.z, sums[i][j] += a.w * b.w;
          }
        }
      }
    }
  }

  BAFT_DEVICE void store(float* matrix, const float (&values)[2][2]) const {
    BAFT_UNROLL
    for (int i = 0; i < 2; ++i) {
      BAFT_UNROLL
      for (int j = 0; j < 2; ++j) matrix[place(i, j)] = values[i][j], matrix[mirrored(i, j)] = values[i][j];
    }
  }

  // step = -((I + inverse) (I + root) - I) / 2
  BAFT_DEVICE void find_step(float* step, const float* inverse, const float* root) const {
    float sums[2][2] = {};
    multiply(sums, inverse, root);
    BAFT_UNROLL
    for (int i = 0; i < 2; ++i) {
      BAFT_UNROLL
      for (int j = 0; j < 2; ++j) sums[i][j] = -0.5f * (sums[i][j] + (inverse[place(i, j)] + root[place(i, j)]));
    }
    store(step, sums);
  }
  // to = (I + from) (I + step) - I
  BAFT_DEVICE void take_step(float* to, const float* from, const float* step) const {
    float sums[2][2] = {};
    multiply(sums, from, step);
    BAFT_UNROLL
    for (int i = 0; i < 2; ++i) {
      BAFT_UNROLL
      for (int j = 0; j < 2; ++j) sums[i][j] = from[place(i, j)] + (step[place(i, j)] + sums[i][j]);
    }
    store(to, sums);
  }
};

// N = (I + E)^(-1/2) - I for a matrix E of norm `distance`, which is there in `root`. Coupled Newton-Schulz iteration:
// step by step, I + root goes from I + E to its root, and I + inverse from I to that root's inverse.
template <class K>
BAFT_DEVICE const float* find_inverse_root(float* root, const typename K::Plan& plan, float distance, int iterations) {
  const int numbers = plan.order * plan.pitch();
  float* inverse = reinterpret_cast<float*>(shared_memory() + plan.sums_at);
  float *step = inverse + numbers, *next_root = inverse + 2 * numbers, *next_inverse = inverse + 3 * numbers;
  const int tiles = triangle_index(plan.order / 2, 0);
  const Element first = triangle_element(thread());
  const auto for_tiles = [&](auto work) {
    for (int t = thread(); t < tiles; t += K::kThreads)
      work(RootTile{t == thread() ? first : triangle_element(t), plan.order});
  };

  for (int e = thread(); e < numbers; e += K::kThreads) inverse[e] = 0.0f;
  sync_block();
  // What is left is the norm of (I + inverse) (I + root) - I, at most. Enough is far below a rounding.
  float left = distance;
  for (int n = 0; n < iterations && left > 1e-9f; ++n, left *= left * (0.75f + 0.25f * left)) {
    for_tiles([&](const RootTile& tile) { tile.find_step(step, inverse, root); });
    sync_block();
    for_tiles([&](const RootTile& tile) {
      tile.take_step(next_root, root, step);
      tile.take_step(next_inverse, inverse, step);
    });
    sync_block();
    float *old_root = root, *old_inverse = inverse;
    root = next_root, inverse = next_inverse;
    next_root = old_root, next_inverse = old_inverse;
  }
  return inverse;
}

// -- move --

// R + N R, four rows and four columns for a thread at a time, from the last chunk on, which is still there.
template <class K>
BAFT_DEVICE void move_slice(RetractSlice<K>& slice, const typename K::Plan& plan, const float* inverse) {
  for (int i = slice.count - 1; i >= 0; --i) {
    slice.load(i);
    const float4* chunk = slice.chunk();
    for (int e = thread(); e < plan.tile_rows * slice.fours(); e += K::kThreads) {
      const int tile = e / slice.fours(), four = e % slice.fours();
      float4 sums[4] = {};
      for (int k = 0; k < plan.rank; ++k) {
        const float4 x = chunk[k * slice.fours() + four];
        // Four rows of N, which is symmetric, at column k.
        const float4 factors = *reinterpret_cast<const float4*>(inverse + k * plan.pitch() + tile * 4);
        add_product(sums[0], factors.x, x), add_product(sums[1], factors.y, x);
        add_product(sums[2], factors.z, x), add_product(sums[3], factors.w, x);
      }
      BAFT_UNROLL
      for (int row = 0; row < 4; ++row)
        if (tile * 4 + row < plan.rank) {
          add_product(sums[row], 1.0f, chunk[(tile * 4 + row) * slice.fours() + four]); // after all that is small
          slice.store(tile * 4 + row, four, sums[row]);
        }
    }
  }
}

// One cluster for each basis. `distances` gets ||R R^T - I||_F of each as it was; where that isn't at most `near`, the
// basis stays as it is: the iteration needn't converge there.
template <class K>
BAFT_KERNEL_SHARING(K::kThreads, 2)
retract(const RetractTable table, float* distances, int iterations, float near) {
  const int number = block() / K::kCluster;
  const Basis& basis = table.bases[number];
  const typename K::Plan plan(basis.rank, basis.width);
  const Address chunk_arrived = address_of(shared_memory() + K::kChunkArrivedAt);
  const Address sums_arrived = address_of(shared_memory() + K::kSumsArrivedAt);
  if (thread() == 0) {
    barrier_init(chunk_arrived, 1);
    barrier_init(sums_arrived, 1);
    fence_barrier_init();
    barrier_expect(sums_arrived, plan.sums_bytes());
  }
  sync_warp();
  cluster_arrive_relaxed();
  RetractSlice<K> slice(basis, plan);
  send_gram<K>(slice, plan);
  barrier_wait(sums_arrived, 0); // with those that this CTA sent to itself: what its groups left isn't needed any more

  float* error = reinterpret_cast<float*>(shared_memory() + K::Plan::kGramAt);
  find_error<K>(error, plan);
  sync_block();
  const float distance = matrix_norm(error, plan.order * plan.pitch());
  if (cluster_rank() == 0 && thread() == 0) distances[number] = distance;
  if (!(distance <= near)) return; // NaN too
  move_slice<K>(slice, plan, find_inverse_root<K>(error, plan, distance, iterations));
}

} // namespace baft::cuda
