// What a warp of int4_wgmma.cu does by itself: it makes the left side of products out of words in
// shared memory, and stores their sums.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "hopper.cuh"

namespace {

constexpr int PLANES = 4;
constexpr int TILE_ROWS = 16;  // rows of the weight of a row tile, and of a warp
constexpr int WARPS = 4;       // of a group
constexpr int STAGE_WORDS = 2048;  // bytes of a row tile: four tiles of 64 inputs
constexpr int PART_NUMBERS = 64;   // scales, or zero points, of a row tile: 16 rows, four planes
constexpr int ROUND_TOKENS = 16;   // of sums that a warp stores at once
constexpr int STAGING_BYTES = ROUND_TOKENS * TILE_ROWS * 2;

struct Arguments {
    const uint8_t* words;   // of Int4Weights
    const uint8_t* scales;  // float16 or float32
    const uint8_t* zeros;   // or null: every zero point is 8
    const void* bias;       // or null
    void* y;                // [rows, features]
    int rows, features;
    int row_tiles, stages;      // of the weight
    int block_bits, part_bits;  // log2 of the windows of a block's plane, and of a part
    int parts, scale_bytes;     // of a row tile; they have scales of their own
    int stage_parts;            // of a stage: 1 or 2
    int groups;                 // of a thread block
    int row_blocks, token_tiles, tiles;  // of y: tiles = row_blocks * token_tiles
    int split_bits;             // log2 of the thread blocks of a cluster
    bool next_at_once;          // the next kernel may begin with this one, not towards its end
    int x_slots, word_slots, word_slot_bytes, scales_at, zeros_at;  // the latter within a slot
    int x_at, words_at, staging_at;                                  // within shared memory
};

// ---- unpacking ----

template <bool BFLOAT16>
using Number = std::conditional_t<BFLOAT16, __nv_bfloat16, __half>;
template <bool BFLOAT16>
using Pair = std::conditional_t<BFLOAT16, __nv_bfloat162, __half2>;

template <typename T>
__device__ uint32_t bits(const T& value) {
    static_assert(sizeof(T) == 4);
    return *reinterpret_cast<const uint32_t*>(&value);
}

template <typename T>
__device__ T from_bits(uint32_t value) {
    return *reinterpret_cast<const T*>(&value);
}

template <typename T>
__device__ uint32_t both(T value) {
    const uint32_t one = *reinterpret_cast<const uint16_t*>(&value);
    return __byte_perm(one, one, 0x1010);
}

// What turns nibbles into numbers: of one row of the weight and one part, each twice.
template <bool BFLOAT16>
struct Quantization {
    // A scale is the sum of two numbers of x's dtype, so that its product with a nibble is rounded
    // once. Of a float16 as bfloat16, `low` has the last three bits.
    uint32_t high, low;
    uint32_t zero;  // -(128 + zero point) in bfloat16, -(1024 + zero point) in float16

    __device__ void set_scale(float scale) {
        if constexpr (BFLOAT16) {
            const uint32_t all = __float_as_uint(scale);
            high = __byte_perm(all, all, 0x3232);  // not rounded: what is left is in `low`
            const uint32_t rest = __float_as_uint(scale - __uint_as_float(all & 0xffff0000));
            low = __byte_perm(rest, rest, 0x3232);
        } else {
            const __half top = __half(scale);
            high = both(top), low = both(__half(scale - float(top)));
        }
    }
    // Zero point 8: -136 or -1032.
    __device__ void set_zero() { zero = BFLOAT16 ? 0xc308c308 : 0xe408e408; }
};

// Two nibbles of a plane -> (q - zero point) * scale. In the last bits of 128 as bfloat16 and of
// 1024 as float16 a nibble adds to it; `zero` takes that away again, exactly.
template <bool BFLOAT16, bool COMMON>
__device__ uint32_t unpack(uint32_t words, int plane, const Quantization<BFLOAT16>& of) {
    using Two = Pair<BFLOAT16>;
    uint32_t nibbles;
    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;"  // (words & mask) | number
        : "=r"(nibbles) : "r"(words >> 4 * plane), "n"(BFLOAT16 ? 0x43004300 : 0x64006400));
    const Two q = __hadd2(from_bits<Two>(nibbles), from_bits<Two>(of.zero));
    if constexpr (!BFLOAT16 && COMMON) {
        return bits(__hmul2(q, from_bits<Two>(of.high)));  // nothing is left in `low`
    } else {
        const Two rest = __hmul2(q, from_bits<Two>(of.low));
        return bits(__hfma2(q, from_bits<Two>(of.high), rest));
    }
}

// The `Quantization` of a lane's rows g = lane / 4 and 8 + g, of one part after the other. COMMON:
// scales in float16, every zero point 8, one part for a stage.
template <bool BFLOAT16, bool COMMON>
struct Parts {
    Quantization<BFLOAT16> row[2];
    uint32_t scales[PLANES];  // COMMON: of the stage, for both rows

    __device__ void begin_stage(const Arguments& a, const uint8_t* slot, int row_tile) {
        if constexpr (COMMON) {
            const int place = (row_tile * 8 + threadIdx.x % 32 / 4) * 16;
            const uint4 v = *reinterpret_cast<const uint4*>(slot + a.scales_at + place);
            scales[0] = v.x, scales[1] = v.y, scales[2] = v.z, scales[3] = v.w;
            row[0].set_zero(), row[1].set_zero();
        }
    }

