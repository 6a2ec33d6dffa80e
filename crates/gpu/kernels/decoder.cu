// What a decoder does between its products with weights, on packed rows of several sequences. Everything is f32 but the
// inputs of products and the keys and values kept, which have the type `T`. Each row is computed in one order, whatever
// else is in the batch.

#include <cuda_bf16.h>
#include <stdint.h>

namespace {

// Tokens of a page of keys and values.
constexpr int PAGE = 16;
// Queries of one block of threads.
constexpr int QUERIES = 16;
constexpr int THREADS = 128;

__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

// The sum over a block of threads, the same in each of them.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float parts[32];
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < blockDim.x / 32; warp++) sum += parts[warp];
    return sum;
}

// out = x * weight / sqrt(mean of x^2 + eps). A block a row.
template <typename T>
__device__ void rms_norm(const float* x, const float* weight, T* out, int width, float eps) {
    x += static_cast<size_t>(blockIdx.x) * width;
    out += static_cast<size_t>(blockIdx.x) * width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += x[i] * x[i];
    const float inverse = 1.0f / sqrtf(block_sum(squares) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) store(out + i, x[i] * inverse * weight[i]);
}

// out = activation(x[.., gate]) * x[.., up], for x = [rows, gate | up].
template <typename T>
__device__ void gate(const float* x, T* out, unsigned long long length, int width, int gelu) {
    const unsigned long long at = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= length) return;
    const unsigned long long row = at / width;
    const float* from = x + row * 2 * width + at % width;
    const float value = from[0], up = from[width];
    const float cube = value * value * value;
    const float inner = gelu ? 1.5957691216f * (value + 0.044715f * cube) : value;
    store(out + at, value / (1.0f + expf(-inner)) * up);
}

struct Rotate {
    // [rows, heads + 2 kv_heads, head_dim]
    const float* qkv;
    // [rows, half] each; null: nothing is rotated.
    const float *cosines, *sines;
    // [head_dim] each, or null.
    const float *query_norm, *key_norm;
    // By row: page * PAGE + place in the page.
    const uint32_t* slots;
    // [rows, heads, head_dim]
    float* queries;
    // [pages, kv_heads, PAGE, head_dim]
    void *keys, *values;
    int heads, kv_heads, head_dim, half;
    float eps;
    int unused;
};

// Norms and rotates the query and key heads, and puts keys and values into their pages. A block a head of a row.
template <typename T>
__device__ void rotate_and_store(const Rotate& r) {
    __shared__ float head[256];
    const int row = blockIdx.x, which = blockIdx.y, dim = r.head_dim, i = threadIdx.x;
    const size_t from = (static_cast<size_t>(row) * (r.heads + 2 * r.kv_heads) + which) * dim;
    float value = i < dim ? r.qkv[from + i] : 0.0f;
    const bool is_query = which < r.heads, is_value = which >= r.heads + r.kv_heads;
    const float* norm = is_query ? r.query_norm : r.key_norm;
    if (!is_value && norm != nullptr) {
        const float inverse = 1.0f / sqrtf(block_sum(value * value) / dim + r.eps);
        if (i < dim) value = value * inverse * norm[i];
    }
    if (!is_value && r.cosines != nullptr) {
        head[i] = value;
        __syncthreads();
        if (i < 2 * r.half) {
            const int pair = i < r.half ? i : i - r.half;
            const float c = r.cosines[static_cast<size_t>(row) * r.half + pair];
            const float s = r.sines[static_cast<size_t>(row) * r.half + pair];
            value = i < r.half ? head[i] * c - head[i + r.half] * s : head[i] * c + head[i - r.half] * s;
        }
    }
    if (i >= dim) return;
    if (is_query) {
        r.queries[(static_cast<size_t>(row) * r.heads + which) * dim + i] = value;
        return;
    }
    const uint32_t slot = r.slots[row];
    const int kv_head = is_value ? which - r.heads - r.kv_heads : which - r.heads;
    const size_t to = ((static_cast<size_t>(slot / PAGE) * r.kv_heads + kv_head) * PAGE + slot % PAGE) * dim + i;
    store(static_cast<T*>(is_value ? r.values : r.keys) + to, value);
}

