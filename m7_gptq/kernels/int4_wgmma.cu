// Products of more than a few rows with 4-bit weights on Hopper: y[M, N] = x[M, K] @ W.T + bias.
//
// With many rows tensor cores set the pace. They take the left side of a product from registers
// (wgmma), and there 4-bit weights become numbers: nothing but x is ever in shared memory in full
// precision, and no weight in memory. While one group of warps unpacks, others multiply.
//
//   group     four warps with 64 rows of the weight, 16 each (a row tile of int4_layout.py), and
//             TOKENS rows of x, which they multiply by wgmma.m64nTOKENSk16
//   block     of threads: 1 to 4 groups with neighbouring rows of the weight and the same rows of
//             x, and warps that only have memory copied: words; their scales; x
//   stage     two windows of 32 inputs of each of the four planes: 2 KB of a row tile's words, with
//             their scales and zero points; and for each plane a box of x, 64 inputs wide
//   rings     one of stages of words, one of boxes of x, both in shared memory. Copies fill them,
//             full and empty barriers say how far both sides are
//   cluster   of thread blocks that share K, where there are few tiles of y: their sums are added
//             at the end, always in the same order
//
// Without clusters there are as many thread blocks as multiprocessors, and they have one tile of y
// after the other: the first copies for the next are under way while sums are stored.

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>

#include "hopper.cuh"
#include "int4_wgmma.cuh"
#include "wgmma.cuh"

namespace {

constexpr int BOX_INPUTS = 64;  // 128 bytes of a row of x: what the copy engine swizzles
constexpr int FRAGMENT_BYTES = 512;  // sums of 16 rows of the weight and 8 of x: four of each lane
constexpr int WORD_SLOTS = 4;        // stages
constexpr int MOST_X_SLOTS = 48;     // barriers of both rings have 1 KB

// ---- PTX, where C++ has no word for it ----

__device__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Nobody ends before the others have read its sums. What was written need not be seen: relaxed, or
// all would wait for their stores of y.
__device__ void cluster_end() {
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// The same place in the shared memory of a thread block of the cluster.
__device__ uint32_t address_in(uint32_t address, uint32_t rank) {
    uint32_t place;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(address), "r"(rank));
    return place;
}

__device__ void copy_to_shared(uint32_t to, const uint8_t* from, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier) : "memory");
}

// A box of x that starts at an input and a row; what lies outside of x is zero.
__device__ void copy_box(uint32_t to, const CUtensorMap& x, int input, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(&x), "r"(input), "r"(row), "r"(barrier) : "memory");
}

__device__ float4 load_sums(uint32_t from) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(from) : "memory");
    return v;
}

// A slot of a ring, and the parity of the round. Who empties waits for `parity`; who fills for
// `parity ^ 1`: in the first round slots count as empty.
struct Turn {
    int slot = 0;
    uint32_t parity = 0;

    __device__ void next(int slots) {
        if (++slot == slots) slot = 0, parity ^= 1;
    }
};

// With more rows of x a thread has more sums, and fewer groups fit. Threads that only copy give
// registers away. Who asks for more than is left waits forever: see the kernel's static_assert.
template <int TOKENS>
constexpr int MOST_GROUPS = TOKENS <= 64 ? 4 : TOKENS == 128 ? 3 : 2;
template <int TOKENS>
constexpr int MOST_THREADS = (MOST_GROUPS<TOKENS> + 1) * WARPS * 32;
template <int TOKENS>
constexpr int REGISTERS = TOKENS <= 64 ? 112 : TOKENS == 128 ? 160 : 232;
constexpr int COPYING_REGISTERS = 32;
template <int TOKENS>
constexpr int REGISTERS_AT_LAUNCH = 65536 / MOST_THREADS<TOKENS> / 8 * 8;
template <int TOKENS>
constexpr int TILES_ALONG_X = 2048 / TOKENS;

// What a thread block has to do, and where everything is.
template <int TOKENS>
struct Work {
    static constexpr int BOX_BYTES = TOKENS * BOX_INPUTS * 2;

