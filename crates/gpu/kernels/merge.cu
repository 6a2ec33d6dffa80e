// The pass that merges, one launch for all tensors of one kind: read the parents, widen to f32, combine, round once, write. The arithmetic is
// that of crates/merge/src/kernel, operation by operation, in the order of the parents, so that the bytes are the same.
// Compiled with --fmad=false: no product is fused with a sum.

#include <cuda_fp16.h>
#include <stdint.h>

namespace {

constexpr int MOST_MEMBERS = 8;
// Elements of one thread: 16 bytes of a 16-bit type.
constexpr int RUN = 8;
// Elements of one block.
constexpr int TILE = 8192;
// The least bits of an f32 that round to an infinite bfloat16.
constexpr uint32_t LEAST_INFINITE = 0x7f7f8000;

enum Number : uint32_t { BF16, F16, F32 };
enum Operation : uint32_t { WEIGHTED_SUM, DELTAS, TIES, SPARSE_SUM, BASE };
enum Survivors : uint32_t { KEEP, DIVIDE, MULTIPLY };
enum Mean : uint32_t { SUM, MEAN, MIXUP };

// An edge among magnitudes: larger ones than `bits` lie above it (-1: all do), and where it divides equal ones, of those that
// have just its bits the elements with an index below `index`.
struct Edge {
    unsigned long long index;
    int bits;
    uint32_t divides;

    __device__ bool is_below(uint32_t magnitude, unsigned long long at) const {
        const int size = static_cast<int>(magnitude);
        return size > bits || (divides && size == bits && at < index);
    }
};

struct Member {
    const void* values;
    // Bit i: whether a random sparsifier keeps element i. Null: it keeps all.
    const uint8_t* kept;
    Edge low, high, trim;
    uint32_t number;
    uint32_t between;
    uint32_t survivors;
    float by;
    // What the value is multiplied by before an election, what after it (or in the sum), and its share of the divisor.
    float before, factor, share;
    // 1 / by, rounded to nearest.
    float reciprocal;
};

struct Pass {
    unsigned long long length;
    const void* base;
    void* out;
    uint32_t* not_finite;
    uint32_t base_number, out_number, members, mean;
    float divisor, scaling, majority;
    uint32_t unused;
    Member member[MOST_MEMBERS];
};

struct Raw {
    uint32_t words[RUN];
};

__device__ __forceinline__ Raw read(const void* values, uint32_t number, unsigned long long at) {
    Raw raw;
    const uint4* from = static_cast<const uint4*>(values);
    if (number == F32) {
        const uint4 low = from[at / 4], high = from[at / 4 + 1];
        raw = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    } else {
        const uint4 all = from[at / 8];
        raw = {all.x, all.y, all.z, all.w, 0, 0, 0, 0};
    }
    return raw;
}

__device__ __forceinline__ float widen(const Raw& raw, uint32_t number, int i) {
    if (number == F32) return __uint_as_float(raw.words[i]);
    const uint32_t half = i % 2 ? raw.words[i / 2] >> 16 : raw.words[i / 2] & 0xffff;
    if (number == BF16) return __uint_as_float(half << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
}

// To nearest even; the bits of a 16-bit type lie below.
__device__ __forceinline__ uint32_t narrow(float value, uint32_t number, bool& finite) {
    const uint32_t bits = __float_as_uint(value);
    if (number == F32) {
        finite &= (bits & 0x7f800000) != 0x7f800000;
        return bits;
    }
    if (number == BF16) {
        const bool is_number = (bits & 0x7fffffff) <= 0x7f800000;
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        finite &= is_number && (rounded & 0x7f80) != 0x7f80;
        return rounded;
    }
    const uint32_t rounded = __half_as_ushort(__float2half_rn(value));
    finite &= (rounded & 0x7c00) != 0x7c00;
    return rounded;
}

__device__ __forceinline__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffff; }

// The base plus a change; where there is none the base's value stays as it is, sign of zero included.
__device__ __forceinline__ float on_base(float base, float scaling, float change) {
    return change == 0.0f ? base : base + scaling * change;
}

// x / by, rounded to nearest, from the rounded reciprocal: Markstein's correction is exact for a divisor around 1 unless
// numbers become subnormal or overflow on the way.
__device__ __forceinline__ float divide(float x, float by, float reciprocal) {
    const float quotient = x * reciprocal;
    const float size = fabsf(x);
    if (size > 1e-30f && size < 1e30f && by > 1e-4f && by < 1e4f) {
        return fmaf(fmaf(-quotient, by, x), reciprocal, quotient);
    }
    return x / by;
}

__device__ __forceinline__ float sparse(const Member& member, float delta, uint8_t kept, int i, unsigned long long at) {
    if (!(kept >> i & 1)) delta = 0.0f;
    if (member.between) {
        const uint32_t size = magnitude(delta);
        if (!member.low.is_below(size, at) || member.high.is_below(size, at)) delta = 0.0f;
    }
    if (member.survivors == DIVIDE) return divide(delta, member.by, member.reciprocal);
    if (member.survivors == MULTIPLY) return delta * member.by;
    return delta;
}

// The sum of `factor * value` over the members whose factor is not 0, in order.
template <int K, bool ALL>
__device__ __forceinline__ float weighted_sum(const Pass& pass, const float (&values)[K]) {
    float sum = 0.0f;
    bool first = true;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const float factor = pass.member[k].factor;
        if ((ALL || k < pass.members) && factor != 0.0f) {
            sum = first ? factor * values[k] : sum + factor * values[k];
            first = false;
        }
    }
    return pass.divisor == 1.0f ? sum : sum / pass.divisor;
}

