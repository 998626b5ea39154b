/* Scaled dot-product attention on one head at a time. Never a T x T array: both passes hold the scores of a tile of queries and keys, and
   all their products run through the micro-kernel of native/tile.h. It reads its left operand by any two strides, so the products with a
   transposed tile of scores need no transposition. */

enum { KEY_COLUMNS = 128 }; /* keys of a tile, whose queries are a panel */

/* c [rows, num_panels * PANEL] (+)= a [rows, depth] times packed panels, `panel_size` floats from one to the next; rows <= TILE_ROWS. */
static void row_product(int rows, int64_t depth, Matrix a, const float *panels, int64_t panel_size, int64_t num_panels, float *c, int64_t stride_c, int add) {
    for (int64_t p = 0; p < num_panels; p++, panels += panel_size, c += PANEL)
        tile(rows, 2, depth, a, panels, c, stride_c, (Addend){add ? c : NULL, stride_c});
}

/* Arguments of both passes. Query i of sample b sees the keys [first[at], limits[at]), at = b * bound_step + i; NULL: all first are 0. A query
   that sees no key has limit 0. */
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
    int64_t bound_step, column_step; /* from sample to sample; 0 where all samples are alike */
    int64_t threshold;
    double scale, keep_scale;
} Attention;

/* Multiply s [n, PANEL], of `rows` queries from `first` on and of the keys from `key` on, by their scaled keep mask. */
static void drop_keys(const Attention *a, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t key, int64_t n, float *s) {
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
        for (int lane = 0; lane < PANEL; lane++) row[lane] *= keeps(low[lane], high[lane], column, threshold) ? scale : 0.0f;
    }
}

/* Interval of the keys that any of `rows` queries from `query` on sees: [first, limit). */
typedef struct {
    int64_t first, limit;
} Keys;

static Keys keys_of(const Attention *a, int64_t b, int64_t query, int64_t rows) {
    const int64_t at = b * a->bound_step + query;
    Keys keys = {a->first ? a->Tk : 0, 0};
    for (int64_t i = at; i < at + rows; i++) keys.limit = a->limits[i] > keys.limit ? a->limits[i] : keys.limit;
    for (int64_t i = at; a->first && i < at + rows; i++) keys.first = least(a->first[i], keys.first);
    return keys;
}

/* The part of it among the n keys from `key` on, counted from `key`: empty where limit <= first. */
static Keys keys_within(Keys keys, int64_t key, int64_t n) {
    return (Keys){keys.first > key ? keys.first - key : 0, least(n, keys.limit - key)};
}

/* Bounds of as many queries as a vector has lanes, a query a lane; a lane without a query sees no key. */
typedef struct {
    int32_t first[LANES], limit[LANES];
    Keys any;     /* keys that some query sees */
    int64_t open; /* queries that see a key see those from here on up to their limits */
} Bounds;

static void bounds_start(Bounds *m, const Attention *a, int64_t b, int64_t query, int64_t n) {
    const int64_t at = b * a->bound_step + query;
    m->any = (Keys){a->first ? a->Tk : 0, 0};
    m->open = 0;
    for (int64_t lane = 0; lane < LANES; lane++) {
        m->first[lane] = lane < n && a->first ? (int32_t)a->first[at + lane] : 0;
        m->limit[lane] = lane < n ? (int32_t)a->limits[at + lane] : 0;
        if (!m->limit[lane]) continue;
        m->any = (Keys){least(m->any.first, m->first[lane]), m->limit[lane] > m->any.limit ? m->limit[lane] : m->any.limit};
        m->open = m->first[lane] > m->open ? m->first[lane] : m->open;
    }
}

/* Parts of the n keys from `key` on, counted from `key`: none sees those before `start` or from `stop` on; all see the first of [open, stop). */
typedef struct {
    int64_t start, open, stop;
} Seen;

static Seen bounds_within(const Bounds *m, int64_t key, int64_t n) {
    const Keys any = keys_within(m->any, key, n);
    const int64_t stop = any.limit > 0 ? any.limit : 0, start = least(any.first, stop);
    return (Seen){start, m->open - key < start ? start : least(m->open - key, stop), stop};
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

/* Cut a thread's scratch into parts of `sizes` floats, each on a 64-byte boundary; 0 if memory is short. */
static int share_scratch(Pool *pool, int thread, int n, const int64_t *sizes, float **const *parts) {
    int64_t total = 0;
    for (int i = 0; i < n; i++) total += round_up(sizes[i], 16);
    float *memory = pool_scratch(pool, thread, (size_t)total);
    for (int i = 0; memory && i < n; memory += round_up(sizes[i], 16), i++) *parts[i] = memory;
    return memory != NULL;
}

#include "cpu_forward.c"

#include "cpu_backward.c"
