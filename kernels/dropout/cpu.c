/* Dropout: the keep-or-drop decision of an element mixes its row's and its column's address
   words (random/hashing.py). */

INLINE int keeps(uint32_t low, uint32_t high, uint32_t column, uint32_t threshold) {
    uint32_t z = (low ^ column) * 0x7FEB352Du;
    z = ((z ^ (z >> 15)) + high) * 0x846CA68Bu;
    return z >= threshold;
}

typedef struct {
    const float *x;
    float *y; /* [rows, C]; may be x */
    const uint64_t *row_words;
    const uint32_t *column_words;
    int64_t num_rows, C, threshold;
    double scale;
} Dropout;

static void dropout_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const Dropout *a = state;
    const float scale = (float)a->scale;
    const uint32_t threshold = (uint32_t)a->threshold;
    for (int64_t row = start; row < stop; row++) {
        const uint32_t low = (uint32_t)a->row_words[row],
                       high = (uint32_t)(a->row_words[row] >> 32);
        const float *x = a->x + row * a->C;
        float *y = a->y + row * a->C;
#pragma omp simd
        for (int64_t i = 0; i < a->C; i++)
            y[i] = x[i] * (keeps(low, high, a->column_words[i], threshold) ? scale : 0.0f);
    }
}

static void dropout(Pool *pool, const Argument *arguments) {
    UNPACK(Dropout, a, arguments);
    pool_run(pool, dropout_rows, &a, a.num_rows, 16);
}
