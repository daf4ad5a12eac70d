// A GPU of one cluster, on a CPU: the functions of csrc/cuda/machine.cuh, so that the kernels run as they stand.
//
// Every thread of the cluster's CTAs is a fiber. Fibers change places only inside the functions below, at random; copies
// and stores to other CTAs are carried out at random times after they were asked for. Each seed has its own slow CTAs,
// and copies that come at once or at the last moment: a kernel that is right in every order gives the same result for
// all of them. What would hang stops with a report; shared memory that was never written holds NaN.
// Not modelled: the order of plain stores within a thread, and the fence between them and the copies.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define BAFT_DEVICE inline
#define BAFT_KERNEL(THREADS) static void
#define BAFT_KERNEL_SHARING(THREADS, BLOCKS) static void
#define BAFT_UNROLL

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace baft::cuda {

using Address = uint32_t; // of shared memory: the CTA's rank, plus one, in the upper byte

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int rank, thread;
  bool done = false;
  std::vector<std::function<void()>> open_copies; // asked for, not yet closed
  int copies_unread = 0, copies_unwritten = 0;
  int cluster_waits = 0;
  std::vector<Fiber*> waiting; // for its copies: itself, at most
  const char* waits_for = nullptr;
};

struct Barrier {
  int expected = 0, arrived = 0, phase = 0;
  int64_t bytes = 0; // still to come in this phase; negative if they came before they were expected
  std::vector<Fiber*> waiting;
};

struct Meeting { // of so many threads
  int arrived = 0;
  std::vector<Fiber*> waiting;
  const void* operands[32]; // of a warp's lanes
};

class Cluster {
 public:
  Cluster(int size, int threads, size_t shared_bytes, uint64_t seed)
      : size_(size), threads_(threads), shared_(size, std::vector<unsigned char>(shared_bytes + 128, 0xff)),
        ended_(size, 0), random_(seed), ready_(size) {
    for (int rank = 0; rank < size; ++rank) speeds_.push_back(std::pow(10.0, -static_cast<double>(random_() % 4)));
    copies_first_ = std::vector<double>{0.01, 0.1, 0.5, 0.9}[random_() % 4];
  }

