/* The product by blocks (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication"): BLOCK_DEPTH x BLOCK_COLUMNS of b
   are packed once and stay in the second-level cache; the rows of a pass by, TILE_ROWS at a time, and stay in the first-level cache while
   they meet every panel of the block. Meanwhile what comes next is fetched.

   Which products an element is the sum of, and in which order they are added, depends on K alone: any number of threads gives the same
   bits. */

enum {
    BLOCK_DEPTH = 512,
    BLOCK_COLUMNS = VECTOR_BYTES == 64 ? 384 : 192, /* processors with AVX-512 have 1 MB of second-level cache and more, others half of it */
    PAGE = 4096 / sizeof(float),
    LINE = 64 / sizeof(float),
};

/* A part of the result. */
typedef struct {
    int64_t row, rows, column, columns;
} Part;

/* How one thread computes a part: blocks [depth, width] of b, along the depth first. */
typedef struct {
    const MatMul *product;
    Part part;
    int64_t depth, num_depths, width, num_blocks;
} Plan;

/* A block of b, without extent after the last. */
typedef struct {
    int64_t first, depth, column, columns;
} Block;

/* The size of equal pieces of n, whole units of at most `most`; not 0. */
static int64_t piece(int64_t n, int64_t most, int64_t unit) {
    const int64_t pieces = (n + most - 1) / most;
    return n ? round_up((n + pieces - 1) / pieces, unit) : unit;
}

static Plan plan_of(const MatMul *p, Part part) {
    Plan plan = {.product = p, .part = part, .depth = piece(p->K, BLOCK_DEPTH, LANES), .width = piece(part.columns, BLOCK_COLUMNS, PANEL)};
    plan.num_depths = p->K ? (p->K + plan.depth - 1) / plan.depth : 1; /* without any depth, one block that gives zeros */
    plan.num_blocks = (part.columns + plan.width - 1) / plan.width * plan.num_depths;
    return plan;
}

static Block block_of(const Plan *plan, int64_t number) {
    if (number >= plan->num_blocks) return (Block){0};
    const int64_t first = number % plan->num_depths * plan->depth, column = number / plan->num_depths * plan->width;
    return (Block){first, least(plan->depth, plan->product->K - first), plan->part.column + column, least(plan->width, plan->part.columns - column)};
}

static const float *start_of(const MatMul *p, Block block) { return p->b.start + block.first * p->b.row + block.column * p->b.column; }

static void pack_block(const MatMul *p, Block block, float *panels) {
    if (p->b.column == 1)
        pack(start_of(p, block), p->b.row, block.depth, block.columns, panels);
    else
        pack_transposed(start_of(p, block), p->b.column, block.columns, block.depth, 1.0f, panels);
}

/* A tile's rows of a, copied where they would not stay in the first-level cache: rows that lie whole pages apart all fall into one set of
   it, and of rows that lie side by side a narrow tile uses but a small part of each line. */
static Matrix gather(Matrix a, int rows, int64_t depth, float *copy) {
    enum { STRIDE = BLOCK_DEPTH + LINE };
    if (a.row == 1 && TILE_ROWS < LINE / 2 && rows == TILE_ROWS) {
        for (int64_t k = 0; k < depth; k++) memcpy(copy + k * TILE_ROWS, a.start + k * a.column, TILE_ROWS * sizeof(float));
        return (Matrix){copy, 1, TILE_ROWS};
    }
    if (a.column == 1 && a.row % PAGE == 0 && depth >= LANES) {
        for (int64_t r = 0; r < rows; r++, a.start += a.row) {
            for (int64_t k = 0; k + LANES <= depth; k += LANES) store(copy + r * STRIDE + k, load(a.start + k));
            store(copy + r * STRIDE + depth - LANES, load(a.start + depth - LANES));
        }
        return (Matrix){copy, STRIDE, 1};
    }
    return a;
}

/* Memory that will be read soon, [rows, length]: `count` lines of it are fetched into the second-level cache at a time. */
typedef struct {
    const float *start;
    int64_t stride, rows, length, count, row, column;
} Ahead;

static Ahead ahead_of_block(const MatMul *p, Block block, int64_t times) {
    Ahead next = {start_of(p, block), p->b.row, block.depth, block.columns};
    if (p->b.column != 1) next = (Ahead){next.start, p->b.column, block.columns, block.depth};
    next.count = (next.rows * (next.length / LINE + 1) + times - 1) / times;
    return next;
}

/* Of rows alone: what lies along the depth, a few elements of each line, is too many lines. */
static Ahead ahead_of_rows(Matrix a, int64_t rows, int64_t depth, int64_t times) {
    if (a.column != 1) return (Ahead){0};
    return (Ahead){a.start, a.row, rows, depth, .count = (rows * (depth / LINE + 1) + times - 1) / times};
}

static void fetch(Ahead *next) {
    for (int64_t i = 0; i < next->count && next->row < next->rows; i++) {
        __builtin_prefetch(next->start + next->row * next->stride + next->column, 0, 2);
        next->column += LINE;
        if (next->column >= next->length) {
            next->column = 0;
            next->row++;
        }
    }
}

/* Where a tile will be stored. */
static void fetch_tile(const float *c, int64_t stride, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        __builtin_prefetch(c + r * stride, 1);
        __builtin_prefetch(c + r * stride + PANEL - 1, 1);
    }
}

