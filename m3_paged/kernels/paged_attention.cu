// Paged attention in CUDA C++: the twin of triton_kernels.py, with nothing left to a compiler.
//
// Decode attention reads every cached key and value once, for one query token: it is as fast as its
// memory reads. The kernel therefore keeps many independent 16-byte loads in flight and exchanges as
// little as possible between threads.
//
//   grid    x: KV head (times pieces of its group of query heads)   y: sequence   z: split of the context
//   block   4 warps; each warp is cut into teams, and a team of LANES threads reads one token's row,
//           16 bytes a thread (head size 128 in bf16: 16 threads a row, 2 teams a warp, 8 a block)
//   team    walks over the tokens with stride "teams in the block", UNROLL tokens a turn, and keeps its
//           own online softmax (maximum, total, weighted values) in registers
//   end     the teams' results are merged in shared memory; with several splits, combine_kernel merges
//           those of a sequence in the same way
//
// Layouts as in reference.py. The kernels are templates; a build instantiates them for one head size
// (nvcc -DHEAD_SIZE=128), and the plain C entry points at the end need no PyTorch header: so it takes
// a few seconds.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#ifndef HEAD_SIZE
#error "say which head size to build for: nvcc -DHEAD_SIZE=128 ..."
#endif

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int UNROLL = 4;  // tokens a team has in flight: 4 keys and 4 values
constexpr float LOWEST = -1e30f;  // finite, because -inf - -inf would be NaN

constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

// How a row of D values of type T is spread over a team.
template <typename T, int D>
struct Row {
    static constexpr int WIDTH = 16 / sizeof(T);   // values in one 16-byte vector
    static constexpr int VECTORS = D / WIDTH;
    static constexpr int LANES = power_of_two_from(VECTORS) < 32 ? power_of_two_from(VECTORS) : 32;
    static constexpr int PER_LANE = (VECTORS + LANES - 1) / LANES;  // vectors a thread holds
    static constexpr int TEAMS = THREADS / LANES;
    static_assert(D % WIDTH == 0, "a row must be whole 16-byte vectors");
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ T from_float(float x);
template <> __device__ float from_float(float x) { return x; }
template <> __device__ __half from_float(float x) { return __float2half_rn(x); }
template <> __device__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

template <typename T>
__device__ void unpack(const uint4& bits, float (&values)[16 / sizeof(T)]) {
    const T* typed = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int i = 0; i < 16 / sizeof(T); ++i) values[i] = to_float(typed[i]);
}

// Each split takes the same number of tokens, a function of the sequence's own length.
__device__ int tokens_per_split(int length, int num_splits) {
    return max((length + num_splits - 1) / num_splits, 1);
}

struct Arguments {
    const void* q;            // [B, Hq, D], sequences q_stride values apart
    const void* k_cache;      // [num_blocks, block_size, Hkv, D]
    const void* v_cache;      // [num_blocks, block_size, Hkv, D]
    const int* block_tables;  // [B, max_blocks], rows table_stride apart
    const int* context_lens;  // [B]
    void* out;                // [B, Hq, D]
    float* partial;           // [B, Hq, num_splits, D]; unused when num_splits is 1
    float* log_sums;          // [B, Hq, num_splits], log2 of the sum of exponentials
    float scale_log2;         // softmax scale * log2(e): exponentials are powers of two
    int batch, num_heads, num_kv_heads, block_size, num_splits;
    int64_t q_stride, table_stride;
};

