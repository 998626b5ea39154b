// Declarations of hopper.cuh for kernels under the emulator. Compiled with the kernel; tma.cpp and
// wgmma.cpp define them.
#pragma once
#include "runtime.h"

struct bfloat16;
struct TensorMap;

// ---- mbarrier
void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_expect(uint64_t* barrier, int bytes);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_wait(uint64_t* barrier, int parity);
void fence_barrier_init();
inline void fence_async_proxy() { emulator::fence_async_proxy(); }

// ---- TMA
void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1);
void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2);
void tma_load_4d(
    void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3
);
void tma_store_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3);
void tma_commit();

namespace emulator {
void wait_for_stores(int pending);
void wait_for_products(int pending);

// Operands of one wgmma, as a thread issues it. The left factor comes from registers if
// `a_registers` is not null.
struct Product {
    float* d;
    int n;
    bool transpose_b, accumulate, is_bfloat16;
    const uint32_t* a_registers;
    uint64_t a, b;
};
void start_product(const Product& product);

template <typename T> constexpr bool is_bfloat16 = false;
template <> inline constexpr bool is_bfloat16<::bfloat16> = true;
}  // namespace emulator

template <int N>
__attribute__((always_inline)) inline void tma_wait() {
    emulator::wait_for_stores(N);
}
template <int N>
__attribute__((always_inline)) inline void tma_wait_read() {
    emulator::wait_for_stores(N);
}

// ---- parts of a block
void named_barrier_sync(int id, int threads);
void named_barrier_arrive(int id, int threads);
template <int N>
inline void set_max_registers_up() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers of setmaxnreg");
}
template <int N>
inline void set_max_registers_down() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers of setmaxnreg");
}

// ---- wgmma
uint64_t shared_descriptor(const void* shared, int leading_bytes, int stride_bytes, int swizzle);
void warpgroup_fence();
void warpgroup_commit();
template <int N>
__attribute__((always_inline)) inline void warpgroup_wait() {
    emulator::wait_for_products(N);
}
template <int N> inline void accumulator_fence(float (&)[N]) {}

template <typename T, int N, int TRANSPOSE_B>
__attribute__((always_inline)) inline void wgmma_m64_k16(
    float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate
) {
    static_assert(
        N % 32 == 0 && N <= 256, "wgmma widths are written out for multiples of 32 up to 256"
    );
    emulator::start_product(
        {d, N, TRANSPOSE_B != 0, accumulate, emulator::is_bfloat16<T>, nullptr, a, b}
    );
}
template <typename T, int N, int TRANSPOSE_B>
__attribute__((always_inline)) inline void wgmma_m64_k16(
    float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate
) {
    static_assert(
        N % 32 == 0 && N <= 256, "wgmma widths are written out for multiples of 32 up to 256"
    );
    emulator::start_product(
        {d, N, TRANSPOSE_B != 0, accumulate, emulator::is_bfloat16<T>, a, 0, b}
    );
}
