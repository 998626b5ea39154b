// Layer normalisation, forward and backward.
//
// A row is held in registers (norms.cuh): memory is read and written once, and mean and variance
// are two-pass sums over registers.
//
// Backward walks down the rows with a fixed number of blocks. Every thread sums its columns'
// gradients of weight and bias in registers; the rows of a block are summed in order, and
// column_sum.cu adds the blocks. No atomics: the bits repeat.
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
// minillm-sass: layernorm_forward LDG.E.128*5 STG.E.128*2
// minillm-sass: layernorm_backward LDG.E.128*7 STG.E.128*3
#include "../gpu/include/norms.cuh"

// y = (x - mean) rstd weight + bias of x [rows, D], or of x + delta + delta_bias, which is then
// written to sum_out. bias and delta_bias may be null.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    layernorm_forward(const Element* x, const Element* delta, const Element* delta_bias,
                      const Element* weight, const Element* bias, Element* sum_out, Element* y,
                      float* mean_out, float* rstd_out, int64_t num_rows, int D, float eps) {
    __shared__ float2 shared[MOST_THREADS / 32];
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= num_rows) return;  // uniform over a warp: such rows have a warp each
    const int64_t start = row * D;

    float v[RUNS][RUN];
    float total = 0.0f;
    load_row(v, x, delta, delta_bias, sum_out, start, D);
    #pragma unroll
    for (int r = 0; r < RUNS; r++) {
        #pragma unroll
        for (int i = 0; i < RUN; i++) total += v[r][i];
    }
    const float mean = row_sum(total, shared) / D;

    float squares = 0.0f;
    #pragma unroll
    for (int r = 0; r < RUNS; r++) {
        #pragma unroll
        for (int i = 0; i < RUN; i++) {
            v[r][i] -= mean;
            if (column(r) + i < D) squares += v[r][i] * v[r][i];
        }
    }
    const float rstd = 1.0f / sqrtf(row_sum(squares, shared) / D + eps);

    #pragma unroll
    for (int r = 0; r < RUNS; r++) {
        const int c = column(r);
        float w[RUN];
        load_floats(w, weight + c, D - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) v[r][i] *= rstd * w[i];
        if (bias != nullptr) add_run(v[r], bias + c, D - c);
        store_floats(y + start + c, v[r], D - c);
    }
    if (threadIdx.x == 0) {
        mean_out[row] = mean;
        rstd_out[row] = rstd;
    }
}

// grad_x = (g - mean(g) - z mean(g z)) rstd + grad_sum with z = (x - mean) rstd, g = grad_y weight.
// Any of grad_sum, grad_x, partials may be null, and grad_x may be grad_y. partials [2, gridDim.x,
// D] takes each block's sums over rows of grad_y z and of grad_y.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    layernorm_backward(const Element* grad_y, const Element* grad_sum, const Element* x,
                       const Element* weight, const float* mean_in, const float* rstd_in,
                       Element* grad_x, float* partials, int64_t num_rows, int D) {
    __shared__ float2 shared[MOST_THREADS / 32];
    float sums[2][RUNS][RUN] = {};  // over rows: for weight and bias

    for (int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; row < num_rows;
         row += (int64_t)gridDim.x * blockDim.y) {
        const int64_t start = row * D;
        const float mean = mean_in[row], rstd = rstd_in[row];
        Run<Element, RUN> x_row[RUNS], grad_row[RUNS];  // kept packed: half the registers of floats
        float2 along = make_float2(0.0f, 0.0f);
        #pragma unroll
        for (int r = 0; r < RUNS; r++) {
            x_row[r] = load_run<RUN>(x + start + column(r), D - column(r));
            grad_row[r] = load_run<RUN>(grad_y + start + column(r), D - column(r));
        }
        #pragma unroll
        for (int r = 0; r < RUNS; r++) {
            float z[RUN], g[RUN], w[RUN];
            to_floats(z, x_row[r]);
            to_floats(g, grad_row[r]);
            load_floats(w, weight + column(r), D - column(r));
            #pragma unroll
            for (int i = 0; i < RUN; i++) {
                z[i] = (z[i] - mean) * rstd;
                sums[0][r][i] += g[i] * z[i];
                sums[1][r][i] += g[i];
                g[i] *= w[i];  // columns from D on: zero, so they count in no sum
                along.x += g[i];
                along.y += g[i] * z[i];
            }
        }
        if (grad_x == nullptr) continue;
        along = row_sums(along, shared);
        const float along_one = along.x / D, along_z = along.y / D;
        #pragma unroll
        for (int r = 0; r < RUNS; r++) {
            const int c = column(r);
            float z[RUN], g[RUN], w[RUN];
            to_floats(z, x_row[r]);
            to_floats(g, grad_row[r]);
            load_floats(w, weight + c, D - c);
            #pragma unroll
            for (int i = 0; i < RUN; i++)
                g[i] = (g[i] * w[i] - along_one - (z[i] - mean) * rstd * along_z) * rstd;
            // Loaded before the reduction, grad_sum would take 180 registers instead of 167: two
            // blocks of 128 threads a multiprocessor instead of three.
            if (grad_sum != nullptr) add_run(g, grad_sum + start + c, D - c);
            store_floats(grad_x + start + c, g, D - c);
        }
    }
    if (partials != nullptr) store_partials(partials, sums, D);
}
