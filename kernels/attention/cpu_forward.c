/* Forward pass: tiles of PANEL queries over all keys. Single queries (generation) skip the
   packing. */

typedef struct {
    Attention common;
    float *o; /* [B, Tq, H, K] */
    int64_t o_b, o_t, o_h, o_k;
    float *lse; /* [B, H, Tq] */
} AttentionForward;

/* Online softmax of LANES queries, one per lane: `top` is the largest score so far, minus
   infinity before the first visible key; `total` is the sum of exp(score - top). Maxima and sums
   need no operation across lanes. */
typedef struct {
    Bounds bounds;
    float top[LANES], total[LANES];
} Softmax;

static void softmax_start(Softmax *m, const Attention *a, int64_t b, int64_t query, int64_t n) {
    bounds_start(&m->bounds, a, b, query, n);
    for (int64_t lane = 0; lane < LANES; lane++) {
        m->top[lane] = -__builtin_inff();
        m->total[lane] = 0;
    }
}

/* Hide the scores s of the keys [key + start, key + stop), and raise `top` to the largest
   visible one. check_first is 0 if these keys lie above every query's lower bound, which saves a
   comparison. */
INLINE void hide_scores(
    const Bounds *m, int64_t key, int64_t start, int64_t stop, const int check_first, float *s,
    float *top
) {
    for (int64_t j = start; j < stop; j++) {
        float *row = s + j * PANEL;
        const int32_t at = (int32_t)(key + j);
#pragma omp simd
        for (int lane = 0; lane < LANES; lane++) {
            const float x = at < m->limit[lane] && (!check_first || at >= m->first[lane])
                                ? row[lane] : -__builtin_inff();
            row[lane] = x;
            top[lane] = x > top[lane] ? x : top[lane];
        }
    }
}

/* Overwrite the scores s of the keys [key, key + n), one row of PANEL floats each, by
   exp(score - top). The caller multiplies sums computed with the previous `top` by `rescale`
   [LANES]. */
static void softmax_keys(Softmax *m, int64_t key, int64_t n, float *s, float *rescale) {
    const Seen seen = bounds_within(&m->bounds, key, n);
    float top[LANES], total[LANES] = {0};
    memcpy(top, m->top, sizeof top);
    hide_scores(&m->bounds, key, seen.start, seen.open, 1, s, top);
    hide_scores(&m->bounds, key, seen.open, seen.stop, 0, s, top);
    float shift[LANES];
#pragma omp simd
    for (int lane = 0; lane < LANES; lane++) {
        shift[lane] = top[lane] == -__builtin_inff() ? 0 : top[lane];
        rescale[lane] = exp_(m->top[lane] - shift[lane]);
    }
    for (int64_t j = 0; j < seen.start; j++) store(s + j * PANEL, (Vector){0});
    for (int64_t j = seen.start; j < seen.stop; j++) {
        float *row = s + j * PANEL;
#pragma omp simd
        for (int lane = 0; lane < LANES; lane++) {
            row[lane] = exp_(row[lane] - shift[lane]);
            total[lane] += row[lane];
        }
    }
    for (int64_t j = seen.stop; j < n; j++) store(s + j * PANEL, (Vector){0});
#pragma omp simd
    for (int lane = 0; lane < LANES; lane++) {
        m->top[lane] = top[lane];
        m->total[lane] = m->total[lane] * rescale[lane] + total[lane];
    }
}

/* Scratch of one thread in the forward pass. */
typedef struct {
    float *values;  /* packed: all of v of a head */
    float *queries; /* packed: scale q^T of PANEL queries */
    float *s;       /* [KEY_COLUMNS, PANEL] */
    float *out;     /* [PANEL, width] sums */
    int64_t width;  /* K rounded up to whole panels */
} ForwardScratch;

/* Process at most PANEL queries of one head over their visible keys, KEY_COLUMNS at a time.
   Scores are computed transposed: one key per row, one query per lane.

   Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867. */