    const Arguments& a;
    uint8_t* const shared;
    const int rank;                // in the cluster
    const int first_tile, step;    // of y: first_tile, first_tile + step, ...
    const int first_stage, last_stage;
    const uint32_t x_full, x_empty, words_full, words_empty;  // barriers of slots

    __device__ Work(const Arguments& a, uint8_t* shared)
        : a(a), shared(shared), rank(blockIdx.x & ((1 << a.split_bits) - 1)),
          first_tile(blockIdx.x >> a.split_bits), step(gridDim.x >> a.split_bits),
          first_stage(a.stages * rank >> a.split_bits),
          last_stage(a.stages * (rank + 1) >> a.split_bits),
          x_full(shared_address(shared)), x_empty(x_full + a.x_slots * 8),
          words_full(x_empty + a.x_slots * 8), words_empty(words_full + a.word_slots * 8) {}

    __device__ int warps() const { return a.groups * WARPS; }  // that multiply
    __device__ int split() const { return 1 << a.split_bits; }
    // The first row of x and the first row tile of a tile of y. A few tiles along x come with all
    // of the weight, then the next few: these 2,048 rows of x stay in the L2 cache.
    __device__ void place(int tile, int& token, int& row_tile) const {
        constexpr int FEW = TILES_ALONG_X<TOKENS>;
        if (a.token_tiles == 1) {
            token = 0, row_tile = tile * warps();
            return;
        }
        const int before = tile / (a.row_blocks * FEW) * FEW;
        const int few = min(FEW, a.token_tiles - before);
        tile -= before * a.row_blocks;
        token = (before + tile % few) * TOKENS;
        row_tile = tile / few * warps();
    }
    __device__ uint8_t* x_slot(int slot) const { return shared + a.x_at + slot * BOX_BYTES; }
    __device__ uint8_t* word_slot(int slot) const {
        return shared + a.words_at + slot * a.word_slot_bytes;
    }
};

// By one warp.
template <int TOKENS>
__device__ void init_barriers(const Work<TOKENS>& work) {
    const int x_slots = work.a.x_slots, word_slots = work.a.word_slots;
    for (int i = threadIdx.x; i < 2 * (x_slots + word_slots); i += 32) {
        const bool x_full = i < x_slots;
        const bool words_full = i >= 2 * x_slots && i < 2 * x_slots + word_slots;
        // Arrivals. Full: of those who announce bytes, one for x, two for words (words; scales and
        // zero points). Empty: of the warps that read the slot.
        barrier_init(work.x_full + i * 8, x_full ? 1 : words_full ? 2 : work.warps());
    }
    fence_barriers();
}

// A warp's share of what goes into the slots of words: copy(slot, row tile, stage, barrier) by a
// lane for each row tile, of so many bytes. Past the end the last row tile is copied again; what it
// gives is not stored.
template <int TOKENS, typename Copy>
__device__ void copy_stages(const Work<TOKENS>& work, int bytes, const Copy& copy) {
    const Arguments& a = work.a;
    const int lane = threadIdx.x % 32;
    Turn turn;
    for (int tile = work.first_tile; tile < a.tiles; tile += work.step) {
        int token, first_row_tile;
        work.place(tile, token, first_row_tile);
        const int row_tile = min(first_row_tile + lane, a.row_tiles - 1);
        for (int stage = work.first_stage; stage < work.last_stage; ++stage) {
            const uint32_t full = work.words_full + turn.slot * 8;
            barrier_wait(work.words_empty + turn.slot * 8, turn.parity ^ 1);
            if (lane == 0) barrier_expect(full, work.warps() * bytes);
            __syncwarp();
            if (lane < work.warps()) {
                copy(shared_address(work.word_slot(turn.slot)), row_tile, stage, full);
            }
            turn.next(a.word_slots);
        }
    }
}

