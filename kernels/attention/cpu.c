/* Scaled dot-product attention, one head at a time. Both passes hold the scores of a tile of
   queries and keys, never a T x T array. All products run through the micro-kernel of
   native/tile.h. It reads its left operand by any two strides, so a transposed tile of scores
   needs no copy. */

enum { KEY_COLUMNS = 128 }; /* keys per tile; its queries are one panel */

/* Compute c [rows, num_panels * PANEL] (+)= a [rows, depth] times packed panels. Panels lie
   `panel_size` floats apart; rows <= TILE_ROWS. */
static void row_product(
    int rows, int64_t depth, Matrix a, const float *panels, int64_t panel_size, int64_t num_panels,
    float *c, int64_t stride_c, int add
) {
    for (int64_t p = 0; p < num_panels; p++, panels += panel_size, c += PANEL)
        tile(rows, 2, depth, a, panels, c, stride_c, (Addend){add ? c : NULL, stride_c});
}

/* Arguments of both passes. Query i of sample b sees the keys [first[at], limits[at]), with
   at = b * bound_step + i. With `first` NULL every lower bound is 0. The limit of a query without
   keys is 0. */
typedef struct {
    const float *q; /* strides in elements, those of channels 1 */
    int64_t q_b, q_t, q_h, q_k;
    const float *k;
    int64_t k_b, k_t, k_h, k_k;
    const float *v;
    int64_t v_b, v_t, v_h, v_k;
    const int64_t *first, *limits; /* [Tq] or [B, Tq]; first may be NULL */
    const uint64_t *row_words;     /* dropout: [B, H, Tq] or NULL */
    const uint32_t *column_words;  /* dropout: [Tk] or [B, Tk] */
    int64_t B, Tq, Tk, H, Hkv, K;
    int64_t bound_step, column_step; /* from sample to sample; 0 if all samples share one row */
    int64_t threshold;
    double scale, keep_scale;
    double cap; /* bound on scores; 0: none */
} Attention;

/* Multiply s [n, PANEL] by its scaled keep mask: `rows` queries from `first` on, n keys from
   `key` on. */
static void drop_keys(
    const Attention *a, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t key, int64_t n,
    float *s
) {
    const uint64_t *words = a->row_words + (b * a->H + h) * a->Tq + first;
    const uint32_t threshold = (uint32_t)a->threshold;
    const float scale = (float)a->keep_scale;
    const uint32_t *columns = a->column_words + b * a->column_step + key;
    uint32_t low[PANEL] = {0}, high[PANEL] = {0};
    for (int64_t r = 0; r < rows; r++) {
        low[r] = (uint32_t)words[r];
        high[r] = (uint32_t)(words[r] >> 32);
    }
    for (int64_t j = 0; j < n; j++) {
        float *row = s + j * PANEL;
        const uint32_t column = columns[j];
#pragma omp simd
        for (int lane = 0; lane < PANEL; lane++)
            row[lane] *= keeps(low[lane], high[lane], column, threshold) ? scale : 0.0f;
    }
}

/* Return tanh(x) to 2e-7 of its value: x + x^3 P(x^2) up to 5/8 (Cephes, Moshier 1989), by e^2x
   beyond, where that does not cancel. 2 sigmoid(2 x) - 1 errs by 1e-7, which a bound of 50 would
   make 6e-6 of a score. */
INLINE float score_tanh(float x) {
    float s = x * x, t = x < 0 ? -x : x;
    float p = -5.70498872745e-3f;
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    float outside = 1.0f - 2.0f / (exp_(t > 40.0f ? 80.0f : 2 * t) + 1.0f);
    return t <= 0.625f ? x + x * s * p : x < 0 ? -outside : x == x ? outside : x;
}

/* Bound the scores s of n keys, one row of PANEL floats each: cap tanh(s / cap). With `slope` not
   NULL set it to the derivative, 1 - tanh(s / cap)^2. */
static void cap_scores(float cap, int64_t n, float *s, float *slope) {
    const float share = 1.0f / cap;
    for (int64_t i = 0; i < n * PANEL; i += PANEL) {
#pragma omp simd
        for (int lane = 0; lane < PANEL; lane++) {
            const float t = score_tanh(s[i + lane] * share);
            s[i + lane] = cap * t;
            if (slope) slope[i + lane] = 1.0f - t * t;
        }
    }
}

/* Interval [first, limit) of keys: the union over `rows` queries from `query` on. */
typedef struct {
    int64_t first, limit;
} Keys;