static void attention_forward_queries(
    const AttentionForward *f, int64_t b, int64_t h, int64_t first, int64_t rows,
    const ForwardScratch *w
) {
    const Attention *a = &f->common;
    const int64_t K = a->K, width = w->width, panels = width / PANEL;
    const Keys keys = keys_of(a, b, first, rows);
    const float *k = a->k + b * a->k_b + h / (a->H / a->Hkv) * a->k_h;
    Softmax softmax[2];
    for (int half = 0; half < 2; half++)
        softmax_start(&softmax[half], a, b, first + half * LANES, rows - half * LANES);
    pack_transposed(
        a->q + b * a->q_b + first * a->q_t + h * a->q_h, a->q_t, rows, K, (float)a->scale,
        w->queries
    );
    memset(w->out, 0, (size_t)(PANEL * width) * sizeof(float));
    for (int64_t key = keys.first; key < keys.limit; key += KEY_COLUMNS) {
        const int64_t n = least(KEY_COLUMNS, keys.limit - key);
        float rescale[PANEL];
        for (int64_t j = 0; j < n; j += TILE_ROWS)
            row_product(
                (int)least(TILE_ROWS, n - j), K, (Matrix){k + (key + j) * a->k_t, a->k_t, 1},
                w->queries, 0, 1, w->s + j * PANEL, PANEL, 0
            );
        if (a->cap > 0) cap_scores((float)a->cap, n, w->s, NULL);
        for (int half = 0; half < 2; half++)
            softmax_keys(&softmax[half], key, n, w->s + half * LANES, rescale + half * LANES);
        if (a->row_words) drop_keys(a, b, h, first, rows, key, n, w->s);
        for (int64_t r = 0; key > keys.first && r < rows; r++)
            for (int64_t i = 0; i < width; i++) w->out[r * width + i] *= rescale[r];
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            const int count = (int)least(TILE_ROWS, rows - r);
            const Keys seen = keys_within(keys_of(a, b, first + r, count), key, n);
            if (seen.limit <= seen.first) continue;
            const Matrix weights = {w->s + seen.first * PANEL + r, 1, PANEL};
            row_product(
                count, seen.limit - seen.first, weights, w->values + (key + seen.first) * PANEL,
                a->Tk * PANEL, panels, w->out + r * width, width, 1
            );
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const Softmax *m = &softmax[r / LANES];
        const float total = m->total[r % LANES], top = m->top[r % LANES],
                    factor = total > 0 ? 1 / total : total == 0 ? 0 : total;
        f->lse[(b * a->H + h) * a->Tq + first + r] =
            total == 0 ? -__builtin_inff() : __builtin_logf(total) + top;
        float *o = f->o + b * f->o_b + (first + r) * f->o_t + h * f->o_h;
        for (int64_t i = 0; i < K; i++) o[i] = w->out[r * width + i] * factor;
    }
}

/* Pad a row of scores to whole vectors and return that length. Loops over it need no scalar
   remainder, which takes longer than the vectors for rows of a few dozen keys. Rows of scratch
   are whole panels long. */
INLINE int64_t fill_vector(float *row, int64_t n, float value) {
    const int64_t whole = round_up(n, LANES);
    for (int64_t j = n; j < whole; j++) row[j] = value;
    return whole & -(int64_t)LANES; /* marks it as a multiple for the compiler */
}

/* Overwrite the scores s [n] of one query by unnormalised probabilities. Return their sum and
   set the shift: log(sum) + shift is the log-sum-exp. */
static float probabilities(int64_t n, float *s, float *shift) {
    const int64_t whole = fill_vector(s, n, -__builtin_inff());
    float top = maximum(s, whole), total = 0;
    if (top == -__builtin_inff()) top = 0; /* fully masked query */
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < whole; j++) {
        const float e = exp_(s[j] - top);
        s[j] = e;
        total += e;
    }
    *shift = top;
    return total;
}

