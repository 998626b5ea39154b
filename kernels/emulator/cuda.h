// CUDA C++ for the host compiler: keywords, built-in variables and types, intrinsics. It precedes
// every .cu file, so that kernels/gpu/include/cuda.cuh, whose own version is for the GPU, finds it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "elements.h"
#include "runtime.h"

// Subset of <cmath> that kernels use: the whole header takes longer to compile than most of them.
extern "C" {
float exp2f(float) noexcept;
float expf(float) noexcept;
float log2f(float) noexcept;
float logf(float) noexcept;
float sqrtf(float) noexcept;
double sqrt(double) noexcept;
float fmaf(float, float, float) noexcept;
float fabsf(float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float erff(float) noexcept;
float tanhf(float) noexcept;
float cosf(float) noexcept;
float sinf(float) noexcept;
}
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif

// ---- keywords. A static variable serves as a shared one, since one block runs at a time; its
// section marks it.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("minillm_shared")))

// All code between a kernel and the emulator's library is inlined, so return addresses lie in the
// kernel.
#define EMULATED __forceinline__

// ---- built-in variables and types
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
constexpr int warpSize = 32;

#define EMULATOR_VECTOR_TYPES(NAME, SCALAR) \
    struct alignas(2 * sizeof(SCALAR)) NAME##2 { SCALAR x, y; }; \
    struct NAME##3 { SCALAR x, y, z; }; \
    struct alignas(4 * sizeof(SCALAR)) NAME##4 { SCALAR x, y, z, w; }; \
    inline NAME##2 make_##NAME##2(SCALAR x, SCALAR y) { return {x, y}; } \
    inline NAME##3 make_##NAME##3(SCALAR x, SCALAR y, SCALAR z) { return {x, y, z}; } \
    inline NAME##4 make_##NAME##4(SCALAR x, SCALAR y, SCALAR z, SCALAR w) { return {x, y, z, w}; }
EMULATOR_VECTOR_TYPES(float, float)
EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(uint, unsigned)
#undef EMULATOR_VECTOR_TYPES

// ---- elements
template <typename T> EMULATED T from_float(float x);
template <> EMULATED float from_float<float>(float x) { return x; }
template <> EMULATED bfloat16 from_float<bfloat16>(float x) { return bfloat16_from(x); }
template <> EMULATED float16 from_float<float16>(float x) { return float16_from(x); }

template <typename T> EMULATED uint32_t pack2(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <typename T> EMULATED float2 unpack2(uint32_t both) {
    return {
        to_float(T{static_cast<uint16_t>(both)}), to_float(T{static_cast<uint16_t>(both >> 16)})
    };
}

// Type that moves 2, 4, 8 or 16 bytes in one instruction.
template <int BYTES> struct Word;
template <> struct Word<2> { typedef uint16_t type; };
template <> struct Word<4> { typedef uint32_t type; };
template <> struct Word<8> { typedef uint64_t type; };
template <> struct Word<16> { typedef uint32_t type __attribute__((vector_size(16))); };

template <typename T> EMULATED void store_word(T* to, T x) {
    *reinterpret_cast<typename Word<sizeof(T)>::type*>(to) =
        *reinterpret_cast<typename Word<sizeof(T)>::type*>(&x);
}

template <typename T>
EMULATED T* dynamic_shared() {
    return static_cast<T*>(emulator::dynamic_shared());
}

// ---- arithmetic
EMULATED float exp2_(float x) { return exp2f(x); }
EMULATED float log2_(float x) { return log2f(x); }
EMULATED float rsqrtf(float x) { return 1.0f / sqrtf(x); }
EMULATED float __expf(float x) { return expf(x); }
EMULATED float __logf(float x) { return logf(x); }
EMULATED float __log2f(float x) { return log2f(x); }
EMULATED float __fdividef(float x, float y) { return x / y; }
EMULATED float __fadd_rn(float x, float y) { return x + y; }
EMULATED float __fsub_rn(float x, float y) { return x - y; }
EMULATED float __fmul_rn(float x, float y) { return x * y; }
EMULATED float __fdiv_rn(float x, float y) { return x / y; }
EMULATED float __fsqrt_rn(float x) { return sqrtf(x); }
EMULATED float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
EMULATED double __dadd_rn(double x, double y) { return x + y; }
EMULATED double __dmul_rn(double x, double y) { return x * y; }
EMULATED float __uint_as_float(unsigned x) { return float_from_bits(x); }
EMULATED float __int_as_float(int x) { return float_from_bits(static_cast<unsigned>(x)); }
EMULATED unsigned __float_as_uint(float x) { return bits_of_float(x); }
EMULATED int __float_as_int(float x) { return static_cast<int>(bits_of_float(x)); }
EMULATED int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATED int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
EMULATED int __ffs(int x) { return __builtin_ffs(x); }
EMULATED unsigned __umulhi(unsigned x, unsigned y) {
    return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32);
}
EMULATED uint64_t __umul64hi(uint64_t x, uint64_t y) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(x) * y >> 64);
}
template <typename T> EMULATED T __ldg(const T* p) { return *p; }

// Minimum and maximum of two arithmetic types, in the type of their sum.
template <typename A, typename B>
EMULATED auto min(A a, B b) -> decltype(a + b) {
    return a < b ? a : b;
}
template <typename A, typename B>
EMULATED auto max(A a, B b) -> decltype(a + b) {
    return a > b ? a : b;
}

