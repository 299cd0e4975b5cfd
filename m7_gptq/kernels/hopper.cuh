// What Hopper's copy engine and barriers offer, for which C++ has no words: PTX.
//
// A barrier is in shared memory. It counts arrivals and bytes that copies bring; when all have
// come, a phase is over and the next one begins. Addresses are those of shared memory, in 32 bits.

#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int MOST_SHARED_BYTES = 227 * 1024;  // of a thread block

__device__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers that were initialized are seen by the copy engine and by the cluster.
__device__ void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;"
                 ::: "memory");
}

__device__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and let the phase wait for so many bytes more.
__device__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait until the phase of this parity is over; the phases of a barrier are 0, 1, 0, ... and what
// came before the first counts as over. Only two phases can be told apart: to wait for phase n + 1
// while n runs returns at once. So nobody may miss a phase.
__device__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t over = 0;
    while (!over) {
        asm volatile(
            "{\n.reg .pred over;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n}"
            : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
    }
}

// Ordinary accesses of shared memory before this come before the copy engine's after it.
__device__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Programmatic dependent launch: the kernel after this one may begin; wait for the one before.
__device__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace
