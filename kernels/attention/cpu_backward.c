/* Backward pass: tiles of PANEL queries and KEY_COLUMNS keys. Scores are recomputed from the
   log-sum-exp. */

typedef struct {
    Attention common;
    const float *grad_o;
    int64_t go_b, go_t, go_h, go_k;
    const float *o;
    int64_t o_b, o_t, o_h, o_k;
    const float *lse;
    float *grad_q;
    int64_t gq_b, gq_t, gq_h, gq_k;
    float *grad_k;
    int64_t gk_b, gk_t, gk_h, gk_k;
    float *grad_v;
    int64_t gv_b, gv_t, gv_h, gv_k;
} AttentionBackward;

/* Scratch of one thread for one key-value head. */
typedef struct {
    float *keys;                /* packed: k */
    float *grad_k, *grad_v;     /* [Tk, width] sums */
    float *queries_t, *grads_t; /* packed: scale q^T, grad_o^T of PANEL queries */
    float *queries, *grads;     /* packed: q, grad_o of these */
    float *s, *grad_s, *slope;  /* [KEY_COLUMNS, PANEL] */
    float *grad_q;              /* [PANEL, width] sums */
    int64_t width;              /* K rounded up to whole panels */
} BackwardScratch;

/* Bounds, log-sum-exp and delta of LANES queries. */
typedef struct {
    Bounds bounds;
    float lse[LANES], delta[LANES];
} Queries;

static void queries_start(
    const AttentionBackward *f, int64_t b, int64_t h, int64_t first, int64_t n, Queries *m
) {
    const Attention *a = &f->common;
    const float *grad_o = f->grad_o + b * f->go_b + first * f->go_t + h * f->go_h,
                *o = f->o + b * f->o_b + first * f->o_t + h * f->o_h;
    *m = (Queries){0};
    bounds_start(&m->bounds, a, b, first, n);
    for (int64_t lane = 0; lane < least(n, LANES); lane++) {
        const float lse = f->lse[(b * a->H + h) * a->Tq + first + lane];
        if (lse == -__builtin_inff()) { /* fully masked query */
            m->bounds.limit[lane] = 0;
            continue;
        }
        m->lse[lane] = lse;
        m->delta[lane] = dot(grad_o + lane * f->go_t, o + lane * f->o_t, a->K);
    }
}

/* Apply score_grads to the keys [key + start, key + stop); check_first as in hide_scores. */
INLINE void score_grads_of(
    const Queries *m, int64_t key, int64_t start, int64_t stop, const int check_first, float *s,
    float *grad_s
) {
    for (int64_t j = start; j < stop; j++) {
        float *row = s + j * PANEL, *grad_row = grad_s + j * PANEL;
        const int32_t at = (int32_t)(key + j);
#pragma omp simd
        for (int lane = 0; lane < LANES; lane++) {
            const int seen =
                at < m->bounds.limit[lane] && (!check_first || at >= m->bounds.first[lane]);
            row[lane] = exp_(seen ? row[lane] - m->lse[lane] : -__builtin_inff());
            grad_row[lane] = row[lane] * (grad_row[lane] - m->delta[lane]);
        }
    }
}

static void clear_scores(int64_t start, int64_t stop, float *s, float *grad_s) {
    for (int64_t j = start; j < stop; j++) {
        store(s + j * PANEL, (Vector){0});
        store(grad_s + j * PANEL, (Vector){0});
    }
}

/* Turn scores s into probabilities, and <grad_o, v> in grad_s into the gradient of the scores.
   Keys [key, key + n), one row of PANEL floats each. */
static void score_grads(const Queries *m, int64_t key, int64_t n, float *s, float *grad_s) {
    const Seen seen = bounds_within(&m->bounds, key, n);
    clear_scores(0, seen.start, s, grad_s);
    score_grads_of(m, key, seen.start, seen.open, 1, s, grad_s);
    score_grads_of(m, key, seen.open, seen.stop, 0, s, grad_s);
    clear_scores(seen.stop, n, s, grad_s);
}

/* Compute probabilities and score gradients of PANEL queries and the keys [key, key + n),
   transposed as in the forward pass. */
