// Products of few rows with 4-bit weights in CUDA C++: y[M, N] = x[M, K] @ W.T + bias, M <= 16.
//
// Such a product takes as long as its weight takes to arrive, so memory must never be idle, and
// what has arrived must be multiplied faster than more can come.
//
//   tile      16 rows of the weight; window: 32 inputs of each of a block's four planes: 1 KB of a
//             tile's words (see int4_layout.py), which lie one behind the other along K
//   cluster   of 1 to 8 thread blocks: they have the same tiles, one after the other, and share K.
//             All clusters run at once, one thread block on a multiprocessor
//   ring      of slots in shared memory; the copy engine fills one with a thread block's share of a
//             tile: words, scales, zero points
//   producer  one warp: it has slots filled, a few ahead of what has arrived. Not all at once: what
//             is asked for later, as x is, has to wait for all that was asked for before
//   piece     WINDOWS neighbouring windows, what one of the next warps multiplies: always the same
//             ones, so that it reads x once, into registers. Its sums replace its words in the slot
//   finishers a few more warps: they add the sums of a tile's pieces and store the result or, in a
//             cluster, send it to the thread block that adds and stores the sums of this tile
//
// All sums are added in the same order, whatever comes first. Nobody waits for memory twice:
// weights are requested while the kernel before this one still runs (programmatic dependent
// launch), and x is loaded while they arrive.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

#include "hopper.cuh"

namespace {

constexpr int TILE_ROWS = 16;
constexpr int WINDOW_BYTES = 1024;  // of words: two tiles of 512
constexpr int FRAGMENT_BYTES = 512;  // sums of 16 rows and 8 columns: four of each lane
constexpr int PLANES = 4;

struct Arguments {
    const void* x;          // [rows, inputs]
    const uint8_t* words;   // of Int4Weights
    const uint8_t* scales;  // float16 or float32
    const uint8_t* zeros;   // or null: every zero point is 8
    const void* bias;       // or null
    void* y;                // [rows, features]
    int rows, features, inputs;
    int windows, parts;     // of a tile; parts have a scale of their own
    int block_bits, part_bits;  // log2 of the windows of a block's plane, and of a part
    int cluster_bits;           // log2 of the thread blocks of a cluster
    int tiles, more_tiles;      // of each cluster; so many have one more
    int pieces, more_pieces;    // of each thread block of a cluster; so many have one more
    int scale_bytes;        // of one scale: 2 or 4
    int warps_k, warps_n;   // warps that share K; groups of those, which take turns with the tiles
    int finishers;          // warps
    int slots, slot_bytes, scales_at, zeros_at;  // the latter within a slot
    int ahead;              // slots that are under way at the most
    int sums_at, inbox_at, ring_at;  // within shared memory
};

// What a thread block multiplies.
struct Share {
    int first_tile, tiles;
    int first_window, windows;
    int first_part, parts;
};

// ---- PTX, where C++ has no word for it ----

// Relaxed: nothing but barriers, which have a fence of their own, was written before.
__device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Store to the same place in the shared memory of a thread block of the cluster, whose barrier
// counts the bytes that have come.
__device__ void send(uint32_t address, uint32_t barrier, uint32_t rank, float4 value) {
    asm volatile(
        "{\n.reg .b32 place, counter;\n"
        "mapa.shared::cluster.u32 place, %0, %2;\n"
        "mapa.shared::cluster.u32 counter, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
        " [place], {%3, %4, %5, %6}, [counter];\n}"
        ::"r"(address), "r"(barrier), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z),
        "f"(value.w) : "memory");
}

// Now, not where the compiler thinks it is soon enough.
__device__ uint4 load_words(const uint8_t* from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared_address(from)));
    return v;
}

