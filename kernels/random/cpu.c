/* Addressed random numbers (reference.py), the same bits on every machine: exactly rounded
   operations in one order. exact.c, which includes this file, disables contraction to fused
   multiply-adds. */

static uint64_t finalise(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static uint64_t random_word(uint64_t key, uint64_t index) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
    return finalise(finalise(index * golden + key) + golden);
}

/* Return the natural logarithm of a positive normal x. */
static double exact_log(double x) {
    int exponent;
    double mantissa = frexp(x, &exponent);
    if (mantissa < 0.70710678118654752) {
        mantissa *= 2;
        exponent -= 1;
    }
    const double s = (mantissa - 1) / (mantissa + 1), z = s * s;
    double series = 1.0 / 21;
    for (int odd = 19; odd > 0; odd -= 2) series = series * z + 1.0 / odd;
    return 2 * s * series + exponent * 0.69314718055994531;
}

/* Numerator and denominator of degree 7, from the constant term up (Wichura 1988, AS 241). */
typedef struct {
    double top[8], bottom[8];
} Rational;

static const Rational CENTRE = {
    {3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
     1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
     3.3430575583588128105e4, 2.5090809287301226727e3},
    {1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
     5.2264952788528545610e3},
};
static const Rational TAIL = {
    {1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
     3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
     2.27238449892691845833e-2, 7.74545014278341407640e-4},
    {1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
     1.05075007164441684324e-9},
};
static const Rational FAR = {
    {6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
     2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
     2.71155556874348757815e-5, 2.01033439929228813265e-7},
    {1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
     2.04426310338993978564e-15},
};

static double ratio(const Rational *f, double r) {
    double top = f->top[7] * r, bottom = f->bottom[7] * r;
    for (int i = 6; i > 0; i--) {
        top = (top + f->top[i]) * r;
        bottom = (bottom + f->bottom[i]) * r;
    }
    return (top + f->top[0]) / (bottom + f->bottom[0]);
}

static double inverse_normal(double u) {
    const double q = u - 0.5, r = 0.180625 - q * q;
    if (!(r < 0)) return q * ratio(&CENTRE, r);
    const double t = sqrt(-exact_log(q < 0 ? u : 1 - u));
    const double tail = t <= 5 ? ratio(&TAIL, t - 1.6) : ratio(&FAR, t - 5);
    return q < 0 ? -tail : tail;
}

typedef struct {
    const uint64_t *indices;
    double *out;
    int64_t size;
    uint64_t key;
} RandomNormal;

static void random_normal_range(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const RandomNormal *a = state;
    for (int64_t i = start; i < stop; i++) {
        const double u = ((double)(random_word(a->key, a->indices[i]) >> 12) + 0.5) * 0x1p-52;
        a->out[i] = inverse_normal(u);
    }
}

static void random_normal(Pool *pool, const Argument *arguments) {
    UNPACK(RandomNormal, a, arguments);
    pool_run(pool, random_normal_range, &a, a.size, 1 << 12);
}
