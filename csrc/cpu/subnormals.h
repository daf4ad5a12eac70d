// While one of these lives, its thread takes numbers below 2^-126 for zero.
//
// A processor multiplies such a number a hundred times as slowly as another. Backward meets many of them: tokens that
// are predicted as they shall be have gradients of 1e-20, gates that are shut multiply them by as little, and a training
// step of a run's thousandth edit took half as long again as that of its first. As gradients they are nothing. Forward
// keeps them, as what it doesn't edit has to come out as it went in.
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
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t kZero = 0;
  static uint64_t mode() { return 0; }
  static void set(uint64_t) {}
#endif
  uint64_t before_ = mode();
};

} // namespace baft::cpu