__device__ void copy_to_shared(uint32_t to, const uint8_t* from, int bytes, uint32_t barrier,
                               uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// ---- unpacking and multiplying ----

// A nibble enters the product as factor * (offset + nibble): to take offset and zero point away
// from every number would cost as much as to multiply them. They are taken away from the sums, as
// often as the sum over x says.
template <bool BFLOAT16>
__device__ constexpr float offset_of(int plane) {
    return BFLOAT16 ? 128.0f : plane % 2 ? 64.0f : 0.0f;
}
template <bool BFLOAT16>
__device__ constexpr float factor_of(int plane) {
    return BFLOAT16 || plane % 2 == 0 ? 1.0f : 16.0f;
}

// Two nibbles at a time of a byte's low and high plane, without rounding. In the last bits of 128
// as bfloat16 and of 1024 as float16 they add to it. float16 has room for a byte: its high nibble
// counts 16 times, and the low one is what the high one leaves of it.
template <bool BFLOAT16>
__device__ void unpack(uint32_t words, int byte, uint32_t& low, uint32_t& high) {
    if constexpr (BFLOAT16) {
        // (words & mask) | number
        asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(low) : "r"(words >> 8 * byte));
        asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(high)
            : "r"(words >> 8 * byte >> 4));
    } else {
        const uint32_t both = __byte_perm(words, 0x64646464, byte ? 0x4341 : 0x4240);
        high = both & 0xfff0fff0;
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(low) : "r"(both), "r"(high));
    }
}

template <bool BFLOAT16>
__device__ void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t low,
                             uint32_t high) {
#define MMA(TYPE)                                                                       \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                  \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                    \
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(low), "r"(high))
    if constexpr (BFLOAT16) {
        MMA("bf16");
    } else {
        MMA("f16");
    }
#undef MMA
}

// A warp's piece of x, as the right side of the products.
template <int WINDOWS, int COLUMNS>
struct Inputs {
    // Where registers are few, sums are in shared memory.
    static constexpr bool SHARED = WINDOWS * COLUMNS > 2;

    uint4 values[WINDOWS][PLANES][COLUMNS];  // inputs 8 * c to 8 * c + 7 of a window, row g
    float2 sums[SHARED ? 1 : PLANES * COLUMNS];
    float2* shared_sums;  // [PLANES * COLUMNS][4]

    // Of a plane's inputs in the rows 2 * c and 2 * c + 1.
    __device__ float2& sum(int plane, int m) {
        const int place = plane * COLUMNS + m;
        if constexpr (SHARED) return shared_sums[place * 4 + threadIdx.x % 4];
        return sums[SHARED ? 0 : place];
    }
};

template <int WINDOWS, int COLUMNS>
__device__ void load_inputs(const Arguments& a, int first_window, Inputs<WINDOWS, COLUMNS>& x) {
    const int row = threadIdx.x % 32 / 4, first = threadIdx.x % 4 * 8;
#pragma unroll
    for (int v = 0; v < WINDOWS; ++v) {
        const int window = first_window + v;
        const int block = window >> a.block_bits;
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
            const int windows_before = ((block * (PLANES - 1) + plane) << a.block_bits) + window;
            const int k = windows_before * 32 + first;
#pragma unroll
            for (int m = 0; m < COLUMNS; ++m) {
                x.values[v][plane][m] = {0, 0, 0, 0};
                if (m * 8 + row < a.rows && k < a.inputs) {
                    // From the L2 cache: this multiprocessor's own may hold what x was before.
                    const auto* from = static_cast<const uint16_t*>(a.x);
                    const int64_t place = int64_t(m * 8 + row) * a.inputs + k;
                    x.values[v][plane][m] = __ldcg(reinterpret_cast<const uint4*>(from + place));
                }
            }
        }
    }
}

template <bool BFLOAT16, int WINDOWS, int COLUMNS>
__device__ void add_inputs(Inputs<WINDOWS, COLUMNS>& x) {
    constexpr uint32_t ONES = BFLOAT16 ? 0x3f803f80 : 0x3c003c00;
    const uint32_t ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
    for (int i = 0; i < PLANES * COLUMNS; ++i) {
        float sums[4] = {};
#pragma unroll
        for (int v = 0; v < WINDOWS; ++v) {
            const uint4 right = x.values[v][i / COLUMNS][i % COLUMNS];
            multiply_add<BFLOAT16>(sums, ones, right.x, right.y);
            multiply_add<BFLOAT16>(sums, ones, right.z, right.w);
        }
        x.sum(i / COLUMNS, i % COLUMNS) = {sums[0], sums[1]};
    }
    __syncwarp();
}

