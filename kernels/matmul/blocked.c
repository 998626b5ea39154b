/* Blocked matrix product (Goto and van de Geijn 2008, "Anatomy of high-performance matrix
   multiplication"). BLOCK_DEPTH x BLOCK_COLUMNS of b are packed once and stay in the
   second-level cache. TILE_ROWS rows of a stay in the first-level cache while every panel of the
   block is multiplied. The next operands are prefetched meanwhile.

   The terms of an element and their order depend on K alone: any number of threads gives the
   same bits. */

enum {
    BLOCK_DEPTH = 512,
    /* Processors with AVX-512 have 1 MB of second-level cache and more, others half of it. */
    BLOCK_COLUMNS = VECTOR_BYTES == 64 ? 384 : 192,
    PAGE = 4096 / sizeof(float),
    LINE = 64 / sizeof(float),
};

/* Return the size of equal pieces of n, in whole units of at most `most`; never 0. */
static int64_t piece(int64_t n, int64_t most, int64_t unit) {
    const int64_t pieces = (n + most - 1) / most;
    return n ? round_up((n + pieces - 1) / pieces, unit) : unit;
}

/* Part of the result: a thread's share before work stealing. */
typedef struct {
    int64_t row, rows, column, columns;
} Part;

/* Partition of the result into `down` x `across` parts. A part has `columns` column blocks, and
   each of these `chunks` pieces: groups of tiles of rows. A thread packs a column block at its
   first piece of it: `layers` consecutive blocks along the depth. */
typedef struct {
    const MatMul *product;
    int64_t down, across;
    int64_t depth, width;      /* of a block, at most BLOCK_DEPTH and BLOCK_COLUMNS */
    int64_t columns, chunks;   /* of the largest part */
    int64_t first, layers;     /* the blocks along the depth of this call */
} Plan;

static Part part_of(const Plan *plan, int64_t number) {
    const MatMul *p = plan->product;
    const int64_t i = number / plan->across, j = number % plan->across;
    const int64_t panels = (p->N + PANEL - 1) / PANEL;
    const int64_t row = p->M * i / plan->down, end = p->M * (i + 1) / plan->down;
    const int64_t column = panels * j / plan->across * PANEL;
    const int64_t last = least(p->N, panels * (j + 1) / plan->across * PANEL);
    return (Part){row, end - row, column, last - column};
}

/* Block of b; empty past the last. */
typedef struct {
    int64_t first, depth, column, columns;
} Block;

/* Return block `layer` along the depth of column block `number` of a part. */
static Block block_of(const Plan *plan, Part part, int64_t number, int64_t layer) {
    const int64_t column = number * plan->width, first = (plan->first + layer) * plan->depth;
    if (column >= part.columns) return (Block){0};
    return (Block){
        first, least(plan->depth, plan->product->K - first), part.column + column,
        least(plan->width, part.columns - column)
    };
}

static const float *start_of(const MatMul *p, Block block) {
    return p->b.start + block.first * p->b.row + block.column * p->b.column;
}

static void pack_block(const MatMul *p, Block block, float *panels) {
    const float *b = start_of(p, block);
    if (p->b.column == 1)
        pack(b, p->b.row, block.depth, block.columns, panels);
    else
        pack_transposed(b, p->b.column, block.columns, block.depth, 1.0f, panels);
}

/* Return the place of a block in the whole of b, packed: block by block along the depth, and in
   each of them panel by panel. */
static float *place_of(const MatMul *p, Block block) {
    return p->packed + block.first * round_up(p->N, PANEL) + block.column * block.depth;
}

/* Return a tile's rows of a, copied if they would not stay in the first-level cache. Rows whole
   pages apart all map to one cache set. If rows lie side by side, a narrow tile uses a small
   part of each line. */
static Matrix gather(Matrix a, int rows, int64_t depth, float *copy) {
    enum { STRIDE = BLOCK_DEPTH + LINE };
    if (a.row == 1 && TILE_ROWS < LINE / 2 && rows == TILE_ROWS) {
        for (int64_t k = 0; k < depth; k++)
            memcpy(copy + k * TILE_ROWS, a.start + k * a.column, TILE_ROWS * sizeof(float));
        return (Matrix){copy, 1, TILE_ROWS};
    }
    if (a.column == 1 && a.row % PAGE == 0 && depth >= LANES) {
        for (int64_t r = 0; r < rows; r++, a.start += a.row) {
            float *to = copy + r * STRIDE;
            for (int64_t k = 0; k + LANES <= depth; k += LANES) store(to + k, load(a.start + k));
            store(to + depth - LANES, load(a.start + depth - LANES));
        }
        return (Matrix){copy, STRIDE, 1};
    }
    return a;
}

