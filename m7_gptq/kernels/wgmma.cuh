// Hopper's products of matrices, by a group of four warps: sums[64, TOKENS] += left[64, 16] @
// box[TOKENS, 16].T, the left side in registers, the right side in shared memory.
//
// They run by themselves: until one is done, neither its sums nor its left side may be touched.

#pragma once

#include <stdint.h>

namespace {

__device__ void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last so many groups that were committed are done.
template <int PENDING>
__device__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Where 16 inputs of a box begin ("Matrix Descriptor Format" of the PTX ISA). Besides the address:
// the copy engine's swizzle of rows of 128 bytes (bits 62 and 63), eight rows every 1,024 bytes
// (from bit 32 on), and a distance that swizzled rows do not need (from bit 16 on). The swizzle is
// one of addresses, so 16 inputs further along a row are simply 32 bytes further.
constexpr uint64_t BOX_DESCRIPTOR = (uint64_t(1) << 62) | (uint64_t(1024 >> 4) << 32) | (1 << 16);

__device__ uint64_t describe(uint32_t address) {
    return BOX_DESCRIPTOR | ((address & 0x3ffff) >> 4);
}

#define LIST_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
                  "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LIST_16(i) LIST_8(i), LIST_8(i + 8)
#define LIST_32(i) LIST_16(i), LIST_16(i + 16)
#define LIST_64(i) LIST_32(i), LIST_32(i + 32)
#define LIST_128(i) LIST_64(i), LIST_64(i + 64)
#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
    "%29, %30, %31"
#define NAMES_64 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, " \
    "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, " \
    "%77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, " \
    "%95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
    "%125, %126, %127"
#define WGMMA(TOKENS, TYPE, NAMES, LIST, LEFT, RIGHT)                                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" TOKENS "k16.f32." TYPE "." TYPE " {" NAMES \
                 "}, {" LEFT "}, " RIGHT ", 1, 1, 1, 0;"                                       \
                 : LIST : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(box))
#define WGMMA_OF(TYPE)                                                                        \
    if constexpr (TOKENS == 32)                                                               \
        WGMMA("32", TYPE, NAMES_16, LIST_16(0), "%16, %17, %18, %19", "%20");                 \
    else if constexpr (TOKENS == 64)                                                          \
        WGMMA("64", TYPE, NAMES_32, LIST_32(0), "%32, %33, %34, %35", "%36");                 \
    else if constexpr (TOKENS == 128)                                                         \
        WGMMA("128", TYPE, NAMES_64, LIST_64(0), "%64, %65, %66, %67", "%68");                \
    else                                                                                      \
        WGMMA("256", TYPE, NAMES_128, LIST_128(0), "%128, %129, %130, %131", "%132")

template <bool BFLOAT16, int TOKENS>
__device__ void multiply(float (&d)[TOKENS / 2], const uint32_t (&a)[4], uint64_t box) {
    if constexpr (BFLOAT16) {
        WGMMA_OF("bf16");
    } else {
        WGMMA_OF("f16");
    }
}

#undef WGMMA_OF
#undef WGMMA
#undef NAMES_128
#undef NAMES_64
#undef NAMES_32
#undef NAMES_16
#undef LIST_128
#undef LIST_64
#undef LIST_32
#undef LIST_16
#undef LIST_8

}  // namespace