template <int K, bool ALL>
__device__ __forceinline__ float ties(const Pass& pass, float (&deltas)[K]) {
    float vote = 0.0f;
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (ALL || k < pass.members) {
            deltas[k] = pass.member[k].before * deltas[k];
            vote += deltas[k];
        }
    }
    const float elected = vote > 0.0f ? 1.0f : vote < 0.0f ? -1.0f : pass.majority;
    float sum = 0.0f, total = 0.0f, only = 0.0f;
    int count = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const float delta = deltas[k];
        if ((ALL || k < pass.members) && ((delta > 0.0f && elected > 0.0f) || (delta < 0.0f && elected < 0.0f))) {
            sum += pass.member[k].factor * delta;
            total += pass.member[k].share;
            only = delta;
            count++;
        }
    }
    if (pass.mean == MIXUP && count == 1) return only;
    // With two parents the shares of a mixup are lambda and 1 - lambda: nothing is divided.
    const bool divides = pass.mean == MEAN || (pass.mean == MIXUP && pass.members != 2);
    return divides && total != 0.0f ? sum / total : sum;
}

// The tiles of some tensors, block by block. With FAST all values are bfloat16, and there are just K parents.
template <uint32_t OPERATION, int K, bool FAST, bool SPARSE>
__device__ __forceinline__ void merge(const Pass* __restrict__ passes, const uint2* __restrict__ tiles, int count) {
    for (int t = blockIdx.x; t < count; t += gridDim.x) {
        const uint2 tile = tiles[t];
        const Pass& pass = passes[tile.x];
        const unsigned long long start = static_cast<unsigned long long>(tile.y) * TILE;
        const unsigned long long end = min(start + TILE, pass.length);
        const uint32_t base_number = FAST ? BF16 : pass.base_number, out_number = FAST ? BF16 : pass.out_number;
        bool finite = true;
        uint32_t largest = 0;
        for (unsigned long long at = start + threadIdx.x * RUN; at < end; at += blockDim.x * RUN) {
            Raw base = {}, raw[K];
            uint8_t kept[K];
            if (OPERATION != WEIGHTED_SUM) base = read(pass.base, base_number, at);
#pragma unroll
            for (int k = 0; k < K; k++) {
                const Member& member = pass.member[k];
                const uint32_t number = FAST ? BF16 : member.number;
                // A parent that adds nothing is not read.
                const bool is_there = FAST || k < pass.members;
                const bool reads = is_there && (OPERATION != WEIGHTED_SUM || member.factor != 0.0f);
                raw[k] = reads ? read(member.values, number, at) : Raw{};
                kept[k] = SPARSE && is_there && member.kept != nullptr ? member.kept[at / 8] : 0xff;
            }
            uint32_t out[RUN];
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                const float theta0 = OPERATION == WEIGHTED_SUM ? 0.0f : widen(base, base_number, i);
                float values[K];
#pragma unroll
                for (int k = 0; k < K; k++) {
                    const Member& member = pass.member[k];
                    values[k] = widen(raw[k], FAST ? BF16 : member.number, i);
                    if (OPERATION != WEIGHTED_SUM && (FAST || k < pass.members)) {
                        values[k] = values[k] - theta0;
                        if (SPARSE) values[k] = sparse(member, values[k], kept[k], i, at + i);
                        if (OPERATION == TIES && !member.trim.is_below(magnitude(values[k]), at + i)) values[k] = 0.0f;
                        if (OPERATION == SPARSE_SUM) values[k] = on_base(theta0, 1.0f, values[k]);
                    }
                }
                float merged;
                if (OPERATION == TIES) {
                    merged = on_base(theta0, pass.scaling, ties<K, FAST>(pass, values));
                } else {
                    merged = weighted_sum<K, FAST>(pass, values);
                    if (OPERATION == DELTAS) merged = on_base(theta0, pass.scaling, merged);
                }
                if (FAST) {
                    // The largest magnitude tells whether any is not finite once it is rounded.
                    const uint32_t bits = __float_as_uint(merged);
                    largest = at + i < end ? max(largest, bits & 0x7fffffff) : largest;
                    out[i] = bits + 0x7fff + (bits >> 16 & 1);
                } else {
                    bool good = true;
                    out[i] = narrow(merged, out_number, good);
                    finite &= good || at + i >= end;
                }
            }
            uint4* to = static_cast<uint4*>(pass.out);
            if (FAST) {
                // The upper halves of two words are one word.
                to[at / 8] = make_uint4(__byte_perm(out[0], out[1], 0x7632), __byte_perm(out[2], out[3], 0x7632),
                                        __byte_perm(out[4], out[5], 0x7632), __byte_perm(out[6], out[7], 0x7632));
            } else if (out_number == F32) {
                to[at / 4] = make_uint4(out[0], out[1], out[2], out[3]);
                to[at / 4 + 1] = make_uint4(out[4], out[5], out[6], out[7]);
            } else {
                to[at / 8] = make_uint4(out[0] | out[1] << 16, out[2] | out[3] << 16, out[4] | out[5] << 16,
                                        out[6] | out[7] << 16);
            }
        }
        if (!finite || largest >= LEAST_INFINITE) atomicOr(pass.not_finite, 1u);
    }
}