// ---- barriers
namespace emulator {
Votes block_barrier(const char* name, int value, int line);
void sync_warp(unsigned mask);
// Copy to every lane the bytes of the lane it names; `width` splits the warp into segments. `how`:
// 'i' index, 'x' xor, 'd' down, 'u' up.
void shuffle(unsigned mask, void* value, int bytes, char how, int operand, int width);
unsigned ballot(unsigned mask, bool predicate, const char* name);
// Apply `how` ('+', 'x' exchange, 'c' compare and swap, '<' minimum, '>' maximum) to a word of
// shared or global memory.
uint64_t atomic(
    void* address, int bytes, char how, uint64_t operand, uint64_t compare, bool is_signed
);
void thread_fence();
}  // namespace emulator

EMULATED void __syncthreads(int line = __builtin_LINE()) {
    emulator::block_barrier("__syncthreads", 0, line);
}
EMULATED int __syncthreads_or(int x, int line = __builtin_LINE()) {
    return emulator::block_barrier("__syncthreads_or", x, line).any;
}
EMULATED int __syncthreads_and(int x, int line = __builtin_LINE()) {
    return emulator::block_barrier("__syncthreads_and", x, line).all;
}
EMULATED int __syncthreads_count(int x, int line = __builtin_LINE()) {
    return emulator::block_barrier("__syncthreads_count", x, line).sum;
}
EMULATED void __syncwarp(unsigned mask = 0xffffffffu) { emulator::sync_warp(mask); }
EMULATED void __threadfence() { emulator::thread_fence(); }
EMULATED void __threadfence_block() {}

// ---- exchange between lanes
template <typename T> EMULATED T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    emulator::shuffle(mask, &value, sizeof value, 'i', lane, width);
    return value;
}
template <typename T>
EMULATED T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    emulator::shuffle(mask, &value, sizeof value, 'x', lanes, width);
    return value;
}
template <typename T>
EMULATED T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    emulator::shuffle(mask, &value, sizeof value, 'd', static_cast<int>(distance), width);
    return value;
}
template <typename T>
EMULATED T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    emulator::shuffle(mask, &value, sizeof value, 'u', static_cast<int>(distance), width);
    return value;
}
EMULATED unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulator::ballot(mask, predicate, "__ballot_sync");
}
EMULATED int __any_sync(unsigned mask, int predicate) {
    return emulator::ballot(mask, predicate, "__any_sync") != 0;
}
EMULATED int __all_sync(unsigned mask, int predicate) {
    return emulator::ballot(mask, !predicate, "__all_sync") == 0;
}

// ---- atomics
EMULATED int atomicAdd(int* p, int x) {
    return static_cast<int>(emulator::atomic(p, 4, '+', static_cast<uint32_t>(x), 0, true));
}
EMULATED unsigned atomicAdd(unsigned* p, unsigned x) {
    return static_cast<unsigned>(emulator::atomic(p, 4, '+', x, 0, false));
}
EMULATED unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
    return emulator::atomic(p, 8, '+', x, 0, false);
}
EMULATED int atomicMax(int* p, int x) {
    return static_cast<int>(emulator::atomic(p, 4, '>', static_cast<uint32_t>(x), 0, true));
}
EMULATED int atomicMin(int* p, int x) {
    return static_cast<int>(emulator::atomic(p, 4, '<', static_cast<uint32_t>(x), 0, true));
}
EMULATED unsigned atomicExch(unsigned* p, unsigned x) {
    return static_cast<unsigned>(emulator::atomic(p, 4, 'x', x, 0, false));
}
EMULATED int atomicExch(int* p, int x) {
    return static_cast<int>(emulator::atomic(p, 4, 'x', static_cast<uint32_t>(x), 0, true));
}
EMULATED unsigned atomicCAS(unsigned* p, unsigned compare, unsigned x) {
    return static_cast<unsigned>(emulator::atomic(p, 4, 'c', x, compare, false));
}
EMULATED int atomicCAS(int* p, int compare, int x) {
    return static_cast<int>(
        emulator::atomic(p, 4, 'c', static_cast<uint32_t>(x), static_cast<uint32_t>(compare), true)
    );
}

// ---- WATCH(name, value): a number, or an array of numbers of up to four dims
namespace emulator {
template <typename T> struct Shape {
    typedef T Number;
    static constexpr size_t count = 1;
    static void fill(int*) {}
};
template <typename T, size_t N> struct Shape<T[N]> {
    typedef typename Shape<T>::Number Number;
    static constexpr size_t count = N * Shape<T>::count;
    static void fill(int* sizes) {
        *sizes = N;
        Shape<T>::fill(sizes + 1);
    }
};
template <typename T> EMULATED void watch_value(const char* name, const T& value) {
    typedef typename Shape<T>::Number Number;
    const bool has_fractions = static_cast<Number>(0.5f) != static_cast<Number>(0);
    const bool has_sign = static_cast<Number>(-1) < static_cast<Number>(0);
    const char type = has_fractions ? 'f' : has_sign ? 'i' : 'u';
    int shape[5] = {0, 0, 0, 0, 0};
    Shape<T>::fill(shape);
    watch(name, type, sizeof(Number), &value, Shape<T>::count, shape);
}
}  // namespace emulator
#define WATCH(name, value) emulator::watch_value(#name, value)