static void backward_scores(
    const AttentionBackward *f, int64_t b, int64_t h, int64_t first, int64_t rows,
    const Queries queries[2], int64_t key, int64_t n, const BackwardScratch *w
) {
    const Attention *a = &f->common;
    const int64_t g = h / (a->H / a->Hkv);
    const float *k = a->k + b * a->k_b + key * a->k_t + g * a->k_h,
                *v = a->v + b * a->v_b + key * a->v_t + g * a->v_h;
    for (int64_t j = 0; j < n; j += TILE_ROWS) {
        const int count = (int)least(TILE_ROWS, n - j);
        row_product(
            count, a->K, (Matrix){k + j * a->k_t, a->k_t, 1}, w->queries_t, 0, 1, w->s + j * PANEL,
            PANEL, 0
        );
        row_product(
            count, a->K, (Matrix){v + j * a->v_t, a->v_t, 1}, w->grads_t, 0, 1,
            w->grad_s + j * PANEL, PANEL, 0
        );
    }
    if (a->cap > 0) cap_scores((float)a->cap, n, w->s, w->slope);
    if (a->row_words) drop_keys(a, b, h, first, rows, key, n, w->grad_s);
    for (int half = 0; half < 2; half++)
        score_grads(&queries[half], key, n, w->s + half * LANES, w->grad_s + half * LANES);
    for (int64_t i = 0; a->cap > 0 && i < n * PANEL; i++) w->grad_s[i] *= w->slope[i];
    if (a->row_words) drop_keys(a, b, h, first, rows, key, n, w->s);
}

/* Add the products of the tiles s and grad_s to grad_v, grad_k and grad_q. Each group of keys
   skips the queries outside the first and the last that see one of its keys. Each group of
   queries skips the keys hidden from all of it. */
static void backward_products(
    const Attention *a, int64_t b, int64_t first, int64_t rows, int64_t key, int64_t n,
    const BackwardScratch *w
) {
    const int64_t width = w->width, panels = width / PANEL, bound = b * a->bound_step + first;
    for (int64_t j = 0, r = 0; j < n; j += TILE_ROWS) {
        while (r < rows && a->limits[bound + r] <= key + j) r++;
        const int count = (int)least(TILE_ROWS, n - j);
        int64_t end = rows;
        while (a->first && end > r && a->first[bound + end - 1] >= key + j + count) end--;
        if (end <= r) continue;
        const int64_t at = j * PANEL + r, to = (key + j) * width;
        row_product(
            count, end - r, (Matrix){w->s + at, PANEL, 1}, w->grads + r * PANEL, rows * PANEL,
            panels, w->grad_v + to, width, 1
        );
        row_product(
            count, end - r, (Matrix){w->grad_s + at, PANEL, 1}, w->queries + r * PANEL,
            rows * PANEL, panels, w->grad_k + to, width, 1
        );
    }
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
        const int count = (int)least(TILE_ROWS, rows - r);
        const Keys seen = keys_within(keys_of(a, b, first + r, count), key, n);
        if (seen.limit <= seen.first) continue;
        const Matrix grads = {w->grad_s + seen.first * PANEL + r, 1, PANEL};
        row_product(
            count, seen.limit - seen.first, grads, w->keys + (key + seen.first) * PANEL,
            a->Tk * PANEL, panels, w->grad_q + r * width, width, 1
        );
    }
}

