// The Hopper instructions the kernels use, one small function each: mbarriers, TMA, wgmma, dependent launches.
// Names and semantics are those of the PTX ISA; operand layouts are explained at `smem_descriptor`.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "cuda/elements.cuh"

namespace mtlora::cuda {

__device__ inline uint32_t smem_address(const void* p) {
    return uint32_t(__cvta_generic_to_shared(p));
}

// Lane 0's value in every lane. Tells the compiler that what follows from it is the same across the warp: descriptors
// then stay in uniform registers, where wgmma takes them; moving them there costs more than a small wgmma.
__device__ inline int uniform(int v) {
    return __shfl_sync(~0u, v, 0);
}

// ---- mbarriers ----

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the cluster; the block synchronises after it.
__device__ inline void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// Arrive, and hold the phase open until `bytes` have been copied.
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
                 : "memory");
}

// Wait until the phase of this parity has completed.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(smem_address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}

// ---- Barriers of the block ----

// One barrier among `threads` threads of the block; id 0 is __syncthreads.
__device__ inline void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same, and whether `condition` held for all of them.
template <int id, int threads>
__device__ inline bool named_barrier_all(bool condition) {
    uint32_t all;
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.u32 p, %3, 0;\n"
        "barrier.cta.red.and.aligned.pred p, %1, %2, p;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(all)
        : "n"(id), "n"(threads), "r"(uint32_t(condition))
        : "memory");
    return all;
}

// ---- Dependent launches ----

// The next kernel of the stream may start its prologue now; it must call `grid_dependency_wait`.
__device__ inline void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until every earlier kernel that this one was allowed to overlap has finished and its writes are visible.
__device__ inline void grid_dependency_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- TMA: coordinates count elements from the innermost dimension; what lies outside reads 0 and is not written ----

__device__ inline void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(smem_address(to)),
        "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1)
        : "memory");
}

__device__ inline void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_address(to)),
        "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// What is read once leaves L2 before what others still read.