// Two warps share that work: to ask for a copy takes longer than the copy.
template <int TOKENS>
__device__ void copy_words(const Work<TOKENS>& work) {
    const Arguments& a = work.a;
    const int at = threadIdx.x % 32 * STAGE_WORDS;
    copy_stages(work, STAGE_WORDS, [&](uint32_t slot, int row_tile, int stage, uint32_t full) {
        const int64_t place = int64_t(row_tile) * a.stages + stage;
        copy_to_shared(slot + at, a.words + place * STAGE_WORDS, STAGE_WORDS, full);
    });
}
template <int TOKENS>
__device__ void copy_quantization(const Work<TOKENS>& work) {
    const Arguments& a = work.a;
    const int lane = threadIdx.x % 32, numbers = a.stage_parts * PART_NUMBERS;
    const int scales = numbers * a.scale_bytes, zeros = a.zeros ? numbers * 2 : 0;
    const auto copy = [&](uint32_t slot, int row_tile, int stage, uint32_t full) {
        const int64_t part = int64_t(row_tile) * a.parts + ((stage * 2) >> a.part_bits);
        copy_to_shared(slot + a.scales_at + lane * scales,
                       a.scales + part * (PART_NUMBERS * a.scale_bytes), scales, full);
        if (zeros) {
            copy_to_shared(slot + a.zeros_at + lane * zeros, a.zeros + part * (PART_NUMBERS * 2),
                           zeros, full);
        }
    };
    copy_stages(work, scales + zeros, copy);
}

// x, by one thread.
template <int TOKENS>
__device__ void copy_x(const Work<TOKENS>& work, const CUtensorMap& x) {
    const Arguments& a = work.a;
    Turn turn;
    for (int tile = work.first_tile; tile < a.tiles; tile += work.step) {
        int token, row_tile;
        work.place(tile, token, row_tile);
        for (int stage = work.first_stage; stage < work.last_stage; ++stage) {
            // In windows along K, with B of them in a block's plane: plane p of this one is at
            // 3 * block * B + stage * 2 + p * B.
            const int block = (stage * 2) >> a.block_bits;
            const int before = ((block * (PLANES - 1)) << a.block_bits) + stage * 2;
            for (int plane = 0; plane < PLANES; ++plane) {
                const int input = (before + (plane << a.block_bits)) * 32;
                const uint32_t full = work.x_full + turn.slot * 8;
                const uint32_t slot = shared_address(work.x_slot(turn.slot));
                barrier_wait(work.x_empty + turn.slot * 8, turn.parity ^ 1);
                barrier_expect(full, work.BOX_BYTES);
                copy_box(slot, x, input, token, full);
                turn.next(a.x_slots);
            }
        }
    }
}

// Where a warp is in the rings.
struct Turns {
    Turn x, words;
};

// All stages of a tile: a warp's sums of its row tile and TOKENS rows of x.
template <bool BFLOAT16, bool COMMON, int TOKENS>
__device__ void multiply_stages(const Work<TOKENS>& work, Turns& turns, float (&sums)[TOKENS / 2]) {
    const Arguments& a = work.a;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto release_x = [&](int slot) {
        if (lane == 0) barrier_arrive(work.x_empty + slot * 8);
    };
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sums[i] = 0.0f;
    int used = -1;  // the slot of x that products under way read
    for (int stage = work.first_stage; stage < work.last_stage; ++stage) {
        const uint8_t* const slot = work.word_slot(turns.words.slot);
        uint32_t words[2][4][2];
        barrier_wait(work.words_full + turns.words.slot * 8, turns.words.parity);
        load_stage(shared_address(slot) + warp * STAGE_WORDS, words);
        uint32_t left[2][4][4];  // of two planes: one is multiplied, one unpacked
        Parts<BFLOAT16, COMMON> parts;
        parts.begin_stage(a, slot, warp);
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                if (i % 8 == 0) parts.load(a, slot, warp, i / 8, plane);
                left[plane % 2][i / 4][i % 4] =
                    unpack<BFLOAT16, COMMON>(words[i / 8][i / 2 % 4][i % 2], plane,
                                             parts.row[i % 2]);
            }
            barrier_wait(work.x_full + turns.x.slot * 8, turns.x.parity);
            const uint64_t box = describe(shared_address(work.x_slot(turns.x.slot)));
            begin_multiplying();
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // 16 inputs: 32 bytes
                multiply<BFLOAT16, TOKENS>(sums, left[plane % 2][i], box + i * 2);
            }
            commit();
            wait_for_products<1>();  // those before: their left side is free again, and their box
            if (used >= 0) release_x(used);
            used = turns.x.slot;
            turns.x.next(a.x_slots);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(work.words_empty + turns.words.slot * 8);
        turns.words.next(a.word_slots);
    }
    wait_for_products<0>();
    if (used >= 0) release_x(used);
}

