// A GPU of one cluster, on a CPU: the functions of csrc/cuda/machine.cuh, so that the kernels run as they stand.
//
// Every thread of the cluster's CTAs is a fiber. Fibers change places only inside the functions below, at random;
// copies and stores to other CTAs are carried out at random times after they were asked for. Each seed has its own slow
// CTAs, and copies that come at once or at the last moment: a kernel that is right in every order gives the same result
// for all of them. What would hang stops with a report; shared memory that was never written holds NaN. A kernel may
// begin while the previous one still runs; that one's results are there when all wait for it, and not before. Not
// modelled: the order of plain stores within a thread, and the fence between them and the copies.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cluster.h"

#define BAFT_DEVICE inline
#define BAFT_KERNEL(THREADS) static void
#define BAFT_KERNEL_SHARING(THREADS, BLOCKS) static void
#define BAFT_UNROLL

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace baft::cuda {

// -- who am I --

inline int thread() { return emulator::self().thread; }
inline int warp() { return thread() / 32; }
inline int lane() { return thread() % 32; }
inline int lane_anew() { return lane(); }
inline int cluster_rank() { return emulator::self().rank; }
inline int block() { return emulator::cluster().index() * emulator::cluster().size() + cluster_rank(); }
inline int blocks() { return emulator::cluster().count() * emulator::cluster().size(); }

// -- shared memory --

inline unsigned char* shared_memory() { return emulator::cluster().shared(cluster_rank()); }
inline Address address_of(const void* shared) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(shared) - shared_memory();
  return static_cast<Address>((cluster_rank() + 1) << 24 | offset);
}
inline Address in_cta(Address address, int rank) { return (address & 0xffffff) | static_cast<Address>(rank + 1) << 24; }

// -- barriers --

inline void barrier_init(Address barrier, int arrivals) {
  emulator::cluster().at(barrier, 8, 8);
  emulator::cluster().barrier(barrier) = {arrivals, 0, 0, 0, {}};
}
inline void fence_barrier_init() {}
inline void barrier_expect(Address address, int bytes) {
  emulator::Barrier& barrier = emulator::cluster().barrier(address);
  emulator::cluster().require(barrier.expected > 0, "a barrier that wasn't set up");
  ++barrier.arrived;
  barrier.bytes += bytes;
  emulator::cluster().end_phase_if_complete(barrier);
  emulator::cluster().pause();
}
inline void barrier_arrive(Address barrier) { barrier_expect(barrier, 0); }
inline void barrier_wait(Address address, int parity) {
  emulator::Barrier& barrier = emulator::cluster().barrier(address);
  emulator::cluster().require(barrier.expected > 0, "a barrier that wasn't set up");
  emulator::cluster().pause();
  emulator::cluster().wait_until([&] { return barrier.phase % 2 != parity; }, barrier.waiting, "a barrier's phase");
}

inline void barrier_wait_local(Address barrier, int parity) { barrier_wait(barrier, parity); }

// -- copies --

inline void copy_in(Address to, const void* from, int bytes, Address barrier) {
  unsigned char* there = emulator::cluster().at(to, bytes, 16);
  emulator::cluster().require(reinterpret_cast<uintptr_t>(from) % 16 == 0 && bytes % 16 == 0 && bytes > 0,
                              "a copy that isn't of multiples of 16 bytes");
  emulator::cluster().later([=] {
    std::memcpy(there, from, bytes);
    emulator::Barrier& arrived = emulator::cluster().barrier(barrier);
    arrived.bytes -= bytes;
    emulator::cluster().end_phase_if_complete(arrived);
  });
  emulator::cluster().pause();
}
inline void copy_out(void* to, Address from, int bytes) {
  const unsigned char* here = emulator::cluster().at(from, bytes, 16);
  emulator::cluster().require(reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0 && bytes > 0,
                              "a copy that isn't of multiples of 16 bytes");
  emulator::Fiber* me = &emulator::self();
  me->open_copies.push_back([=] {
    auto held = std::make_shared<std::vector<unsigned char>>(here, here + bytes);
    --me->copies_unread;
    emulator::cluster().wake(me->waiting);
    emulator::cluster().later([=] {
      std::memcpy(to, held->data(), bytes);
      --me->copies_unwritten;
      emulator::cluster().wake(me->waiting);
    });
  });
}
inline void close_copies_out() {
  emulator::Fiber& me = emulator::self();
  me.copies_unread += static_cast<int>(me.open_copies.size());
  me.copies_unwritten += static_cast<int>(me.open_copies.size());
  for (auto& copy : me.open_copies) emulator::cluster().later(copy);
  me.open_copies.clear();
  emulator::cluster().pause();
}
inline void wait_copies_read() {
  emulator::Fiber& me = emulator::self();
  emulator::cluster().wait_until([&] { return me.copies_unread == 0; }, me.waiting, "its copies to have read");
}
inline void wait_copies_out() {
  emulator::Fiber& me = emulator::self();
  emulator::cluster().wait_until([&] { return me.copies_unwritten == 0; }, me.waiting, "its copies to be written");
}
inline void fence_for_copies() {}

