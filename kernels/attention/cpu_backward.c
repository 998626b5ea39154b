/* The backward pass: tiles of QUERY_ROWS queries and KEY_COLUMNS keys, whose scores are computed again from the log-sum-exp. */

typedef struct {
    Attention common;
    const float *grad_o, *o, *lse;
    float *grad_q, *grad_k, *grad_v;
    int64_t go_b, go_t, go_h, o_b, o_t, o_h, gq_b, gq_t, gq_h, gk_b, gk_t, gk_h, gv_b, gv_t, gv_h;
} AttentionBackward;

/* A thread's memory while it works on one key-value head. */
typedef struct {
    float *keys_t, *values_t, *keys; /* packed: scale k^T, v^T, k */
    float *grad_k, *grad_v;          /* [Tk, width] sums */
    float *queries, *grads;          /* packed: QUERY_ROWS of q, of grad_o */
    float *s, *grad_s;               /* [QUERY_ROWS, KEY_COLUMNS] */
    float *grad_q;                   /* [QUERY_ROWS, width] */
    int64_t width;                   /* K rounded up to whole panels */
} BackwardScratch;

/* From scores and <grad_o, v> of query i to probabilities and the gradient of the scores, for the keys [first, first + n). */
static void score_grads(const AttentionBackward *f, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n, float *s, float *grad_s, float delta) {
    const Attention *a = &f->common;
    const int64_t row = (b * a->H + h) * a->Tq + i;
    const float lse = f->lse[row];
    int64_t seen = lse == -__builtin_inff() ? 0 : a->limits[i] - first;
    seen = seen < 0 ? 0 : least(seen, n);
    if (a->key_mask) {
        const uint8_t *mask = a->key_mask + b * a->Tk + first;
#pragma omp simd
        for (int64_t j = 0; j < seen; j++) s[j] = mask[j] ? s[j] : -__builtin_inff();
    }
    if (a->row_words) drop(a, b, h, i, first, seen, grad_s);
    const int64_t whole = fill_vector(s, seen, -__builtin_inff());
    fill_vector(grad_s, seen, 0); /* what no one sees may be NaN */
#pragma omp simd
    for (int64_t j = 0; j < whole; j++) {
        s[j] = exp_(s[j] - lse);
        grad_s[j] = s[j] * (grad_s[j] - delta);
    }
    if (a->row_words) drop(a, b, h, i, first, seen, s);
    for (int64_t j = whole; j < n; j++) s[j] = grad_s[j] = 0;
}

/* Scores of the queries [i, i + rows), rows <= TILE_ROWS, and of the n keys from `key` on, with their gradients, into row r of the tiles
   s and grad_s; and what they add to grad_q. Keys beyond all limits are left out. */
static void backward_score_rows(const AttentionBackward *f, int64_t b, int64_t h, int64_t i, int64_t rows, int64_t key, int64_t n, const float *delta, int64_t r, const BackwardScratch *w) {
    const Attention *a = &f->common;
    const int64_t K = a->K, seen = least(n, largest_limit(a, i, rows) - key), panels = seen > 0 ? round_up(seen, PANEL) / PANEL : 0;
    const Operand q = {a->q + b * a->q_b + i * a->q_t + h * a->q_h, a->q_t, 1}, grad_o = {f->grad_o + b * f->go_b + i * f->go_t + h * f->go_h, f->go_t, 1};
    float *s = w->s + r * KEY_COLUMNS, *grad_s = w->grad_s + r * KEY_COLUMNS;
    row_product((int)rows, K, q, w->keys_t + key * K, K * PANEL, panels, s, KEY_COLUMNS, 0);
    row_product((int)rows, K, grad_o, w->values_t + key * K, K * PANEL, panels, grad_s, KEY_COLUMNS, 0);
    for (int64_t row = 0; row < rows; row++) score_grads(f, b, h, i + row, key, n, s + row * KEY_COLUMNS, grad_s + row * KEY_COLUMNS, delta[row]);
    if (seen > 0)
        row_product((int)rows, seen, (Operand){grad_s, KEY_COLUMNS, 1}, w->keys + key * PANEL, a->Tk * PANEL, w->width / PANEL, w->grad_q + r * w->width, w->width, 1);
}

/* What the tiles s and grad_s add to grad_v and grad_k. Each group of keys leaves out the queries before the first that sees one of it. */
static void backward_key_rows(const Attention *a, int64_t first, int64_t rows, int64_t key, int64_t n, const BackwardScratch *w) {
    const int64_t width = w->width, panels = width / PANEL;
    int64_t r = 0;
    for (int64_t j = 0; j < n; j += TILE_ROWS) {
        while (r < rows && a->limits[first + r] <= key + j) r++;
        const int count = (int)least(TILE_ROWS, n - j);
        const int64_t at = r * KEY_COLUMNS + j, to = (key + j) * width;
        row_product(count, rows - r, (Operand){w->s + at, 1, KEY_COLUMNS}, w->grads + r * PANEL, rows * PANEL, panels, w->grad_v + to, width, 1);
        row_product(count, rows - r, (Operand){w->grad_s + at, 1, KEY_COLUMNS}, w->queries + r * PANEL, rows * PANEL, panels, w->grad_k + to, width, 1);
    }
}

