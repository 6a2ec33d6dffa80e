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
enum Operation : uint32_t { WEIGHTED_SUM, DELTAS, TIES, SPARSE_SUM };
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

__device__ __forceinline__ float read(const void* values, uint32_t number, unsigned long long at) {
    if (number == F32) return static_cast<const float*>(values)[at];
    const uint16_t half = static_cast<const uint16_t*>(values)[at];
    if (number == BF16) return __uint_as_float(static_cast<uint32_t>(half) << 16);
    return __half2float(__ushort_as_half(half));
}

// Number i of eight.
__device__ __forceinline__ float of_bf16(const uint4& eight, int i) {
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
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

// x / by, rounded to nearest, from the rounded reciprocal (0: none is to be used). The first step gives a neighbour of the
// quotient, and from one the second gives the rounded quotient (Markstein 1990), unless numbers on the way are subnormal or
// infinite, or all bits of the divisor's mantissa are set.
__device__ __forceinline__ float divide(float x, float by, float reciprocal) {
    const float quotient = x * reciprocal;
    const float size = fabsf(x);
    if (size > 1e-30f && size < 1e30f && reciprocal != 0.0f) {
        const float near = fmaf(fmaf(-quotient, by, x), reciprocal, quotient);
        return fmaf(fmaf(-near, by, x), reciprocal, near);
    }
    return x / by;
}

__device__ __forceinline__ float sparse(const Member& member, float delta, bool kept, unsigned long long at) {
    if (!kept) delta = 0.0f;
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

// What becomes of one element.
template <uint32_t OPERATION, int K, bool ALL, bool SPARSE>
__device__ __forceinline__ float merged(const Pass& pass, float theta0, float (&values)[K], const bool (&kept)[K],
                                        unsigned long long at) {
#pragma unroll
    for (int k = 0; k < K; k++) {
        const Member& member = pass.member[k];
        if (OPERATION != WEIGHTED_SUM && (ALL || k < pass.members)) {
            values[k] = values[k] - theta0;
            if (SPARSE) values[k] = sparse(member, values[k], kept[k], at);
            if (OPERATION == TIES && !member.trim.is_below(magnitude(values[k]), at)) values[k] = 0.0f;
            if (OPERATION == SPARSE_SUM) values[k] = on_base(theta0, 1.0f, values[k]);
        }
    }
    if (OPERATION == TIES) return on_base(theta0, pass.scaling, ties<K, ALL>(pass, values));
    const float sum = weighted_sum<K, ALL>(pass, values);
    return OPERATION == DELTAS ? on_base(theta0, pass.scaling, sum) : sum;
}

// The tiles of some tensors, block by block, where all values are bfloat16 and there are just K parents.
template <uint32_t OPERATION, int K, bool SPARSE>
__device__ __forceinline__ void merge_fast(const Pass* __restrict__ passes, const uint2* __restrict__ tiles, int count) {
    for (int t = blockIdx.x; t < count; t += gridDim.x) {
        const uint2 tile = tiles[t];
        const Pass& pass = passes[tile.x];
        const unsigned long long start = static_cast<unsigned long long>(tile.y) * TILE;
        const unsigned long long end = min(start + TILE, pass.length);
        uint32_t largest = 0;
        for (unsigned long long at = start + threadIdx.x * RUN; at < end; at += blockDim.x * RUN) {
            uint4 base = {}, raw[K];
            uint8_t bits[K];
            if (OPERATION != WEIGHTED_SUM) base = static_cast<const uint4*>(pass.base)[at / RUN];
#pragma unroll
            for (int k = 0; k < K; k++) {
                const Member& member = pass.member[k];
                // A parent that adds nothing is not read.
                const bool reads = OPERATION != WEIGHTED_SUM || member.factor != 0.0f;
                raw[k] = reads ? static_cast<const uint4*>(member.values)[at / RUN] : uint4{};
                bits[k] = SPARSE && member.kept != nullptr ? member.kept[at / RUN] : 0xff;
            }
            uint32_t out[RUN];
#pragma unroll
            for (int i = 0; i < RUN; i++) {
                float values[K];
                bool kept[K];
#pragma unroll
                for (int k = 0; k < K; k++) {
                    values[k] = of_bf16(raw[k], i);
                    kept[k] = bits[k] >> i & 1;
                }
                const float value = merged<OPERATION, K, true, SPARSE>(pass, of_bf16(base, i), values, kept, at + i);
                // The largest magnitude tells whether any is not finite once it is rounded.
                const uint32_t all = __float_as_uint(value);
                largest = at + i < end ? max(largest, all & 0x7fffffff) : largest;
                out[i] = all + 0x7fff + (all >> 16 & 1);
            }
            // The upper halves of two words are one word.
            static_cast<uint4*>(pass.out)[at / RUN] =
                make_uint4(__byte_perm(out[0], out[1], 0x7632), __byte_perm(out[2], out[3], 0x7632),
                           __byte_perm(out[4], out[5], 0x7632), __byte_perm(out[6], out[7], 0x7632));
        }
        if (largest >= LEAST_INFINITE) atomicOr(pass.not_finite, 1u);
    }
}

// As above, of any types and up to MOST_MEMBERS parents: an element a thread.
template <uint32_t OPERATION>
__device__ __forceinline__ void merge_any(const Pass* __restrict__ passes, const uint2* __restrict__ tiles, int count) {
    for (int t = blockIdx.x; t < count; t += gridDim.x) {
        const uint2 tile = tiles[t];
        const Pass& pass = passes[tile.x];
        const unsigned long long start = static_cast<unsigned long long>(tile.y) * TILE;
        const unsigned long long end = min(start + TILE, pass.length);
        bool finite = true;
#pragma unroll 1
        for (unsigned long long at = start + threadIdx.x; at < end; at += blockDim.x) {
            const float theta0 = OPERATION == WEIGHTED_SUM ? 0.0f : read(pass.base, pass.base_number, at);
            float values[MOST_MEMBERS];
            bool kept[MOST_MEMBERS];
#pragma unroll
            for (int k = 0; k < MOST_MEMBERS; k++) {
                const Member& member = pass.member[k];
                const bool is_there = k < pass.members;
                const bool reads = is_there && (OPERATION != WEIGHTED_SUM || member.factor != 0.0f);
                values[k] = reads ? read(member.values, member.number, at) : 0.0f;
                kept[k] = !is_there || member.kept == nullptr || (member.kept[at / 8] >> at % 8 & 1);
            }
            const float value = merged<OPERATION, MOST_MEMBERS, false, true>(pass, theta0, values, kept, at);
            const uint32_t rounded = narrow(value, pass.out_number, finite);
            if (pass.out_number == F32) {
                static_cast<uint32_t*>(pass.out)[at] = rounded;
            } else {
                static_cast<uint16_t*>(pass.out)[at] = static_cast<uint16_t>(rounded);
            }
        }
        if (!finite) atomicOr(pass.not_finite, 1u);
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

#define POINT(NAME, MERGE)                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                \
        NAME(const Pass* __restrict__ passes, const uint2* __restrict__ tiles, int count) {          \
        MERGE(passes, tiles, count);                                                                 \
    }
#define OF_PARENTS(K)                                                         \
    POINT(weighted_sum_fast_##K, (merge_fast<WEIGHTED_SUM, K, false>))        \
    POINT(deltas_fast_##K, (merge_fast<DELTAS, K, false>))                    \
    POINT(deltas_fast_sparse_##K, (merge_fast<DELTAS, K, true>))              \
    POINT(ties_fast_##K, (merge_fast<TIES, K, false>))                        \
    POINT(ties_fast_sparse_##K, (merge_fast<TIES, K, true>))

OF_PARENTS(2)
OF_PARENTS(3)
POINT(weighted_sum, merge_any<WEIGHTED_SUM>)
POINT(deltas, merge_any<DELTAS>)
POINT(ties, merge_any<TIES>)
POINT(sparse_sum, merge_any<SPARSE_SUM>)

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