// Add the sums of all thread blocks of a cluster, always in the same order. Each adds and stores
// some of them.
template <bool BFLOAT16, int TOKENS>
__device__ void store_shared_sums(const Work<TOKENS>& work, uint8_t* staging,
                                  const float (&sums)[TOKENS / 2]) {
    const Arguments& a = work.a;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = work.warps();
    // All groups have read the rings, and nothing more comes: sums take their place.
    asm volatile("bar.sync 1, %0;" ::"r"(warps * 32) : "memory");
    constexpr int FRAGMENTS = TOKENS / 8, ROUNDS = TOKENS / ROUND_TOKENS;
    float4* const to =
        reinterpret_cast<float4*>(work.shared + a.x_at + warp * FRAGMENTS * FRAGMENT_BYTES) + lane;
#pragma unroll
    for (int i = 0; i < FRAGMENTS; ++i) {
        to[i * 32] = {sums[i * 4], sums[i * 4 + 1], sums[i * 4 + 2], sums[i * 4 + 3]};
    }
    cluster_sync();
    int first_token, first_row_tile;
    work.place(work.first_tile, first_token, first_row_tile);
    for (int i = warp * work.split() + work.rank; i < warps * ROUNDS; i += warps * work.split()) {
        const int from_warp = i / ROUNDS, round = i % ROUNDS;
        const int token = first_token + round * ROUND_TOKENS;
        if (token >= a.rows) continue;
        const uint32_t from = shared_address(work.shared + a.x_at) + lane * 16
                              + (from_warp * FRAGMENTS + round * 2) * FRAGMENT_BYTES;
        float4 total[2] = {};
#pragma unroll 4
        for (int other = 0; other < work.split(); ++other) {
            const uint32_t place = address_in(from, other);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 one = load_sums(place + half * FRAGMENT_BYTES);
                total[half].x += one.x, total[half].y += one.y;
                total[half].z += one.z, total[half].w += one.w;
            }
        }
        Output<BFLOAT16>(a, staging, first_row_tile + from_warp)
            .store(a, token, total[0], total[1]);
    }
}

template <bool BFLOAT16, bool COMMON, int TOKENS>
__global__ void __launch_bounds__(MOST_THREADS<TOKENS>, 1)
    many_rows_kernel(const __grid_constant__ Arguments a,
                     const __grid_constant__ CUtensorMap x) {
    static_assert(MOST_GROUPS<TOKENS> * REGISTERS<TOKENS> + COPYING_REGISTERS
                  <= (MOST_GROUPS<TOKENS> + 1) * REGISTERS_AT_LAUNCH<TOKENS>);
    extern __shared__ __align__(1024) uint8_t shared[];
    const Work<TOKENS> work(a, shared);
    const int warp = threadIdx.x / 32;
    if (warp == 0) init_barriers(work);
    if (threadIdx.x == work.warps() * 32) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
    }
    __syncthreads();
    if (a.next_at_once) let_next_begin();

    if (warp >= work.warps()) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPYING_REGISTERS));
        if (warp == work.warps()) {
            copy_words(work);  // the kernel before has not written them: no wait_for_inputs
        } else if (warp == work.warps() + 1) {
            copy_quantization(work);  // likewise
        } else if (threadIdx.x == (work.warps() + 2) * 32) {
            wait_for_inputs();
            copy_x(work, x);
        }
        __syncwarp();
        if (a.split_bits > 0) cluster_sync(), cluster_end();  // these count all threads
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS<TOKENS>));
        wait_for_inputs();  // for y, too: the kernel before may still read what lies there
        uint8_t* const staging = shared + a.staging_at + warp * STAGING_BYTES;
        Turns turns;
        for (int tile = work.first_tile; tile < a.tiles; tile += work.step) {
            float sums[TOKENS / 2];
            multiply_stages<BFLOAT16, COMMON>(work, turns, sums);
            if (!a.next_at_once && tile + work.step >= a.tiles) let_next_begin();
            if (a.split_bits > 0) {
                store_shared_sums<BFLOAT16>(work, staging, sums);
                break;  // there is no other tile
            }
            int token, row_tile;
            work.place(tile, token, row_tile);
            const Output<BFLOAT16> output(a, staging, row_tile + warp);
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i += 8) {
                if (token + i * 2 >= a.rows) break;
                output.store(a, token + i * 2, {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]},
                             {sums[i + 4], sums[i + 5], sums[i + 6], sums[i + 7]});
            }
        }
        __syncwarp();
        if (a.split_bits > 0) cluster_end();
    }
}

