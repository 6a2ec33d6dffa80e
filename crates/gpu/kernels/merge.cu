// The pass that merges, one launch a tensor: read the parents, widen to f32, combine, round once, write. The arithmetic is
// that of crates/merge/src/kernel, operation by operation, in the order of the parents, so that the bytes are the same.
// Compiled with --fmad=false: no product is fused with a sum.

#include <cuda_fp16.h>
#include <stdint.h>

namespace {

constexpr int MOST_MEMBERS = 8;
// Elements of one thread: 16 bytes of a 16-bit type.
constexpr int RUN = 8;

enum Number : uint32_t { BF16, F16, F32 };
enum Operation : uint32_t { WEIGHTED_SUM, DELTAS, TIES, SPARSE_SUM, BASE };
enum Survivors : uint32_t { KEEP, DIVIDE, MULTIPLY };
enum Mean : uint32_t { SUM, MEAN, MIXUP };

// An edge among magnitudes: of those that have just its bits, the elements with lower index lie above it.
struct Edge {
    unsigned long long index;
    uint32_t bits;
    uint32_t unused;

    __device__ bool is_below(uint32_t magnitude, unsigned long long at) const {
        return magnitude > bits || (magnitude == bits && at < index);
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
    uint32_t unused;
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

__device__ __forceinline__ float sparse(const Member& member, float delta, uint8_t kept, int i, unsigned long long at) {
    if (!(kept >> i & 1)) delta = 0.0f;
    if (member.between) {
        const uint32_t size = magnitude(delta);
        if (!member.low.is_below(size, at) || member.high.is_below(size, at)) delta = 0.0f;
    }
    if (member.survivors == DIVIDE) return delta / member.by;
    if (member.survivors == MULTIPLY) return delta * member.by;
    return delta;
}

// The sum of `factor * value` over the members whose factor is not 0, in order.
template <int K>
__device__ __forceinline__ float weighted_sum(const Pass& pass, const float (&values)[K]) {
    float sum = 0.0f;
    bool first = true;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const float factor = pass.member[k].factor;
        if (k < pass.members && factor != 0.0f) {
            sum = first ? factor * values[k] : sum + factor * values[k];
            first = false;
        }
    }
    return pass.divisor == 1.0f ? sum : sum / pass.divisor;
}

template <int K>
__device__ __forceinline__ float ties(const Pass& pass, float (&deltas)[K]) {
    float vote = 0.0f;
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (k < pass.members) {
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

template <uint32_t OPERATION, int K>
__device__ __forceinline__ void merge(const Pass& pass) {
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * blockDim.x * RUN;
    unsigned long long at = (static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x) * RUN;
    bool finite = true;
    for (; at < pass.length; at += step) {
        Raw base = {}, raw[K];
        uint8_t kept[K];
        if (OPERATION != WEIGHTED_SUM) base = read(pass.base, pass.base_number, at);
#pragma unroll
        for (int k = 0; k < K; k++) {
            const Member& member = pass.member[k];
            // A parent that adds nothing is not read.
            const bool reads = k < pass.members && (OPERATION != WEIGHTED_SUM || member.factor != 0.0f);
            raw[k] = reads ? read(member.values, member.number, at) : Raw{};
            kept[k] = k < pass.members && member.kept != nullptr ? member.kept[at / 8] : 0xff;
        }
        uint32_t out[RUN];
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const float theta0 = OPERATION == WEIGHTED_SUM ? 0.0f : widen(base, pass.base_number, i);
            float values[K];
#pragma unroll
            for (int k = 0; k < K; k++) {
                const Member& member = pass.member[k];
                values[k] = widen(raw[k], member.number, i);
                if (OPERATION != WEIGHTED_SUM && k < pass.members) {
                    values[k] = sparse(member, values[k] - theta0, kept[k], i, at + i);
                    if (OPERATION == TIES && !member.trim.is_below(magnitude(values[k]), at + i)) values[k] = 0.0f;
                    if (OPERATION == SPARSE_SUM) values[k] = on_base(theta0, 1.0f, values[k]);
                }
            }
            float merged;
            if (OPERATION == TIES) {
                merged = on_base(theta0, pass.scaling, ties<K>(pass, values));
            } else {
                merged = weighted_sum<K>(pass, values);
                if (OPERATION == DELTAS) merged = on_base(theta0, pass.scaling, merged);
            }
            bool good = true;
            out[i] = narrow(merged, pass.out_number, good);
            finite &= good || at + i >= pass.length;
        }
        uint4* to = static_cast<uint4*>(pass.out);
        if (pass.out_number == F32) {
            to[at / 4] = make_uint4(out[0], out[1], out[2], out[3]);
            to[at / 4 + 1] = make_uint4(out[4], out[5], out[6], out[7]);
        } else {
            to[at / 8] = make_uint4(out[0] | out[1] << 16, out[2] | out[3] << 16, out[4] | out[5] << 16, out[6] | out[7] << 16);
        }
    }
    if (!finite) atomicOr(pass.not_finite, 1u);
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

#define POINT(NAME, OPERATION, K)                                                                    \
    extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ Pass pass) { \
        merge<OPERATION, K>(pass);                                                                   \
    }

POINT(weighted_sum_2, WEIGHTED_SUM, 2)
POINT(weighted_sum_8, WEIGHTED_SUM, 8)
POINT(deltas_2, DELTAS, 2)
POINT(deltas_8, DELTAS, 8)
POINT(ties_2, TIES, 2)
POINT(ties_8, TIES, 8)
POINT(sparse_sum_2, SPARSE_SUM, 2)
POINT(sparse_sum_8, SPARSE_SUM, 8)

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
