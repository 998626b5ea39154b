// Instructions of Hopper, compute capability 9.0 (build for sm_90a): barriers that count bytes
// (mbarrier), tile copies by the copy engine (TMA), products of a whole warpgroup straight from
// shared memory (wgmma), and registers moved between warpgroups (setmaxnreg).
//
// Shared memory is accessed by threads and through the "asynchronous proxy" of TMA and wgmma. A
// thread's ordinary stores are visible to that proxy only after its fence_async_proxy() and a
// barrier.
#pragma once
#include "ampere.cuh"

// A tensor map (CUtensorMap): address, sizes, strides, box and swizzle of an array, encoded by the
// host (launching.py) and passed as `const __grid_constant__ TensorMap name`.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

// Permutation of 16-byte chunks within a tile, so that a column of chunks covers all banks: chunk
// index ^= row % 8 (128-byte rows). Descriptors hold the value; the tile's address must be a
// multiple of 1024, 512 or 256 bytes.
enum Swizzle { SWIZZLE_NONE = 0, SWIZZLE_128 = 1, SWIZZLE_64 = 2, SWIZZLE_32 = 3 };

// Return the descriptor of a tile in shared memory for wgmma (PTX manual, "Matrix Descriptor
// Format"): start address, two strides and the swizzle, in units of 16 bytes. Tiles consist of
// "core matrices" of 8 rows x 16 bytes.
//   - K-major (A, and B [N x K] with TRANSPOSE_B = 0), rows of 128 bytes, SWIZZLE_128:
//     leading_bytes is ignored, stride_bytes = 1024 from eight rows to the next eight. The next 16
//     columns of k are 32 bytes further in the row.
//   - N-major (B [K x N], TRANSPOSE_B = 1), rows of 64 n, SWIZZLE_128: leading_bytes from one panel
//     of 64 n to the next, stride_bytes = 1024 from eight rows of k to the next eight. The next 16
//     rows of k are 2048 bytes further.
__host__ __device__ __forceinline__ uint64_t descriptor_bits(uint32_t address, int leading_bytes,
                                                             int stride_bytes, int swizzle) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(leading_bytes >> 4) << 16 |
           (uint64_t)(stride_bytes >> 4) << 32 | (uint64_t)swizzle << 62;
}

#ifndef MINILLM_EMULATOR

__device__ __forceinline__ uint64_t shared_descriptor(const void* shared, int leading_bytes,
                                                      int stride_bytes, int swizzle) {
    return descriptor_bits(shared_address(shared), leading_bytes, stride_bytes, swizzle);
}

// ---- mbarrier: a barrier in shared memory that counts arrivals and bytes. A phase completes after
// `count` arrivals and all expected bytes; the next one begins at once. A wait names the parity of
// a phase: 0, 1, 0, ... A new barrier is in phase 0, so waiting for parity 1 returns at once: a
// producer finds all its buffers empty at first.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
}

// Arrive once and announce `bytes` of copies. A clipped copy counts its whole box.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Wait for the end of the phase of this parity. try_wait returns after a limited time, hence the
// loop.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
    int over;
    do {
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
            "selp.b32 %0, 1, 0, over;\n"
            "}"
            : "=r"(over)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!over);
}

// Make barriers visible to the copy engine: after mbarrier_init, before their use. A
// __syncthreads() must follow.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Order a thread's ordinary stores to shared memory before reads by TMA or wgmma that follow a
// barrier.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- TMA: one thread starts the copy of a whole box. c0 is the coordinate along the innermost
// dim. Elements outside the array are read as zero and not written. Loads complete on an mbarrier;
// stores in groups, like cp.async.
__device__ __forceinline__ void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier,
                                            int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
        : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier,
                                            int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
