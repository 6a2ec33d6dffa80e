// As cuda.h.

#pragma once

#include "cuda.h"

struct half {
    uint16_t bits;
};

static inline half __ushort_as_half(uint16_t bits) { return half{bits}; }
static inline uint16_t __half_as_ushort(half value) { return value.bits; }

static inline float __half2float(half value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Subnormal ones too: 2^-24 is the unit of all.
    const float unit = magnitude < 0x400 ? magnitude * 0x1p-24f : __uint_as_float((magnitude << 13) + 0x38000000);
    return __uint_as_float(sign | __float_as_uint(unit));
}

static inline half __float2half_rn(float value) {
    const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return half{0x7fff};
    if (magnitude >= 0x477ff000) return half{static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000) {
        // The sum rounds to multiples of 2^-24.
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return half{static_cast<uint16_t>(sign | (__float_as_uint(shifted) - __float_as_uint(0.5f)))};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000;
    return half{static_cast<uint16_t>(sign | rounded >> 13)};
}

struct __half2 {
    half x, y;
};

static inline __half2 __floats2half2_rn(float x, float y) { return __half2{__float2half_rn(x), __float2half_rn(y)}; }