// HEADS query heads of one KV head share each key and value that a thread has loaded.
template <typename T, int D, int HEADS>
__global__ void __launch_bounds__(THREADS) decode_kernel(const Arguments a) {
    using R = Row<T, D>;
    const int group = a.num_heads / a.num_kv_heads;
    const int pieces = (group + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.x / pieces;
    const int first = (blockIdx.x % pieces) * HEADS;  // of the group's heads
    const int heads = min(HEADS, group - first);
    const int first_head = kv_head * group + first;
    const int sequence = blockIdx.y;
    const int split = blockIdx.z;

    const int length = a.context_lens[sequence];
    const int chunk = tokens_per_split(length, a.num_splits);
    const int begin = split * chunk;
    const int end = min(begin + chunk, length);

    const int team = threadIdx.x / R::LANES;
    const int lane = threadIdx.x % R::LANES;

    // The query, scaled, in registers: this thread's columns of every head.
    float query[HEADS][R::PER_LANE][R::WIDTH] = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        const T* row = static_cast<const T*>(a.q) + sequence * a.q_stride + (first_head + h) * D;
#pragma unroll
        for (int i = 0; i < R::PER_LANE; ++i) {
            const int vector = i * R::LANES + lane;
            if (h >= heads || vector >= R::VECTORS) continue;
#pragma unroll
            for (int j = 0; j < R::WIDTH; ++j) {
                query[h][i][j] = to_float(row[vector * R::WIDTH + j]) * a.scale_log2;
            }
        }
    }

    float maximum[HEADS], total[HEADS] = {}, weighted[HEADS][R::PER_LANE][R::WIDTH] = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) maximum[h] = LOWEST;

    const int* table = a.block_tables + sequence * a.table_stride;
    const int64_t row_vectors = int64_t(a.num_kv_heads) * R::VECTORS;
    const uint4* k_head = static_cast<const uint4*>(a.k_cache) + kv_head * R::VECTORS;
    const uint4* v_head = static_cast<const uint4*>(a.v_cache) + kv_head * R::VECTORS;

    // Block ids are fetched one turn ahead, so that a key's address never waits for the table.
    int block[UNROLL];
    auto fetch_blocks = [&](int turn) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = turn + u * R::TEAMS + team;
            block[u] = token < end ? table[token / a.block_size] : 0;
        }
    };
    fetch_blocks(begin);

    for (int turn = begin; turn < end; turn += UNROLL * R::TEAMS) {
        uint4 keys[UNROLL][R::PER_LANE] = {}, values[UNROLL][R::PER_LANE] = {};
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = turn + u * R::TEAMS + team;
            const int64_t slot = int64_t(block[u]) * a.block_size + token % a.block_size;
#pragma unroll
            for (int i = 0; i < R::PER_LANE; ++i) {
                const int vector = i * R::LANES + lane;
                if (token >= end || vector >= R::VECTORS) continue;  // zeros stay
                keys[u][i] = __ldg(k_head + slot * row_vectors + vector);
                values[u][i] = __ldg(v_head + slot * row_vectors + vector);
            }
        }
        fetch_blocks(turn + UNROLL * R::TEAMS);

        float scores[HEADS][UNROLL] = {};
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
            for (int i = 0; i < R::PER_LANE; ++i) {
                float key[R::WIDTH];
                unpack<T>(keys[u][i], key);
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
#pragma unroll
                    for (int j = 0; j < R::WIDTH; ++j) scores[h][u] += query[h][i][j] * key[j];
                }
            }
        }
        // Sum over the team; afterwards each of its threads holds the whole score.
#pragma unroll
        for (int distance = R::LANES / 2; distance > 0; distance /= 2) {
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    scores[h][u] += __shfl_xor_sync(0xffffffff, scores[h][u], distance);
                }
            }
        }

        // Online softmax: one rescaling for UNROLL tokens. Scores turn into weights.
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float new_maximum = maximum[h];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (turn + u * R::TEAMS + team < end) new_maximum = fmaxf(new_maximum, scores[h][u]);
            }
            const float shrink = exp2f(maximum[h] - new_maximum);
            total[h] *= shrink;
#pragma unroll
            for (int i = 0; i < R::PER_LANE; ++i) {
#pragma unroll
                for (int j = 0; j < R::WIDTH; ++j) weighted[h][i][j] *= shrink;
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const bool inside = turn + u * R::TEAMS + team < end;
                scores[h][u] = inside ? exp2f(scores[h][u] - new_maximum) : 0.0f;
                total[h] += scores[h][u];
            }
            maximum[h] = new_maximum;
        }

#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
            for (int i = 0; i < R::PER_LANE; ++i) {
                float value[R::WIDTH];
                unpack<T>(values[u][i], value);
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
#pragma unroll
                    for (int j = 0; j < R::WIDTH; ++j) weighted[h][i][j] += scores[h][u] * value[j];
                }
            }
        }
    }

    // Merge the teams: bring all to the common maximum, then add.
    __shared__ float team_maximum[R::TEAMS][HEADS], team_total[R::TEAMS][HEADS];
    __shared__ float team_weighted[R::TEAMS][HEADS][D];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        team_maximum[team][h] = maximum[h];
        team_total[team][h] = total[h];
#pragma unroll
        for (int i = 0; i < R::PER_LANE; ++i) {
            const int vector = i * R::LANES + lane;
            if (vector >= R::VECTORS) continue;
#pragma unroll
            for (int j = 0; j < R::WIDTH; ++j) {
                team_weighted[team][h][vector * R::WIDTH + j] = weighted[h][i][j];
            }
        }
    }
    __syncthreads();

    for (int index = threadIdx.x; index < heads * D; index += THREADS) {
        const int h = index / D, column = index % D;
        float highest = LOWEST, sum = 0.0f, result = 0.0f;
        for (int t = 0; t < R::TEAMS; ++t) highest = fmaxf(highest, team_maximum[t][h]);
        for (int t = 0; t < R::TEAMS; ++t) {
            const float weight = exp2f(team_maximum[t][h] - highest);
            sum += weight * team_total[t][h];
            result += weight * team_weighted[t][h][column];
        }
        result = sum > 0.0f ? result / sum : 0.0f;  // no token at all: zeros
        const int64_t row = int64_t(sequence) * a.num_heads + first_head + h;
        if (a.num_splits == 1) {
            static_cast<T*>(a.out)[row * D + column] = from_float<T>(result);
        } else {
            a.partial[(row * a.num_splits + split) * D + column] = result;
            if (column == 0) a.log_sums[row * a.num_splits + split] = highest + log2f(sum);
        }
    }
}

