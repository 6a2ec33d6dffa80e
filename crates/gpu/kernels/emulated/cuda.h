// What the kernels of merge.cu and draw.cu use of CUDA, on a CPU: their arithmetic can be tested where there is no GPU (feature
// `emulated`). Threads that wait for each other are threads of the CPU, one block after the other; all others run one after
// the other. Nothing here is fast.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(threads)
// One block runs at a time.
#define __shared__ static

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
inline thread_local Place blockIdx, threadIdx, blockDim, gridDim;

extern "C" inline __attribute__((used)) void emulated_place(uint32_t block, uint32_t thread, uint32_t blocks, uint32_t threads) {
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

// Waits for all threads of the block (src/emulated.rs).
extern "C" void emulated_wait();
static inline void __syncthreads() { emulated_wait(); }

static inline int atomicAdd(int* at, int by) { return __atomic_fetch_add(at, by, __ATOMIC_RELAXED); }
static inline void atomicMax(uint32_t* at, uint32_t value) {
    uint32_t there = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (there < value && !__atomic_compare_exchange_n(at, &there, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}
static inline void atomicOr(uint32_t* at, uint32_t bits) { __atomic_fetch_or(at, bits, __ATOMIC_RELAXED); }
