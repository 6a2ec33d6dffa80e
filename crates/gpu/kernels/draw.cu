// Drawing the next token of each row of logits, a block a row, by the rules of crates/lm/src/sampler.rs: the same weights, the same
// cuts in the same order, sums in f64. Blocks may have any number of threads up to MOST_THREADS.

#include <math.h>
#include <stdint.h>

namespace {

constexpr int MOST_THREADS = 1024;
// Tokens that may be left by a cut; where more are, the CPU draws.
constexpr int MOST_CANDIDATES = 1024;
// Not drawn here: too many candidates, or no logit that is a number.
constexpr uint32_t NONE = 0xffffffff;

struct Chance {
    // From 0 to 1, below 1.
    double uniform;
    float temperature, top_p, min_p;
    // 0: off.
    uint32_t top_k;
};

// Bits that rise with the value, the same for zeros of both signs; 0 for what is no number.
__device__ __forceinline__ uint32_t ordered(float value) {
    if (!(value == value)) return 0;
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

__device__ __forceinline__ float value_of(uint32_t ordered) {
    return __uint_as_float(ordered & 0x80000000 ? ordered & 0x7fffffff : ~ordered);
}

__device__ __forceinline__ double weight(float logit, float best, float temperature) {
    if (!(logit == logit)) return 0.0;
    return exp((static_cast<double>(logit) - static_cast<double>(best)) / static_cast<double>(temperature));
}

// The sum over all threads, always in the same order.
__device__ __forceinline__ double block_sum(double part) {
    __shared__ double parts[MOST_THREADS];
    __syncthreads();
    parts[threadIdx.x] = part;
    for (uint32_t stride = 1; stride < blockDim.x; stride *= 2) {
        __syncthreads();
        if (threadIdx.x % (2 * stride) == 0 && threadIdx.x + stride < blockDim.x) {
            parts[threadIdx.x] += parts[threadIdx.x + stride];
        }
    }
    __syncthreads();
    return parts[0];
}

__device__ __forceinline__ int block_count(int part) {
    __shared__ int count;
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, part);
    __syncthreads();
    return count;
}

__device__ __forceinline__ uint32_t block_max(uint32_t part) {
    __shared__ uint32_t most;
    __syncthreads();
    if (threadIdx.x == 0) most = 0;
    __syncthreads();
    atomicMax(&most, part);
    __syncthreads();
    return most;
}

// The largest bits that at least `k` of the logits reach.
__device__ __forceinline__ uint32_t reached_by(const float* logits, int vocab, int k) {
    uint32_t bound = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const uint32_t trial = bound | 1u << bit;
        int above = 0;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) above += ordered(logits[i]) >= trial;
        if (block_count(above) >= k) bound = trial;
    }
    return bound;
}