struct Attend {
    const float* queries;
    const void *keys, *values;
    // [rows, heads, head_dim]
    void* out;
    // By task: first row, rows, position of the first row, where its table of pages starts.
    const uint4* tasks;
    const uint32_t* tables;
    int heads, kv_heads, head_dim;
    // Latest positions that a token sees; 0: all.
    int window;
    // Query heads of one key/value head that one block takes.
    int heads_at_once;
    float scale, softcap;
    int unused;
};

// Rows of one sequence against one key/value head: pages one after the other, with a running maximum and sum. DIM is the
// head size rounded up.
template <typename T, int DIM>
__device__ void attend(const Attend& a) {
    constexpr int PITCH = DIM + 4;
    // Groups of four numbers of a page that each thread carries.
    constexpr int CARRIED = DIM / 32;
    __shared__ __align__(16) float queries[QUERIES][PITCH];
    __shared__ __align__(16) float page[PAGE][PITCH];
    __shared__ float weights[QUERIES][PAGE + 1];

    const uint4 task = a.tasks[blockIdx.x];
    const int dim = a.head_dim, group = a.heads / a.kv_heads, chunks = (group + a.heads_at_once - 1) / a.heads_at_once;
    const int kv_head = blockIdx.y / chunks, first_head = blockIdx.y % chunks * a.heads_at_once;
    const uint32_t* table = a.tables + task.w;

    // Of this thread: one query, and of it two keys of each page, or a part of its dimensions.
    const int query = threadIdx.x / 8, lane = threadIdx.x % 8;
    const int row = query / a.heads_at_once, in_group = first_head + query % a.heads_at_once;
    const bool is_there = row < task.y && in_group < group;
    const int position = task.z + row;
    const int first_seen = a.window > 0 ? max(0, position + 1 - a.window) : 0;

    for (int i = threadIdx.x; i < QUERIES * PITCH; i += THREADS) (&queries[0][0])[i] = 0.0f;
    for (int i = threadIdx.x; i < PAGE * PITCH; i += THREADS) (&page[0][0])[i] = 0.0f;
    __syncthreads();
    const size_t at = ((static_cast<size_t>(task.x) + row) * a.heads + kv_head * group + in_group) * dim;
    if (is_there) {
        for (int d = lane; d < dim; d += 8) queries[query][d] = a.queries[at + d] * a.scale;
    }

    int place[CARRIED], key_of[CARRIED];
#pragma unroll
    for (int c = 0; c < CARRIED; c++) {
        const int four = threadIdx.x + c * THREADS;
        key_of[c] = four / (dim / 4);
        place[c] = four % (dim / 4) * 4;
    }
    float most = -INFINITY, sum = 0.0f, out[DIM / 8];
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) out[d] = 0.0f;

    const int begin = (a.window > 0 ? max(0, static_cast<int>(task.z) + 1 - a.window) : 0) / PAGE;
    const int end = (task.z + task.y - 1) / PAGE + 1;
    for (int p = begin; p < end; p++) {
        const size_t start = (static_cast<size_t>(table[p]) * a.kv_heads + kv_head) * PAGE * dim;
        float4 keys[CARRIED], values[CARRIED];
#pragma unroll
        for (int c = 0; c < CARRIED; c++) {
            if (key_of[c] < PAGE) {
                keys[c] = load4(static_cast<const T*>(a.keys) + start + key_of[c] * dim + place[c]);
                values[c] = load4(static_cast<const T*>(a.values) + start + key_of[c] * dim + place[c]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < CARRIED; c++) {
            if (key_of[c] < PAGE) *reinterpret_cast<float4*>(&page[key_of[c]][place[c]]) = keys[c];
        }
        __syncthreads();
        float4 low = make_float4(0, 0, 0, 0), high = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int d = 0; d < DIM; d += 4) {
            const float4 q = *reinterpret_cast<const float4*>(&queries[query][d]);
            const float4 k = *reinterpret_cast<const float4*>(&page[lane][d]);
            const float4 l = *reinterpret_cast<const float4*>(&page[lane + 8][d]);
            low.x = fmaf(q.x, k.x, low.x), low.y = fmaf(q.y, k.y, low.y);
            low.z = fmaf(q.z, k.z, low.z), low.w = fmaf(q.w, k.w, low.w);
            high.x = fmaf(q.x, l.x, high.x), high.y = fmaf(q.y, l.y, high.y);
            high.z = fmaf(q.z, l.z, high.z), high.w = fmaf(q.w, l.w, high.w);
        }
        float scores[2] = {(low.x + low.y) + (low.z + low.w), (high.x + high.y) + (high.z + high.w)};
        bool seen[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = p * PAGE + lane + half * 8;
            seen[half] = is_there && key <= position && key >= first_seen;
            if (a.softcap > 0.0f) scores[half] = a.softcap * tanhf(scores[half] / a.softcap);
        }
        float best = fmaxf(seen[0] ? scores[0] : -INFINITY, seen[1] ? scores[1] : -INFINITY);
        for (int lanes = 4; lanes > 0; lanes /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, lanes));
        best = fmaxf(best, most);
        const float keep = best == most ? 1.0f : expf(most - best);
        const float first = seen[0] ? expf(scores[0] - best) : 0.0f;
        const float second = seen[1] ? expf(scores[1] - best) : 0.0f;
        float added = first + second;
        for (int lanes = 4; lanes > 0; lanes /= 2) added += __shfl_xor_sync(0xffffffff, added, lanes);
        sum = sum * keep + added;
        most = best;
        weights[query][lane] = first;
        weights[query][lane + 8] = second;
        __syncthreads();
#pragma unroll
        for (int c = 0; c < CARRIED; c++) {
            if (key_of[c] < PAGE) *reinterpret_cast<float4*>(&page[key_of[c]][place[c]]) = values[c];
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) out[d] *= keep;
#pragma unroll
        for (int key = 0; key < PAGE; key++) {
            const float weight = weights[query][key];
#pragma unroll
            for (int c = 0; c < CARRIED; c++) {
                const float4 v = *reinterpret_cast<const float4*>(&page[key][c * 32 + lane * 4]);
                out[c * 4] = fmaf(weight, v.x, out[c * 4]);
                out[c * 4 + 1] = fmaf(weight, v.y, out[c * 4 + 1]);
                out[c * 4 + 2] = fmaf(weight, v.z, out[c * 4 + 2]);
                out[c * 4 + 3] = fmaf(weight, v.w, out[c * 4 + 3]);
            }
        }
    }
    if (!is_there) return;
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int c = 0; c < CARRIED; c++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int d = c * 32 + lane * 4 + i;
            if (d < dim) store(static_cast<T*>(a.out) + at + d, out[c * 4 + i] * inverse);
        }
    }
}