static Keys keys_of(const Attention *a, int64_t b, int64_t query, int64_t rows) {
    const int64_t at = b * a->bound_step + query;
    Keys keys = {a->first ? a->Tk : 0, 0};
    for (int64_t i = at; i < at + rows; i++)
        keys.limit = a->limits[i] > keys.limit ? a->limits[i] : keys.limit;
    for (int64_t i = at; a->first && i < at + rows; i++)
        keys.first = least(a->first[i], keys.first);
    return keys;
}

/* Intersect the interval with the n keys from `key` on. Indices count from `key`; the result is
   empty if limit <= first. */
static Keys keys_within(Keys keys, int64_t key, int64_t n) {
    return (Keys){keys.first > key ? keys.first - key : 0, least(n, keys.limit - key)};
}

/* Key bounds of LANES queries, one query per lane. A lane without a query sees no key. */
typedef struct {
    int32_t first[LANES], limit[LANES];
    Keys any;     /* keys that some query sees */
    int64_t open; /* largest lower bound of the queries that see a key */
} Bounds;

static void bounds_start(Bounds *m, const Attention *a, int64_t b, int64_t query, int64_t n) {
    const int64_t at = b * a->bound_step + query;
    m->any = (Keys){a->first ? a->Tk : 0, 0};
    m->open = 0;
    for (int64_t lane = 0; lane < LANES; lane++) {
        m->first[lane] = lane < n && a->first ? (int32_t)a->first[at + lane] : 0;
        m->limit[lane] = lane < n ? (int32_t)a->limits[at + lane] : 0;
        if (!m->limit[lane]) continue;
        m->any = (Keys){
            least(m->any.first, m->first[lane]),
            m->limit[lane] > m->any.limit ? m->limit[lane] : m->any.limit
        };
        m->open = m->first[lane] > m->open ? m->first[lane] : m->open;
    }
}

/* Parts of the n keys from `key` on; indices count from `key`. Keys before `start` or from
   `stop` on are hidden from every query. In [open, stop) no query needs its lower bound checked. */
typedef struct {
    int64_t start, open, stop;
} Seen;

static Seen bounds_within(const Bounds *m, int64_t key, int64_t n) {
    const Keys any = keys_within(m->any, key, n);
    const int64_t stop = any.limit > 0 ? any.limit : 0, start = least(any.first, stop);
    return (Seen){start, m->open - key < start ? start : least(m->open - key, stop), stop};
}

/* Prefetch rows [first, first + rows) of one head of x [B, T, H, K]. A head's rows lie too far
   apart for the hardware prefetcher. Without this, the loads would take half as long as the
   products. Each group of rows prefetches its share of the next head. */
INLINE void prefetch(
    const float *x, int64_t stride_b, int64_t stride_t, int64_t stride_h, int64_t b, int64_t h,
    int64_t T, int64_t K, int64_t first, int64_t rows
) {
    const int64_t last = least(first + rows, T);
    for (int64_t t = first; t < last; t++)
        for (int64_t i = 0; i < K; i += 16)
            __builtin_prefetch(x + b * stride_b + t * stride_t + h * stride_h + i, 0, 2);
}

/* Prefetch the inputs of both passes for query head `head`; a no-op from B * H on. */
static void prefetch_head(const Attention *a, int64_t head, int64_t first, int64_t rows) {
    if (head >= a->B * a->H) return;
    const int64_t b = head / a->H, h = head % a->H, group = a->H / a->Hkv;
    prefetch(a->q, a->q_b, a->q_t, a->q_h, b, h, a->Tq, a->K, first, rows);
    if (h % group) return;
    prefetch(a->k, a->k_b, a->k_t, a->k_h, b, h / group, a->Tk, a->K, first, rows);
    prefetch(a->v, a->v_b, a->v_t, a->v_h, b, h / group, a->Tk, a->K, first, rows);
}

/* Cut a thread's scratch into parts of `sizes` floats, each on a 64-byte boundary. Return 0 if
   memory is short. */
static int share_scratch(
    Pool *pool, int thread, int n, const int64_t *sizes, float **const *parts
) {
    int64_t total = 0;
    for (int i = 0; i < n; i++) total += round_up(sizes[i], 16);
    float *memory = pool_scratch(pool, thread, (size_t)total);
    for (int i = 0; memory && i < n; memory += round_up(sizes[i], 16), i++) *parts[i] = memory;
    return memory != NULL;
}

#include "cpu_forward.c"

#include "cpu_backward.c"
