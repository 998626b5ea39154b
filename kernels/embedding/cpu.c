/* Embedding lookup and its backward pass. The backward pass is deterministic: a thread owns
   columns, not rows, and adds the ids in order. */

typedef struct {
    const int64_t *ids;
    const float *weight; /* [V, D] */
    float *out;          /* [num_ids, D] */
    int64_t num_ids, V, D, first_row;
} EmbeddingForward;

static void embedding_forward_rows(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const EmbeddingForward *a = state;
    const size_t row_bytes = (size_t)a->D * sizeof(float);
    for (int64_t i = start; i < stop; i++) {
        const int64_t row = a->ids[i] - a->first_row;
        if (row >= 0 && row < a->V)
            memcpy(a->out + i * a->D, a->weight + row * a->D, row_bytes);
        else
            memset(a->out + i * a->D, 0, row_bytes);
    }
}

static void embedding_forward(Pool *pool, const Argument *arguments) {
    UNPACK(EmbeddingForward, a, arguments);
    pool_run(pool, embedding_forward_rows, &a, a.num_ids, 64);
}

typedef struct {
    const float *grad_y; /* [num_ids, D] */
    const int64_t *ids;
    float *grad_weight; /* [V, D] */
    int64_t num_ids, V, D, first_row, accumulate;
} EmbeddingBackward;

static void embedding_backward_columns(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const EmbeddingBackward *a = state;
    const int64_t first = start * LANES, last = stop * LANES < a->D ? stop * LANES : a->D;
    if (!a->accumulate)
        for (int64_t row = 0; row < a->V; row++)
            memset(a->grad_weight + row * a->D + first, 0, (size_t)(last - first) * sizeof(float));
    for (int64_t i = 0; i < a->num_ids; i++) {
        const int64_t row = a->ids[i] - a->first_row;
        if (row >= 0 && row < a->V)
            add_to(a->grad_weight + row * a->D + first, a->grad_y + i * a->D + first, last - first);
    }
}

static void embedding_backward(Pool *pool, const Argument *arguments) {
    UNPACK(EmbeddingBackward, a, arguments);
    pool_run(pool, embedding_backward_columns, &a, (a.D + LANES - 1) / LANES, 1);
}