// ---- attention on tensor cores: bfloat16 ----

// Queries of one warp; a block has up to WARPS of them, which share the pages.
constexpr int WARPS = 4;

__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const __nv_bfloat16* at) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(at));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const __nv_bfloat16* at) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(at));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// As `attend`, 16 queries a warp. Scaled queries and weights are rounded to bfloat16; sums are f32. A query's result does not
// depend on what the other queries of its warp or block are.
template <int DIM>
__device__ void attend_on_tensor_cores(const Attend& a) {
    constexpr int PITCH = DIM + 8;
    constexpr int STEPS = DIM / 16;
    __shared__ __align__(16) __nv_bfloat16 keys[PAGE * PITCH];
    __shared__ __align__(16) __nv_bfloat16 values[PAGE * PITCH];

    const uint4 task = a.tasks[blockIdx.x];
    const int dim = a.head_dim, group = a.heads / a.kv_heads, chunks = (group + a.heads_at_once - 1) / a.heads_at_once;
    const int kv_head = blockIdx.y / chunks, first_head = blockIdx.y % chunks * a.heads_at_once;
    const uint32_t* table = a.tables + task.w;
    const int rows_a_warp = QUERIES / a.heads_at_once;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, threads = blockDim.x;

    // Of this thread: queries lane / 4 and that plus 8; of each the columns lane % 4 * 2 and the next one.
    int position[2], first_seen[2];
    bool is_there[2];
    size_t at[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = lane / 4 + half * 8;
        const int row = warp * rows_a_warp + query / a.heads_at_once, in_group = first_head + query % a.heads_at_once;
        is_there[half] = query < rows_a_warp * a.heads_at_once && row < task.y && in_group < group;
        position[half] = task.z + row;
        first_seen[half] = a.window > 0 ? max(0, position[half] + 1 - a.window) : 0;
        at[half] = ((static_cast<size_t>(task.x) + row) * a.heads + kv_head * group + in_group) * dim;
    }
    uint32_t queries[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const int half = part % 2, d = step * 16 + part / 2 * 8 + lane % 4 * 2;
            float2 q = make_float2(0.0f, 0.0f);
            if (is_there[half] && d < dim) q = *reinterpret_cast<const float2*>(a.queries + at[half] + d);
            queries[step][part] = pack(q.x * a.scale, q.y * a.scale);
        }
    }
    for (int i = threadIdx.x; i < PAGE * PITCH; i += threads) keys[i] = values[i] = __float2bfloat16_rn(0.0f);
    __syncthreads();

    float out[DIM / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    const int begin = (a.window > 0 ? max(0, static_cast<int>(task.z) + 1 - a.window) : 0) / PAGE;
    const int end = (task.z + task.y - 1) / PAGE + 1;
    const int fours = dim / 4;
    for (int p = begin; p < end; p++) {
        const size_t start = (static_cast<size_t>(table[p]) * a.kv_heads + kv_head) * PAGE * dim;
        const uint2* new_keys = reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(a.keys) + start);
        const uint2* new_values = reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(a.values) + start);
        __syncthreads();
        for (int i = threadIdx.x; i < PAGE * fours; i += threads) {
            const int place = i / fours * PITCH + i % fours * 4;
            *reinterpret_cast<uint2*>(keys + place) = new_keys[i];
            *reinterpret_cast<uint2*>(values + place) = new_values[i];
        }
        __syncthreads();
        // Keys 0 to 7 of the page, then 8 to 15.
        float scores[2][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t k[4];
            load_matrices(k, keys + (lane % 8 + lane / 16 * 8) * PITCH + step * 16 + lane / 8 % 2 * 8);
            multiply(scores[0], queries[step], k[0], k[1]);
            multiply(scores[1], queries[step], k[2], k[3]);
        }
        float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int half = i / 2, key = p * PAGE + tile * 8 + lane % 4 * 2 + i % 2;
                float score = scores[tile][i];
                if (a.softcap > 0.0f) score = a.softcap * tanhf(score / a.softcap);
                const bool seen = is_there[half] && key <= position[half] && key >= first_seen[half];
                scores[tile][i] = seen ? score : -INFINITY;
                best[half] = fmaxf(best[half], scores[tile][i]);
            }
        }
        float keep[2], added[2] = {0.0f, 0.0f};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            best[half] = fmaxf(best[half], __shfl_xor_sync(0xffffffff, best[half], 1));
            best[half] = fmaxf(best[half], __shfl_xor_sync(0xffffffff, best[half], 2));
            best[half] = fmaxf(best[half], most[half]);
            keep[half] = best[half] == most[half] ? 1.0f : __expf(most[half] - best[half]);
            most[half] = best[half];
        }
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float score = scores[tile][i];
                scores[tile][i] = score == -INFINITY ? 0.0f : __expf(score - most[i / 2]);
                added[i / 2] += scores[tile][i];
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            added[half] += __shfl_xor_sync(0xffffffff, added[half], 1);
            added[half] += __shfl_xor_sync(0xffffffff, added[half], 2);
            sum[half] = sum[half] * keep[half] + added[half];
        }
        const uint32_t weights[4] = {pack(scores[0][0], scores[0][1]), pack(scores[0][2], scores[0][3]),
                                     pack(scores[1][0], scores[1][1]), pack(scores[1][2], scores[1][3])};