// Scales of a lane's rows g and 8 + g, of a byte's low and high plane.
template <bool COMMON>
__device__ void load_scales(const uint8_t* from, int scale_bytes, int byte, float (&scale)[2][2]) {
    if (!COMMON && scale_bytes == 4) {
        const float4 four = reinterpret_cast<const float4*>(from)[byte];
        scale[0][0] = four.x, scale[0][1] = four.y, scale[1][0] = four.z, scale[1][1] = four.w;
    } else {
        const uint2 packed = reinterpret_cast<const uint2*>(from)[byte];
        const float2 low = __half22float2(reinterpret_cast<const __half2&>(packed.x));
        const float2 high = __half22float2(reinterpret_cast<const __half2&>(packed.y));
        scale[0][0] = low.x, scale[0][1] = low.y, scale[1][0] = high.x, scale[1][1] = high.y;
    }
}

// Their zero points: the last four bits of numbers that stand for nibbles, too.
__device__ void load_zeros(const uint8_t* from, int byte, float (&zero)[2][2]) {
    const uint2 packed = reinterpret_cast<const uint2*>(from)[byte];
    zero[0][0] = packed.x & 15, zero[0][1] = packed.x >> 16 & 15;
    zero[1][0] = packed.y & 15, zero[1][1] = packed.y >> 16 & 15;
}

// What one warp does with a slot: a piece's sums in place of its words.
template <bool BFLOAT16, bool COMMON, int WINDOWS, int COLUMNS>
__device__ void multiply_piece(const Arguments& a, uint8_t* words_at, const uint8_t* scales_at,
                               const uint8_t* zeros_at, Inputs<WINDOWS, COLUMNS>& x) {
    uint4 words[2 * WINDOWS];
#pragma unroll
    for (int i = 0; i < 2 * WINDOWS; ++i) words[i] = load_words(words_at + i * 512);
    float sums[COLUMNS][4] = {};
    // Products that follow each other add to different sums: they need not wait for each other.
    constexpr int AT_ONCE = WINDOWS * COLUMNS > 2 ? 2 : PLANES;
#pragma unroll
    for (int first = 0; first < PLANES; first += AT_ONCE) {
        float products[AT_ONCE][COLUMNS][4] = {};
#pragma unroll
        for (int i = 0; i < 2 * WINDOWS; ++i) {
            uint32_t left[AT_ONCE][4];  // (r, hi): 00, 10, 01, 11
#pragma unroll
            for (int p = 0; p < AT_ONCE; p += 2) {
                const int byte = (first + p) / 2;
                unpack<BFLOAT16>(words[i].x, byte, left[p][0], left[p + 1][0]);
                unpack<BFLOAT16>(words[i].z, byte, left[p][1], left[p + 1][1]);
                unpack<BFLOAT16>(words[i].y, byte, left[p][2], left[p + 1][2]);
                unpack<BFLOAT16>(words[i].w, byte, left[p][3], left[p + 1][3]);
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE * COLUMNS; ++j) {
                const int p = j / COLUMNS, m = j % COLUMNS;
                const uint4 right = x.values[i / 2][first + p][m];
                multiply_add<BFLOAT16>(products[p][m], left[p], i % 2 ? right.z : right.x,
                                       i % 2 ? right.w : right.y);
            }
        }
#pragma unroll
        for (int p = 0; p < AT_ONCE; p += 2) {
            float scale[2][2], zero[2][2] = {{8, 8}, {8, 8}};
            load_scales<COMMON>(scales_at, a.scale_bytes, (first + p) / 2, scale);
            if (!COMMON && a.zeros) load_zeros(zeros_at, (first + p) / 2, zero);
#pragma unroll
            for (int j = 0; j < 2 * COLUMNS; ++j) {
                const int high = j / COLUMNS, m = j % COLUMNS, plane = first + p + high;
                const float factor = factor_of<BFLOAT16>(plane);
                const float2 inputs = x.sum(plane, m);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float taken = -factor * (offset_of<BFLOAT16>(plane) + zero[high][i / 2]);
                    const float product =
                        fmaf(i % 2 ? inputs.y : inputs.x, taken, products[p + high][m][i]);
                    sums[m][i] = fmaf(product, scale[high][i / 2] / factor, sums[m][i]);
                }
            }
        }
    }
    // A lane's sums lie where its own first words did, so that no other one still needs these.
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < COLUMNS; ++m) {
        if (m * 8 + column < a.rows) {
            *reinterpret_cast<float4*>(words_at + m * FRAGMENT_BYTES) = {
                sums[m][0], sums[m][1], sums[m][2], sums[m][3]};
        }
    }
}

