// Base of every .cu file: element types, 16-byte accesses, packing, and reductions over a warp and
// a block.
//
// A .cu file includes only this and other headers of kernels/, so that three compilers read it
// alike: nvcc, NVRTC (which has no standard headers), and the host compiler of the emulator.
// kernels/emulator/cuda.h replaces the code between `#ifndef MINILLM_EMULATOR` and its `#endif`;
// the rest runs there unchanged.
//
// -DELEMENT=float32 | bfloat16 | float16 chooses `Element`, the type of the arrays. Sums and
// statistics are always float.
#pragma once

#ifndef MINILLM_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef __CUDACC_RTC__  // NVRTC knows the built-in types only
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif
#ifndef INFINITY
#define INFINITY __builtin_bit_cast(float, 0x7f800000)  // a constant expression
#endif

typedef __nv_bfloat16 bfloat16;
typedef __half float16;
#endif
typedef float float32;

#ifndef ELEMENT
#define ELEMENT float32
#endif
typedef ELEMENT Element;

#define LANE ((int)(threadIdx.x % 32))  // of a one-dimensional block
#define WARP ((int)(threadIdx.x / 32))

// Conversions. To 16 bits: round to nearest, ties to even.
#ifndef MINILLM_EMULATOR
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ float16 from_float<float16>(float x) {
    return __float2half_rn(x);
}

// Two 16-bit elements in a register, `low` in the low half: an operand of tensor cores.
template <typename T> __device__ __forceinline__ uint32_t pack2(float low, float high);
template <> __device__ __forceinline__ uint32_t pack2<bfloat16>(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&both);
}
template <> __device__ __forceinline__ uint32_t pack2<float16>(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&both);
}

template <typename T> __device__ __forceinline__ float2 unpack2(uint32_t both);
template <> __device__ __forceinline__ float2 unpack2<bfloat16>(uint32_t both) {
    // A bfloat16 is the upper half of a float.
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack2<float16>(uint32_t both) {
    return __half22float2(*reinterpret_cast<__half2*>(&both));
}

// The special-function unit's exponential and logarithm: one instruction each, about 2 ulp,
// denormals are zero. It is for powers of two only, so kernels scale by log2(e) once and stay in
// base two.
__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Start of dynamic shared memory, whose size the launch gives. TMA's widest swizzle needs an
// alignment of 1024 bytes.
template <typename T> __device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char minillm_dynamic_shared[];
    return reinterpret_cast<T*>(minillm_dynamic_shared);
}

// Built-in type that moves BYTES bytes in one instruction.
template <int BYTES> struct Word;
template <> struct Word<2> { typedef uint16_t type; };
template <> struct Word<4> { typedef uint32_t type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<16> { typedef uint4 type; };

// Write 16 or 8 bytes of global memory in one instruction. An assignment may become one store for
// each component: the compiler splits a union's words and does not join them again.
__device__ __forceinline__ void store_word(uint4* to, uint4 x) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
__device__ __forceinline__ void store_word(uint2* to, uint2 x) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x),
                 "r"(x.y)
                 : "memory");
}

// WATCH(name, value) shows `value` (a number or an array of numbers) of one chosen thread in the
// emulator; a no-op on the GPU.
#define WATCH(name, value)
#endif

// N elements that move together. Pack16 is the widest access of a thread: one instruction, 512
// bytes a warp.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
    T v[N];
};
template <typename T> using Pack16 = Pack<T, 16 / sizeof(T)>;

// Read or write N elements as one; their address must be a multiple of their size.
template <int N, typename T> __device__ __forceinline__ Pack<T, N> load(const T* from) {
    typedef typename Word<N * sizeof(T)>::type Whole;
    Pack<T, N> pack;
    *reinterpret_cast<Whole*>(&pack) = *reinterpret_cast<const Whole*>(from);
    return pack;
}
template <int N, typename T> __device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
    typedef typename Word<N * sizeof(T)>::type Whole;
    *reinterpret_cast<Whole*>(to) = *reinterpret_cast<const Whole*>(&pack);
}
template <typename T> __device__ __forceinline__ Pack16<T> load16(const T* from) {
    return load<16 / sizeof(T)>(from);
}
template <typename T> __device__ __forceinline__ void store16(T* to, const Pack16<T>& pack) {
    store(to, pack);
}

// Reduce over the 32 lanes of a warp. After step i every lane holds the result of 2^i lanes; at the
// end all hold the same bits, since float addition is commutative.
__device__ __forceinline__ float warp_sum(float x) {
    #pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    #pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}

// Reduce over a one-dimensional block of whole warps; all threads take part and get the result.
// `shared`: one float a warp, free again afterwards.
__device__ __forceinline__ float block_sum(float x, float* shared) {
    const int num_warps = blockDim.x / 32;
    x = warp_sum(x);
    if (LANE == 0) shared[WARP] = x;
    __syncthreads();
    x = warp_sum(LANE < num_warps ? shared[LANE] : 0.0f);
    __syncthreads();
    return x;
}
__device__ __forceinline__ float block_max(float x, float* shared) {
    const int num_warps = blockDim.x / 32;
    x = warp_max(x);
    if (LANE == 0) shared[WARP] = x;
    __syncthreads();
    x = warp_max(LANE < num_warps ? shared[LANE] : -INFINITY);
    __syncthreads();
    return x;
}
