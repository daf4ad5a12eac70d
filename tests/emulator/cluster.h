// The cluster of the emulated GPU: its threads as fibers, who runs next, barriers, and what is under way.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

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

// What the previous kernel of the stream writes, and what lies there until it has ended.
struct Written {
  void* at;
  std::vector<unsigned char> before;

  void swap() {
    unsigned char* bytes = static_cast<unsigned char*>(at);
    std::swap_ranges(before.begin(), before.end(), bytes);
  }
};

struct Meeting { // of so many threads
  int arrived = 0;
  std::vector<Fiber*> waiting;
  const void* operands[32]; // of a warp's lanes
};

class Cluster {
 public:
  Cluster(int size, int threads, size_t shared_bytes, uint64_t seed)
      : size_(size),
        threads_(threads),
        shared_(size, std::vector<unsigned char>(shared_bytes + 128, 0xff)),
        ended_(size, 0),
        random_(seed),
        ready_(size) {
    for (int rank = 0; rank < size; ++rank) speeds_.push_back(std::pow(10.0, -static_cast<double>(random_() % 4)));
    copies_first_ = std::vector<double>{0.01, 0.1, 0.5, 0.9}[random_() % 4];
  }

  // A previous kernel that still runs ends as late as it can: when every thread that hasn't ended waits, some for it.
  void run(int index, int count, const std::function<void()>& kernel, const std::vector<Written>& previous) {
    index_ = index;
    count_ = count;
    kernel_ = &kernel;
    previous_ = previous;
    previous_ended_ = previous.empty();
    for (Written& written : previous_) written.swap();
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
      if (rank < 0 && pending_.empty()) {
        if (previous_ended_) break;
        end_previous();
        continue;
      }
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
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_[rank].data()) + 127) &
                                            ~uintptr_t{127});
  }
  unsigned char* at(Address address, size_t bytes, int alignment) {
    const int rank = static_cast<int>(address >> 24) - 1;
    const size_t offset = address & 0xffffff;
    require(rank >= 0 && rank < size_ && offset + bytes + 128 <= shared_[rank].size(),
            "an address outside of the cluster");
    require(offset % alignment == 0, "an address that isn't aligned");
    return shared(rank) + offset;
  }
  void require(bool fine, const char* problem) {
    if (!fine) throw std::runtime_error(std::string(problem) + ": " + report());
  }
  void wait_for_previous() {
    pause();
    wait_until([&] { return previous_ended_; }, waiting_for_previous_, "the previous kernel");
  }
  bool previous_ended() const { return previous_ended_; }
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
  void meet(Meeting& meeting, int count, const char* what) {
    meet(meeting, count, what, [] {});
  }
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

  void end_previous() {
    for (Written& written : previous_) written.swap();
    previous_ended_ = true;
    wake(waiting_for_previous_);
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
  std::vector<Written> previous_; // with what lies there in the meantime
  bool previous_ended_ = true;
  std::vector<Fiber*> waiting_for_previous_;
  Fiber* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr error_;
};

inline Cluster* Cluster::current = nullptr;
inline Cluster& cluster() { return *Cluster::current; }
inline Fiber& self() { return cluster().self(); }

// Run `kernel` on every cluster of a grid, one after the other, each while a `previous` kernel ends, if there is one.
inline void launch(int clusters, int size, int threads, size_t shared_bytes, uint64_t seed,
                   const std::function<void()>& kernel, const std::vector<Written>& previous = {}) {
  for (int index = 0; index < clusters; ++index) {
    Cluster one(size, threads, shared_bytes, seed + 1000003 * index);
    Cluster::current = &one;
    one.run(index, clusters, kernel, previous);
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

} // namespace baft::cuda