// ---- the parts of the kernel ----

template <int WINDOWS>
__device__ Share share_of(const Arguments& a) {
    const int cluster = blockIdx.x >> a.cluster_bits;
    const int rank = blockIdx.x & ((1 << a.cluster_bits) - 1);
    Share share;
    share.first_tile = cluster * a.tiles + min(cluster, a.more_tiles);
    share.tiles = a.tiles + (cluster < a.more_tiles);
    share.first_window = (rank * a.pieces + min(rank, a.more_pieces)) * WINDOWS;
    share.windows = (a.pieces + (rank < a.more_pieces)) * WINDOWS;
    share.first_part = share.first_window >> a.part_bits;
    share.parts = ((share.first_window + share.windows - 1) >> a.part_bits) + 1 - share.first_part;
    return share;
}

// One thread has a slot filled with the thread block's share of a tile.
__device__ void request(const Arguments& a, const Share& share, int tile, uint32_t slot,
                        uint32_t barrier) {
    uint64_t policy;  // weights are read once: they may leave the L2 cache first
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const int64_t row = share.first_tile + tile;
    const int words = share.windows * WINDOW_BYTES;
    const int scales = share.parts * 64 * a.scale_bytes;
    const int zeros = a.zeros ? share.parts * 128 : 0;
    barrier_expect(barrier, words + scales + zeros);
    copy_to_shared(slot, a.words + (row * a.windows + share.first_window) * WINDOW_BYTES, words,
                   barrier, policy);
    const int64_t part = row * a.parts + share.first_part;
    copy_to_shared(slot + a.scales_at, a.scales + part * 64 * a.scale_bytes, scales, barrier,
                   policy);
    if (zeros) copy_to_shared(slot + a.zeros_at, a.zeros + part * 128, zeros, barrier, policy);
}

template <bool BFLOAT16>
__device__ void store_result(const Arguments& a, int tile, int m, const float4& sums) {
    using T = std::conditional_t<BFLOAT16, __nv_bfloat16, __half>;
    const int lane = threadIdx.x % 32;
    const float values[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int feature = tile * TILE_ROWS + i / 2 * 8 + lane / 4;
        const int row = m * 8 + lane % 4 * 2 + i % 2;
        if (row >= a.rows || feature >= a.features) continue;
        const float bias = a.bias ? float(static_cast<const T*>(a.bias)[feature]) : 0.0f;
        static_cast<T*>(a.y)[int64_t(row) * a.features + feature] = T(values[i] + bias);
    }
}

// Sums of `count` fragments, `stride` bytes apart, in their order.
__device__ float4 add_up(const uint8_t* from, int count, int stride) {
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
        const float4 one = *reinterpret_cast<const float4*>(from + i * stride);
        sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
    }
    return sum;
}

// More registers for x leave fewer threads. A multiprocessor's are given to four warps at a time.
constexpr int most_threads(int windows, int columns, bool common) {
    const int held = windows * columns;
    if (held == 8) return 8 * 32;
    if (held == 4) return (common ? 16 : 12) * 32;
    if (held == 2) return (columns == 2 ? 16 : 20) * 32;
    return 24 * 32;
}