// One block merges one head's splits: their average weighted by each one's sum of exponentials.
template <typename T, int D>
__global__ void combine_kernel(const Arguments a) {
    const int64_t row = int64_t(blockIdx.y) * a.num_heads + blockIdx.x;
    const int length = a.context_lens[blockIdx.y];
    const int chunk = tokens_per_split(length, a.num_splits);
    const int used_splits = (length + chunk - 1) / chunk;
    const float* log_sums = a.log_sums + row * a.num_splits;
    const float* partial = a.partial + row * a.num_splits * D;

    float highest = LOWEST, sum = 0.0f, result = 0.0f;
    for (int s = 0; s < used_splits; ++s) highest = fmaxf(highest, log_sums[s]);
    for (int s = 0; s < used_splits; ++s) {
        const float weight = exp2f(log_sums[s] - highest);
        sum += weight;
        result += weight * partial[s * D + threadIdx.x];
    }
    result = sum > 0.0f ? result / sum : 0.0f;
    static_cast<T*>(a.out)[row * D + threadIdx.x] = from_float<T>(result);
}

// One block copies one token's keys and values to its slot. Bytes are bytes: no type needed.
__global__ void reshape_and_cache_kernel(const uint4* k, const uint4* v, uint4* k_cache,
                                         uint4* v_cache, const int64_t* slot_mapping,
                                         int64_t k_stride, int64_t v_stride, int row_vectors) {
    const int64_t token = blockIdx.x;
    const int64_t slot = slot_mapping[token];
    if (slot < 0) return;
    for (int i = threadIdx.x; i < row_vectors; i += blockDim.x) {
        k_cache[slot * row_vectors + i] = k[token * k_stride + i];
        v_cache[slot * row_vectors + i] = v[token * v_stride + i];
    }
}

template <typename T, int D, int HEADS>
void launch_decode(const Arguments& a, cudaStream_t stream) {
    const int pieces = (a.num_heads / a.num_kv_heads + HEADS - 1) / HEADS;
    const dim3 grid(a.num_kv_heads * pieces, a.batch, a.num_splits);
    decode_kernel<T, D, HEADS><<<grid, THREADS, 0, stream>>>(a);
    if (a.num_splits > 1) {
        combine_kernel<T, D><<<dim3(a.num_heads, a.batch), D, 0, stream>>>(a);
    }
}

template <typename T, int D>
void launch_for_group(const Arguments& a, cudaStream_t stream) {
    const int group = a.num_heads / a.num_kv_heads;
    if (group == 1) return launch_decode<T, D, 1>(a, stream);
    if (group == 2) return launch_decode<T, D, 2>(a, stream);
    launch_decode<T, D, 4>(a, stream);  // any other ratio in pieces of up to 4 heads
}

}  // namespace

// Each returns a cudaError_t. dtype: 0 float32, 1 float16, 2 bfloat16.
extern "C" int folovllm_paged_attention(int dtype, const void* q, const void* k_cache,
                                        const void* v_cache, const int* block_tables,
                                        const int* context_lens, void* out, float* partial,
                                        float* log_sums, float scale_log2, int batch,
                                        int num_heads, int num_kv_heads, int block_size,
                                        int num_splits, int64_t q_stride, int64_t table_stride,
                                        cudaStream_t stream) {
    const Arguments a{q,          k_cache,    v_cache,    block_tables, context_lens, out,
                      partial,    log_sums,   scale_log2, batch,        num_heads,    num_kv_heads,
                      block_size, num_splits, q_stride,   table_stride};
    switch (dtype) {
        case 0: launch_for_group<float, HEAD_SIZE>(a, stream); break;
        case 1: launch_for_group<__half, HEAD_SIZE>(a, stream); break;
        case 2: launch_for_group<__nv_bfloat16, HEAD_SIZE>(a, stream); break;
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

// Rows of 16-byte vectors: row_vectors of them, k_stride and v_stride vectors apart in k and v.
extern "C" int folovllm_reshape_and_cache(const void* k, const void* v, void* k_cache,
                                          void* v_cache, const int64_t* slot_mapping,
                                          int num_tokens, int64_t k_stride, int64_t v_stride,
                                          int row_vectors, cudaStream_t stream) {
    const int threads = row_vectors < 256 ? (row_vectors + 31) / 32 * 32 : 256;
    reshape_and_cache_kernel<<<num_tokens, threads, 0, stream>>>(
        static_cast<const uint4*>(k), static_cast<const uint4*>(v), static_cast<uint4*>(k_cache),
        static_cast<uint4*>(v_cache), slot_mapping, k_stride, v_stride, row_vectors);
    return cudaGetLastError();
}

extern "C" const char* folovllm_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
