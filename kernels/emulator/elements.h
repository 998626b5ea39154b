// The 16-bit element types, as bits, and their conversions: round to nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31,
                   fraction = x.bits & 0x3ffu;
    if (exponent == 31)
        return float_from_bits(sign | 0x7f800000u | fraction << 13);  // infinities and NaNs
    if (exponent == 0) {  // zero and subnormal numbers: fraction * 2^-24
        const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
        return sign ? -magnitude : magnitude;
    }
    return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

inline bfloat16 bfloat16_from(float x) {
    const uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float16 float16_from(float x) {
    const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return {0x7fff};
    // 65520 and more round to infinity.
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
    // Below 2^-14, adding 0.5 rounds the number to units of 2^-24 and leaves it in the low bits.
    if (magnitude < 0x38800000u) {
        const uint32_t sum = bits_of_float(float_from_bits(magnitude) + 0.5f);
        return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}
