// Activations of the MLP, forward and backward. A thread takes one run of 16 bytes: the 2048
// threads of a multiprocessor have 32 KB or more in flight, about twice the need of an H100's
// memory.
// minillm-build: -DELEMENT=float32
// minillm-build: -DELEMENT=bfloat16
// minillm-build: -DELEMENT=float16
// minillm-sass: *_forward LDG.E.128*2 STG.E.128
// minillm-sass: *_backward LDG.E.128*3 STG.E.128
// minillm-sass: *glu_backward STG.E.128*2
#include "../gpu/include/vectors.cuh"

#define THREADS 256
#define LOG2_E 1.4426950408889634f
#define SQRT_2_PI 0.7978845608028654f  // sqrt(2 / pi)
#define CUBIC 0.044715f
#define SQRT_HALF 0.7071067811865476f
#define INV_SQRT_2PI 0.3989422804014327f

__device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + exp2_(-LOG2_E * x));
}

// GPT-2's GELU: x (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3), which is x sigmoid(2 u).
struct GeluTanh {
    static __device__ __forceinline__ float gate(float x) {
        return sigmoid(2 * SQRT_2_PI * x * (1.0f + CUBIC * x * x));
    }
    static __device__ __forceinline__ float value(float x) { return x * gate(x); }
    static __device__ __forceinline__ float slope(float x) {
        const float s = gate(x);
        // A saturated gate has slope 0; for large x the formula gives 0 times infinity.
        const float inner = 2 * SQRT_2_PI * x * (1.0f + 3 * CUBIC * x * x) * (1.0f - s) * s;
        return fabsf(x) > 30.0f ? s : s + inner;
    }
};

// GELU itself: x Phi(x).
struct GeluErf {
    static __device__ __forceinline__ float value(float x) {
        return 0.5f * x * (1.0f + erff(SQRT_HALF * x));
    }
    static __device__ __forceinline__ float slope(float x) {
        return 0.5f * (1.0f + erff(SQRT_HALF * x)) +
               x * INV_SQRT_2PI * exp2_(-0.5f * LOG2_E * x * x);
    }
};

struct Relu {
    static __device__ __forceinline__ float value(float x) { return fmaxf(x, 0.0f); }
    static __device__ __forceinline__ float slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }
};

struct Relu2 {
    static __device__ __forceinline__ float value(float x) { return x > 0.0f ? x * x : 0.0f; }
    static __device__ __forceinline__ float slope(float x) { return x > 0.0f ? 2.0f * x : 0.0f; }
};

struct Silu {
    static __device__ __forceinline__ float value(float x) { return x * sigmoid(x); }
    static __device__ __forceinline__ float slope(float x) {
        const float s = sigmoid(x), y = x * s;
        return s + y * (1.0f - s);
    }
};

// Position of a thread in [rows, F]: `tiles` blocks share a row. An array without rows is one row.
struct Place {
    int64_t row, column;
};
__device__ __forceinline__ Place place(int tiles) {
    return {(int64_t)(blockIdx.x / tiles),
            ((int64_t)(blockIdx.x % tiles) * THREADS + threadIdx.x) * RUN};
}

// Load the run of x [rows, F] at a place, plus bias [F] unless that is null.
__device__ __forceinline__ void load_biased(float (&v)[RUN], const Element* x, const Element* bias,
                                            Place at, int64_t F) {
    load_floats(v, x + at.row * F + at.column, F - at.column);
    if (bias == nullptr) return;
    float b[RUN];
    load_floats(b, bias + at.column, F - at.column);
    #pragma unroll
    for (int i = 0; i < RUN; i++) v[i] += b[i];
}

template <typename Activation>
__device__ __forceinline__ void forward(const Element* x, const Element* bias, Element* y,
                                        int64_t F, int tiles) {
    const Place at = place(tiles);
    if (at.column >= F) return;
    float v[RUN];
    load_biased(v, x, bias, at, F);
    #pragma unroll
    for (int i = 0; i < RUN; i++) v[i] = Activation::value(v[i]);
    store_floats(y + at.row * F + at.column, v, F - at.column);
}

