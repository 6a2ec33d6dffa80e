// The pass that merges, one launch for all tensors of one kind: read the parents, widen to f32, combine, round once, write. The arithmetic is
// that of crates/merge/src/kernel, operation by operation, in the order of the parents, so that the bytes are the same.
// Compiled with --fmad=false: no product is fused with a sum.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace {

constexpr int MOST_MEMBERS = 8;
// Elements of one thread: 16 bytes of a 16-bit type.
constexpr int RUN = 8;
// Elements of one block.
constexpr int TILE = 8192;

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
    // 1 / by, rounded to nearest; 0 where it is not to be used.
    float reciprocal;
    // The values are deltas, and what a sparsifier does is done.
    uint32_t formed;
    uint32_t unused;
};

struct Pass {
    unsigned long long length;
    const void* base;
    void* out;
    uint32_t* not_finite;
    uint32_t base_number, out_number, members, mean;
    float divisor, scaling, majority;
    // Of the divisor, as a member's.
    float reciprocal;
    Member member[MOST_MEMBERS];
};

__device__ __forceinline__ float read(const void* values, uint32_t number, unsigned long long at) {
    if (number == F32) return static_cast<const float*>(values)[at];
    const uint16_t half = static_cast<const uint16_t*>(values)[at];
    if (number == BF16) return __uint_as_float(static_cast<uint32_t>(half) << 16);
    return __half2float(__ushort_as_half(half));
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

__device__ __forceinline__ float sparse(const Member& member, float delta, bool kept, unsigned long long at) {
    if (!kept) delta = 0.0f;
    if (member.between) {
        const uint32_t size = magnitude(delta);
        if (!member.low.is_below(size, at) || member.high.is_below(size, at)) delta = 0.0f;
    }
    if (member.survivors == DIVIDE) return delta / member.by;
    if (member.survivors == MULTIPLY) return delta * member.by;
    return delta;
}

// The sum of `factor * value` over the members whose factor is not 0, in order.
__device__ __forceinline__ float weighted_sum(const Pass& pass, const float (&values)[MOST_MEMBERS]) {
    float sum = 0.0f;
    bool first = true;
#pragma unroll
    for (int k = 0; k < MOST_MEMBERS; k++) {
        const float factor = pass.member[k].factor;
        if (k < pass.members && factor != 0.0f) {
            sum = first ? factor * values[k] : sum + factor * values[k];
            first = false;
        }
    }
    return pass.divisor == 1.0f ? sum : sum / pass.divisor;
}

__device__ __forceinline__ float ties(const Pass& pass, float (&deltas)[MOST_MEMBERS]) {
    float vote = 0.0f;
#pragma unroll
    for (int k = 0; k < MOST_MEMBERS; k++) {
        if (k < pass.members) {
            deltas[k] = pass.member[k].before * deltas[k];
            vote += deltas[k];
        }
    }
    const float elected = vote > 0.0f ? 1.0f : vote < 0.0f ? -1.0f : pass.majority;
    float sum = 0.0f, total = 0.0f, only = 0.0f;
    int count = 0;
#pragma unroll
    for (int k = 0; k < MOST_MEMBERS; k++) {
        const float delta = deltas[k];
        if (k < pass.members && ((delta > 0.0f && elected > 0.0f) || (delta < 0.0f && elected < 0.0f))) {
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
template <uint32_t OPERATION>
__device__ __forceinline__ float merged(const Pass& pass, float theta0, float (&values)[MOST_MEMBERS],
                                        const bool (&kept)[MOST_MEMBERS], unsigned long long at) {
#pragma unroll
    for (int k = 0; k < MOST_MEMBERS; k++) {
        const Member& member = pass.member[k];
        if (OPERATION != WEIGHTED_SUM && k < pass.members) {
            if (!member.formed) values[k] = values[k] - theta0;
            values[k] = sparse(member, values[k], kept[k], at);
            if (OPERATION == TIES && !member.trim.is_below(magnitude(values[k]), at)) values[k] = 0.0f;
            if (OPERATION == SPARSE_SUM) values[k] = on_base(theta0, 1.0f, values[k]);
        }
    }
    if (OPERATION == TIES) return on_base(theta0, pass.scaling, ties(pass, values));
    const float sum = weighted_sum(pass, values);
    return OPERATION == DELTAS ? on_base(theta0, pass.scaling, sum) : sum;
}

// One element of a tensor of any types.
template <uint32_t OPERATION>
__device__ __forceinline__ void merge_element(const Pass& pass, unsigned long long at, bool& finite) {
    const float theta0 = OPERATION == WEIGHTED_SUM ? 0.0f : read(pass.base, pass.base_number, at);
    float values[MOST_MEMBERS];
    bool kept[MOST_MEMBERS];
#pragma unroll
    for (int k = 0; k < MOST_MEMBERS; k++) {
        const Member& member = pass.member[k];
        const bool is_there = k < pass.members;
        // A parent that adds nothing is not read.
        const bool reads = is_there && (OPERATION != WEIGHTED_SUM || member.factor != 0.0f);
        values[k] = reads ? read(member.values, member.number, at) : 0.0f;
        kept[k] = !is_there || member.kept == nullptr || (member.kept[at / 8] >> at % 8 & 1);
    }
    const uint32_t rounded = narrow(merged<OPERATION>(pass, theta0, values, kept, at), pass.out_number, finite);
    if (pass.out_number == F32) {
        static_cast<uint32_t*>(pass.out)[at] = rounded;
    } else {
        static_cast<uint16_t*>(pass.out)[at] = static_cast<uint16_t>(rounded);
    }
}

// Up to MOST_MEMBERS parents: an element a thread.
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
            merge_element<OPERATION>(pass, at, finite);
        }
        if (!finite) atomicOr(pass.not_finite, 1u);
    }
}

// The few runs that a loop over runs does not take.
template <uint32_t OPERATION>
__device__ __noinline__ void merge_run(const Pass& pass, unsigned long long at) {
    const unsigned long long end = min(at + RUN, pass.length);
    bool finite = true;
#pragma unroll 1
    for (; at < end; at++) merge_element<OPERATION>(pass, at, finite);
    if (!finite) atomicOr(pass.not_finite, 1u);
}

// The elements of a run, as they lie.
struct Run {
    uint4 first, second;
};

__device__ __forceinline__ const uint8_t* element(const void* values, uint32_t number, unsigned long long at) {
    return static_cast<const uint8_t*>(values) + (at << (number == F32 ? 2 : 1));
}

__device__ __forceinline__ Run load(const uint8_t* values, uint32_t number, uint32_t at) {
    const uint4* from = reinterpret_cast<const uint4*>(values + (at << (number == F32 ? 2 : 1)));
    return {__ldg(from), number == F32 ? __ldg(from + 1) : uint4{}};
}

__device__ __forceinline__ void widen(const Run& run, uint32_t number, float (&values)[RUN]) {
    const uint32_t words[RUN] = {run.first.x,  run.first.y,  run.first.z,  run.first.w,
                                 run.second.x, run.second.y, run.second.z, run.second.w};
    if (number == BF16) {
#pragma unroll
        for (int i = 0; i < RUN; i++) values[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
    } else if (number == F16) {
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            values[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2])));
        }
    } else {
#pragma unroll
        for (int i = 0; i < RUN; i++) values[i] = __uint_as_float(words[i]);
    }
}