/* Memory to prefetch into the second-level cache, [rows, length], `count` lines at a time. */
typedef struct {
    const float *start;
    int64_t stride, rows, length, count, row, column;
} Ahead;

/* Return the share of piece `number` of `pieces` of a block, prefetched in `times` calls. */
static Ahead ahead_of_block(
    const MatMul *p, Block block, int64_t number, int64_t pieces, int64_t times
) {
    Ahead next = {start_of(p, block), p->b.row, block.depth, block.columns};
    if (p->b.column != 1) next = (Ahead){next.start, p->b.column, block.columns, block.depth};
    const int64_t end = next.rows * (number + 1) / pieces;
    next.row = next.rows * number / pieces;
    next.rows = end;
    next.count = ((end - next.row) * (next.length / LINE + 1) + times - 1) / times;
    return next;
}

/* Return rows to prefetch; none for a column-major operand, which uses a few elements of too
   many lines. */
static Ahead ahead_of_rows(Matrix a, int64_t rows, int64_t depth, int64_t times) {
    if (a.column != 1) return (Ahead){0};
    const int64_t count = (rows * (depth / LINE + 1) + times - 1) / times;
    return (Ahead){a.start, a.row, rows, depth, .count = count};
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

/* Prefetch the destination of a tile. */
static void fetch_tile(const float *c, int64_t stride, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        __builtin_prefetch(c + r * stride, 1);
        __builtin_prefetch(c + r * stride + PANEL - 1, 1);
    }
}

/* Compute the last columns, fewer than a panel: out [rows, n] = a b plus the addend. */
static void edge_tile(
    int rows, int64_t n, int64_t depth, Matrix a, const float *panel, float *out, int64_t stride,
    Addend plus
) {
    float whole[TILE_ROWS * PANEL];
    tile(rows, n <= LANES ? 1 : 2, depth, a, panel, whole, PANEL, (Addend){NULL, 0});
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++) {
            const float before = plus.start ? plus.start[r * plus.row + i] : 0;
            out[r * stride + i] = whole[r * PANEL + i] + before;
        }
}

