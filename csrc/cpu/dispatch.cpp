// Chooses the variant, once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace baft::cpu {
namespace {

bool runs_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool runs_avx512bf16() {
#if defined(__x86_64__)
  return runs_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

const Kernels& choose() {
  const Kernels* usable[] = {runs_avx512bf16() ? avx512bf16_kernels() : nullptr,
                             runs_avx512() ? avx512_kernels() : nullptr, runs_avx2() ? avx2_kernels() : nullptr,
                             portable_kernels()};
  if (const char* asked = std::getenv("BAFT_CPU_VARIANT"))
    for (const Kernels* variant : usable)
      if (variant && std::strcmp(variant->name, asked) == 0) return *variant;
  for (const Kernels* variant : usable)
    if (variant) return *variant;
  return *portable_kernels();
}

} // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

} // namespace baft::cpu
