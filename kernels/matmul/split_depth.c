/* Products that are deep for their size, such as gradients of small weights, of a wide layer's input, or of what goes into the head. Slices
   of the result would each pack the whole of one operand again; slices of the depth pack nothing twice, but each leaves a partial sum of the
   whole result. */

enum {
    SLICE_DEPTH = 256,
    MAX_SLICES = 8,
    MAX_PARTIAL = 1 << 20 /* floats, which every thread but one keeps as scratch */
};

INLINE int is_deep(const Pool *pool, const MatMul *p) {
    const int64_t larger = p->M > p->N ? p->M : p->N, threads = pool_size(pool);
    if (threads == 1 || threads > MAX_SLICES || p->M * p->N > MAX_PARTIAL) return 0;
    return 2 * p->K >= 3 * larger && p->K >= threads * SLICE_DEPTH;
}

typedef struct {
    const MatMul *product;
    float **partial; /* [MAX_SLICES], each [M, N]: what the slices after the first add */
} DepthSlices;

static void matmul_depth(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const DepthSlices *slices = state;
    MatMul p = *slices->product;
    p.a += start * (p.transposed_a ? p.stride_a : 1);
    p.b += start * (p.transposed_b ? 1 : p.stride_b);
    p.K = stop - start;
    if (thread) {
        p.out = slices->partial[thread] = pool_scratch(pool, thread, (size_t)(p.M * p.N));
        p.stride_out = p.N;
        p.accumulate = 0;
        p.bias = NULL;
        if (!p.out) return;
    }
    matmul_slice(&p, 0, p.M, 0, p.N);
}

static void add_slices(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const DepthSlices *slices = state;
    const MatMul *p = slices->product;
    for (int64_t row = start; row < stop; row++)
        for (int i = 1; i < MAX_SLICES; i++)
            if (slices->partial[i]) add_to(p->out + row * p->stride_out, slices->partial[i] + row * p->N, p->N);
}

static void matmul_deep(Pool *pool, const MatMul *p) {
    float *partial[MAX_SLICES] = {NULL};
    const DepthSlices slices = {p, partial};
    pool_run(pool, matmul_depth, &slices, p->K, SLICE_DEPTH);
    pool_run(pool, add_slices, &slices, p->M, 1);
}
