// While one of these lives, its thread takes numbers below 2^-126 for zero: on x86-64 and ARM; on others there is none.
// To be used within a task, never around what may start a thread: that one would be born with it, and keep it.
//
// A processor takes a hundred times as long over such a number as over another. Backward meets many: gates that learn to
// be shut come to be 1e-20, or 1e-38, and what is left of a token's gradient behind them is no more. For them a training
// step of a run's thousandth edit took half as long again as one of its first. As gradients they are nothing. Forward,
// which meets few, keeps them: what isn't edited has to come out as it went in.
//
// float16 has numbers below 2^-14 that are subnormal there: as floats they are ordinary, and stay.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace baft::cpu {

class SubnormalsAreZero {
public:
  SubnormalsAreZero() { set(before_ | kZero); }
  ~SubnormalsAreZero() { set(before_); }
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

private:
#if defined(__x86_64__)
  static constexpr uint64_t kZero = 0x8040; // of results (FTZ), and of operands (DAZ)
  static uint64_t mode() { return _mm_getcsr(); }
  static void set(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kZero = 1 << 24; // FZ, of both
  static uint64_t mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
  static constexpr uint64_t kZero = 0;
  static uint64_t mode() { return 0; }
  static void set(uint64_t) {}
#endif
  uint64_t before_ = mode();
};

} // namespace baft::cpu