// What was written, to see whether all of it is finite: largest magnitudes.
struct Largest {
    uint32_t bits = 0;

    __device__ void note_pair(uint32_t pair) { bits = __vmaxu2(bits, pair & 0x7fff7fff); }
    __device__ void note(float value) { bits = max(bits, magnitude(value)); }
    __device__ bool is_finite(uint32_t number) const {
        if (number == F32) return bits < 0x7f800000;
        const uint32_t least = number == BF16 ? 0x7f80 : 0x7c00;
        return (bits & 0xffff) < least && bits >> 16 < least;
    }
};

__device__ __forceinline__ void store(const float (&values)[RUN], uint32_t number, uint8_t* out, uint32_t at, Largest& largest) {
    uint4* to = reinterpret_cast<uint4*>(out + (at << (number == F32 ? 2 : 1)));
    uint32_t words[RUN];
    if (number == F32) {
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            words[i] = __float_as_uint(values[i]);
            largest.note(values[i]);
        }
        to[1] = make_uint4(words[4], words[5], words[6], words[7]);
    } else if (number == BF16) {
#pragma unroll
        for (int i = 0; i < RUN / 2; i++) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
            memcpy(&words[i], &pair, sizeof pair);
            largest.note_pair(words[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < RUN / 2; i++) {
            const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
            memcpy(&words[i], &pair, sizeof pair);
            largest.note_pair(words[i]);
        }
    }
    to[0] = make_uint4(words[0], words[1], words[2], words[3]);
}