static void attention_backward_queries(const AttentionBackward *f, int64_t b, int64_t h, int64_t first, int64_t rows, const BackwardScratch *w) {
    const Attention *a = &f->common;
    const int64_t K = a->K, width = w->width;
    const float *q = a->q + b * a->q_b + first * a->q_t + h * a->q_h;
    const float *grad_o = f->grad_o + b * f->go_b + first * f->go_t + h * f->go_h, *o = f->o + b * f->o_b + first * f->o_t + h * f->o_h;
    float delta[QUERY_ROWS];
    const int64_t next = b * a->H + h + 1;
    prefetch_head(a, next, first, rows);
    if (next < a->B * a->H) {
        prefetch(f->grad_o, f->go_b, f->go_t, f->go_h, next / a->H, next % a->H, a->Tq, K, first, rows);
        prefetch(f->o, f->o_b, f->o_t, f->o_h, next / a->H, next % a->H, a->Tq, K, first, rows);
        prefetch(f->grad_q, f->gq_b, f->gq_t, f->gq_h, next / a->H, next % a->H, a->Tq, K, first, rows);
    }
    for (int64_t r = 0; r < rows; r++) delta[r] = dot(grad_o + r * f->go_t, o + r * f->o_t, K);
    pack(q, a->q_t, rows, K, w->queries);
    pack(grad_o, f->go_t, rows, K, w->grads);
    memset(w->grad_q, 0, (size_t)(rows * width) * sizeof(float));
    const int64_t limit = largest_limit(a, first, rows);
    for (int64_t key = 0; key < limit; key += KEY_COLUMNS) {
        const int64_t n = least(KEY_COLUMNS, limit - key);
        for (int64_t r = 0; r < rows; r += TILE_ROWS) backward_score_rows(f, b, h, first + r, least(TILE_ROWS, rows - r), key, n, delta + r, r, w);
        backward_key_rows(a, first, rows, key, n, w);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *to = f->grad_q + b * f->gq_b + (first + r) * f->gq_t + h * f->gq_h;
        for (int64_t i = 0; i < K; i++) to[i] = (float)a->scale * w->grad_q[r * width + i];
    }
}

static void attention_backward_heads(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const AttentionBackward *f = state;
    const Attention *a = &f->common;
    const int64_t group = a->H / a->Hkv, K = a->K, Tk = a->Tk, num_keys = round_up(Tk, PANEL), width = round_up(K, PANEL);
    const int64_t sizes[] = {num_keys * K, num_keys * K, Tk * width, Tk * width, Tk * width, QUERY_ROWS * width, QUERY_ROWS * width,
                             QUERY_ROWS * KEY_COLUMNS, QUERY_ROWS * KEY_COLUMNS, QUERY_ROWS * width};
    BackwardScratch w = {.width = width};
    float **const parts[] = {&w.keys_t, &w.values_t, &w.keys, &w.grad_k, &w.grad_v, &w.queries, &w.grads, &w.s, &w.grad_s, &w.grad_q};
    if (!share_scratch(pool, thread, 10, sizes, parts)) return;
    for (int64_t item = start; item < stop; item++) {
        const int64_t b = item / a->Hkv, g = item % a->Hkv;
        const float *k = a->k + b * a->k_b + g * a->k_h;
        pack_transposed(k, a->k_t, Tk, K, (float)a->scale, w.keys_t);
        pack_transposed(a->v + b * a->v_b + g * a->v_h, a->v_t, Tk, K, 1.0f, w.values_t);
        pack(k, a->k_t, Tk, K, w.keys);
        memset(w.grad_k, 0, (size_t)(Tk * width) * sizeof(float));
        memset(w.grad_v, 0, (size_t)(Tk * width) * sizeof(float));
        for (int64_t h = g * group; h < (g + 1) * group; h++)
            for (int64_t first = 0; first < a->Tq; first += QUERY_ROWS)
                attention_backward_queries(f, b, h, first, least(QUERY_ROWS, a->Tq - first), &w);
        for (int64_t t = 0; t < Tk; t++) {
            float *grad_k = f->grad_k + b * f->gk_b + t * f->gk_t + g * f->gk_h, *grad_v = f->grad_v + b * f->gv_b + t * f->gv_t + g * f->gv_h;
            for (int64_t i = 0; i < K; i++) grad_k[i] = (float)a->scale * w.grad_k[t * width + i];
            memcpy(grad_v, w.grad_v + t * width, (size_t)K * sizeof(float));
        }
    }
}

static void attention_backward(Pool *pool, const Argument *arguments) {
    UNPACK(AttentionBackward, f, arguments);
    pool_run(pool, attention_backward_heads, &f, f.common.B * f.common.Hkv, 1);
}
