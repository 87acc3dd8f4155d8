// What not every kernel needs besides hopper.cuh: clusters and their blocks' shared memory, runs of bytes, registers
// moved between warpgroups, a ring of stages.
#pragma once

#include "cuda/hopper.cuh"

namespace mtlora::cuda {

__device__ inline uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Every thread of every block of the cluster.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same without a memory barrier, which takes half a microsecond: enough after `barrier_init_fence`.
__device__ inline void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ inline uint32_t cluster_size() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// The address of the same variable in the shared memory of block `rank`.
__device__ inline uint32_t cluster_address(const void* p, uint32_t rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(p)), "r"(rank));
    return address;
}

__device__ inline void cluster_arrive(uint32_t barrier_address) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier_address) : "memory");
}

// A run of bytes, a multiple of 16, to shared memory.
__device__ inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_address(to)),
                 "l"(from), "r"(bytes), "r"(smem_address(barrier))
                 : "memory");
}

// Registers a thread of this warpgroup may use from here on: what producers give up, consumers take.
template <int count>
__device__ inline void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ inline void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// Position in a ring of stages. Consumers wait for `parity`, producers for the opposite: the first lap is free.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void advance(int stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Barriers of a ring, one thread: a stage is full after one arrival and its bytes, empty after those of its consumers.
__device__ inline void init_stages(uint64_t* full, uint64_t* empty, int stages, uint32_t consumers) {
    for (int s = 0; s < stages; ++s) {
        barrier_init(full + s, 1);
        barrier_init(empty + s, consumers);
    }
}

}  // namespace mtlora::cuda