// An edge as one block meets it. Before element `index` of its tile magnitudes above `before` lie above the edge, from it on
// those above `after`.
struct Cut {
    int index;
    float before, after;

    __device__ __forceinline__ static Cut of(const Edge& edge, unsigned long long start) {
        const unsigned long long index = edge.divides && edge.index > start ? edge.index - start : 0;
        const auto limit = [](int bits) { return bits < 0 ? -1.0f : __uint_as_float(static_cast<uint32_t>(bits)); };
        return {static_cast<int>(min(index, static_cast<unsigned long long>(TILE))), limit(edge.bits - 1), limit(edge.bits)};
    }

    __device__ __forceinline__ bool divides(int at) const { return at < index && index < at + RUN; }
    __device__ __forceinline__ float limit(int at) const { return at < index ? before : after; }
};

// x / by, rounded to nearest, of a run, from the rounded reciprocal: the first step gives a neighbour of the quotient, and from
// one the second gives the rounded quotient (Markstein 1990), unless numbers on the way are subnormal or infinite, or all bits of
// the divisor's mantissa are set. False where other magnitudes than 0 and 1e-30 to 1e30 were among them: then the values are of
// no use. Zeros may come out with the other sign.
__device__ __forceinline__ bool divide_run(float by, float reciprocal, float (&values)[RUN]) {
    if (reciprocal == 0.0f) {
#pragma unroll
        for (int i = 0; i < RUN; i++) values[i] = values[i] == 0.0f ? 0.0f : values[i] / by;
        return true;
    }
    uint32_t least = 0xffffffff, most = 0;
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        const uint32_t size = magnitude(values[i]);
        // 0 becomes the largest number.
        least = min(least, size - 1);
        most = max(most, size);
        const float quotient = values[i] * reciprocal;
        const float near = fmaf(fmaf(-quotient, by, values[i]), reciprocal, quotient);
        values[i] = fmaf(fmaf(-near, by, values[i]), reciprocal, near);
    }
    return least >= 0x0da24260 && most < 0x7149f2ca;
}

// What a sparsifier leaves of the deltas of a run; as `divide_run`.
__device__ __forceinline__ bool sparse_run(const Member& member, const Cut& low, const Cut& high, uint32_t bits, int at,
                                           float (&deltas)[RUN]) {
    const uint32_t survivors = member.survivors;
    const bool between = member.between;
    const float least = low.limit(at), most = high.limit(at);
    uint32_t stays = bits;
    if (between) {
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            if (!(fabsf(deltas[i]) > least) || fabsf(deltas[i]) > most) stays &= ~(1u << i);
        }
    }
    bool good = true;
    if (survivors == DIVIDE) {
        good = divide_run(member.by, member.reciprocal, deltas);
    } else if (survivors == MULTIPLY) {
        const float by = member.by;
#pragma unroll
        for (int i = 0; i < RUN; i++) deltas[i] = deltas[i] * by;
    }
#pragma unroll
    for (int i = 0; i < RUN; i++) deltas[i] = stays >> i & 1 ? deltas[i] : 0.0f;
    return good;
}

// What TIES makes of trimmed deltas.
template <uint32_t MEANING, int K>
__device__ __forceinline__ float ties_of(const float (&deltas)[K], const float (&factor)[K], const float (&share)[K],
                                         float majority) {
    float vote = deltas[0];
#pragma unroll
    for (int k = 1; k < K; k++) vote += deltas[k];
    const float sign = __uint_as_float((__float_as_uint(vote) & 0x80000000) | 0x3f800000);
    const float elected = fabsf(vote) > 0.0f ? sign : majority;
    bool agrees[K];
#pragma unroll
    for (int k = 0; k < K; k++) agrees[k] = deltas[k] * elected > 0.0f;
    if (MEANING == MIXUP && K == 2) {
        const float both = factor[0] * deltas[0] + factor[1] * deltas[1];
        const float one = agrees[0] ? deltas[0] : agrees[1] ? deltas[1] : 0.0f;
        return agrees[0] && agrees[1] ? both : one;
    }
    float sum = 0.0f, total = 0.0f, only = 0.0f;
    int count = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        sum = agrees[k] ? sum + factor[k] * deltas[k] : sum;
        total = agrees[k] ? total + share[k] : total;
        only = agrees[k] ? deltas[k] : only;
        count += agrees[k];
    }
    if (MEANING == SUM) return sum;
    const float mean = total != 0.0f && sum != 0.0f ? sum / total : sum;
    return MEANING == MIXUP && count == 1 ? only : mean;
}