using Kernel = void (*)(Arguments, CUtensorMap);

template <int TOKENS>
Kernel kernel_for(bool bfloat16, bool common, int groups) {
    if (groups > MOST_GROUPS<TOKENS>) return nullptr;
    if (bfloat16) {
        return common ? many_rows_kernel<true, true, TOKENS>
                      : many_rows_kernel<true, false, TOKENS>;
    }
    return common ? many_rows_kernel<false, true, TOKENS> : many_rows_kernel<false, false, TOKENS>;
}

Kernel kernel_for(bool bfloat16, bool common, int tokens, int groups) {
    switch (tokens) {
        case 32: return kernel_for<32>(bfloat16, common, groups);
        case 64: return kernel_for<64>(bfloat16, common, groups);
        case 128: return kernel_for<128>(bfloat16, common, groups);
        case 256: return kernel_for<256>(bfloat16, common, groups);
        default: return nullptr;
    }
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver, which is loaded already: there is no library to link with.
Encode find_encode() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found,
                                                      cudaEnableDefault, &result);
#endif
    return error || result != cudaDriverEntryPointSuccess ? nullptr
                                                          : reinterpret_cast<Encode>(found);
}

// x[rows, inputs], of which boxes of 64 inputs are copied at once.
bool make_map(CUtensorMap& map, bool bfloat16, const void* x, int rows, int inputs, int tokens) {
    static const Encode encode = find_encode();
    const cuuint64_t sizes[2] = {cuuint64_t(inputs), cuuint64_t(rows)};
    const cuuint64_t stride[1] = {cuuint64_t(inputs) * 2};
    const cuuint32_t box[2] = {BOX_INPUTS, cuuint32_t(tokens)};
    const cuuint32_t steps[2] = {1, 1};
    const auto type = bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return encode
           && !encode(&map, type, 2, const_cast<void*>(x), sizes, stride, box, steps,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

int divide_up(int a, int b) { return (a + b - 1) / b; }
int log2_of(int power) { return power > 1 ? 1 + log2_of(power / 2) : 0; }

}  // namespace

// Make the kernels ready on this device and count the clusters of 1, 2, 4 and 8 thread blocks that
// run on it at once, one thread block on a multiprocessor. Returns a cudaError_t.
extern "C" int folovllm_int4_wgmma_prepare(int* clusters) {
    if (!find_encode()) return cudaErrorNotSupported;
    for (int tokens = 32; tokens <= 256; tokens *= 2) {
        for (int i = 0; i < 4; ++i) {
            const Kernel kernel = kernel_for(i % 2, i / 2, tokens, 1);
            const cudaError_t error = cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_SHARED_BYTES);
            if (error) return error;
        }
    }
    for (int i = 0; i < 4; ++i) {
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {1u << i, 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = 8 * 1024;
        config.blockDim = MOST_THREADS<64>;
        config.dynamicSmemBytes = MOST_SHARED_BYTES;
        config.attrs = &attribute;
        config.numAttrs = 1;
        const cudaError_t error =
            cudaOccupancyMaxActiveClusters(&clusters[i], kernel_for(true, true, 64, 1), &config);
        if (error) return error;
    }
    return cudaSuccess;
}

// Returns a cudaError_t. dtype: 1 float16, 2 bfloat16; plane, parts (of a block): see Int4Weights.
// tokens, groups: of a tile of y; split: thread blocks that share K; blocks: at the most, where
// they do not. next_at_once: see Arguments.
extern "C" int folovllm_int4_wgmma(int dtype, const void* x, const void* words, const void* scales,
                                   const void* zeros, const void* bias, void* y, int rows,
                                   int features, int inputs, int row_tiles, int k_tiles, int plane,
                                   int parts, int scale_bytes, int tokens, int groups, int split,
                                   int blocks, int next_at_once, int use_pdl,
                                   cudaStream_t stream) {
    const bool bfloat16 = dtype == 2;
    const int windows = k_tiles / 2, part_windows = plane / 32 / parts;
    const bool common = !zeros && scale_bytes == 2 && part_windows > 1;
    const Kernel kernel = kernel_for(bfloat16, common, tokens, groups);
    const bool shared_by_few = split >= 1 && split <= 8 && !(split & (split - 1));
    if (dtype < 1 || dtype > 2 || plane < BOX_INPUTS || rows < 1) return cudaErrorInvalidValue;
    if (!kernel || groups < 1 || !shared_by_few || split > windows / 2) {
        return cudaErrorInvalidConfiguration;
    }
    Arguments a = {};
    a.words = static_cast<const uint8_t*>(words);
    a.scales = static_cast<const uint8_t*>(scales);
    a.zeros = static_cast<const uint8_t*>(zeros);
    a.bias = bias, a.y = y;
    a.rows = rows, a.features = features;
    a.row_tiles = row_tiles, a.stages = windows / 2;
    a.block_bits = log2_of(plane / 32), a.part_bits = log2_of(part_windows);
    a.stage_parts = part_windows > 1 ? 1 : 2;
    a.parts = windows / part_windows, a.scale_bytes = scale_bytes;
    a.groups = groups, a.split_bits = log2_of(split), a.next_at_once = next_at_once;
    const int warps = groups * WARPS;
    a.token_tiles = divide_up(rows, tokens);
    a.row_blocks = divide_up(row_tiles, warps);
    a.tiles = a.row_blocks * a.token_tiles;

    a.scales_at = warps * STAGE_WORDS;
    a.zeros_at = a.scales_at + warps * a.stage_parts * PART_NUMBERS * scale_bytes;
    a.word_slot_bytes = a.zeros_at + (zeros ? warps * a.stage_parts * PART_NUMBERS * 2 : 0);
    const int box_bytes = tokens * BOX_INPUTS * 2, staging = warps * STAGING_BYTES;
    a.x_at = 1024;  // the barriers are before
    const int room = MOST_SHARED_BYTES - a.x_at - staging;
    const int stages = divide_up(a.stages, split);  // that a thread block has for a tile
    a.word_slots = std::max(2, std::min({WORD_SLOTS, stages, room / 2 / a.word_slot_bytes}));
    a.x_slots = (room - a.word_slots * a.word_slot_bytes) / box_bytes;
    a.x_slots = std::min({a.x_slots, stages * PLANES, MOST_X_SLOTS});
    if (a.x_slots < 2) return cudaErrorInvalidConfiguration;
    a.words_at = a.x_at + a.x_slots * box_bytes;
    a.staging_at = a.words_at + a.word_slots * a.word_slot_bytes;
    if (split > 1) {  // sums take the place of the rings
        a.staging_at = std::max(a.staging_at, a.x_at + warps * tokens / 8 * FRAGMENT_BYTES);
    }
    if (a.staging_at + staging > MOST_SHARED_BYTES) return cudaErrorInvalidConfiguration;

    CUtensorMap map;
    if (!make_map(map, bfloat16, x, rows, inputs, tokens)) return cudaErrorInvalidValue;
    cudaLaunchConfig_t config = {};
    config.gridDim = split > 1 ? a.tiles * split : std::min(a.tiles, blocks);
    config.blockDim = (warps + WARPS) * 32;
    config.dynamicSmemBytes = a.staging_at + staging;
    config.stream = stream;
    cudaLaunchAttribute attributes[2];
    config.attrs = attributes;
    if (split > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {unsigned(split), 1, 1};
    }
    if (use_pdl) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, a, map);
    if (error) cudaGetLastError();  // reported once, here
    return error;
}

extern "C" const char* folovllm_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
