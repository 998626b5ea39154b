// Softmax cross-entropy in place on logits [rows, V], of which a rank may hold a part of the
// columns. A block processes one row.
//
// Two ways, as in reference.py: xent_max, xent_shifted_sum and xent_grad move the logits five
// times; xent_statistics and xent_grad_from_logits move them three times and compute the
// exponentials twice, which is faster here.
//
// Kernels that overwrite a row read the target's element first, then synchronise, and write its
// result last.
// minillm-build: -DELEMENT=float32
// minillm-build: -DELEMENT=bfloat16
// minillm-build: -DELEMENT=float16
// minillm-sass: xent_* LDG.E.128*2
// minillm-sass: xent_grad* STG.E.128*2
// minillm-sass: xent_shifted_sum STG.E.128*2
#include "../gpu/include/vectors.cuh"

#define MOST_THREADS 512
#define LOG2_E 1.4426950408889634f

// out [rows] = the largest of each row's first `valid` logits.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    xent_max(const Element* logits, float* out, int V, int valid) {
    __shared__ float shared[MOST_THREADS / 32];
    const Element* row = logits + (int64_t)blockIdx.x * V;
    float largest = -INFINITY;
    #pragma unroll 2
    for (int c = threadIdx.x * RUN; c < valid; c += blockDim.x * RUN) {
        float v[RUN];
        load_floats(v, row + c, valid - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++)
            if (c + i < valid) largest = fmaxf(largest, v[i]);
    }
    largest = block_max(largest, shared);
    if (threadIdx.x == 0) out[blockIdx.x] = largest;
}

// Overwrite logits with exp(logits - row_max), columns from `valid` on with zeros. sums [rows]:
// their sums. target_logit [rows]: the target's logit less the maximum, 0 where another rank holds
// it; first_class is the class of column 0.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    xent_shifted_sum(Element* logits, const float* row_max, const int64_t* targets, float* sums,
                     float* target_logit, int V, int valid, int64_t first_class) {
    __shared__ float shared[MOST_THREADS / 32];
    Element* row = logits + (int64_t)blockIdx.x * V;
    const float largest = row_max[blockIdx.x];
    if (threadIdx.x == 0) {
        const int64_t target = targets[blockIdx.x] - first_class;
        target_logit[blockIdx.x] =
            target >= 0 && target < valid ? to_float(row[target]) - largest : 0.0f;
    }
    __syncthreads();
    float sum = 0.0f;
    #pragma unroll 2
    for (int c = threadIdx.x * RUN; c < V; c += blockDim.x * RUN) {
        float v[RUN];
        load_floats(v, row + c, V - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) {
            v[i] = c + i < valid ? exp2_((v[i] - largest) * LOG2_E) : 0.0f;
            sum += v[i];
        }
        store_floats(row + c, v, V - c);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The largest of each row's first `valid` logits, the sum of their exponentials relative to it, and
// the target's logit, 0 where another rank holds it, in one pass: a larger logit rescales the sum
// so far (Milakov and Gimelshein 2018).
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    xent_statistics(const Element* logits, const int64_t* targets, float* row_max, float* sums,
                    float* target_logit, int V, int valid, int64_t first_class) {
    __shared__ float shared[MOST_THREADS / 32];
    const Element* row = logits + (int64_t)blockIdx.x * V;
    float largest = -INFINITY, sum = 0.0f;
    #pragma unroll 2
    for (int c = threadIdx.x * RUN; c < valid; c += blockDim.x * RUN) {
        float v[RUN];
        load_floats(v, row + c, valid - c);
        float top = largest;
        #pragma unroll
        for (int i = 0; i < RUN; i++)
            if (c + i < valid) top = fmaxf(top, v[i]);
        if (top == -INFINITY) continue;  // avoid inf - inf
        sum *= exp2_((largest - top) * LOG2_E);
        largest = top;
        #pragma unroll
        for (int i = 0; i < RUN; i++)
            if (c + i < valid) sum += exp2_((v[i] - top) * LOG2_E);
    }
    const float top = block_max(largest, shared);
    sum = block_sum(largest == -INFINITY ? 0.0f : sum * exp2_((largest - top) * LOG2_E), shared);
    if (threadIdx.x > 0) return;
    const int64_t target = targets[blockIdx.x] - first_class;
    row_max[blockIdx.x] = top;
    sums[blockIdx.x] = sum;
    target_logit[blockIdx.x] = target >= 0 && target < valid ? to_float(row[target]) : 0.0f;
}

// Overwrite logits with (softmax - onehot(target)) row_scale, columns from `valid` on with zeros;
// row_max and sum_exp [rows] are over the whole vocabulary. Rows go from the last to the first,
// since the previous pass has left the last ones in the cache.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    xent_grad_from_logits(Element* logits, const float* row_max, const float* sum_exp,
                          const int64_t* targets, const float* row_scale, int V, int valid,
                          int64_t first_class) {
    const int number = gridDim.x - 1 - blockIdx.x;
    Element* row = logits + (int64_t)number * V;
    const int64_t target = targets[number] - first_class;
    const bool here = threadIdx.x == 0 && target >= 0 && target < valid;
    const float largest = row_max[number], scale = row_scale[number],
                factor = scale / sum_exp[number];
    const float at_target =
        here ? exp2_((to_float(row[target]) - largest) * LOG2_E) * factor - scale : 0.0f;
    __syncthreads();
    #pragma unroll 2
    for (int c = threadIdx.x * RUN; c < V; c += blockDim.x * RUN) {
        float v[RUN];
        load_floats(v, row + c, V - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++)
            v[i] = c + i < valid ? exp2_((v[i] - largest) * LOG2_E) * factor : 0.0f;
        store_floats(row + c, v, V - c);
    }
    __syncthreads();
    if (here) row[target] = from_float<Element>(at_target);
}

// Overwrite exp_logits with (softmax - onehot(target)) row_scale; sum_exp [rows] is over the whole
// vocabulary.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    xent_grad(Element* exp_logits, const float* sum_exp, const int64_t* targets,
              const float* row_scale, int V, int64_t first_class) {
    Element* row = exp_logits + (int64_t)blockIdx.x * V;
    const int64_t target = targets[blockIdx.x] - first_class;
    const bool here = threadIdx.x == 0 && target >= 0 && target < V;
    const float scale = row_scale[blockIdx.x], factor = scale / sum_exp[blockIdx.x];
    const float at_target = here ? to_float(row[target]) * factor - scale : 0.0f;
    __syncthreads();
    #pragma unroll 2
    for (int c = threadIdx.x * RUN; c < V; c += blockDim.x * RUN) {
        float v[RUN];
        load_floats(v, row + c, V - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) v[i] *= factor;
        store_floats(row + c, v, V - c);
    }
    __syncthreads();
    if (here) row[target] = from_float<Element>(at_target);
}
