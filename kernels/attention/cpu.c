/* Scaled dot-product attention on one head at a time. Never a T x T array: forward holds the scores of TILE_ROWS queries, backward those of
   a tile of queries and keys, which it computes again from the log-sum-exp.

   All products run through one micro-kernel, a TILE_ROWS x PANEL tile of the result held in registers:

       tile[r][:] += a[r][k] * panel[k][:]

   The right operand is packed once per head into panels PANEL columns wide; the left one is read where it lies, by any two strides, so the
   products with a transposed tile of scores need no transposition. */

enum {
    PANEL = 2 * LANES,
    TILE_ROWS = VECTOR_BYTES == 64 ? 12 : 6, /* with 2 vectors a row this fills the registers: 32 of 64 bytes, 16 of 32 or 16 bytes */
    QUERY_ROWS = 48,                         /* of a tile of the backward pass */
    KEY_COLUMNS = 128,
};

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct {
    const float *start;
    int64_t row, column; /* strides in elements */
} Operand;

INLINE void tile_product(const int rows, int64_t depth, Operand a, const float *panel, float *c, int64_t stride_c, int add) {
    Vector sum[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        sum[r][0] = add ? load(c + r * stride_c) : (Vector){0};
        sum[r][1] = add ? load(c + r * stride_c + LANES) : (Vector){0};
    }
    for (int64_t k = 0; k < depth; k++) {
        const Vector left = load(panel + k * PANEL), right = load(panel + k * PANEL + LANES);
        const float *column = a.start + k * a.column;
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const float factor = column[r * a.row];
            sum[r][0] += left * factor;
            sum[r][1] += right * factor;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        store(c + r * stride_c, sum[r][0]);
        store(c + r * stride_c + LANES, sum[r][1]);
    }
}

/* c [rows, panels * PANEL] (+)= a [rows, depth] times packed panels, `panel_size` floats from one to the next; rows <= TILE_ROWS. */
static void row_product(int rows, int64_t depth, Operand a, const float *panels, int64_t panel_size, int64_t num_panels, float *c, int64_t stride_c, int add) {
    for (int64_t p = 0; p < num_panels; p++, panels += panel_size, c += PANEL) {
        switch (rows) {
#define ROWS(n) \
    case n: \
        tile_product(n, depth, a, panels, c, stride_c, add); \
        break;
            ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#if VECTOR_BYTES == 64
            ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
#undef ROWS
        }
    }
}

/* x [rows, columns] into panels of PANEL columns, [rows][PANEL] each; the last is padded with zeros. */
static void pack(const float *x, int64_t stride, int64_t rows, int64_t columns, float *panels) {
    for (int64_t first = 0; first < columns; first += PANEL) {
        const int64_t n = least(PANEL, columns - first);
        for (int64_t row = 0; row < rows; row++, panels += PANEL) {
            memcpy(panels, x + row * stride + first, (size_t)n * sizeof(float));
            for (int64_t i = n; i < PANEL; i++) panels[i] = 0;
        }
    }
}

/* scale * x^T for x [rows, columns] into panels of PANEL rows of x, [columns][PANEL] each; the last is padded with zeros. */
static void pack_transposed(const float *x, int64_t stride, int64_t rows, int64_t columns, float scale, float *panels) {
    for (int64_t first = 0; first < rows; first += PANEL, panels += columns * PANEL) {
        const int64_t n = least(PANEL, rows - first);
        if (n < PANEL) memset(panels, 0, (size_t)(columns * PANEL) * sizeof(float));
        for (int64_t i = 0; i < n; i++)
            for (int64_t column = 0; column < columns; column++) panels[column * PANEL + i] = scale * x[(first + i) * stride + column];
    }
}

/* What both passes know. Query i sees the keys [0, limits[i]) that key_mask does not hide. */
typedef struct {
    const float *q, *k, *v;
    const int64_t *limits;        /* [Tq] */
    const uint8_t *key_mask;      /* [B, Tk] or NULL */
    const uint64_t *row_words;    /* dropout: [B, H, Tq] or NULL */
    const uint32_t *column_words; /* dropout: [Tk] */
    int64_t B, Tq, Tk, H, Hkv, K;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h; /* strides in elements */
    int64_t threshold;
    double scale, keep_scale;
} Attention;