// grad_x may be grad_y.
template <typename Activation>
__device__ __forceinline__ void backward(const Element* grad_y, const Element* x,
                                         const Element* bias, Element* grad_x, int64_t F,
                                         int tiles) {
    const Place at = place(tiles);
    if (at.column >= F) return;
    float v[RUN], g[RUN];
    load_biased(v, x, bias, at, F);
    load_floats(g, grad_y + at.row * F + at.column, F - at.column);
    #pragma unroll
    for (int i = 0; i < RUN; i++) g[i] *= Activation::slope(v[i]);
    store_floats(grad_x + at.row * F + at.column, g, F - at.column);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_tanh_forward(const Element* x, const Element* bias, Element* y, int64_t F, int tiles) {
    forward<GeluTanh>(x, bias, y, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_tanh_backward(const Element* grad_y, const Element* x, const Element* bias,
                       Element* grad_x, int64_t F, int tiles) {
    backward<GeluTanh>(grad_y, x, bias, grad_x, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_erf_forward(const Element* x, const Element* bias, Element* y, int64_t F, int tiles) {
    forward<GeluErf>(x, bias, y, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_erf_backward(const Element* grad_y, const Element* x, const Element* bias, Element* grad_x,
                      int64_t F, int tiles) {
    backward<GeluErf>(grad_y, x, bias, grad_x, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    relu_forward(const Element* x, const Element* bias, Element* y, int64_t F, int tiles) {
    forward<Relu>(x, bias, y, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    relu_backward(const Element* grad_y, const Element* x, const Element* bias, Element* grad_x,
                  int64_t F, int tiles) {
    backward<Relu>(grad_y, x, bias, grad_x, F, tiles);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    relu2_forward(const Element* x, const Element* bias, Element* y, int64_t F, int tiles) {
    forward<Relu2>(x, bias, y, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    relu2_backward(const Element* grad_y, const Element* x, const Element* bias, Element* grad_x,
                   int64_t F, int tiles) {
    backward<Relu2>(grad_y, x, bias, grad_x, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_forward(const Element* x, const Element* bias, Element* y, int64_t F, int tiles) {
    forward<Silu>(x, bias, y, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_backward(const Element* grad_y, const Element* x, const Element* bias, Element* grad_x,
                  int64_t F, int tiles) {
    backward<Silu>(grad_y, x, bias, grad_x, F, tiles);
}

// y [rows, F] = activation(gate) up, of gate_up [rows, 2F] = [gate | up].
template <typename Activation>
__device__ __forceinline__ void gated_forward(const Element* gate_up, Element* y, int64_t F,
                                              int tiles) {
    const Place at = place(tiles);
    if (at.column >= F) return;
    const int64_t left = F - at.column;
    const Element* from = gate_up + at.row * 2 * F + at.column;
    float gate[RUN], up[RUN];
    load_floats(gate, from, left);
    load_floats(up, from + F, left);
    #pragma unroll
    for (int i = 0; i < RUN; i++) up[i] *= Activation::value(gate[i]);
    store_floats(y + at.row * F + at.column, up, left);
}

// grad [rows, 2F] of gate_up from grad_y [rows, F].
template <typename Activation>
__device__ __forceinline__ void gated_backward(const Element* grad_y, const Element* gate_up,
                                               Element* grad, int64_t F, int tiles) {
    const Place at = place(tiles);
    if (at.column >= F) return;
    const int64_t left = F - at.column;
    const int64_t offset = at.row * 2 * F + at.column;
    float gate[RUN], up[RUN], dy[RUN];
    load_floats(gate, gate_up + offset, left);
    load_floats(up, gate_up + offset + F, left);
    load_floats(dy, grad_y + at.row * F + at.column, left);
    #pragma unroll
    for (int i = 0; i < RUN; i++) {
        const float y = Activation::value(gate[i]);
        gate[i] = dy[i] * up[i] * Activation::slope(gate[i]);
        up[i] = dy[i] * y;
    }
    store_floats(grad + offset, gate, left);
    store_floats(grad + offset + F, up, left);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_forward(const Element* gate_up, Element* y, int64_t F, int tiles) {
    gated_forward<Silu>(gate_up, y, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_backward(const Element* grad_y, const Element* gate_up, Element* grad, int64_t F,
                    int tiles) {
    gated_backward<Silu>(grad_y, gate_up, grad, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    geglu_forward(const Element* gate_up, Element* y, int64_t F, int tiles) {
    gated_forward<GeluTanh>(gate_up, y, F, tiles);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    geglu_backward(const Element* grad_y, const Element* gate_up, Element* grad, int64_t F,
                   int tiles) {
    gated_backward<GeluTanh>(grad_y, gate_up, grad, F, tiles);
}