  void run(int index, int count, const std::function<void()>& kernel) {
    index_ = index;
    count_ = count;
    kernel_ = &kernel;
    for (int rank = 0; rank < size_; ++rank)
      for (int thread = 0; thread < threads_; ++thread) {
        fibers_.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers_.back();
        fiber.rank = rank;
        fiber.thread = thread;
        fiber.stack.reset(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &scheduler_;
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Cluster::start), 0);
        make_ready(&fiber);
      }
    while (true) {
      const int rank = next_cta();
      if (rank < 0 && pending_.empty()) break;
      if (rank < 0 || (!pending_.empty() && drawn() < copies_first_)) {
        take(pending_)();
      } else {
        running_ = take(ready_[rank]);
        swapcontext(&scheduler_, &running_->context);
        if (error_) std::rethrow_exception(error_);
      }
    }
    for (const auto& fiber : fibers_)
      if (!fiber->done) throw std::runtime_error("the kernel hangs: " + report());
  }

  // -- for the functions below --

  Fiber& self() { return *running_; }
  int size() const { return size_; }
  int threads() const { return threads_; }
  int index() const { return index_; }
  int count() const { return count_; }
  unsigned char* shared(int rank) {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_[rank].data()) + 127) & ~uintptr_t{127});
  }
  unsigned char* at(Address address, size_t bytes, int alignment) {
    const int rank = static_cast<int>(address >> 24) - 1;
    const size_t offset = address & 0xffffff;
    require(rank >= 0 && rank < size_ && offset + bytes + 128 <= shared_[rank].size(), "an address outside of the cluster");
    require(offset % alignment == 0, "an address that isn't aligned");
    return shared(rank) + offset;
  }
  void require(bool fine, const char* problem) {
    if (!fine) throw std::runtime_error(std::string(problem) + ": " + report());
  }
  bool runs(int rank) const { return ended_[rank] < threads_; }
  void later(std::function<void()> work) { pending_.push_back(std::move(work)); }
  Barrier& barrier(Address address) { return barriers_[address]; }
  Meeting& meeting(int kind, int which) { return meetings_[{running_->rank, kind, which}]; }
  Meeting& cluster_meeting() { return meetings_[{-1, 0, 0}]; }

  // Let others run until `over` holds; whoever changes that wakes `waiting`.
  template <class Over>
  void wait_until(Over over, std::vector<Fiber*>& waiting, const char* what) {
    Fiber* me = running_;
    while (!over()) {
      me->waits_for = what;
      waiting.push_back(me);
      swapcontext(&me->context, &scheduler_);
    }
    me->waits_for = nullptr;
  }
  void wake(std::vector<Fiber*>& waiting) {
    for (Fiber* fiber : waiting) make_ready(fiber);
    waiting.clear();
  }
  // Meet `count` threads. The last one does the work; then all go on.
  template <class Work>
  void meet(Meeting& meeting, int count, const char* what, Work work) {
    if (++meeting.arrived == count) {
      work();
      meeting.arrived = 0;
      wake(meeting.waiting);
      pause();
    } else {
      Fiber* me = running_;
      me->waits_for = what;
      meeting.waiting.push_back(me);
      swapcontext(&me->context, &scheduler_);
      me->waits_for = nullptr;
    }
  }
  void meet(Meeting& meeting, int count, const char* what) { meet(meeting, count, what, [] {}); }
  void pause() {
    Fiber* me = running_;
    make_ready(me);
    swapcontext(&me->context, &scheduler_);
  }
  void end_phase_if_complete(Barrier& barrier) {
    if (barrier.arrived < barrier.expected || barrier.bytes != 0) return;
    barrier.arrived = 0;
    ++barrier.phase;
    wake(barrier.waiting);
  }

  static Cluster* current;

 private:
  static constexpr size_t kStack = 64 << 10;

  static void start() {
    Cluster& cluster = *current;
    Fiber& me = *cluster.running_;
    try {
      (*cluster.kernel_)();
      cluster.require(me.copies_unread == 0 && me.open_copies.empty(), "a thread ends before its copies have read");
    } catch (...) {
      cluster.error_ = std::current_exception();
    }
    me.done = true;
    ++cluster.ended_[me.rank];
  }

  void make_ready(Fiber* fiber) { ready_[fiber->rank].push_back(fiber); }

  double drawn() { return static_cast<double>(random_() >> 11) * 0x1p-53; }

  // One of the CTAs that have threads to run, the fast ones rather; -1 for none.
  int next_cta() {
    double all = 0;
    for (int rank = 0; rank < size_; ++rank) all += ready_[rank].empty() ? 0 : speeds_[rank];
    double left = drawn() * all;
    int found = -1;
    for (int rank = 0; rank < size_ && left >= 0; ++rank)
      if (!ready_[rank].empty()) {
        found = rank;
        left -= speeds_[rank];
      }
    return found;
  }

  template <class T>
  T take(std::vector<T>& from) {
    std::swap(from[random_() % from.size()], from.back());
    T taken = std::move(from.back());
    from.pop_back();
    return taken;
  }

  std::string report() const {
    std::map<std::string, int> counts;
    for (const auto& fiber : fibers_)
      if (fiber->waits_for) ++counts[std::string(fiber->waits_for) + " in CTA " + std::to_string(fiber->rank)];
    std::string text;
    for (const auto& [what, count] : counts) text += std::to_string(count) + " threads wait for " + what + "; ";
    return text + std::to_string(pending_.size()) + " copies under way";
  }

  int size_, threads_, index_ = 0, count_ = 1;
  std::vector<std::vector<unsigned char>> shared_;
  std::vector<int> ended_; // threads of each CTA
  std::mt19937_64 random_;
  ucontext_t scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::vector<Fiber*>> ready_; // of each CTA
  std::vector<double> speeds_;
  double copies_first_;
  std::vector<std::function<void()>> pending_;
  std::map<Address, Barrier> barriers_;
  std::map<std::tuple<int, int, int>, Meeting> meetings_;
  Fiber* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr error_;
};

inline Cluster* Cluster::current = nullptr;
inline Cluster& cluster() { return *Cluster::current; }
inline Fiber& self() { return cluster().self(); }

// Run `kernel` on every cluster of a grid, one after the other.
inline void launch(int clusters, int size, int threads, size_t shared_bytes, uint64_t seed,
                   const std::function<void()>& kernel) {
  for (int index = 0; index < clusters; ++index) {
    Cluster one(size, threads, shared_bytes, seed + 1000003 * index);
    Cluster::current = &one;
    one.run(index, clusters, kernel);
  }
}