/* Multiply n values of query i, from key `first` on, by their scaled keep mask. */
static void drop(const Attention *a, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n, float *x) {
    const uint64_t word = a->row_words[(b * a->H + h) * a->Tq + i];
    const uint32_t low = (uint32_t)word, high = (uint32_t)(word >> 32), threshold = (uint32_t)a->threshold;
    const uint32_t *columns = a->column_words + first;
    const float scale = (float)a->keep_scale;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) x[j] *= keeps(low, high, columns[j], threshold) ? scale : 0.0f;
}

static int64_t largest_limit(const Attention *a, int64_t first, int64_t rows) {
    int64_t limit = 0;
    for (int64_t i = first; i < first + rows; i++) limit = a->limits[i] > limit ? a->limits[i] : limit;
    return limit;
}

/* Ask for rows [first, first + rows) of one head of x [B, T, H, K]: a head's rows lie far apart, so the processor does not foresee them, and
   waiting for them would take half as long as the products. Each group of rows asks for its share of the head that comes next. */
INLINE void prefetch(const float *x, int64_t stride_b, int64_t stride_t, int64_t stride_h, int64_t b, int64_t h, int64_t T, int64_t K, int64_t first, int64_t rows) {
    const int64_t last = least(first + rows, T);
    for (int64_t t = first; t < last; t++)
        for (int64_t i = 0; i < K; i += 16) __builtin_prefetch(x + b * stride_b + t * stride_t + h * stride_h + i, 0, 2);
}

/* The same for what both passes read of query head `head` of all B * H, if there is one. */
static void prefetch_head(const Attention *a, int64_t head, int64_t first, int64_t rows) {
    if (head >= a->B * a->H) return;
    const int64_t b = head / a->H, h = head % a->H, group = a->H / a->Hkv;
    prefetch(a->q, a->q_b, a->q_t, a->q_h, b, h, a->Tq, a->K, first, rows);
    if (h % group) return;
    prefetch(a->k, a->k_b, a->k_t, a->k_h, b, h / group, a->Tk, a->K, first, rows);
    prefetch(a->v, a->v_b, a->v_t, a->v_h, b, h / group, a->Tk, a->K, first, rows);
}

/* Fill a row of scores up to a whole number of vectors; returns that length. Loops over it need no scalar rest, which for rows of a few
   dozen keys would take longer than the vectors. Rows of scratch are whole panels long. */
INLINE int64_t fill_vector(float *row, int64_t n, float value) {
    const int64_t whole = round_up(n, LANES);
    for (int64_t j = n; j < whole; j++) row[j] = value;
    return whole & -(int64_t)LANES; /* tells the compiler that it is a multiple */
}

typedef struct {
    Attention common;
    float *o;   /* [B, Tq, H, K] */
    float *lse; /* [B, H, Tq] */
    int64_t o_b, o_t, o_h;
} AttentionForward;

/* Overwrite the scores s of query i, of which the first `depth` will be used, by unnormalised probabilities. Returns their sum and the
   shift: log(sum) + shift is the log-sum-exp. */
static float probabilities(const Attention *a, int64_t b, int64_t i, int64_t depth, float *s, float *shift) {
    const int64_t n = a->limits[i];
    if (a->key_mask) {
        const uint8_t *seen = a->key_mask + b * a->Tk;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) s[j] = seen[j] ? s[j] : -__builtin_inff();
    }
    const int64_t whole = fill_vector(s, n, -__builtin_inff());
    float top = maximum(s, whole), total = 0;
    if (top == -__builtin_inff()) top = 0; /* sees nothing */
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < whole; j++) {
        const float e = exp_(s[j] - top);
        s[j] = e;
        total += e;
    }
    for (int64_t j = whole; j < depth; j++) s[j] = 0;
    *shift = top;
    return total;
}

