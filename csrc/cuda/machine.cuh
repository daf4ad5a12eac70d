// The machine: one function for each instruction that the kernels use beyond C++, and nothing else.
//
// tests/emulator/emulator.h has the same functions for a CPU, on which the kernels then run as they stand: lane by
// lane, with the CTAs of a cluster interleaved at random and copies that arrive at any time.
#pragma once

#include <cstdint>

namespace baft::cuda {
constexpr int kLargestSharedBytes = 227 << 10; // that a CTA can have on sm_90 and sm_100
#ifdef __CUDA_ARCH__
constexpr int kArchitecture = __CUDA_ARCH__; // that this is compiled for: 900 for sm_90
#else
constexpr int kArchitecture = 0;
#endif
} // namespace baft::cuda

#ifdef BAFT_EMULATED
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define BAFT_DEVICE __device__ __forceinline__
#define BAFT_KERNEL(THREADS) __global__ void __launch_bounds__(THREADS, 1)
#define BAFT_KERNEL_SHARING(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS, BLOCKS) // blocks on an SM
#define BAFT_UNROLL _Pragma("unroll")

namespace baft::cuda {

// -- who am I --

BAFT_DEVICE int thread() { return threadIdx.x; }
BAFT_DEVICE int warp() {
  return __shfl_sync(~0u, threadIdx.x / 32, 0);
} // the same in all lanes, and the compiler knows
BAFT_DEVICE int lane() { return threadIdx.x % 32; }
BAFT_DEVICE int lane_anew() { // found each time: what depends on it takes no registers in the meantime
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
BAFT_DEVICE int block() { return blockIdx.x; }
BAFT_DEVICE int blocks() { return gridDim.x; }
BAFT_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// -- shared memory: of this CTA, or of another one of the cluster --

using Address = uint32_t;

BAFT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic[];
  return dynamic;
}
BAFT_DEVICE Address address_of(const void* shared) { return static_cast<Address>(__cvta_generic_to_shared(shared)); }
BAFT_DEVICE Address in_cta(Address address, int rank) {
  Address there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// -- barriers in shared memory, which count arrivals and bytes --

BAFT_DEVICE void barrier_init(Address barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
BAFT_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrive, and expect so many bytes before the phase ends. They may have come already.
BAFT_DEVICE void barrier_expect(Address barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
BAFT_DEVICE void barrier_arrive(Address barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// With NVCC_APPEND_FLAGS=-DBAFT_BOUNDED_WAITS, to find a wait that never ends: after four seconds its kernel fails. It
// isn't always so because it takes registers, which some kernels don't have.
#ifdef BAFT_BOUNDED_WAITS
#define BAFT_BEGIN_TO_WAIT             \
  ".reg .pred late;\n"                 \
  ".reg .u32 begin, now;\n"            \
  "mov.u32 begin, %%globaltimer_lo;\n"
#define BAFT_OR_GIVE_UP                  \
  "mov.u32 now, %%globaltimer_lo;\n"     \
  "sub.u32 now, now, begin;\n"           \
  "setp.gt.u32 late, now, 4000000000;\n" \
  "@late trap;\n"
#else
#define BAFT_BEGIN_TO_WAIT
#define BAFT_OR_GIVE_UP
#endif
#define BAFT_WAIT(SCOPE)                                                         \
  "{\n"                                                                          \
  ".reg .pred done;\n"                                                           \
  BAFT_BEGIN_TO_WAIT                                                             \
  "again_%=:\n"                                                                  \
  "mbarrier.try_wait.parity.acquire." SCOPE ".shared::cta.b64 done, [%0], %1;\n" \
  "@done bra over_%=;\n"                                                         \
  BAFT_OR_GIVE_UP                                                                \
  "bra again_%=;\n"                                                              \
  "over_%=:\n"                                                                   \
  "}"
// Wait for the end of the phase with this parity: 0 for the first, 1 for the second, and so on in turns. Then what
// other CTAs sent is seen; and with the local form, what came from this CTA and its copies.
BAFT_DEVICE void barrier_wait_local(Address barrier, int parity) {
  asm volatile(BAFT_WAIT("cta")::"r"(barrier), "r"(parity) : "memory");
}
BAFT_DEVICE void barrier_wait(Address barrier, int parity) {
  asm volatile(BAFT_WAIT("cluster")::"r"(barrier), "r"(parity) : "memory");
}
#undef BAFT_WAIT
#undef BAFT_OR_GIVE_UP
#undef BAFT_BEGIN_TO_WAIT

// -- copies that run on their own: multiples of 16 bytes, from and to multiples of 16 --

BAFT_DEVICE void copy_in(Address to, const void* from, int bytes, Address barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
BAFT_DEVICE void copy_out(void* to, Address from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
BAFT_DEVICE void close_copies_out() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's copies out have read their source; until they are written.
BAFT_DEVICE void wait_copies_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
BAFT_DEVICE void wait_copies_out() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// What this thread wrote to shared memory is seen by the copies that start afterwards.
BAFT_DEVICE void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -- to the shared memory of the cluster's CTAs: a store that arrives at a barrier there, with its bytes --

BAFT_DEVICE void send(Address to, float4 values, Address barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(__float_as_uint(values.x)), "r"(__float_as_uint(values.y)), "r"(__float_as_uint(values.z)),
               "r"(__float_as_uint(values.w)), "r"(barrier)
               : "memory");
}
BAFT_DEVICE void send(Address to, float2 values, Address barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "r"(__float_as_uint(values.x)), "r"(__float_as_uint(values.y)), "r"(barrier)
               : "memory");
}
BAFT_DEVICE void send(Address to, uint32_t word, Address barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(word),
               "r"(barrier)
               : "memory");
}
BAFT_DEVICE void send(Address to, float value, Address barrier) { send(to, __float_as_uint(value), barrier); }

// -- meeting --

BAFT_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// The same without a fence: the other CTAs then see no more than what fence_barrier_init() released.
BAFT_DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
BAFT_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
BAFT_DEVICE void sync_block() { __syncthreads(); }
BAFT_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
BAFT_DEVICE void sync_warp() { __syncwarp(); }
// The previous kernel of the stream has ended and its writes are seen; and this one's successor may start.
BAFT_DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
BAFT_DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Move registers between the warps of a block: every warp of a group of four calls it.
template <int kRegisters>
BAFT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
BAFT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// -- between lanes --

BAFT_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
BAFT_DEVICE uint32_t ballot(bool holds) { return __ballot_sync(~0u, holds); } // bit i: whether it holds in lane i
// Four 8 x 8 matrices of 16 bits, or not transposed, 8 x 4 of 32; lane 8 m + i says where row i of matrix m is. See
// fragments.h for who holds what.
BAFT_DEVICE void load_matrices(uint32_t* to, Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}
BAFT_DEVICE void load_matrices_transposed(uint32_t* to, Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// -- 16-bit numbers, two in a word --

struct Bfloat16 {
  using Number = uint16_t;
  using Pair = uint32_t;
  static constexpr float kLargest = 3.3895314e38f;
  static BAFT_DEVICE uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static BAFT_DEVICE float low(uint32_t word) { return __uint_as_float(word << 16); }
  static BAFT_DEVICE float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  // sums [16 x 8] += a [16 x 16] b [16 x 8], and with half the depth.
  static BAFT_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static BAFT_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[2], const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
};

struct Float16 {
  using Number = uint16_t;
  using Pair = uint32_t;
  static constexpr float kLargest = 65504.0f;
  static BAFT_DEVICE uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static BAFT_DEVICE float low(uint32_t word) { return __half2float(__ushort_as_half(word & 0xffff)); }
  static BAFT_DEVICE float high(uint32_t word) { return __half2float(__ushort_as_half(word >> 16)); }
  static BAFT_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static BAFT_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[2], const uint32_t* b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
};

// -- 32-bit numbers: float32, and TF32, which has the upper 19 bits of one --

BAFT_DEVICE float as_float(uint32_t word) { return __uint_as_float(word); }
BAFT_DEVICE uint32_t as_word(float x) { return __float_as_uint(x); }
BAFT_DEVICE uint32_t to_tf32(float x) { // the nearest
  uint32_t word;
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}
// sums [16 x 8] += a [16 x 8] b [8 x 8]: four words and two, whose lower 13 bits are taken for zeros.
BAFT_DEVICE void multiply_tf32(float (&sums)[4], const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// -- functions --

BAFT_DEVICE float exponential(float x) { return expf(x); } // to float32's last bit, which __expf() is not
BAFT_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
// Of memory that nothing writes from the kernel's start to its end. Neither compiler nor machine keeps such a load in
// its place: it may come ahead of a wait for the previous kernel that it stands behind, and behind one that it stands
// ahead of.
template <class Word>
BAFT_DEVICE Word load_constant(const Word* from) {
  return __ldg(from);
}

} // namespace baft::cuda

#endif