// What the 32 lanes of a warp do together: `work` gets all their operands.
template <class Operands, class Work>
inline void together(const char* what, Operands& mine, Work work) {
  const int warp = self().thread / 32, lane = self().thread % 32;
  Meeting& meeting = cluster().meeting(1, warp);
  meeting.operands[lane] = &mine;
  cluster().meet(meeting, 32, what, [&] {
    Operands* all[32];
    for (int i = 0; i < 32; ++i) all[i] = const_cast<Operands*>(static_cast<const Operands*>(meeting.operands[i]));
    work(all);
  });
}

} // namespace emulator

// -- who am I --

inline int thread() { return emulator::self().thread; }
inline int warp() { return thread() / 32; }
inline int lane() { return thread() % 32; }
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
    emulator::cluster().require(emulator::cluster().runs(static_cast<int>(to >> 24) - 1), "a store to a CTA that has ended");
    std::memcpy(there, &value, sizeof value);
    emulator::Barrier& arrived = emulator::cluster().barrier(barrier);
    emulator::cluster().require(arrived.expected > 0, "a store that arrives at a barrier before that was set up");
    arrived.bytes -= sizeof value;
    emulator::cluster().end_phase_if_complete(arrived);
  });
}
inline void send(Address to, float4 values, Address barrier) { send_value(to, values, barrier); }
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
inline void sync_warp() {
  emulator::cluster().meet(emulator::cluster().meeting(3, warp()), 32, "its warp");
}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
template <int kRegisters>
inline void take_registers() {}
template <int kRegisters>
inline void give_registers() {}

// -- between lanes --

inline float shuffle_xor(float value, int mask) {
  struct { float mine, found; } operands{value, 0.0f};
  emulator::together("a shuffle", operands, [mask](auto** all) {
    for (int i = 0; i < 32; ++i) all[i]->found = all[i ^ mask]->mine;
  });
  return operands.found;
}

inline uint32_t ballot(bool holds) {
  struct { bool mine; uint32_t found; } operands{holds, 0};
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
inline void load_matrices_as(uint32_t (&to)[4], Address row, bool transposed) {
  MatrixLoad mine{row, to, transposed};
  emulator::together("matrices", mine, [](MatrixLoad** all) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t values[8][8];
      for (int i = 0; i < 8; ++i)
        std::memcpy(values[i], emulator::cluster().at(all[8 * matrix + i]->row, 16, 16), 16);
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
inline void load_matrices(uint32_t (&to)[4], Address row) { load_matrices_as(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], Address row) { load_matrices_as(to, row, true); }

// -- 16-bit numbers --

struct Product {
  float* sums;
  uint32_t a[4], b[2];
  int depth;
};

template <class T>
inline void multiply_in_warp(Product& mine) {
  emulator::together("a product", mine, [](Product** all) {
    double a[16][16] = {}, b[16][8] = {};
    const int depth = all[0]->depth;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int q = 0; q < depth / 4; ++q) { // registers of a: rows g and g + 8, columns 2t and 2t + 8
        const int row = g + 8 * (q % 2), column = 2 * t + 8 * (q / 2);
        a[row][column] = T::low(all[lane]->a[q]);
        a[row][column + 1] = T::high(all[lane]->a[q]);
      }
      for (int q = 0; q < depth / 8; ++q) {
        b[2 * t + 8 * q][g] = T::low(all[lane]->b[q]);
        b[2 * t + 8 * q + 1][g] = T::high(all[lane]->b[q]);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int q = 0; q < 4; ++q) {
        const int row = lane / 4 + 8 * (q / 2), column = lane % 4 * 2 + q % 2;
        double sum = all[lane]->sums[q];
        for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
        all[lane]->sums[q] = static_cast<float>(sum);
      }
  });
}

template <class T>
struct Half {
  static void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product mine{sums, {a[0], a[1], a[2], a[3]}, {b0, b1}, 16};
    multiply_in_warp<T>(mine);
  }
  static void multiply(float (&sums)[4], const uint32_t (&a)[2], uint32_t b) {
    Product mine{sums, {a[0], a[1], 0, 0}, {b, 0}, 8};
    multiply_in_warp<T>(mine);
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

// -- functions --

inline float exponential(float x) { return std::exp(x); }
inline float square_root(float x) { return std::sqrt(x); }
template <class Word>
inline Word load_constant(const Word* from) {
  return *from;
}

} // namespace baft::cuda