__device__ __forceinline__ void tma_load_4d(void* shared, const TensorMap* map, uint64_t* barrier,
                                            int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

__device__ __forceinline__ void tma_store_4d(const TensorMap* map, const void* shared, int c0,
                                             int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
        "[%1];" ::"l"(map),
        "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

__device__ __forceinline__ void tma_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Wait until at most N of this thread's groups are in flight.
template <int N> __device__ __forceinline__ void tma_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// Wait until at most N of them still read shared memory; the rest may be overwritten.
template <int N> __device__ __forceinline__ void tma_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// ---- Named barriers (1 .. 15; __syncthreads is 0), for part of a block. `threads` counts those
// that sync and arrive, a multiple of 32.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Registers: all warps of a warpgroup release some, or wait until enough are free (24 .. 256,
// multiples of 8).
template <int N> __device__ __forceinline__ void set_max_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void set_max_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- wgmma: d [64 x N] (+)= a [64 x 16] b [16 x N] by a warpgroup, 16-bit elements, float sums.
// It is asynchronous: from warpgroup_fence() until warpgroup_wait(), threads must not touch d, A's
// registers or the tiles. Warp w of the group holds rows 16 w .. 16 w + 15; lane l's d[4 i + e]:
// row 16 w + l/4 + 8 (e/2), column 8 i + 2 (l%4) + e%2, so d is like N/8 D fragments of mma.sync
// side by side, and A from registers is the same fragment as there.

// Call before the first wgmma, and after writes to registers that it reads.
__device__ __forceinline__ void warpgroup_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Wait until at most the N latest groups are in flight.
template <int N> __device__ __forceinline__ void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keep the compiler from moving uses of d: it assumes that wgmma writes d when issued, not that d
// is in flight until the wait. Call it for each accumulator right before the first wgmma of a group
// and right after the wait.
template <int N> __device__ __forceinline__ void accumulator_fence(float (&d)[N]) {
    #pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Accumulators as operands of the instruction: their places in its text, and their C expressions.
#define MINILLM_PLACES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MINILLM_PLACES_32                                   \
    MINILLM_PLACES_16 ", %16, %17, %18, %19, %20, %21, %22" \
                      ", %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MINILLM_PLACES_48                                   \
    MINILLM_PLACES_32 ", %32, %33, %34, %35, %36, %37, %38" \
                      ", %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MINILLM_PLACES_64                                   \
    MINILLM_PLACES_48 ", %48, %49, %50, %51, %52, %53, %54" \
                      ", %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MINILLM_PLACES_80                                   \
    MINILLM_PLACES_64 ", %64, %65, %66, %67, %68, %69, %70" \
                      ", %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define MINILLM_PLACES_96                                   \
    MINILLM_PLACES_80 ", %80, %81, %82, %83, %84, %85, %86" \
                      ", %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MINILLM_PLACES_112                                     \
    MINILLM_PLACES_96 ", %96, %97, %98, %99, %100, %101, %102" \
                      ", %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define MINILLM_PLACES_128                                          \
    MINILLM_PLACES_112 ", %112, %113, %114, %115, %116, %117, %118" \
                       ", %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MINILLM_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MINILLM_SUMS_16_FROM(i) \
    MINILLM_SUMS_4(i), MINILLM_SUMS_4(i + 4), MINILLM_SUMS_4(i + 8), MINILLM_SUMS_4(i + 12)
#define MINILLM_SUMS_16 MINILLM_SUMS_16_FROM(0)
#define MINILLM_SUMS_32 MINILLM_SUMS_16, MINILLM_SUMS_16_FROM(16)
#define MINILLM_SUMS_48 MINILLM_SUMS_32, MINILLM_SUMS_16_FROM(32)
#define MINILLM_SUMS_64 MINILLM_SUMS_48, MINILLM_SUMS_16_FROM(48)
#define MINILLM_SUMS_80 MINILLM_SUMS_64, MINILLM_SUMS_16_FROM(64)
#define MINILLM_SUMS_96 MINILLM_SUMS_80, MINILLM_SUMS_16_FROM(80)
#define MINILLM_SUMS_112 MINILLM_SUMS_96, MINILLM_SUMS_16_FROM(96)
#define MINILLM_SUMS_128 MINILLM_SUMS_112, MINILLM_SUMS_16_FROM(112)

// COUNT = N / 2 accumulators; p0, p1, ... are the places after them. "p, 1, 1": add to d if p;
// neither A nor B is negated.
#define MINILLM_WGMMA_SHARED(TYPE, N, COUNT, p0, p1, p2, p3)                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\n"                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                 " {" MINILLM_PLACES_##COUNT "}, %" #p0 ", %" #p1 ", p, 1, 1, 0, %" #p3 ";\n}" \
                 : MINILLM_SUMS_##COUNT                                                        \
                 : "l"(a), "l"(b), "r"((int)accumulate), "n"(TRANSPOSE_B))
#define MINILLM_WGMMA_REGISTERS(TYPE, N, COUNT, p0, p1, p2, p3, p4, p5, p6)                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p5 ", 0;\n"                                \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                  \
                 " {" MINILLM_PLACES_##COUNT "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 \
                 ", p, 1, 1, %" #p6 ";\n}"                                                        \
                 : MINILLM_SUMS_##COUNT                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate),      \
                   "n"(TRANSPOSE_B))
#define MINILLM_WGMMA_SHARED_ANY(TYPE)                                                \
    if constexpr (N == 32) MINILLM_WGMMA_SHARED(TYPE, 32, 16, 16, 17, 18, 19);        \
    if constexpr (N == 64) MINILLM_WGMMA_SHARED(TYPE, 64, 32, 32, 33, 34, 35);        \
    if constexpr (N == 96) MINILLM_WGMMA_SHARED(TYPE, 96, 48, 48, 49, 50, 51);        \
    if constexpr (N == 128) MINILLM_WGMMA_SHARED(TYPE, 128, 64, 64, 65, 66, 67);      \
    if constexpr (N == 160) MINILLM_WGMMA_SHARED(TYPE, 160, 80, 80, 81, 82, 83);      \
    if constexpr (N == 192) MINILLM_WGMMA_SHARED(TYPE, 192, 96, 96, 97, 98, 99);      \
    if constexpr (N == 224) MINILLM_WGMMA_SHARED(TYPE, 224, 112, 112, 113, 114, 115); \
    if constexpr (N == 256) MINILLM_WGMMA_SHARED(TYPE, 256, 128, 128, 129, 130, 131)
#define MINILLM_WGMMA_REGISTERS_ANY(TYPE)                                                          \
    if constexpr (N == 32) MINILLM_WGMMA_REGISTERS(TYPE, 32, 16, 16, 17, 18, 19, 20, 21, 22);      \
    if constexpr (N == 64) MINILLM_WGMMA_REGISTERS(TYPE, 64, 32, 32, 33, 34, 35, 36, 37, 38);      \
    if constexpr (N == 96) MINILLM_WGMMA_REGISTERS(TYPE, 96, 48, 48, 49, 50, 51, 52, 53, 54);      \
    if constexpr (N == 128) MINILLM_WGMMA_REGISTERS(TYPE, 128, 64, 64, 65, 66, 67, 68, 69, 70);    \
    if constexpr (N == 160) MINILLM_WGMMA_REGISTERS(TYPE, 160, 80, 80, 81, 82, 83, 84, 85, 86);    \
    if constexpr (N == 192) MINILLM_WGMMA_REGISTERS(TYPE, 192, 96, 96, 97, 98, 99, 100, 101, 102); \
    if constexpr (N == 224)                                                                        \
        MINILLM_WGMMA_REGISTERS(TYPE, 224, 112, 112, 113, 114, 115, 116, 117, 118);                \
    if constexpr (N == 256)                                                                        \
    MINILLM_WGMMA_REGISTERS(TYPE, 256, 128, 128, 129, 130, 131, 132, 133, 134)

template <typename T> struct TypeOf;
template <> struct TypeOf<bfloat16> { static constexpr bool is_bfloat16 = true; };
template <> struct TypeOf<float16> { static constexpr bool is_bfloat16 = false; };

// Compute d = a b, plus d if `accumulate`, with A and B from shared memory.
template <typename T, int N, int TRANSPOSE_B>
__device__ __forceinline__ void wgmma_m64_k16(float (&d)[N / 2], uint64_t a, uint64_t b,
                                              bool accumulate) {
    static_assert(N % 32 == 0 && N <= 256,
                  "wgmma widths are written out for multiples of 32 up to 256");
    if constexpr (TypeOf<T>::is_bfloat16) {
        MINILLM_WGMMA_SHARED_ANY("bf16");
    } else {
        MINILLM_WGMMA_SHARED_ANY("f16");
    }
}
// Compute the same with A from registers.
template <typename T, int N, int TRANSPOSE_B>
__device__ __forceinline__ void wgmma_m64_k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                              bool accumulate) {
    static_assert(N % 32 == 0 && N <= 256,
                  "wgmma widths are written out for multiples of 32 up to 256");
    if constexpr (TypeOf<T>::is_bfloat16) {
        MINILLM_WGMMA_REGISTERS_ANY("bf16");
    } else {
        MINILLM_WGMMA_REGISTERS_ANY("f16");
    }
}
#endif