/* Multiply n values of query i, from key `first` on, by their scaled keep mask. */
static void drop(
    const Attention *a, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n, float *x
) {
    const uint64_t word = a->row_words[(b * a->H + h) * a->Tq + i];
    const uint32_t low = (uint32_t)word, high = (uint32_t)(word >> 32),
                   threshold = (uint32_t)a->threshold;
    const uint32_t *columns = a->column_words + b * a->column_step + first;
    const float scale = (float)a->keep_scale;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) x[j] *= keeps(low, high, columns[j], threshold) ? scale : 0.0f;
}

/* Process one query without packing, for generation: packing the keys would cost as much as the
   products. */
static void attention_forward_row(
    const AttentionForward *f, int64_t b, int64_t h, int64_t i, float *s
) {
    const Attention *a = &f->common;
    const int64_t K = a->K, group = a->H / a->Hkv;
    const Keys keys = keys_of(a, b, i, 1);
    const int64_t first = keys.first, n = keys.limit > first ? keys.limit - first : 0;
    const float *q = a->q + b * a->q_b + i * a->q_t + h * a->q_h;
    const float *k = a->k + b * a->k_b + first * a->k_t + h / group * a->k_h,
                *v = a->v + b * a->v_b + first * a->v_t + h / group * a->v_h;
    float *o = f->o + b * f->o_b + i * f->o_t + h * f->o_h, shift;
    for (int64_t j = 0; j < n; j++) s[j] = dot(q, k + j * a->k_t, K) * (float)a->scale;
    if (a->cap > 0)
        for (int64_t j = 0; j < n; j++) s[j] = (float)a->cap * score_tanh(s[j] / (float)a->cap);
    const float total = probabilities(n, s, &shift);
    f->lse[(b * a->H + h) * a->Tq + i] = __builtin_logf(total) + shift;
    if (a->row_words) drop(a, b, h, i, first, n, s);
    memset(o, 0, (size_t)K * sizeof(float));
    const float factor = total > 0 ? 1 / total : total == 0 ? 0 : total;
    for (int64_t j = 0; j < n; j++) {
        const float p = s[j] * factor, *row = v + j * a->v_t;
#pragma omp simd
        for (int64_t c = 0; c < K; c++) o[c] += p * row[c];
    }
}

enum { FEW_QUERIES = 4 };

static void attention_forward_heads(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const AttentionForward *f = state;
    const Attention *a = &f->common;
    const int64_t group = a->H / a->Hkv, K = a->K;
    if (a->Tq <= FEW_QUERIES) { /* items are (sample, head) */
        float *s = pool_scratch(pool, thread, (size_t)round_up(a->Tk, LANES));
        for (int64_t item = start; s && item < stop; item++)
            for (int64_t i = 0; i < a->Tq; i++)
                attention_forward_row(f, item / a->H, item % a->H, i, s);
        return;
    }
    ForwardScratch w = {.width = round_up(K, PANEL)};
    const int64_t sizes[] = {a->Tk * w.width, K * PANEL, KEY_COLUMNS * PANEL, PANEL * w.width};
    if (!share_scratch(
            pool, thread, 4, sizes, (float **const[]){&w.values, &w.queries, &w.s, &w.out}
        ))
        return;
    for (int64_t item = start; item < stop; item++) { /* items are (sample, key-value head) */
        const int64_t b = item / a->Hkv, g = item % a->Hkv;
        pack(a->v + b * a->v_b + g * a->v_h, a->v_t, a->Tk, K, w.values);
        for (int64_t h = g * group; h < (g + 1) * group; h++)
            for (int64_t first = 0; first < a->Tq; first += PANEL) {
                const int64_t rows = least(PANEL, a->Tq - first);
                prefetch_head(a, b * a->H + h + 1, first, rows);
                attention_forward_queries(f, b, h, first, rows, &w);
            }
    }
}

static void attention_forward(Pool *pool, const Argument *arguments) {
    UNPACK(AttentionForward, f, arguments);
    pool_run(
        pool, attention_forward_heads, &f,
        f.common.B * (f.common.Tq <= FEW_QUERIES ? f.common.H : f.common.Hkv), 1
    );
}