// The tiles of some tensors of just K parents, block by block: a run a thread.
template <uint32_t OPERATION, uint32_t MEANING, int K, bool SPARSE>
__device__ __forceinline__ void merge_fast(const Pass* __restrict__ passes, const uint2* __restrict__ tiles, int count) {
    for (int t = blockIdx.x; t < count; t += gridDim.x) {
        const uint2 tile = tiles[t];
        const Pass& pass = passes[tile.x];
        const unsigned long long start = static_cast<unsigned long long>(tile.y) * TILE;
        const int length = static_cast<int>(min(static_cast<unsigned long long>(TILE), pass.length - start));
        // What does not change from run to run.
        const uint32_t base_number = pass.base_number, out_number = pass.out_number;
        const float scaling = pass.scaling, majority = pass.majority, divisor = pass.divisor;
        const uint8_t* base = element(pass.base, base_number, start);
        uint8_t* out = const_cast<uint8_t*>(element(pass.out, out_number, start));
        const uint8_t* parents[K];
        uint32_t numbers[K];
        float factor[K], share[K], before[K];
        bool is_formed[K];
        Cut trim[K], low[K], high[K];
        bool adds = false;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const Member& member = pass.member[k];
            numbers[k] = member.number;
            parents[k] = element(member.values, member.number, start);
            factor[k] = member.factor;
            share[k] = member.share;
            before[k] = member.before;
            is_formed[k] = member.formed;
            adds |= member.factor != 0.0f;
            trim[k] = Cut::of(member.trim, start);
            low[k] = Cut::of(member.low, start);
            high[k] = Cut::of(member.high, start);
        }
        Largest largest;
        for (int at = threadIdx.x * RUN; at < length; at += blockDim.x * RUN) {
            bool whole = at + RUN <= length;
#pragma unroll
            for (int k = 0; k < K; k++) {
                if (OPERATION == TIES) whole &= !trim[k].divides(at);
                if (SPARSE) whole &= !low[k].divides(at) && !high[k].divides(at);
            }
            if (!whole) {
                merge_run<OPERATION>(pass, start + at);
                continue;
            }
            Run base_run = {}, runs[K];
            uint32_t bits[K];
            if (OPERATION != WEIGHTED_SUM) base_run = load(base, base_number, at);
#pragma unroll
            for (int k = 0; k < K; k++) {
                // A parent that adds nothing is not read.
                const bool reads = OPERATION != WEIGHTED_SUM || factor[k] != 0.0f;
                runs[k] = reads ? load(parents[k], numbers[k], at) : Run{};
                const uint8_t* kept = SPARSE ? pass.member[k].kept : nullptr;
                bits[k] = kept == nullptr ? 0xff : __ldg(kept + (start + at) / RUN);
            }
            float theta0[RUN], values[K][RUN];
            if (OPERATION != WEIGHTED_SUM) widen(base_run, base_number, theta0);
            bool good = true;
#pragma unroll
            for (int k = 0; k < K; k++) {
                widen(runs[k], numbers[k], values[k]);
                if (OPERATION == WEIGHTED_SUM) continue;
                if (!is_formed[k]) {
#pragma unroll
                    for (int i = 0; i < RUN; i++) values[k][i] = values[k][i] - theta0[i];
                }
                if (SPARSE) good &= sparse_run(pass.member[k], low[k], high[k], bits[k], at, values[k]);
                if (OPERATION == TIES) {
                    const float limit = trim[k].limit(at);
#pragma unroll
                    for (int i = 0; i < RUN; i++) values[k][i] = fabsf(values[k][i]) > limit ? before[k] * values[k][i] : 0.0f;
                }
            }
            float results[RUN];
            if (OPERATION == TIES) {
#pragma unroll
                for (int i = 0; i < RUN; i++) {
                    float deltas[K];
#pragma unroll
                    for (int k = 0; k < K; k++) deltas[k] = values[k][i];
                    results[i] = ties_of<MEANING, K>(deltas, factor, share, majority);
                }
            } else {
                // With -0 the first summand stays as it is.
#pragma unroll
                for (int i = 0; i < RUN; i++) results[i] = adds ? -0.0f : 0.0f;
#pragma unroll
                for (int k = 0; k < K; k++) {
                    if (factor[k] == 0.0f) continue;
#pragma unroll
                    for (int i = 0; i < RUN; i++) results[i] = results[i] + factor[k] * values[k][i];
                }
                if (divisor != 1.0f) {
                    float quotients[RUN];
#pragma unroll
                    for (int i = 0; i < RUN; i++) quotients[i] = results[i];
                    good &= divide_run(divisor, pass.reciprocal, quotients);
#pragma unroll
                    for (int i = 0; i < RUN; i++) results[i] = results[i] == 0.0f ? results[i] * divisor : quotients[i];
                }
            }
            if (OPERATION != WEIGHTED_SUM) {
#pragma unroll
                for (int i = 0; i < RUN; i++) results[i] = on_base(theta0[i], scaling, results[i]);
            }
            if (!good) {
                merge_run<OPERATION>(pass, start + at);
            } else {
                store(results, out_number, out, at, largest);
            }
        }
        if (!largest.is_finite(out_number)) atomicOr(pass.not_finite, 1u);
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
#define OF_PARENTS(K)                                                                  \
    POINT(weighted_sum_fast_##K, (merge_fast<WEIGHTED_SUM, SUM, K, false>))            \
    POINT(deltas_fast_##K, (merge_fast<DELTAS, SUM, K, false>))                        \
    POINT(deltas_fast_sparse_##K, (merge_fast<DELTAS, SUM, K, true>))                  \
    POINT(ties_sum_fast_##K, (merge_fast<TIES, SUM, K, false>))                        \
    POINT(ties_sum_fast_sparse_##K, (merge_fast<TIES, SUM, K, true>))                  \
    POINT(ties_mean_fast_##K, (merge_fast<TIES, MEAN, K, false>))                      \
    POINT(ties_mean_fast_sparse_##K, (merge_fast<TIES, MEAN, K, true>))                \
    POINT(ties_mixup_fast_##K, (merge_fast<TIES, MIXUP, K, false>))                    \
    POINT(ties_mixup_fast_sparse_##K, (merge_fast<TIES, MIXUP, K, true>))

OF_PARENTS(2)
OF_PARENTS(3)
POINT(weighted_sum, merge_any<WEIGHTED_SUM>)
POINT(deltas, merge_any<DELTAS>)
POINT(ties, merge_any<TIES>)
POINT(sparse_sum, merge_any<SPARSE_SUM>)

// Which of `length` elements from `first` on stay: bit i is set where the word of element first + i of the tensor's mask is not
// below the threshold. One word of bits a thread.
extern "C" __global__ void __launch_bounds__(256)
    keep_bits(uint32_t* bits, unsigned long long first, unsigned long long length, uint32_t key0, uint32_t key1,
              uint32_t threshold) {
    const unsigned long long word = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (word * 32 >= length) return;
    const unsigned long long counter = (first + word * 32) / 4;
    const uint32_t skip = first % 4;
    const auto stay = [&](unsigned long long counter) {
        const uint4 words = philox(counter, key0, key1);
        return (words.x >= threshold ? 1u : 0u) | (words.y >= threshold ? 2u : 0u) | (words.z >= threshold ? 4u : 0u) |
               (words.w >= threshold ? 8u : 0u);
    };
    uint32_t kept = 0;
#pragma unroll
    for (int block = 0; block < 8; block++) kept |= stay(counter + block) << (block * 4);
    // A ninth counter, of which the first lanes are the last elements.
    if (skip) kept = kept >> skip | stay(counter + 8) << (32 - skip);
    bits[word] = kept;
}