// Ten rounds of Philox4x32, one counter.
__device__ __forceinline__ uint4 philox(unsigned long long counter, uint32_t key0, uint32_t key1) {
    uint4 c = make_uint4(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
        c = make_uint4(high1 ^ c.y ^ key0, low1, high0 ^ c.w ^ key1, low0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

}  // namespace

#define POINT(NAME, OPERATION, K, FAST, SPARSE)                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                 \
        NAME(const Pass* __restrict__ passes, const uint2* __restrict__ tiles, int count) {           \
        merge<OPERATION, K, FAST, SPARSE>(passes, tiles, count);                                      \
    }
#define OF_PARENTS(K)                                        \
    POINT(weighted_sum_fast_##K, WEIGHTED_SUM, K, true, false) \
    POINT(deltas_fast_##K, DELTAS, K, true, false)             \
    POINT(deltas_fast_sparse_##K, DELTAS, K, true, true)       \
    POINT(ties_fast_##K, TIES, K, true, false)                 \
    POINT(ties_fast_sparse_##K, TIES, K, true, true)

OF_PARENTS(2)
OF_PARENTS(3)
POINT(weighted_sum, WEIGHTED_SUM, MOST_MEMBERS, false, false)
POINT(deltas, DELTAS, MOST_MEMBERS, false, true)
POINT(ties, TIES, MOST_MEMBERS, false, true)
POINT(sparse_sum, SPARSE_SUM, MOST_MEMBERS, false, true)

// Which of `length` elements stay: bit i is set where word i of the tensor's mask is not below the threshold. One word of
// bits a thread.
extern "C" __global__ void __launch_bounds__(256)
    keep_bits(uint32_t* bits, unsigned long long length, uint32_t key0, uint32_t key1, uint32_t threshold) {
    const unsigned long long word = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (word * 32 >= length) return;
    uint32_t kept = 0;
#pragma unroll
    for (int block = 0; block < 8; block++) {
        const uint4 words = philox(word * 8 + block, key0, key1);
        kept |= (words.x >= threshold ? 1u : 0u) << (block * 4);
        kept |= (words.y >= threshold ? 1u : 0u) << (block * 4 + 1);
        kept |= (words.z >= threshold ? 1u : 0u) << (block * 4 + 2);
        kept |= (words.w >= threshold ? 1u : 0u) << (block * 4 + 3);
    }
    bits[word] = kept;
}