// COMMON: scales in float16, every zero point 8. WINDOWS: of a piece; they share a scale in each
// plane. COLUMNS: rows of x, in eights.
template <bool BFLOAT16, bool COMMON, int WINDOWS, int COLUMNS>
__global__ void __launch_bounds__(most_threads(WINDOWS, COLUMNS, COMMON))
    few_rows_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) uint8_t shared[];
    let_next_begin();
    const Share share = share_of<WINDOWS>(a);
    const int pieces = share.windows / WINDOWS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int size = 1 << a.cluster_bits, rank = blockIdx.x & (size - 1);
    const int first_finisher = a.warps_k * a.warps_n, producer = warps - 1;
    uint8_t* const ring = shared + a.ring_at;
    uint8_t* const inbox = shared + a.inbox_at;
    const uint32_t full = shared_address(shared), done = full + a.slots * 8;  // barriers of slots
    const uint32_t empty = done + a.slots * 8, received = empty + a.slots * 8;

    if (threadIdx.x == producer * 32) {
        for (int slot = 0; slot < a.slots; ++slot) {
            barrier_init(full + slot * 8, 1);  // and as many bytes as it expects
            barrier_init(done + slot * 8, pieces);
            barrier_init(empty + slot * 8, 1);
        }
        barrier_init(received, 1);
        // A fragment from each for a tile; a lane has two columns of it.
        const int own_tiles = (share.tiles - rank + size - 1) >> a.cluster_bits;
        barrier_expect(received, own_tiles * size * ((a.rows + 1) / 2) * (8 * 16));
        fence_barriers();
    }
    __syncthreads();
    if (size > 1) cluster_arrive();

    // A slot's phases are its tiles, and the same warps always have it: they miss no phase.
    uint32_t parity = 0;
    if (warp == producer) {
        if (lane == 0) {
            uint32_t arrived = 0, arrived_parity = 0;
            for (int first = 0; first < share.tiles; first += a.slots, parity ^= 1) {
                for (int i = 0; i < min(a.slots, share.tiles - first); ++i) {
                    if (first + i >= a.ahead) {
                        barrier_wait(full + arrived * 8, arrived_parity);
                        if (++arrived == a.slots) arrived = 0, arrived_parity ^= 1;
                    }
                    if (first > 0) {
                        barrier_wait(empty + i * 8, parity ^ 1);
                        fence_copies();  // sums lie there, written in the ordinary way
                    }
                    request(a, share, first + i, shared_address(ring + i * a.slot_bytes),
                            full + i * 8);
                }
            }
        }
        __syncwarp();
    }
    // Until here nothing depended on the kernel before; from here on x and y do.
    wait_for_inputs();

    if (warp < first_finisher) {
        int piece = warp, group = 0;
        for (; piece >= a.warps_k; piece -= a.warps_k) ++group;
        const int window = share.first_window + piece * WINDOWS;
        const int part = (window >> a.part_bits) - share.first_part;
        const int row = lane / 4 * 8;
        const int words_at = piece * WINDOWS * WINDOW_BYTES + lane * 16;
        const int scales_at = a.scales_at + (part * 64 + row) * a.scale_bytes;
        const int zeros_at = a.zeros_at + (part * 64 + row) * 2;
        if (piece < pieces) {
            Inputs<WINDOWS, COLUMNS> x;
            x.shared_sums =
                reinterpret_cast<float2*>(shared + a.sums_at) + warp * PLANES * COLUMNS * 4;
            load_inputs(a, window, x);
            add_inputs<BFLOAT16>(x);
            for (int first = 0; first < share.tiles; first += a.slots, parity ^= 1) {
                for (int i = group; i < min(a.slots, share.tiles - first); i += a.warps_n) {
                    uint8_t* const slot = ring + i * a.slot_bytes;
                    barrier_wait(full + i * 8, parity);
                    multiply_piece<BFLOAT16, COMMON>(a, slot + words_at, slot + scales_at,
                                                     slot + zeros_at, x);
                    __syncwarp();
                    if (lane == 0) barrier_arrive(done + i * 8);
                }
            }
        }
    }
    if (size > 1) cluster_wait();  // the others have begun: they have an inbox
    if (warp >= first_finisher && warp < producer) {
        for (int first = 0; first < share.tiles; first += a.slots, parity ^= 1) {
            for (int i = warp - first_finisher; i < min(a.slots, share.tiles - first);
                 i += a.finishers) {
                const int tile = first + i;
                const uint8_t* const slot = ring + i * a.slot_bytes;
                barrier_wait(done + i * 8, parity);
                float4 sums[COLUMNS];
#pragma unroll
                for (int m = 0; m < COLUMNS; ++m) {
                    sums[m] = add_up(slot + m * FRAGMENT_BYTES + lane * 16, pieces,
                                     WINDOWS * WINDOW_BYTES);
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + i * 8);
#pragma unroll
                for (int m = 0; m < COLUMNS; ++m) {
                    if (size == 1) {
                        store_result<BFLOAT16>(a, share.first_tile + tile, m, sums[m]);
                    } else if (m * 8 + lane % 4 * 2 < a.rows) {
                        // To the thread block whose tile this is: a fragment from each of them.
                        const int place = ((tile & -size) + rank) * COLUMNS + m;
                        send(shared_address(inbox + place * FRAGMENT_BYTES + lane * 16), received,
                             tile & (size - 1), sums[m]);
                    }
                }
            }
        }
    }
    if (size == 1) return;
    barrier_wait(received, 0);
    for (int i = warp; i * size + rank < share.tiles; i += warps) {
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m) {
            const uint8_t* from = inbox + (i * size * COLUMNS + m) * FRAGMENT_BYTES + lane * 16;
            const float4 sums = add_up(from, size, COLUMNS * FRAGMENT_BYTES);
            store_result<BFLOAT16>(a, share.first_tile + i * size + rank, m, sums);
        }
    }
}