#pragma unroll
        for (int tile = 0; tile < DIM / 8; tile += 2) {
            uint32_t v[4];
            load_transposed(v, values + (lane % 16) * PITCH + tile * 8 + lane / 16 * 8);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                out[tile][i] *= keep[i / 2];
                out[tile + 1][i] *= keep[i / 2];
            }
            multiply(out[tile], weights, v[0], v[1]);
            multiply(out[tile + 1], weights, v[2], v[3]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (!is_there[half]) continue;
        const float inverse = 1.0f / sum[half];
#pragma unroll
        for (int tile = 0; tile < DIM / 8; tile++) {
            const int d = tile * 8 + lane % 4 * 2;
            if (d >= dim) continue;
            *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(a.out) + at[half] + d) =
                pack(out[tile][half * 2] * inverse, out[tile][half * 2 + 1] * inverse);
        }
    }
}

struct Best {
    float value;
    uint32_t id;
};

// The larger one, the lower id among equals. An id of all ones is none.
__device__ __forceinline__ Best better(Best a, Best b) {
    if (a.id == 0xffffffff) return b;
    if (b.id == 0xffffffff) return a;
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Best block_best(Best best) {
    __shared__ Best parts[32];
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const Best other = {__shfl_xor_sync(0xffffffff, best.value, lanes), __shfl_xor_sync(0xffffffff, best.id, lanes)};
        best = better(best, other);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
    __syncthreads();
    best = parts[0];
    for (int warp = 1; warp < blockDim.x / 32; warp++) best = better(best, parts[warp]);
    return best;
}

}  // namespace

