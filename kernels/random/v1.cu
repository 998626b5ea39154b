// Addressed normals: the bits of reference.py, which names the sources. Only correctly rounded IEEE
// 754 operations are used, in the reference's order; a product and a sum must stay two operations:
// minillm-options: --fmad=false
#include "../gpu/include/hashing.cuh"

#define THREADS 256

// Evaluate a rational function of degree 7 over 7, coefficients from the constant term up.
__device__ __forceinline__ double ratio(const double (&p)[8], const double (&q)[8], double r) {
    double top = p[7] * r, bottom = q[7] * r;
    #pragma unroll
    for (int i = 6; i > 0; i--) {
        top = (top + p[i]) * r;
        bottom = (bottom + q[i]) * r;
    }
    return (top + p[0]) / (bottom + q[0]);
}

// Return the natural logarithm of a normal x < 1: x = m 2^e with m in [sqrt(1/2), sqrt(2)), and the
// series of 2 artanh((m - 1) / (m + 1)).
__device__ __forceinline__ double logarithm(double x) {
    union {
        double value;
        uint64_t bits;
    } m = {x};
    int exponent = (int)(m.bits >> 52) - 1022;
    m.bits = (m.bits & 0x000FFFFFFFFFFFFFull) | 0x3FE0000000000000ull;  // in [1/2, 1)
    double mantissa = m.value;
    if (mantissa < 0.70710678118654752) {
        mantissa *= 2;
        exponent -= 1;
    }
    const double s = (mantissa - 1) / (mantissa + 1), z = s * s;
    double series = 1.0 / 21;
    #pragma unroll
    for (int odd = 19; odd > 0; odd -= 2) series = series * z + 1.0 / odd;
    return 2 * s * series + exponent * 0.69314718055994531;
}

// Return the z with Phi(z) = u, u in (0, 1): algorithm AS 241.
__device__ double inverse_normal(double u) {
    const double centre_p[8] = {3.3871328727963666080e0, 1.3314166789178437745e2,
                                1.9715909503065514427e3, 1.3731693765509461125e4,
                                4.5921953931549871457e4, 6.7265770927008700853e4,
                                3.3430575583588128105e4, 2.5090809287301226727e3};
    const double centre_q[8] = {1.0,
                                4.2313330701600911252e1,
                                6.8718700749205790830e2,
                                5.3941960214247511077e3,
                                2.1213794301586595867e4,
                                3.9307895800092710610e4,
                                2.8729085735721942674e4,
                                5.2264952788528545610e3};
    const double tail_p[8] = {1.42343711074968357734e0,  4.63033784615654529590e0,
                              5.76949722146069140550e0,  3.64784832476320460504e0,
                              1.27045825245236838258e0,  2.41780725177450611770e-1,
                              2.27238449892691845833e-2, 7.74545014278341407640e-4};
    const double tail_q[8] = {1.0,
                              2.05319162663775882187e0,
                              1.67638483018380384940e0,
                              6.89767334985100004550e-1,
                              1.48103976427480074590e-1,
                              1.51986665636164571966e-2,
                              5.47593808499534494600e-4,
                              1.05075007164441684324e-9};
    const double far_p[8] = {6.65790464350110377720e0,  5.46378491116411436990e0,
                             1.78482653991729133580e0,  2.96560571828504891230e-1,
                             2.65321895265761230930e-2, 1.24266094738807843860e-3,
                             2.71155556874348757815e-5, 2.01033439929228813265e-7};
    const double far_q[8] = {1.0,
                             5.99832206555887937690e-1,
                             1.36929880922735805310e-1,
                             1.48753612908506148525e-2,
                             7.86869131145613259100e-4,
                             1.84631831751005468180e-5,
                             1.42151175831644588870e-7,
                             2.04426310338993978564e-15};
    const double q = u - 0.5, r = 0.180625 - q * q;
    if (r >= 0) return q * ratio(centre_p, centre_q, r);
    const double t = sqrt(-logarithm(q < 0 ? u : 1 - u));
    const double tail = t <= 5 ? ratio(tail_p, tail_q, t - 1.6) : ratio(far_p, far_q, t - 5);
    return q < 0 ? -tail : tail;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    random_normal(const uint64_t* indices, double* out, int64_t size, uint64_t key) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= size) return;
    const uint64_t bits = random_bits(key, indices[i]) >> 12;
    out[i] = inverse_normal(((double)bits + 0.5) * 0x1p-52);
}