/* One head's queries. `keys`, `values` are packed; s [TILE_ROWS, stride_s] and out [TILE_ROWS, stride_out] are scratch. */
static void attention_forward_head(const AttentionForward *f, int64_t b, int64_t h, const float *keys, const float *values, float *s, int64_t stride_s, float *out, int64_t stride_out) {
    const Attention *a = &f->common;
    const int64_t K = a->K;
    for (int64_t first = 0; first < a->Tq; first += TILE_ROWS) {
        const int rows = (int)least(TILE_ROWS, a->Tq - first);
        const int64_t depth = largest_limit(a, first, rows);
        prefetch_head(a, b * a->H + h + 1, first, rows);
        const Operand q = {a->q + b * a->q_b + first * a->q_t + h * a->q_h, a->q_t, 1};
        row_product(rows, K, q, keys, K * PANEL, round_up(depth, PANEL) / PANEL, s, stride_s, 0);
        float total[TILE_ROWS];
        for (int r = 0; r < rows; r++) {
            float shift;
            total[r] = probabilities(a, b, first + r, depth, s + r * stride_s, &shift);
            f->lse[(b * a->H + h) * a->Tq + first + r] = __builtin_logf(total[r]) + shift;
            if (a->row_words) drop(a, b, h, first + r, 0, depth, s + r * stride_s);
        }
        row_product(rows, depth, (Operand){s, stride_s, 1}, values, a->Tk * PANEL, stride_out / PANEL, out, stride_out, 0);
        for (int r = 0; r < rows; r++) {
            float *o = f->o + b * f->o_b + (first + r) * f->o_t + h * f->o_h;
            const float *from = out + r * stride_out, factor = total[r] > 0 ? 1 / total[r] : total[r] == 0 ? 0 : total[r];
#pragma omp simd
            for (int64_t i = 0; i < K; i++) o[i] = from[i] * factor;
        }
    }
}

/* One query row without packing, for generation: packing the keys would cost as much as the products. */
static void attention_forward_row(const AttentionForward *f, int64_t b, int64_t h, int64_t i, float *s) {
    const Attention *a = &f->common;
    const int64_t K = a->K, group = a->H / a->Hkv, n = a->limits[i];
    const float *q = a->q + b * a->q_b + i * a->q_t + h * a->q_h;
    const float *k = a->k + b * a->k_b + h / group * a->k_h, *v = a->v + b * a->v_b + h / group * a->v_h;
    float *o = f->o + b * f->o_b + i * f->o_t + h * f->o_h, shift;
    for (int64_t j = 0; j < n; j++) s[j] = dot(q, k + j * a->k_t, K) * (float)a->scale;
    const float total = probabilities(a, b, i, n, s, &shift);
    f->lse[(b * a->H + h) * a->Tq + i] = __builtin_logf(total) + shift;
    if (a->row_words) drop(a, b, h, i, 0, n, s);
    memset(o, 0, (size_t)K * sizeof(float));
    const float factor = total > 0 ? 1 / total : total == 0 ? 0 : total;
    for (int64_t j = 0; j < n; j++) {
        const float p = s[j] * factor, *row = v + j * a->v_t;
#pragma omp simd
        for (int64_t c = 0; c < K; c++) o[c] += p * row[c];
    }
}

enum { FEW_QUERIES = 4 };

static void attention_forward_heads(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const AttentionForward *f = state;
    const Attention *a = &f->common;
    const int64_t group = a->H / a->Hkv, K = a->K;
    if (a->Tq <= FEW_QUERIES) { /* items are (sample, head) */
        float *s = pool_scratch(pool, thread, (size_t)round_up(a->Tk, LANES));
        for (int64_t item = start; s && item < stop; item++)
            for (int64_t i = 0; i < a->Tq; i++) attention_forward_row(f, item / a->H, item % a->H, i, s);
        return;
    }
    const int64_t num_keys = round_up(a->Tk, PANEL), width = round_up(K, PANEL);
    float *keys = pool_scratch(pool, thread, (size_t)(num_keys * K + a->Tk * width + TILE_ROWS * (num_keys + width)));
    if (!keys) return;
    float *values = keys + num_keys * K, *s = values + a->Tk * width, *out = s + TILE_ROWS * num_keys;
    for (int64_t item = start; item < stop; item++) { /* items are (sample, key-value head) */
        const int64_t b = item / a->Hkv, g = item % a->Hkv;
        pack_transposed(a->k + b * a->k_b + g * a->k_h, a->k_t, a->Tk, K, (float)a->scale, keys);
        pack(a->v + b * a->v_b + g * a->v_h, a->v_t, a->Tk, K, values);
        for (int64_t h = g * group; h < (g + 1) * group; h++) attention_forward_head(f, b, h, keys, values, s, num_keys, out, width);
    }
}

static void attention_forward(Pool *pool, const Argument *arguments) {
    UNPACK(AttentionForward, f, arguments);
    pool_run(pool, attention_forward_heads, &f, f.common.B * (f.common.Tq <= FEW_QUERIES ? f.common.H : f.common.Hkv), 1);
}

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
    int64_t total = 0;
    for (int i = 0; i < 10; i++) total += round_up(sizes[i], 16);
    float *memory = pool_scratch(pool, thread, (size_t)total);
    if (!memory) return;
    for (int i = 0; i < 10; memory += round_up(sizes[i], 16), i++) *parts[i] = memory;
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