/* The last columns, fewer than a panel: out [rows, n] = a b plus the addend. */
static void edge_tile(int rows, int64_t n, int64_t depth, Matrix a, const float *panel, float *out, int64_t stride, Addend plus) {
    float whole[TILE_ROWS * PANEL];
    tile(rows, n <= LANES ? 1 : 2, depth, a, panel, whole, PANEL, (Addend){NULL, 0});
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++) out[r * stride + i] = whole[r * PANEL + i] + (plus.start ? plus.start[r * plus.row + i] : 0);
}

/* Rows [row, row + rows) of the result, at most TILE_ROWS, in the columns of a block. */
static void product_of_rows(const MatMul *p, int64_t row, int rows, Block block, const float *panels, float *copy, Ahead *block_ahead) {
    float *out = p->out + row * p->stride_out + block.column;
    const int64_t num_panels = (block.columns + PANEL - 1) / PANEL;
    const Matrix lying = {p->a.start + row * p->a.row + block.first * p->a.column, p->a.row, p->a.column};
    const Matrix a = gather(lying, rows, block.depth, copy);
    Addend plus = {p->bias ? p->bias + block.column : NULL, 0};
    if (block.first || p->accumulate) plus = (Addend){out, p->stride_out};
    Ahead rows_ahead = {0};
    if (row + 2 * rows <= p->M) rows_ahead = ahead_of_rows((Matrix){lying.start + rows * lying.row, lying.row, lying.column}, rows, block.depth, num_panels);
    for (int64_t i = 0; i < num_panels; i++, panels += block.depth * PANEL, out += PANEL) {
        const int64_t n = least(PANEL, block.columns - i * PANEL);
        fetch(block_ahead);
        fetch(&rows_ahead);
        if (n == PANEL) {
            fetch_tile(out, p->stride_out, rows);
            tile(rows, 2, block.depth, a, panels, out, p->stride_out, plus);
        } else
            edge_tile(rows, n, block.depth, a, panels, out, p->stride_out, plus);
        if (plus.start) plus.start += PANEL;
    }
}

static void matmul_part(const MatMul *p, Part part, float *panels, float *copy) {
    if (!part.rows || !part.columns) return; /* more threads than tiles */
    const Plan plan = plan_of(p, part);
    const int64_t num_tiles = (part.rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t number = 0; number < plan.num_blocks; number++) {
        const Block block = block_of(&plan, number);
        Ahead next = ahead_of_block(p, block_of(&plan, number + 1), num_tiles * ((block.columns + PANEL - 1) / PANEL));
        pack_block(p, block, panels);
        for (int64_t i = 0; i < num_tiles; i++) { /* evenly many rows each */
            const int64_t row = part.rows * i / num_tiles, rows = part.rows * (i + 1) / num_tiles - row;
            product_of_rows(p, part.row + row, (int)rows, block, panels, copy, &next);
        }
    }
}

/* The threads are a grid of `down` x `across` parts of the result. */
typedef struct {
    const MatMul *product;
    int64_t down, across;
} Grid;

static Part part_of(const Grid *grid, int64_t number) {
    const MatMul *p = grid->product;
    const int64_t i = number / grid->across, j = number % grid->across, panels = (p->N + PANEL - 1) / PANEL;
    const int64_t row = p->M * i / grid->down, column = panels * j / grid->across * PANEL;
    return (Part){row, p->M * (i + 1) / grid->down - row, column, least(p->N, panels * (j + 1) / grid->across * PANEL) - column};
}

/* The largest part's time, in units of one product of two elements: to pack an element of b takes about PACK of them, to fetch one of a
   READ (measured). */
static int64_t cost(const Grid *grid) {
    enum { PACK = 6, READ = 16 };
    const int64_t panels = (grid->product->N + PANEL - 1) / PANEL, columns = (panels + grid->across - 1) / grid->across * PANEL;
    const int64_t rows = (grid->product->M + grid->down - 1) / grid->down;
    return columns * (rows + PACK) + rows * READ;
}

static Grid best_grid(const MatMul *p, int64_t threads) {
    Grid best = {p, threads, 1};
    for (int64_t across = 2; across <= threads; across++) {
        const Grid other = {p, threads / across, across};
        if (threads % across == 0 && cost(&other) < cost(&best)) best = other;
    }
    return best;
}

static void matmul_parts(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const Grid *grid = state;
    const size_t block = (size_t)BLOCK_DEPTH * BLOCK_COLUMNS, rows = TILE_ROWS * (BLOCK_DEPTH + LINE);
    float *scratch = pool_scratch(pool, thread, block + rows);
    if (!scratch) return;
    for (int64_t i = start; i < stop; i++) matmul_part(grid->product, part_of(grid, i), scratch, scratch + block);
}

static void matmul_blocked(Pool *pool, const MatMul *p) {
    if (!p->M || !p->N) return;
    enum { WORTHWHILE = 1 << 17 }; /* products of two elements for a thread: less is done before it is awake */
    const Grid grid = best_grid(p, least(pool_size(pool), p->M * p->N * p->K / WORTHWHILE + 1));
    pool_run(pool, matmul_parts, &grid, grid.down * grid.across, 1);
}