// Bits that the likeliest tokens reach which together have the share `top_p`, and perhaps a few more do.
__device__ __forceinline__ uint32_t reached_by_share(const float* logits, int vocab, float best, const Chance& chance) {
    // Fast sums; what they are wrong by is less than the share is raised by.
    const auto mass = [&](uint32_t bound) {
        float part = 0.0f;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            if (logits[i] == logits[i] && ordered(logits[i]) >= bound) part += expf((logits[i] - best) / chance.temperature);
        }
        return block_sum(part);
    };
    const double share = chance.top_p;
    const double needed = fmin(share * 1.001, (1.0 + share) / 2.0) * mass(0);
    uint32_t bound = 0;
    // The last bits would hardly leave fewer.
    for (int bit = 31; bit >= 8; bit--) {
        const uint32_t trial = bound | 1u << bit;
        if (mass(trial) >= needed) bound = trial;
    }
    return bound;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    draw_tokens(const float* logits, const Chance* chances, int vocab, uint32_t* tokens) {
    const uint32_t row = blockIdx.x;
    logits += static_cast<unsigned long long>(row) * vocab;
    const Chance chance = chances[row];
    uint32_t most = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) most = max(most, ordered(logits[i]));
    most = block_max(most);
    const float best = value_of(most);
    if (most == 0 || !(fabsf(best) < INFINITY)) {
        if (threadIdx.x == 0) tokens[row] = NONE;
        return;
    }
    const float temperature = chance.temperature;
    const int k = chance.top_k < static_cast<uint32_t>(vocab) ? static_cast<int>(chance.top_k) : 0;

    if (k == 0 && chance.top_p >= 1.0f) {
        // All tokens, in the order of their ids; each thread has a stretch of them.
        __shared__ double stretches[MOST_THREADS];
        const int stretch = (vocab + blockDim.x - 1) / blockDim.x;
        const int start = min(vocab, static_cast<int>(threadIdx.x) * stretch), end = min(vocab, start + stretch);
        double sum = 0.0;
        for (int i = start; i < end; i++) {
            const double w = weight(logits[i], best, temperature);
            if (w >= chance.min_p) sum += w;
        }
        __syncthreads();
        stretches[threadIdx.x] = sum;
        const double total = block_sum(sum);
        if (threadIdx.x != 0) return;
        double left = chance.uniform * total;
        uint32_t thread = 0;
        while (thread + 1 < blockDim.x && left >= stretches[thread]) left -= stretches[thread++];
        // Rounding may leave something at the end of a stretch: then it is the next token that has a weight, or else the last.
        uint32_t last = NONE;
        for (int i = thread * stretch; i < vocab; i++) {
            const double w = weight(logits[i], best, temperature);
            if (w < chance.min_p || w <= 0.0) continue;
            last = i;
            if (left < w) break;
            left -= w;
        }
        for (int i = min(vocab, static_cast<int>(thread) * stretch) - 1; last == NONE && i >= 0; i--) {
            const double w = weight(logits[i], best, temperature);
            if (w >= chance.min_p && w > 0.0) last = i;
        }
        tokens[row] = last;
        return;
    }

    // The few that a cut may leave, in any order.
    __shared__ double weights[MOST_CANDIDATES], sorted[MOST_CANDIDATES];
    __shared__ uint32_t ids[MOST_CANDIDATES], sorted_ids[MOST_CANDIDATES];
    __shared__ int count;
    uint32_t bound = 0;
    double total = 0.0;
    // Of all but nothing fast sums are not sure.
    if (k > MOST_CANDIDATES || (k == 0 && chance.top_p > 0.9998f)) {
        if (threadIdx.x == 0) tokens[row] = NONE;
        return;
    }
    if (k > 0) {
        bound = reached_by(logits, vocab, k);
    } else {
        double part = 0.0;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) part += weight(logits[i], best, temperature);
        total = block_sum(part);
        bound = reached_by_share(logits, vocab, best, chance);
    }
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float logit = logits[i];
        const uint32_t bits = ordered(logit);
        if (bits == 0 || bits < bound) continue;
        const int at = atomicAdd(&count, 1);
        if (at < MOST_CANDIDATES) {
            weights[at] = weight(logit, best, temperature);
            ids[at] = i;
        }
    }
    __syncthreads();
    const int found = count;
    if (found > MOST_CANDIDATES) {
        if (threadIdx.x == 0) tokens[row] = NONE;
        return;
    }
    // Falling by weight, rising by id.
    for (int i = threadIdx.x; i < found; i += blockDim.x) {
        int rank = 0;
        for (int j = 0; j < found; j++) rank += weights[j] > weights[i] || (weights[j] == weights[i] && ids[j] < ids[i]);
        sorted[rank] = weights[i];
        sorted_ids[rank] = ids[i];
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    int kept = k > 0 ? min(k, found) : found;
    if (chance.top_p < 1.0f) {
        if (k > 0) {
            total = 0.0;
            for (int i = 0; i < kept; i++) total += sorted[i];
        }
        const double share = static_cast<double>(chance.top_p) * total;
        double sum = 0.0;
        for (int i = 0; i < kept; i++) {
            sum += sorted[i];
            if (sum >= share) kept = i + 1;
        }
    }
    double left = 0.0;
    for (int i = 0; i < kept; i++) {
        if (sorted[i] < chance.min_p) kept = i;
        if (i < kept) left += sorted[i];
    }
    left *= chance.uniform;
    uint32_t last = sorted_ids[0];
    for (int i = 0; i < kept && sorted[i] > 0.0; i++) {
        last = sorted_ids[i];
        if (left < sorted[i]) break;
        left -= sorted[i];
    }
    tokens[row] = last;
}