#define OF_TYPE(SUFFIX, T)                                                                                             \
    extern "C" __global__ void rms_norm_##SUFFIX(const float* x, const float* weight, T* out, int width, float eps) {  \
        rms_norm<T>(x, weight, out, width, eps);                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void gate_##SUFFIX(const float* x, T* out, unsigned long long length, int width, int gelu) { \
        gate<T>(x, out, length, width, gelu);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void rotate_and_store_##SUFFIX(const __grid_constant__ Rotate rotate) {                      \
        rotate_and_store<T>(rotate);                                                                                   \
    }

OF_TYPE(f32, float)
OF_TYPE(bf16, __nv_bfloat16)

#define ATTEND(DIM)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_##DIM##_f32(const __grid_constant__ Attend arguments) {\
        attend<float, DIM>(arguments);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                           \
        attend_##DIM##_bf16(const __grid_constant__ Attend arguments) {                                                \
        attend_on_tensor_cores<DIM>(arguments);                                                                        \
    }

ATTEND(64)
ATTEND(128)
ATTEND(256)

// x = cap * tanh(x / cap).
extern "C" __global__ void softcap(float* x, unsigned long long length, float cap) {
    const unsigned long long at = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < length) x[at] = cap * tanhf(x[at] / cap);
}

// Of each row of logits [rows, vocab], a block a row: its largest, the sum of exp(logit - largest) where that is finite, the
// logit of the target, and the `top` largest with their ids, falling, the lowest id first among equals. What is not a number
// and -inf are passed over; ids of all ones fill the rest.
extern "C" __global__ void summarize(const float* logits, const uint32_t* targets, int vocab, int top, float* largest,
                                     double* sums, float* target_logits, float* top_logits, uint32_t* top_ids) {
    const size_t row = blockIdx.x;
    logits += row * vocab;
    const Best none = {-INFINITY, 0xffffffff};
    Best best = none;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float logit = logits[i];
        if (logit > best.value) best = {logit, static_cast<uint32_t>(i)};
    }
    best = block_best(best);
    const float most = best.value;
    float part = 0.0f;
    if (isfinite(most)) {
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            const float logit = logits[i];
            if (logit == logit) part += expf(logit - most);
        }
    }
    __shared__ double parts[32];
    double sum = part;
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0.0;
        for (int warp = 0; warp < blockDim.x / 32; warp++) sum += parts[warp];
        largest[row] = most;
        sums[row] = sum;
        target_logits[row] = logits[targets[row]];
    }
    for (int rank = 0; rank < top; rank++) {
        if (threadIdx.x == 0) {
            top_logits[row * top + rank] = best.value;
            top_ids[row * top + rank] = best.id;
        }
        if (rank + 1 == top || best.id == 0xffffffff) {
            for (int rest = rank + 1 + threadIdx.x; rest < top; rest += blockDim.x) top_ids[row * top + rest] = 0xffffffff;
            return;
        }
        const Best last = best;
        best = none;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            const float logit = logits[i];
            const uint32_t id = i;
            const bool is_after = logit < last.value || (logit == last.value && id > last.id);
            if (is_after && logit > best.value) best = {logit, id};
        }
        best = block_best(best);
    }
}