using Kernel = void (*)(Arguments);

template <bool BFLOAT16, bool COMMON, int COLUMNS>
Kernel kernel_for(int windows) {
    switch (windows) {
        case 1: return few_rows_kernel<BFLOAT16, COMMON, 1, COLUMNS>;
        case 2: return few_rows_kernel<BFLOAT16, COMMON, 2, COLUMNS>;
        case 4: return few_rows_kernel<BFLOAT16, COMMON, 4, COLUMNS>;
        default: return nullptr;
    }
}

template <bool BFLOAT16, bool COMMON>
Kernel kernel_for(int windows, int columns) {
    return columns == 1 ? kernel_for<BFLOAT16, COMMON, 1>(windows)
                        : kernel_for<BFLOAT16, COMMON, 2>(windows);
}

Kernel kernel_for(bool bfloat16, bool common, int windows, int columns) {
    if (bfloat16) {
        return common ? kernel_for<true, true>(windows, columns)
                      : kernel_for<true, false>(windows, columns);
    }
    return common ? kernel_for<false, true>(windows, columns)
                  : kernel_for<false, false>(windows, columns);
}

int divide_up(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return divide_up(a, b) * b; }
int log2_of(int power) { return power > 1 ? 1 + log2_of(power / 2) : 0; }

}  // namespace

// Make the kernels ready on this device and count the clusters of 1, 2, 4 and 8 thread blocks that
// run on it at once, one thread block on a multiprocessor. Returns a cudaError_t.
extern "C" int folovllm_int4_few_rows_prepare(int* clusters) {
    for (int i = 0; i < 2 * 2 * 2 * 3; ++i) {
        const Kernel kernel = kernel_for(i % 2, i / 2 % 2, 1 << i / 8, 1 + i / 4 % 2);
        cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_SHARED_BYTES);
        if (error) return error;
        // Also where a thread block takes less: the next kernel's may then begin beside it.
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
        if (error) return error;
    }
    for (int i = 0; i < 4; ++i) {
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {1u << i, 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = 8 * 1024;
        config.blockDim = 256;
        config.dynamicSmemBytes = MOST_SHARED_BYTES;
        config.attrs = &attribute;
        config.numAttrs = 1;
        const Kernel kernel = kernel_for(true, true, 1, 1);
        const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters[i], kernel, &config);
        if (error) return error;
    }
    return cudaSuccess;
}

