/* Vectors of the instruction set of this translation unit, and mathematical functions that
   compilers vectorise.

   The functions are plain C without branches; `#pragma omp simd` around a loop suffices. No
   fast-math: NaN stays NaN. */
#ifndef MINILLM_VECTOR_H
#define MINILLM_VECTOR_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES (VECTOR_BYTES / 4)

typedef float Vector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

typedef int32_t VectorInt __attribute__((vector_size(VECTOR_BYTES), may_alias));

INLINE Vector load(const float *from) { return *(const Vector *)from; }
INLINE void store(float *to, Vector value) { *(Vector *)to = value; }

/* Interleave the lanes of two vectors: their lower halves, and their upper halves. */
#if VECTOR_BYTES == 64
#define LOW_IN_TURN 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_IN_TURN 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VECTOR_BYTES == 32
#define LOW_IN_TURN 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_IN_TURN 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW_IN_TURN 0, 4, 1, 5
#define HIGH_IN_TURN 2, 6, 3, 7
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VectorInt){__VA_ARGS__})
#endif

/* Write scale times the transpose of `from` to `to` [LANES, LANES]. Each round interleaves the
   rows of both halves: the highest bit of the row's number moves below the column's bits. After
   log2(LANES) rounds rows and columns have changed places. */
INLINE void transpose(
    const float *from, int64_t stride, float scale, float *to, int64_t stride_to
) {
    Vector rows[LANES], turned[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = load(from + i * stride) * scale;
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            turned[2 * i] = SHUFFLE(rows[i], rows[i + LANES / 2], LOW_IN_TURN);
            turned[2 * i + 1] = SHUFFLE(rows[i], rows[i + LANES / 2], HIGH_IN_TURN);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = turned[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * stride_to, rows[i]);
}

INLINE uint32_t bits_of(float x) {
    union {
        float f;
        uint32_t u;
    } both = {.f = x};
    return both.u;
}

INLINE float float_of(uint32_t bits) {
    union {
        uint32_t u;
        float f;
    } both = {.u = bits};
    return both.f;
}

/* Return e^x to 1e-7 for x <= 88; 0 below -87.3; NaN stays NaN. Method: 2^n times a polynomial
   on [-ln 2 / 2, ln 2 / 2], n = round(x / ln 2). */
INLINE float exp_(float x) {
    const float rounder = 12582912.0f; /* 1.5 * 2^23: adding it leaves round(.) in the low bits */
    float inside = x < -87.3f ? -87.3f : x;
    float shifted = inside * 1.44269504f + rounder;
    float n = shifted - rounder;
    /* ln 2 in two parts, the first with few digits */
    float r = inside - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 0.0013836843f;
    p = p * r + 0.0083748158f;
    p = p * r + 0.041668225f;
    p = p * r + 0.16666420f;
    p = p * r + 0.49999991f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    float result = p * float_of((bits_of(shifted) + 127u) << 23);
    return x < -87.3f ? 0.0f : result;
}

/* Return 1 / (1 + e^-x). */
INLINE float sigmoid_(float x) {
    float z = -x;
    return 1.0f / (1.0f + exp_(z > 80.0f ? 80.0f : z));
}

/* Return erf(x) to 2e-7: x P(x^2) on [-1, 1], 1 - exp(Q(|x|)) outside. P and Q are fitted to
   minimax relative error. */
INLINE float erf_(float x) {
    float s = x * x, t = x < 0 ? -x : x;
    float p = -9.6415169e-06f;
    p = p * s + 1.1256948e-4f;
    p = p * s - 8.4828289e-4f;
    p = p * s + 5.2209454e-3f;
    p = p * s - 2.6865400e-2f;
    p = p * s + 1.1283782e-1f;
    p = p * s - 3.7612638e-1f;
    p = p * s + 1.1283792f;
    float u = t > 4.0f ? 4.0f : t; /* erfc(4) = 1.5e-8 */
    float q = 7.9893161e-07f;
    q = q * u - 1.2693495e-05f;
    q = q * u + 6.6092674e-05f;
    q = q * u + 9.4475822e-05f;
    q = q * u - 3.3411731e-03f;
    q = q * u + 2.3803776e-02f;
    q = q * u - 1.0692480e-01f;
    q = q * u - 6.3422209e-01f;
    q = q * u - 1.1291933f;
    q = q * u + 1.2343099e-04f;
    float outside = 1.0f - exp_(q);
    return t <= 1.0f ? x * p : x < 0 ? -outside : outside;
}

/* Return the largest value, ignoring NaN. Lanes are explicit: clang does not reorder a maximum
   that may meet NaN. */
INLINE float maximum(const float *x, int64_t n) {
    Vector most = (Vector){0} - __builtin_inff();
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Vector here = load(x + i);
        const VectorInt more = here > most;
        most = (Vector)((more & (VectorInt)here) | (~more & (VectorInt)most));
    }
    float m = -__builtin_inff();
    for (int lane = 0; lane < LANES; lane++) m = most[lane] > m ? most[lane] : m;
    for (; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}

INLINE float dot(const float *x, const float *y, int64_t n) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += x[i] * y[i];
    return total;
}

enum { SUM_ROWS = 64 }; /* rows of a short sum: many short sums round less than a long one */

/* Set sum = x + y. */
INLINE void add_rows(const float *x, const float *y, float *sum, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) sum[i] = x[i] + y[i];
}

/* Add x to total. */
INLINE void add_to(float *total, const float *x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) total[i] += x[i];
}

#endif
