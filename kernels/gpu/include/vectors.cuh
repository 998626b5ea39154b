// Runs of consecutive elements as floats in registers, for any element type, and sums over a row
// that a warp or a block shares.
//
// Memory is fastest in 16-byte accesses, so a thread takes a run of consecutive elements at a time.
// Only this file handles cut-off last runs and unaligned arrays.
#pragma once
#include "cuda.cuh"

constexpr int RUN = 16 / (int)sizeof(Element);  // elements of 16 bytes

template <int BYTES> struct WordOf;
template <> struct WordOf<16> { typedef uint4 type; };
template <> struct WordOf<8> { typedef uint2 type; };

// N elements as in memory, in words of up to 16 bytes.
template <typename T, int N> struct Run {
    static constexpr int BYTES = N * (int)sizeof(T) >= 16 ? 16 : N * (int)sizeof(T);
    typedef typename WordOf<BYTES>::type Word;
    static constexpr int WORDS = N * (int)sizeof(T) / BYTES;
    union {
        Word words[WORDS];
        uint32_t bits[N * sizeof(T) / 4];
        float floats[N * sizeof(T) / 4];
    };
};

// Return true if the N elements at an address can be moved in wide accesses.
template <int N, typename T> __device__ __forceinline__ bool whole(const T* from, int64_t left) {
    return left >= N && (uint64_t)from % Run<T, N>::BYTES == 0;
}

// Load the N elements at `from`, of which `left` exist; the others are zero.
template <int N, typename T> __device__ __forceinline__ Run<T, N> load_run(const T* from,
                                                                           int64_t left) {
    Run<T, N> run;
    if (whole<N>(from, left)) {
        #pragma unroll
        for (int i = 0; i < Run<T, N>::WORDS; i++)
            run.words[i] = reinterpret_cast<const typename Run<T, N>::Word*>(from)[i];
    } else if constexpr (sizeof(T) == 4) {
        #pragma unroll
        for (int i = 0; i < N; i++) run.floats[i] = i < left ? from[i] : 0.0f;
    } else {
        #pragma unroll
        for (int i = 0; i < N; i += 2)
            run.bits[i / 2] = pack2<T>(i < left ? to_float(from[i]) : 0.0f,
                                       i + 1 < left ? to_float(from[i + 1]) : 0.0f);
    }
    return run;
}

template <int N, typename T> __device__ __forceinline__ void to_floats(float (&x)[N],
                                                                       const Run<T, N>& run) {
    if constexpr (sizeof(T) == 4) {
        #pragma unroll
        for (int i = 0; i < N; i++) x[i] = run.floats[i];
    } else {
        #pragma unroll
        for (int i = 0; i < N; i += 2) {
            const float2 two = unpack2<T>(run.bits[i / 2]);
            x[i] = two.x;
            x[i + 1] = two.y;
        }
    }
}

template <int N, typename T> __device__ __forceinline__ void load_floats(float (&x)[N],
                                                                         const T* from,
                                                                         int64_t left) {
    to_floats(x, load_run<N>(from, left));
}

// Write x, rounded to T, to the N elements at `to`, of which `left` exist.
template <int N, typename T> __device__ __forceinline__ void store_floats(T* to,
                                                                          const float (&x)[N],
                                                                          int64_t left) {
    if (!whole<N>(to, left)) {
        #pragma unroll
        for (int i = 0; i < N; i++)
            if (i < left) to[i] = from_float<T>(x[i]);
        return;
    }
    Run<T, N> run;
    if constexpr (sizeof(T) == 4) {
        #pragma unroll
        for (int i = 0; i < N; i++) run.floats[i] = x[i];
    } else {
        #pragma unroll
        for (int i = 0; i < N; i += 2) run.bits[i / 2] = pack2<T>(x[i], x[i + 1]);
    }
    #pragma unroll
    for (int i = 0; i < Run<T, N>::WORDS; i++)
        store_word(reinterpret_cast<typename Run<T, N>::Word*>(to) + i, run.words[i]);
}

// Round a value to T.
template <typename T> __device__ __forceinline__ float rounded(float x) {
    return to_float(from_float<T>(x));
}

// Sum two numbers over the threads (·, y) of a row: a warp, or a block of several warps with one
// row. `shared` holds two floats a warp. Every thread gets the same bits.
__device__ __forceinline__ float2 row_sums(float2 x, float2* shared) {
    x.x = warp_sum(x.x);
    x.y = warp_sum(x.y);
    const int num_warps = blockDim.x / 32;
    if (num_warps == 1) return x;
    if (LANE == 0) shared[WARP] = x;
    __syncthreads();
    x = LANE < num_warps ? shared[LANE] : make_float2(0.0f, 0.0f);
    __syncthreads();
    return make_float2(warp_sum(x.x), warp_sum(x.y));
}
__device__ __forceinline__ float row_sum(float x, float2* shared) {
    return row_sums(make_float2(x, 0.0f), shared).x;
}