/* Compute rows [row, row + rows) of the result, at most TILE_ROWS, in the columns of a block. */
static void product_of_rows(
    const MatMul *p, int64_t row, int rows, Block block, const float *panels, float *copy,
    Ahead *block_ahead
) {
    float *out = p->out + row * p->stride_out + block.column;
    const int64_t num_panels = (block.columns + PANEL - 1) / PANEL;
    const float *start = p->a.start + row * p->a.row + block.first * p->a.column;
    const Matrix lying = {start, p->a.row, p->a.column};
    const Matrix a = gather(lying, rows, block.depth, copy);
    Addend plus = {p->bias ? p->bias + block.column : NULL, 0};
    if (block.first || p->accumulate) plus = (Addend){out, p->stride_out};
    Ahead rows_ahead = {0};
    if (row + 2 * rows <= p->M) {
        const Matrix next = {start + rows * lying.row, lying.row, lying.column};
        rows_ahead = ahead_of_rows(next, rows, block.depth, num_panels);
    }
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

/* Scratch of one thread: rows of a, and the packed blocks of column block `held / (layers + 1)`
   over all parts. The first `held % (layers + 1)` of these blocks are packed. */
#define NOTHING INT64_MAX

typedef struct {
    float *panels, *copy;
    int64_t *held;
} Memory;

/* Compute piece `number` of the whole result. */
static void matmul_piece(const Plan *plan, int64_t number, const Memory *memory) {
    const MatMul *p = plan->product;
    const int64_t which = number / plan->chunks, chunk = number % plan->chunks;
    const Part part = part_of(plan, which / plan->columns);
    const int64_t column = which % plan->columns, all = plan->layers + 1;
    const int64_t num_tiles = (part.rows + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t start = num_tiles * chunk / plan->chunks;
    const int64_t stop = num_tiles * (chunk + 1) / plan->chunks;
    if (column * plan->width >= part.columns || start == stop) return;
    if (*memory->held / all != which) *memory->held = which * all;
    float *panels = memory->panels;
    for (int64_t layer = 0; layer < plan->layers; layer++) {
        const Block block = block_of(plan, part, column, layer);
        const int64_t num_panels = (block.columns + PANEL - 1) / PANEL;
        const int64_t times = (stop - start) * num_panels;
        Ahead next;
        if (p->packed) {
            panels = place_of(p, block);
        } else if (*memory->held % all == layer) {
            pack_block(p, block, panels);
            ++*memory->held;
        }
        if (p->packed)
            next = (Ahead){0};
        else if (layer + 1 < plan->layers && *memory->held % all == layer + 1)
            next = ahead_of_block(p, block_of(plan, part, column, layer + 1), 0, 1, times);
        else
            next = ahead_of_block(
                p, block_of(plan, part, column + 1, layer), chunk, plan->chunks, times
            );
        for (int64_t i = start; i < stop; i++) { /* equal shares of rows */
            const int64_t row = part.rows * i / num_tiles;
            const int rows = (int)(part.rows * (i + 1) / num_tiles - row);
            product_of_rows(p, part.row + row, rows, block, panels, memory->copy, &next);
        }
        panels += block.depth * num_panels * PANEL;
    }
}

static void matmul_pieces(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const Plan *plan = state;
    const size_t blocks = (size_t)BLOCK_DEPTH * BLOCK_COLUMNS;
    const size_t rows = TILE_ROWS * (BLOCK_DEPTH + LINE);
    float *scratch = pool_scratch(pool, thread, blocks + rows);
    const Memory memory = {scratch, scratch + blocks, pool_held(pool, thread)};
    for (int64_t i = start; scratch && i < stop; i++) matmul_piece(plan, i, &memory);
}

/* Return the largest part's time, in multiply-adds. Packing an element of b costs PACK of them,
   fetching one of a costs READ (measured). */
static int64_t cost(const MatMul *p, int64_t down, int64_t across) {
    enum { PACK = 6, READ = 16 };
    const int64_t panels = (p->N + PANEL - 1) / PANEL;
    const int64_t columns = (panels + across - 1) / across * PANEL;
    const int64_t rows = (p->M + down - 1) / down;
    return columns * (rows + PACK) + rows * READ;
}

static Plan plan_of(const MatMul *p, int64_t threads) {
    /* Pieces per part, and tiles per piece: a piece may have to pack a block. */
    enum { PIECES = 16, LEAST_TILES = 4 };
    Plan plan = {.product = p, .down = threads, .across = 1};
    for (int64_t across = 2; across <= threads; across++)
        if (threads % across == 0 &&
            cost(p, threads / across, across) < cost(p, plan.down, plan.across)) {
            plan.down = threads / across;
            plan.across = across;
        }
    const int64_t panels = (p->N + PANEL - 1) / PANEL;
    const int64_t columns = (panels + plan.across - 1) / plan.across * PANEL;
    const int64_t rows = (p->M + plan.down - 1) / plan.down;
    plan.depth = piece(p->K, BLOCK_DEPTH, LANES);
    plan.width = piece(columns, BLOCK_COLUMNS, PANEL);
    plan.columns = (columns + plan.width - 1) / plan.width;
    const int64_t most = (rows + LEAST_TILES * TILE_ROWS - 1) / (LEAST_TILES * TILE_ROWS);
    plan.chunks = least((PIECES + plan.columns - 1) / plan.columns, most);
    return plan;
}

static void matmul_blocked(Pool *pool, const MatMul *p) {
    if (!p->M || !p->N) return;
    /* multiply-adds per thread: less is done before a thread wakes up */
    enum { WORTHWHILE = 1 << 17 };
    const int64_t threads = least(pool_size(pool), p->M * p->N * p->K / WORTHWHILE + 1);
    Plan plan = plan_of(p, threads);
    /* K = 0: one block that gives zeros */
    const int64_t depths = p->K ? (p->K + plan.depth - 1) / plan.depth : 1;
    const int64_t fit = BLOCK_DEPTH * BLOCK_COLUMNS / (plan.depth * plan.width);
    const int64_t pieces = plan.down * plan.across * plan.columns * plan.chunks;
    for (; plan.first < depths; plan.first += plan.layers) {
        plan.layers = least(fit, depths - plan.first);
        for (int i = 0; i < pool_size(pool); i++) *pool_held(pool, i) = NOTHING;
        pool_run_pieces(pool, matmul_pieces, &plan, pieces, pieces, (int)threads);
    }
}

static void pack_panels(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const MatMul *p = state;
    const int64_t depth = piece(p->K, BLOCK_DEPTH, LANES);
    const int64_t column = start * PANEL, columns = least(p->N, stop * PANEL) - column;
    for (int64_t first = 0; first < p->K; first += depth) {
        const Block block = {first, least(depth, p->K - first), column, columns};
        pack_block(p, block, place_of(p, block));
    }
}

/* Pack the whole of b, for products that share it. */
static void pack_matrix(Pool *pool, const Argument *arguments) {
    struct {
        Matrix b; /* [K, N] */
        float *packed; /* [K, N rounded up to whole panels] */
        int64_t K, N;
    } a;
    _Static_assert(sizeof a % 8 == 0, "members are 8 bytes wide");
    memcpy(&a, arguments, sizeof a);
    const MatMul p = {.b = a.b, .packed = a.packed, .K = a.K, .N = a.N};
    pool_run(pool, pack_panels, &p, (a.N + PANEL - 1) / PANEL, 1);
}
