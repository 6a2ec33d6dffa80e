// What the kernels of merge.cu use of CUDA, on a CPU, one thread of a grid after the other: their arithmetic can be tested
// where there is no GPU (feature `emulated`). Nothing here is fast.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(threads)

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct Place {
    uint32_t x;
};

// Of the thread that runs.
static thread_local Place blockIdx, threadIdx, blockDim, gridDim;

extern "C" void emulated_place(uint32_t block, uint32_t thread, uint32_t blocks, uint32_t threads) {
    blockIdx.x = block;
    threadIdx.x = thread;
    gridDim.x = blocks;
    blockDim.x = threads;
}

static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return uint4{x, y, z, w}; }

template <typename To, typename From>
static inline To bits_of(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

static inline float __uint_as_float(uint32_t bits) { return bits_of<float>(bits); }
static inline uint32_t __float_as_uint(float value) { return bits_of<uint32_t>(value); }

static inline uint32_t __umulhi(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

// Of the eight bytes of `high:low` those that the four lowest digits of `selector` name.
static inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t all = static_cast<uint64_t>(high) << 32 | low;
    uint32_t found = 0;
    for (int i = 0; i < 4; i++) {
        found |= static_cast<uint32_t>(all >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return found;
}

template <typename T>
static inline T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
static inline T max(T a, T b) {
    return a < b ? b : a;
}

// Of the two halves of words the larger.
static inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
    return max(a & 0xffff0000, b & 0xffff0000) | max(a & 0xffff, b & 0xffff);
}

template <typename T>
static inline T __ldg(const T* at) {
    return *at;
}

static inline void atomicOr(uint32_t* at, uint32_t bits) { __atomic_fetch_or(at, bits, __ATOMIC_RELAXED); }

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
