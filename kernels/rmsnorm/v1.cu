// Root-mean-square normalisation, forward and backward.
//
// As in layernorm/v1.cu, a row is held in registers (norms.cuh). Backward walks down the rows with
// a fixed number of blocks; column_sum.cu adds the blocks' partial gradients of the weight.
// minillm-build: -DELEMENT=float32 -DVALUES=8
// minillm-build: -DELEMENT=float32 -DVALUES=16
// minillm-build: -DELEMENT=float32 -DVALUES=24
// minillm-build: -DELEMENT=float32 -DVALUES=32
// minillm-build: -DELEMENT=bfloat16 -DVALUES=8
// minillm-build: -DELEMENT=bfloat16 -DVALUES=16
// minillm-build: -DELEMENT=bfloat16 -DVALUES=24
// minillm-build: -DELEMENT=bfloat16 -DVALUES=32
// minillm-build: -DELEMENT=float16 -DVALUES=8
// minillm-build: -DELEMENT=float16 -DVALUES=24
// minillm-build: -DELEMENT=float16 -DVALUES=32
// minillm-sass: rmsnorm_forward LDG.E.128*4 STG.E.128*2
// minillm-sass: rmsnorm_backward LDG.E.128*5 STG.E.128*2
#include "../gpu/include/norms.cuh"

// y = x rstd weight of x [rows, D], or of x + delta + delta_bias, which is then written to sum_out.
// delta_bias may be null.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    rmsnorm_forward(const Element* x, const Element* delta, const Element* delta_bias,
                    const Element* weight, Element* sum_out, Element* y, float* rstd_out,
                    int64_t num_rows, int D, float eps) {
    __shared__ float2 shared[MOST_THREADS / 32];
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= num_rows) return;  // uniform over a warp: such rows have a warp each
    const int64_t start = row * D;

    float v[RUNS][RUN];
    float squares = 0.0f;
    load_row(v, x, delta, delta_bias, sum_out, start, D);
    #pragma unroll
    for (int r = 0; r < RUNS; r++) {
        #pragma unroll
        for (int i = 0; i < RUN; i++) squares += v[r][i] * v[r][i];
    }
    const float rstd = 1.0f / sqrtf(row_sum(squares, shared) / D + eps);

    #pragma unroll
    for (int r = 0; r < RUNS; r++) {
        const int c = column(r);
        float w[RUN];
        load_floats(w, weight + c, D - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) v[r][i] *= rstd * w[i];
        store_floats(y + start + c, v[r], D - c);
    }
    if (threadIdx.x == 0) rstd_out[row] = rstd;
}

// grad_x = (g - z mean(g z)) rstd + grad_sum with z = x rstd, g = grad_y weight. Any of grad_sum,
// grad_x, partials may be null, and grad_x may be grad_y. partials [gridDim.x, D] takes each
// block's sums over rows of grad_y z.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    rmsnorm_backward(const Element* grad_y, const Element* grad_sum, const Element* x,
                     const Element* weight, const float* rstd_in, Element* grad_x, float* partials,
                     int64_t num_rows, int D) {
    __shared__ float2 shared[MOST_THREADS / 32];
    float sums[1][RUNS][RUN] = {};

    for (int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; row < num_rows;
         row += (int64_t)gridDim.x * blockDim.y) {
        const int64_t start = row * D;
        const float rstd = rstd_in[row];
        // Kept packed: half the registers of floats. All loads start before the reduction.
        Run<Element, RUN> x_row[RUNS], grad_row[RUNS], more[RUNS];
        float along_z = 0.0f;
        #pragma unroll
        for (int r = 0; r < RUNS; r++) {
            x_row[r] = load_run<RUN>(x + start + column(r), D - column(r));
            grad_row[r] = load_run<RUN>(grad_y + start + column(r), D - column(r));
            if (grad_x != nullptr && grad_sum != nullptr)
                more[r] = load_run<RUN>(grad_sum + start + column(r), D - column(r));
        }
        #pragma unroll
        for (int r = 0; r < RUNS; r++) {
            float z[RUN], g[RUN], w[RUN];
            to_floats(z, x_row[r]);
            to_floats(g, grad_row[r]);
            load_floats(w, weight + column(r), D - column(r));
            #pragma unroll
            for (int i = 0; i < RUN; i++) {
                z[i] *= rstd;
                sums[0][r][i] += g[i] * z[i];
                along_z += g[i] * w[i] * z[i];  // columns from D on are zero
            }
        }
        if (grad_x == nullptr) continue;
        along_z = row_sum(along_z, shared) / D;
        #pragma unroll
        for (int r = 0; r < RUNS; r++) {
            const int c = column(r);
            float z[RUN], g[RUN], w[RUN];
            to_floats(z, x_row[r]);
            to_floats(g, grad_row[r]);
            load_floats(w, weight + c, D - c);
            #pragma unroll
            for (int i = 0; i < RUN; i++) g[i] = (g[i] * w[i] - z[i] * rstd * along_z) * rstd;
            if (grad_sum != nullptr) {
                float m[RUN];
                to_floats(m, more[r]);
                #pragma unroll
                for (int i = 0; i < RUN; i++) g[i] += m[i];
            }
            store_floats(grad_x + start + c, g, D - c);
        }
    }
    if (partials != nullptr) store_partials(partials, sums, D);
}