// Returns a cudaError_t. dtype: 1 float16, 2 bfloat16; plane, parts (of a block): see Int4Weights.
// clusters of `cluster` thread blocks; windows of a piece; warps_n: groups of warps that share K;
// shared_bytes: at most so many; ahead_bytes: at least so many are under way.
extern "C" int folovllm_int4_few_rows(int dtype, const void* x, const void* words,
                                      const void* scales, const void* zeros, const void* bias,
                                      void* y, int rows, int features, int inputs, int tiles,
                                      int k_tiles, int plane, int parts, int scale_bytes,
                                      int clusters, int cluster, int windows, int warps_n,
                                      int finishers, int shared_bytes, int ahead_bytes,
                                      int use_pdl, cudaStream_t stream) {
    const int columns = divide_up(rows, 8);
    if (columns < 1 || columns > 2 || (dtype != 1 && dtype != 2)) return cudaErrorInvalidValue;
    const bool common = !zeros && scale_bytes == 2;
    const Kernel kernel = kernel_for(dtype == 2, common, windows, columns);
    const int windows_per_part = plane / 32 / parts;
    const int pieces = k_tiles / 2 / windows;  // of all thread blocks of a cluster
    if (!kernel || windows > windows_per_part || pieces < cluster) return cudaErrorInvalidValue;

    Arguments a = {};
    a.x = x, a.bias = bias, a.y = y;
    a.words = static_cast<const uint8_t*>(words);
    a.scales = static_cast<const uint8_t*>(scales);
    a.zeros = static_cast<const uint8_t*>(zeros);
    a.rows = rows, a.features = features, a.inputs = inputs;
    a.windows = k_tiles / 2, a.parts = a.windows / windows_per_part;
    a.block_bits = log2_of(plane / 32), a.part_bits = log2_of(windows_per_part);
    a.cluster_bits = log2_of(cluster);
    a.tiles = tiles / clusters, a.more_tiles = tiles % clusters;
    a.pieces = pieces / cluster, a.more_pieces = pieces % cluster;
    a.scale_bytes = scale_bytes;
    a.warps_k = divide_up(pieces, cluster), a.warps_n = warps_n;

    // A slot as large as the largest share of a tile; the inbox has a fragment of each tile.
    const int words_bytes = a.warps_k * windows * WINDOW_BYTES;
    const int most_parts = divide_up(a.warps_k * windows, windows_per_part) + 1;
    a.scales_at = words_bytes;
    a.zeros_at = a.scales_at + most_parts * 64 * scale_bytes;
    a.slot_bytes = a.zeros_at + (zeros ? most_parts * 128 : 0);
    const int most_tiles = divide_up(tiles, clusters);
    a.sums_at = round_up(24 * most_tiles + 8, 128);  // enough for the barriers of all slots
    a.inbox_at = a.sums_at + a.warps_k * warps_n * columns * 128;
    a.ring_at = a.inbox_at;
    if (cluster > 1) a.ring_at += round_up(most_tiles, cluster) * columns * FRAGMENT_BYTES;
    shared_bytes = shared_bytes < MOST_SHARED_BYTES ? shared_bytes : MOST_SHARED_BYTES;
    a.slots = (shared_bytes - a.ring_at) / a.slot_bytes;
    if (a.slots >= most_tiles) {
        a.slots = most_tiles;
    } else if (a.slots > warps_n) {
        a.slots -= a.slots % warps_n;  // as many for each group of warps
    }
    a.ahead = 1 + divide_up(ahead_bytes, a.slot_bytes);
    if (a.ahead > a.slots) a.ahead = a.slots;
    a.finishers = finishers;
    if (shared_bytes < a.ring_at + a.slot_bytes) return cudaErrorInvalidValue;

    cudaLaunchConfig_t config = {};
    config.gridDim = clusters * cluster;
    config.blockDim = 32 * (a.warps_k * warps_n + finishers + 1);
    config.dynamicSmemBytes = a.ring_at + a.slots * a.slot_bytes;
    config.stream = stream;
    cudaLaunchAttribute attributes[2];
    config.attrs = attributes;
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {unsigned(cluster), 1, 1};
    }
    if (use_pdl) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, a);
    if (error) cudaGetLastError();  // reported once, here
    return error;
}

extern "C" const char* folovllm_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