__device__ inline void tma_load_once(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
    asm volatile(
        "{\n.reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5}], [%2], policy;\n}" ::"r"(smem_address(to)),
        "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

__device__ inline void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_address(to)),
        "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// To the same place in every block of the cluster in `blocks` (a bit each), completing on the barrier of each.
__device__ inline void tma_load_multicast(void* to, const CUtensorMap* map, uint64_t* barrier, uint16_t blocks, int c0,
                                          int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(smem_address(to)),
        "l"(map), "r"(smem_address(barrier)), "h"(blocks), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

__device__ inline void tma_store(const CUtensorMap* map, const void* from, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(smem_address(from)), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}

// Fetches the map itself, so that the first copy does not wait for it.
__device__ inline void prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ inline void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most `pending` committed groups of stores still read shared memory.
template <int pending>
__device__ inline void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Orders this thread's ordinary writes to shared memory before later reads by TMA and wgmma.
__device__ inline void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The reverse of `load_matrices` of tensor.cuh; each lane's elements are those it holds of wgmma's accumulators.
__device__ inline void store_matrices(uint32_t at, const uint32_t (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(m[0]), "r"(m[1]),
                 "r"(m[2]), "r"(m[3])
                 : "memory");
}

// ---- wgmma: D [64, N] += A [64, 16] B [16, N], fp32 accumulators, issued by a warpgroup ----
//
// Thread `lane` of warp w (of 4) holds rows 16 w + lane / 4 (+ 8) of D and of A in registers, columns
// 8 j + 2 (lane % 4) (+ 1): d[4 j + 0, 1] the first row, d[4 j + 2, 3] the second. A in registers: {row, k 0..7},
// {row + 8, k 0..7}, {row, k 8..15}, {row + 8, k 8..15}, two values each.

enum class Swizzle : int { none = 0, b128 = 1, b64 = 2, b32 = 3 };  // the code in a shared-memory descriptor

__host__ __device__ constexpr Swizzle swizzle_of(int row_bytes) {
    return row_bytes >= 128  ? Swizzle::b128
           : row_bytes == 64 ? Swizzle::b64
           : row_bytes == 32 ? Swizzle::b32
                             : Swizzle::none;
}

// Byte offset of a 16-byte unit (or what is inside it) in a tile of rows of `row_bytes`, as TMA writes it with
// swizzle_of(row_bytes). Tiles start on 1024 bytes.
template <int row_bytes>
__device__ inline uint32_t swizzled(uint32_t offset) {
    constexpr uint32_t mask = row_bytes >= 128 ? 7 : row_bytes == 64 ? 3 : row_bytes == 32 ? 1 : 0;
    return offset ^ (((offset >> 7) & mask) << 4);
}

// An operand in shared memory, by how k lies in it (row = the swizzled row of 32, 64 or 128 bytes):
//   K-major (k contiguous): `stride` = bytes between groups of 8 rows of M or N; `leading` unused, but without
//       swizzle (rows of 16 bytes) it is the distance of the two halves of k;
//   MN-major (trans = 1): `stride` = bytes between groups of 8 k; `leading` = bytes between rows' worth of M or N
//       (without swizzle the two are exchanged).
__device__ inline uint64_t smem_descriptor(const void* tile, uint32_t leading, uint32_t stride, Swizzle swizzle) {
    return uint64_t((smem_address(tile) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(swizzle) << 62;
}

// The operand that starts `bytes` further on: an addition to the low word alone.
__device__ inline uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
    return (descriptor & 0xffffffff00000000) | uint32_t(uint32_t(descriptor) + (bytes >> 4));
}

__device__ inline void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Keeps the compiler from moving a use of registers that wgmma reads or writes across this point.
template <int n>
__device__ inline void pin(float (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int n>
__device__ inline void pin(uint32_t (&a)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// Until at most `pending` committed groups are unfinished.
template <int pending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Operand lists: registers by number for the instruction, by element for the compiler.

#define MTLORA_REGS_8 "%0, %1, %2, %3"
#define MTLORA_REGS_16 \
    MTLORA_REGS_8      \
    ", %4, %5, %6, %7"
#define MTLORA_REGS_24 \
    MTLORA_REGS_16     \
    ", %8, %9, %10, %11"
#define MTLORA_REGS_32 \
    MTLORA_REGS_16     \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MTLORA_REGS_64 \
    MTLORA_REGS_32     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MTLORA_REGS_128                                                                \
    MTLORA_REGS_64                                                                     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MTLORA_REGS_208                                                                \
    MTLORA_REGS_128                                                                    \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103"
#define MTLORA_REGS_256                                                        \
    MTLORA_REGS_208                                                            \
    ", %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115" \
    ", %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MTLORA_OUT_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MTLORA_OUT_8(d, i) MTLORA_OUT_4(d, i), MTLORA_OUT_4(d, i + 4)
#define MTLORA_OUT_12(d, i) MTLORA_OUT_8(d, i), MTLORA_OUT_4(d, i + 8)
#define MTLORA_OUT_16(d, i) MTLORA_OUT_8(d, i), MTLORA_OUT_8(d, i + 8)
#define MTLORA_OUT_32(d, i) MTLORA_OUT_16(d, i), MTLORA_OUT_16(d, i + 16)
#define MTLORA_OUT_64(d, i) MTLORA_OUT_32(d, i), MTLORA_OUT_32(d, i + 32)
#define MTLORA_OUT_104(d, i) MTLORA_OUT_64(d, i), MTLORA_OUT_32(d, i + 64), MTLORA_OUT_8(d, i + 96)
#define MTLORA_OUT_128(d, i) MTLORA_OUT_64(d, i), MTLORA_OUT_64(d, i + 64)

// accumulate = false starts from zero.
#define MTLORA_WGMMA(N, COUNT, I0, I1, I2, I3, I4, I5, I6)                                            \
    template <class E, int trans_a, int trans_b>                                                      \
    __device__ inline void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {        \
        if constexpr (std::is_same_v<E, bf16>) {                                                      \
            MTLORA_WGMMA_SS(N, COUNT, "bf16", I0, I1, I2, I3, I4);                                    \
        } else {                                                                                      \
            MTLORA_WGMMA_SS(N, COUNT, "f16", I0, I1, I2, I3, I4);                                     \
        }                                                                                             \
    }                                                                                                 \
    template <class E, int trans_b>                                                                   \
    __device__ inline void wgmma(float (&d)[COUNT], const uint32_t* a, uint64_t b, bool accumulate) { \
        if constexpr (std::is_same_v<E, bf16>) {                                                      \
            MTLORA_WGMMA_RS(N, COUNT, "bf16", I0, I1, I2, I3, I4, I5, I6);                            \
        } else {                                                                                      \
            MTLORA_WGMMA_RS(N, COUNT, "f16", I0, I1, I2, I3, I4, I5, I6);                             \
        }                                                                                             \
    }
#define MTLORA_WGMMA_SS(N, COUNT, TYPE, I0, I1, I2, I3, I4)                                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                             \
                 ", 0;\n"                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MTLORA_REGS_##N \
                 "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4 ";\n}"                             \
                 : MTLORA_OUT_##COUNT(d, 0)                                                           \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(trans_a), "n"(trans_b))
#define MTLORA_WGMMA_RS(N, COUNT, TYPE, I0, I1, I2, I3, I4, I5, I6)                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5                                             \
                 ", 0;\n"                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MTLORA_REGS_##N \
                 "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, %" #I6 ";\n}"       \
                 : MTLORA_OUT_##COUNT(d, 0)                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(trans_b))

MTLORA_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
MTLORA_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
MTLORA_WGMMA(24, 12, 12, 13, 14, 15, 16, 17, 18)
MTLORA_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
MTLORA_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
MTLORA_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
MTLORA_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
MTLORA_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef MTLORA_WGMMA
#undef MTLORA_WGMMA_SS
#undef MTLORA_WGMMA_RS
#undef MTLORA_REGS_8
#undef MTLORA_REGS_16
#undef MTLORA_REGS_24
#undef MTLORA_REGS_32
#undef MTLORA_REGS_64
#undef MTLORA_REGS_128
#undef MTLORA_REGS_208
#undef MTLORA_REGS_256
#undef MTLORA_OUT_4
#undef MTLORA_OUT_8
#undef MTLORA_OUT_12
#undef MTLORA_OUT_16
#undef MTLORA_OUT_32
#undef MTLORA_OUT_64
#undef MTLORA_OUT_104
#undef MTLORA_OUT_128

}  // namespace mtlora::cuda