template <class Value>
inline void send_value(Address to, Value value, Address barrier) {
  unsigned char* there = emulator::cluster().at(to, sizeof value, sizeof value);
  emulator::cluster().require((to >> 24) == (barrier >> 24), "a store that arrives at a barrier elsewhere");
  emulator::cluster().later([=] {
    emulator::cluster().require(emulator::cluster().runs(static_cast<int>(to >> 24) - 1),
                                "a store to a CTA that has ended");
    std::memcpy(there, &value, sizeof value);
    emulator::Barrier& arrived = emulator::cluster().barrier(barrier);
    emulator::cluster().require(arrived.expected > 0, "a store that arrives at a barrier before that was set up");
    arrived.bytes -= sizeof value;
    emulator::cluster().end_phase_if_complete(arrived);
  });
}
inline void send(Address to, float4 values, Address barrier) { send_value(to, values, barrier); }
inline void send(Address to, float2 values, Address barrier) { send_value(to, values, barrier); }
inline void send(Address to, uint32_t word, Address barrier) { send_value(to, word, barrier); }
inline void send(Address to, float value, Address barrier) { send_value(to, value, barrier); }

// -- meeting --

// The cluster's barrier counts arrivals of all its threads; a wait is for the phase of the thread's own last arrival.
inline void cluster_arrive() {
  const int threads = emulator::cluster().threads() * emulator::cluster().size();
  emulator::Barrier& barrier = emulator::cluster().barrier(0);
  barrier.expected = threads;
  ++barrier.arrived;
  emulator::cluster().end_phase_if_complete(barrier);
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  emulator::Barrier& barrier = emulator::cluster().barrier(0);
  const int phase = emulator::self().cluster_waits++;
  emulator::cluster().wait_until([&] { return barrier.phase > phase; }, barrier.waiting, "the cluster");
}
inline void sync_threads(int barrier, int threads) {
  emulator::cluster().meet(emulator::cluster().meeting(2, barrier), threads, "a barrier of threads");
}
inline void sync_block() { sync_threads(0, emulator::cluster().threads()); }
inline void sync_warp() { emulator::cluster().meet(emulator::cluster().meeting(3, warp()), 32, "its warp"); }
inline void wait_for_previous_kernel() { emulator::cluster().wait_for_previous(); }
inline void let_next_kernel_start() {
  emulator::cluster().require(emulator::cluster().previous_ended(),
                              "the next kernel starts while the last but one runs");
}
template <int kRegisters>
inline void take_registers() {}
template <int kRegisters>
inline void give_registers() {}

// -- between lanes --

inline float shuffle_xor(float value, int mask) {
  struct {
    float mine, found;
  } operands{value, 0.0f};
  emulator::together("a shuffle", operands, [mask](auto** all) {
    for (int i = 0; i < 32; ++i) all[i]->found = all[i ^ mask]->mine;
  });
  return operands.found;
}

inline uint32_t ballot(bool holds) {
  struct {
    bool mine;
    uint32_t found;
  } operands{holds, 0};
  emulator::together("a ballot", operands, [](auto** all) {
    uint32_t found = 0;
    for (int i = 0; i < 32; ++i) found |= static_cast<uint32_t>(all[i]->mine) << i;
    for (int i = 0; i < 32; ++i) all[i]->found = found;
  });
  return operands.found;
}