    __device__ void load(const Arguments& a, const uint8_t* slot, int row_tile, int window,
                         int plane) {
        __half2 two;
        if constexpr (COMMON) {
            if (window) return;
            two = from_bits<__half2>(scales[plane]);
        } else {
            if (window && a.stage_parts == 1) return;
            const int g = threadIdx.x % 32 / 4;
            const int place = ((row_tile * a.stage_parts + window) * 8 + g) * 8 + plane * 2;
            row[0].set_zero(), row[1].set_zero();
            if (a.zeros) {
                const uint8_t* const from = slot + a.zeros_at + place * 2;
                const uint32_t zeros = *reinterpret_cast<const uint32_t*>(from);
                row[0].zero = __byte_perm(zeros, zeros, 0x1010);
                row[1].zero = __byte_perm(zeros, zeros, 0x3232);
            }
            if (a.scale_bytes == 4) {
                const uint8_t* const from = slot + a.scales_at + place * 4;
                const float2 exact = *reinterpret_cast<const float2*>(from);
                row[0].set_scale(exact.x), row[1].set_scale(exact.y);
                return;
            }
            two = *reinterpret_cast<const __half2*>(slot + a.scales_at + place * 2);
        }
        row[0].set_scale(__low2float(two)), row[1].set_scale(__high2float(two));
    }
};

__device__ uint4 load_words(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

// A warp's words of a stage, as wgmma wants them: of every eight inputs, lane c of four has the
// pair 2 * c and 2 * c + 1. In memory lane c has eight neighbours from 8 * c on, all four pairs:
//
//     pair of eight     0      1      2      3       u, hi: which tile of a window, and which word
//     u, hi           0, 0   0, 1   1, 0   1, 1      of a row (int4_layout.py)
//
// So lane c reads from the four lanes of its row, and takes pair c of each: u = c / 2, hi = c % 2.
__device__ void load_stage(uint32_t from, uint32_t (&words)[2][4][2]) {
    const int lane = threadIdx.x % 32, c = lane % 4;
    from += c / 2 * 512 + lane / 4 * 64;
#pragma unroll
    for (int window = 0; window < 2; ++window) {
#pragma unroll
        for (int eight = 0; eight < 4; ++eight) {
            const uint4 v = load_words(from + window * 1024 + eight * 16);
            words[window][eight][0] = c % 2 ? v.y : v.x;
            words[window][eight][1] = c % 2 ? v.w : v.z;
        }
    }
}

// ---- results ----

template <bool BFLOAT16>
__device__ uint32_t pack(float first, float second) {
    return bits(Pair<BFLOAT16>(Number<BFLOAT16>(first), Number<BFLOAT16>(second)));
}

// Where sums of a row tile go. Through shared memory, so that each row of y is stored in pieces of
// 16 bytes: a lane has eight features of a row.
template <bool BFLOAT16>
struct Output {
    using T = Number<BFLOAT16>;

    uint8_t* staging;
    T* y;         // in row 0
    int count;    // of the eight that there are
    float bias[2];  // of the rows g and 8 + g of the weight, whose sums a lane has

    __device__ Output(const Arguments& a, uint8_t* staging, int row_tile) : staging(staging) {
        const int lane = threadIdx.x % 32, first = row_tile * TILE_ROWS;
        const int feature = first + lane % 2 * 8;
        y = static_cast<T*>(a.y) + feature;
        count = min(8, a.features - feature);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int place = first + 8 * r + lane / 4;
            const bool some = a.bias && place < a.features;
            bias[r] = some ? float(static_cast<const T*>(a.bias)[place]) : 0.0f;
        }
    }

    // Sums of 16 rows of x from this one on, in two fragments (rows g of the weight: x, y; 8 + g:
    // z, w; rows 2 * c and 2 * c + 1 of x).
    __device__ void store(const Arguments& a, int row, const float4& first,
                          const float4& second) const {
        const int lane = threadIdx.x % 32;
        const uint32_t to =
            shared_address(staging) + lane % 8 * 32 + lane / 16 * 256 + lane / 8 % 2 * 16;
        __syncwarp();  // what lay here has been read
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
            ::"r"(to), "r"(pack<BFLOAT16>(first.x + bias[0], first.y + bias[0])),
            "r"(pack<BFLOAT16>(first.z + bias[1], first.w + bias[1])),
            "r"(pack<BFLOAT16>(second.x + bias[0], second.y + bias[0])),
            "r"(pack<BFLOAT16>(second.z + bias[1], second.w + bias[1])) : "memory");
        __syncwarp();
        row += lane / 2;
        if (row >= a.rows) return;
        const uint8_t* const from = staging + lane * 16;
        T* const place = y + int64_t(row) * a.features;
        if (a.features % 8 == 0) {
            if (count > 0) *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(from);
        } else {
#pragma unroll 1
            for (int i = 0; i < count; ++i) place[i] = reinterpret_cast<const T*>(from)[i];
        }
    }
};

}  // namespace
