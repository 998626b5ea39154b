/* Rotary positions in place: rotates channel i with channel i + K/2. */

typedef struct {
    float *x; /* [B, T, H, K]; strides in elements, the last 1 */
    int64_t stride_b, stride_t, stride_h, stride_k;
    const float *cos, *sin; /* [T, K/2] */
    int64_t B, T, H, K, inverse;
} Rope;

static void rope_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const Rope *a = state;
    const int64_t half = a->K / 2;
    const float sign = a->inverse ? -1.0f : 1.0f;
    for (int64_t row = start; row < stop; row++) {
        const int64_t b = row / a->T, t = row % a->T;
        const float *c = a->cos + t * half, *s = a->sin + t * half;
        for (int64_t h = 0; h < a->H; h++) {
            float *x = a->x + b * a->stride_b + t * a->stride_t + h * a->stride_h, *y = x + half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                const float sine = sign * s[i], turned = y[i] * c[i] + x[i] * sine;
                x[i] = x[i] * c[i] - y[i] * sine;
                y[i] = turned;
            }
        }
    }
}

static void rope(Pool *pool, const Argument *arguments) {
    UNPACK(Rope, a, arguments);
    pool_run(pool, rope_rows, &a, a.B * a.T, 16);
}