struct MatrixLoad {
  Address row;
  uint32_t* to;
  bool transposed;
};
inline void load_matrices_as(uint32_t* to, Address row, bool transposed) {
  MatrixLoad mine{row, to, transposed};
  emulator::together("matrices", mine, [](MatrixLoad** all) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t values[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(values[i], emulator::cluster().at(all[8 * matrix + i]->row, 16, 16), 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const bool turned = all[lane]->transposed;
        const uint16_t low = turned ? values[2 * t][g] : values[g][2 * t];
        const uint16_t high = turned ? values[2 * t + 1][g] : values[g][2 * t + 1];
        all[lane]->to[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t* to, Address row) { load_matrices_as(to, row, false); }
inline void load_matrices_transposed(uint32_t* to, Address row) { load_matrices_as(to, row, true); }

// -- products --

// Tensor cores truncate their sums.
inline float truncated(double x) {
  const float nearest = static_cast<float>(x);
  const bool beyond = std::isfinite(nearest) && std::abs(static_cast<double>(nearest)) > std::abs(x);
  return beyond ? std::nextafter(nearest, 0.0f) : nearest;
}

// What a lane gives to one: `kPerWord` numbers in a word.
template <int kPerWord>
struct Product {
  float* sums;
  uint32_t a[4], b[2];
  int depth;
};

// sums += a b, the numbers of a word by `number(word, index)`.
template <int kPerWord, class Number>
inline void multiply_in_warp(Product<kPerWord>& mine, Number number) {
  emulator::together("a product", mine, [number](Product<kPerWord>** all) {
    double a[16][16] = {}, b[16][8] = {};
    const int depth = all[0]->depth, halves = depth / (4 * kPerWord);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < halves; ++half)
        for (int i = 0; i < kPerWord; ++i) {
          const int k = (t + half * 4) * kPerWord + i; // a has rows g and g + 8 of this column
          a[g][k] = number(all[lane]->a[2 * half], i);
          a[g + 8][k] = number(all[lane]->a[2 * half + 1], i);
          b[k][g] = number(all[lane]->b[half], i);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int q = 0; q < 4; ++q) {
        const int row = lane / 4 + 8 * (q / 2), column = lane % 4 * 2 + q % 2;
        double sum = all[lane]->sums[q];
        for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
        all[lane]->sums[q] = truncated(sum);
      }
  });
}

// -- 16-bit numbers --

template <class T>
struct Half {
  using Number = uint16_t;
  using Pair = uint32_t;
  static float number(uint32_t word, int i) { return i == 0 ? T::low(word) : T::high(word); }
  static void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t* b) {
    Product<2> mine{sums, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, 16};
    multiply_in_warp(mine, number);
  }
  static void multiply(float (&sums)[4], const uint32_t (&a)[2], const uint32_t* b) {
    Product<2> mine{sums, {a[0], a[1], 0, 0}, {b[0], 0}, 8};
    multiply_in_warp(mine, number);
  }
};

struct Bfloat16 : Half<Bfloat16> {
  static constexpr float kLargest = 3.3895314e38f;
  static uint32_t bits(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    return std::isnan(x) ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  static float value(uint32_t bits) {
    const uint32_t word = bits << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
  static uint32_t pack(float low, float high) { return bits(low) | bits(high) << 16; }
  static float low(uint32_t word) { return value(word & 0xffff); }
  static float high(uint32_t word) { return value(word >> 16); }
};

struct Float16 : Half<Float16> {
  static constexpr float kLargest = 65504.0f;
  static uint32_t bits(float x) {
    const _Float16 rounded = static_cast<_Float16>(x);
    uint16_t word;
    std::memcpy(&word, &rounded, 2);
    return word;
  }
  static float value(uint32_t bits) {
    const uint16_t word = static_cast<uint16_t>(bits);
    _Float16 x;
    std::memcpy(&x, &word, 2);
    return static_cast<float>(x);
  }
  static uint32_t pack(float low, float high) { return bits(low) | bits(high) << 16; }
  static float low(uint32_t word) { return value(word & 0xffff); }
  static float high(uint32_t word) { return value(word >> 16); }
};

// -- 32-bit numbers --

inline float as_float(uint32_t word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
inline uint32_t as_word(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}
inline uint32_t to_tf32(float x) {
  const uint32_t word = as_word(x);
  return (std::isnan(x) ? word : word + 0xfff + (word >> 13 & 1)) & ~0x1fffu;
}
inline void multiply_tf32(float (&sums)[4], const uint32_t* a, const uint32_t* b) {
  Product<1> mine{sums, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, 8};
  multiply_in_warp(mine, [](uint32_t word, int) { return as_float(word & ~0x1fffu); });
}

// -- functions --

inline float exponential(float x) { return std::exp(x); }
inline float square_root(float x) { return std::sqrt(x); }
template <class Word>
inline Word load_constant(const Word* from) {
  return *from;
}

} // namespace baft::cuda
