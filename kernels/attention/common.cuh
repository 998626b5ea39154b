// What v1 and v2 agree on: their arguments, which keys a query sees, and what dropout keeps. Array arguments that do not apply are null
// pointers; the bindings are cuda.py.
#pragma once
#include "../device/hashing.cuh"

// From one sample, time and head to the next, in elements. The last dim of an array [B, T, H, K] has stride 1.
struct Strides {
    int64_t batch, time, head;
};

// Passed by value. A grid says how many samples there are.
struct Attention {
    Strides q, k, v, o, grad_o, grad_q, grad_k, grad_v; // the last four: backward only
    int32_t num_queries, num_keys, num_heads, num_kv_heads;
    int32_t causal;     // query i sees the keys up to i; otherwise all. `limits` overrule this
    uint32_t threshold; // dropout: what hashes below is dropped
    float scale, keep_scale;
};

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f; // exp(x) = exp2(LOG2_E x): the hardware has exp2

template <class T>
__device__ __forceinline__ T* head_start(T* x, Strides strides, int sample, int head) {
    return x + sample * strides.batch + head * strides.head;
}

// Query i sees the keys [0, limit) that `key_mask` does not hide; a query past the end sees none. `limits` [Tq] or null.
__device__ __forceinline__ int limit_of(const Attention& a, const int* limits, int query) {
    if (query >= a.num_queries) return 0;
    if (limits) return limits[query];
    return a.causal ? min(query + 1, a.num_keys) : a.num_keys;
}

// Of some queries: each sees the keys below `least`, none sees those from `most` on.
struct Limits {
    int least, most;
};

__device__ __forceinline__ Limits limits_of(const Attention& a, const int* limits, int first_query, int rows) {
    const int end = min(first_query + rows, a.num_queries);
    if (first_query >= end) return {0, 0};
    if (!limits) return {limit_of(a, limits, first_query), limit_of(a, limits, end - 1)};
    Limits of = {a.num_keys, 0};
    for (int query = first_query; query < end; query++) of = {min(of.least, limits[query]), max(of.most, limits[query])};
    return of;
}

// A query before which none sees `key`: a multiple of `tile`, which divides the number of threads. The whole block calls it.
__device__ __forceinline__ int first_query_seeing(const Attention& a, const int* limits, int key, int tile) {
    if (!limits) return a.causal ? key / tile * tile : 0;
    int first = 0;
    for (; first < a.num_queries; first += blockDim.x)
        if (__syncthreads_or(limit_of(a, limits, first + threadIdx.x) > key)) break;
    return first;
}

// Dropout keeps the probability of (query, key) by a word of the query and head, this one, and a word of the key.
__device__ __forceinline__ uint64_t row_word(uint64_t head_key, int64_t query_time) { return random_bits(head_key, uint64_t(query_time)); }