/* Process at most PANEL queries of one head over their visible keys, KEY_COLUMNS at a time. */
static void attention_backward_queries(
    const AttentionBackward *f, int64_t b, int64_t h, int64_t first, int64_t rows,
    const BackwardScratch *w
) {
    const Attention *a = &f->common;
    const int64_t K = a->K, width = w->width;
    const Keys keys = keys_of(a, b, first, rows);
    const float *q = a->q + b * a->q_b + first * a->q_t + h * a->q_h,
                *grad_o = f->grad_o + b * f->go_b + first * f->go_t + h * f->go_h;
    Queries queries[2];
    for (int half = 0; half < 2; half++)
        queries_start(f, b, h, first + half * LANES, rows - half * LANES, &queries[half]);
    pack_transposed(q, a->q_t, rows, K, (float)a->scale, w->queries_t);
    pack_transposed(grad_o, f->go_t, rows, K, 1.0f, w->grads_t);
    pack(q, a->q_t, rows, K, w->queries);
    pack(grad_o, f->go_t, rows, K, w->grads);
    memset(w->grad_q, 0, (size_t)(rows * width) * sizeof(float));
    for (int64_t key = keys.first; key < keys.limit; key += KEY_COLUMNS) {
        const int64_t n = least(KEY_COLUMNS, keys.limit - key);
        backward_scores(f, b, h, first, rows, queries, key, n, w);
        backward_products(a, b, first, rows, key, n, w);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *to = f->grad_q + b * f->gq_b + (first + r) * f->gq_t + h * f->gq_h;
        for (int64_t i = 0; i < K; i++) to[i] = (float)a->scale * w->grad_q[r * width + i];
    }
}

/* Prefetch rows [first, first + rows) of grad_o, o and grad_q of head `head`. */
static void prefetch_grads(const AttentionBackward *f, int64_t head, int64_t first, int64_t rows) {
    const Attention *a = &f->common;
    const int64_t b = head / a->H, h = head % a->H;
    if (head >= a->B * a->H) return;
    prefetch(f->grad_o, f->go_b, f->go_t, f->go_h, b, h, a->Tq, a->K, first, rows);
    prefetch(f->o, f->o_b, f->o_t, f->o_h, b, h, a->Tq, a->K, first, rows);
    prefetch(f->grad_q, f->gq_b, f->gq_t, f->gq_h, b, h, a->Tq, a->K, first, rows);
}

static void attention_backward_heads(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const AttentionBackward *f = state;
    const Attention *a = &f->common;
    const int64_t group = a->H / a->Hkv, K = a->K, Tk = a->Tk, width = round_up(K, PANEL);
    const int64_t sizes[] = {
        Tk * width, Tk * width, Tk * width, K * PANEL, K * PANEL,
        PANEL * width, PANEL * width, KEY_COLUMNS * PANEL, KEY_COLUMNS * PANEL, PANEL * width,
        KEY_COLUMNS * PANEL
    };
    BackwardScratch w = {.width = width};
    float **const parts[] = {
        &w.keys, &w.grad_k, &w.grad_v, &w.queries_t, &w.grads_t,
        &w.queries, &w.grads, &w.s, &w.grad_s, &w.grad_q, &w.slope
    };
    if (!share_scratch(pool, thread, 11, sizes, parts)) return;
    for (int64_t item = start; item < stop; item++) {
        const int64_t b = item / a->Hkv, g = item % a->Hkv;
        pack(a->k + b * a->k_b + g * a->k_h, a->k_t, Tk, K, w.keys);
        memset(w.grad_k, 0, (size_t)(Tk * width) * sizeof(float));
        memset(w.grad_v, 0, (size_t)(Tk * width) * sizeof(float));
        for (int64_t h = g * group; h < (g + 1) * group; h++)
            for (int64_t first = 0; first < a->Tq; first += PANEL) {
                const int64_t rows = least(PANEL, a->Tq - first);
                prefetch_head(a, b * a->H + h + 1, first, rows);
                prefetch_grads(f, b * a->H + h + 1, first, rows);
                attention_backward_queries(f, b, h, first, rows, &w);
            }
        for (int64_t t = 0; t < Tk; t++) {
            float *grad_k = f->grad_k + b * f->gk_b + t * f->gk_t + g * f->gk_h,
                  *grad_v = f->grad_v + b * f->gv_b + t * f->gv_t + g * f->gv_h;
            for (int64_t i = 0; i < K; i++) grad_k[i] = (float)a->scale * w.grad_k[t * width + i];
            memcpy(grad_v, w.grad_v + t * width, (size_t)K * sizeof(float));
        }
    }
}

static void attention_backward(Pool *pool, const Argument *arguments) {
    UNPACK(AttentionBackward, f, arguments);
    pool_run(pool, attention_backward_heads, &f, f.common.B * f.common.Hkv, 1);
}
