// Definitions shared by all variants: arguments, the visible keys of a query, and the elements that
// dropout keeps. Array arguments that do not apply are null pointers. The bindings are cuda.py.
#pragma once
#include "../gpu/include/hashing.cuh"

// Strides of samples, times and heads, in elements. The last dim of an array [B, T, H, K] has
// stride 1.
struct Strides {
    int64_t batch, time, head;
};

// Passed by value. The grid gives the number of samples.
struct Attention {
    Strides q, k, v, o, grad_o, grad_q, grad_k, grad_v; // the last four: backward only
    int32_t num_queries, num_keys, num_heads, num_kv_heads;
    int32_t causal;       // without a table of visible keys, query i sees the keys up to i; 0: all
    int32_t visible_step; // stride of the samples' tables, in elements; 0: one table for all
    int32_t column_step;  // the same for dropout's words of the keys
    uint32_t threshold;   // of dropout: elements that hash below it are dropped
    float scale, keep_scale;
    float cap, per_cap;   // bound on scores, and 1 / cap; 0: none (v1 alone)
};

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f; // exp(x) = exp2(LOG2_E x)

// Return the score of a dot product in powers of two, within the bound if there is one. Then set
// `slope`, if given, to its derivative by the score without the bound.
__device__ __forceinline__ float score(const Attention& a, float dot, float* slope = nullptr) {
    if (!(a.cap > 0)) return dot * (a.scale * LOG2_E);
    const float t = tanhf(dot * a.scale * a.per_cap);
    if (slope) *slope = 1 - t * t;
    return t * a.cap * LOG2_E;
}

template <class T>
__device__ __forceinline__ T* head_start(T* x, Strides strides, int sample, int head) {
    return x + sample * strides.batch + head * strides.head;
}

// Keys or queries [first, end).
struct Range {
    int first, end;
};

// Visible keys of several queries: none sees a key outside [first, end), all see [open, least).
struct Seen {
    int first, open, least, end;

    // Return true if some query does not see some of the `n` keys from `key` on.
    __device__ __forceinline__ bool hides(int key, int n) const {
        return key < open || key + n > least;
    }
    // Return true if no query sees any of these keys.
    __device__ __forceinline__ bool misses(int key, int n) const {
        return key >= end || key + n <= first;
    }
};

// Visible keys of the queries of one sample: an interval for each query. An int32 table
// (device_table.py) gives those that do not follow from indices; sizes are rounded up to 128:
//     bounds  [queries]       first, end of the keys that a query sees; num_keys, 0 if it sees none
//     blocks  [queries / 16]  struct Seen of 16 queries
//     readers [keys / 16]     first, end of the queries that see any of 16 keys, in whole blocks
struct Visible {
    const int* table;  // null: a causal triangle, or all keys
    int num_queries, num_keys, causal;

    __device__ __forceinline__ Visible(const int* tables, int step, int sample, int num_queries,
                                       int num_keys, int causal)
        : table(tables ? tables + int64_t(sample) * step : nullptr), num_queries(num_queries),
          num_keys(num_keys), causal(causal) {}
    __device__ __forceinline__ Visible(const int* tables, const Attention& a, int sample)
        : Visible(tables, a.visible_step, sample, a.num_queries, a.num_keys, a.causal) {}

    // Return the keys of a query; an empty range for a query out of bounds.
    __device__ __forceinline__ Range keys_of(int query) const {
        if (unsigned(query) >= unsigned(num_queries)) return {0, 0};
        if (!table) return {0, causal ? min(query + 1, num_keys) : num_keys};
        const Pack<int, 2> keys = load<2>(table + 2 * query);
        return {keys.v[0], keys.v[1]};
    }
    // Return the keys of `rows` queries from `first` on, which may be negative; both are multiples
    // of 16.
    __device__ __forceinline__ Seen of_queries(int first, int rows) const {
        const int end = min(first + rows, num_queries);
        first = max(first, 0);
        if (first >= end) return {0, 0, 0, 0};
        if (!table) return {0, 0, keys_of(first).end, keys_of(end - 1).end};
        Seen seen = {num_keys, 0, num_keys, 0};
        #pragma unroll 1  // v3's loading threads have 24 registers
        for (int query = first; query < end; query += 16) {
            const Pack<int, 4> of = load<4>(table + 2 * round_up(num_queries) + query / 4);
            seen = {min(seen.first, of.v[0]), max(seen.open, of.v[1]), min(seen.least, of.v[2]),
                    max(seen.end, of.v[3])};
        }
        return seen;
    }
    // Return the queries that see any of `rows` keys from `first` on; both are multiples of 16.
    __device__ __forceinline__ Range readers(int first, int rows) const {
        if (!table) return {causal ? first : 0, num_queries};
        Range queries = {num_queries, 0};
        #pragma unroll 1
        for (int key = first; key < min(first + rows, num_keys); key += 16) {
            const Pack<int, 2> of =
                load<2>(table + 2 * round_up(num_queries) + round_up(num_queries) / 4 + key / 8);
            if (of.v[1]) queries = {min(queries.first, of.v[0]), max(queries.end, of.v[1])};
        }
        return queries;
    }

private:
    static __device__ __forceinline__ int round_up(int n) { return (n + 127) / 128 * 128; }
};

// Return the word of a query and head; with that of a key it decides if dropout keeps a score.
__device__ __forceinline__ uint64_t row_word(uint64_t head_key, int64_t query_time) {
    return random_bits(head_key, uint64_t(query_time));
}
