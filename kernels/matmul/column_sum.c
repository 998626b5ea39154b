/* Sums over the rows of an array, such as the gradient of a bias. */

typedef struct {
    const float *x; /* [rows, D] */
    float *out;
    int64_t num_rows, D;
} ColumnSum;

enum { SUM_COLUMNS = 64 };

/* Return the first column of a part. All parts but the first start on a cache line if rows are
   whole lines: a vector across two lines takes twice as long to load. */
INLINE int64_t first_column(const ColumnSum *a, int64_t part) {
    const int64_t before_line = (int64_t)(-((uintptr_t)a->x / sizeof(float)) % 16);
    const int64_t column = part * SUM_COLUMNS - (before_line ? SUM_COLUMNS - before_line : 0);
    return column < 0 ? 0 : column > a->D ? a->D : column;
}

INLINE void sum_columns(const ColumnSum *a, int64_t column, const int64_t n, float *total) {
    for (int64_t first = 0; first < a->num_rows; first += SUM_ROWS) {
        const int64_t last = first + SUM_ROWS < a->num_rows ? first + SUM_ROWS : a->num_rows;
        float sums[SUM_COLUMNS] = {0};
        for (int64_t row = first; row < last; row++) add_to(sums, a->x + row * a->D + column, n);
        add_to(total, sums, n);
    }
}

static void column_sum_parts(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const ColumnSum *a = state;
    for (int64_t part = start; part < stop; part++) {
        const int64_t column = first_column(a, part), n = first_column(a, part + 1) - column;
        float total[SUM_COLUMNS] = {0};
        if (n == SUM_COLUMNS)
            sum_columns(a, column, SUM_COLUMNS, total); /* a constant: the sums stay in registers */
        else
            sum_columns(a, column, n, total);
        memcpy(a->out + column, total, (size_t)n * sizeof(float));
    }
}

static void sum_all_columns(Pool *pool, const ColumnSum *a) {
    int64_t num_parts = 0;
    while (first_column(a, num_parts) < a->D) num_parts++;
    pool_run(pool, column_sum_parts, a, num_parts, 1);
}

static void column_sum(Pool *pool, const Argument *arguments) {
    UNPACK(ColumnSum, a, arguments);
    sum_all_columns(pool, &a);
}
