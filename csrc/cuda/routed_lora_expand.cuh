// What one tile of `expand` is: its arguments and shapes, and its two products, by group and as a sum over experts.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/tensor.cuh"

namespace mtlora::cuda {

constexpr int kRows = 64;         // tokens of a tile
constexpr int kSlots = 4;         // tiles between load and store: two for each warpgroup
constexpr int kWeightPitch = 40;  // elements of a staged row of pi: 16-byte units of 8 rows lie in different banks
constexpr int kThreads = 320;     // two multiplying warpgroups, a loading and a storing warp

struct ExpandArgs {
    CUtensorMap b, residual, out;
    const void *h, *pi, *scale;
    float* wide;  // fp32 in place of `out`, or null
    float scaling;
    int tokens, groups, outputs, experts;  // outputs of one group
    int chunks;                            // of 64 k, from experts and rank
    int tiles_per_group, row_tiles;
    bool has_residual, into_residual;
    bool scaling_exact;  // scaling is a value of E
    bool power_of_two;   // ... and 1, 2, 4, ..., without scales of experts
    bool whole_units;    // rows of pi are whole units of 16 bytes
};

// R = rank, BO = outputs.
template <int R, int BO>
struct ExpandTile {
    static constexpr int kBoxColumns = BO < 64 ? BO : 64;  // of one TMA box: a swizzled row
    static constexpr int kBoxBytes = kRows * kBoxColumns * 2;
    static constexpr int kSlotBytes = kRows * BO * 2;
    static constexpr int kSlabBytes = BO * R * 2;  // one expert's outputs
    static constexpr int kChunkExperts = 64 / R;
    // Narrow tiles leave room for two blocks on a multiprocessor, which hide each other's latencies.
    static constexpr int kBlocks = BO == 32 && R <= 32 || BO == 64 && R <= 16 ? 2 : 1;
    // One block alone keeps to 168 registers a thread, which leaves room for a block of `project`.
    static constexpr int kMaxThreads = kBlocks == 2 ? kThreads : 384;
    static constexpr int shared_bytes(int chunks) {
        return 1024 + chunks * kChunkExperts * kSlabBytes + kSlots * kSlotBytes + 8 * 16 * kWeightPitch * 2 +
               256;  // alignment, B, tiles, pi, barriers
    }
};

// Shared-memory address of the row that this lane gives for columns 16 j to 16 j + 15 of its warp's 16 rows of a tile:
// matrices of rows 0 to 7 and 8 to 15 of the first 8 columns, then of the others.
template <int BO>
__device__ uint32_t tile_row(const char* tile, int j) {
    constexpr int columns = ExpandTile<16, BO>::kBoxColumns;
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const uint32_t first = smem_address(tile) + swizzled<columns * 2>(uint32_t(row * columns * 2 + lane / 16 * 16));
    return (first ^ uint32_t(16 * j % columns * 2)) + uint32_t(16 * j / columns * kRows * columns * 2);
}

// use(i, pair) for a thread's pairs of a tile, in the order of wgmma's accumulators.
template <class E, int BO, class Use>
__device__ void read_tile(const char* tile, Use use) {
#pragma unroll
    for (int j = 0; j < BO / 16; ++j) {
        uint32_t pairs[4];
        load_matrices<false>(pairs, tile_row<BO>(tile, j));
#pragma unroll
        for (int i = 0; i < 4; ++i) use(4 * j + i, bits_as<Pair<E>>(pairs[i]));
    }
}

template <int BO, class Make>
__device__ void write_tile(const char* tile, Make make) {
#pragma unroll
    for (int j = 0; j < BO / 16; ++j) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = bits_as<uint32_t>(make(4 * j + i));
        store_matrices(tile_row<BO>(tile, j), pairs);
    }
}

// The sums as they are, from registers: rows of few tokens.
template <int BO>
__device__ void write_wide(const ExpandArgs& p, int first_token, int group, int column, const float (&acc)[BO / 2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < BO / 4; ++i) {
        const int token = first_token + lane / 4 + i % 2 * 8, output = column + i / 2 * 8 + 2 * (lane % 4);
        if (token < p.tokens && output < p.outputs) {
            float* const to = p.wide + (int64_t(token) * p.groups + group) * p.outputs + output;
            *reinterpret_cast<float2*>(to) = make_float2(acc[2 * i], acc[2 * i + 1]);
        }
    }
}

// The larger absolute values of two pairs of elements as integers, where NaN is the largest.
__device__ inline uint32_t magnitude(uint32_t top, uint32_t pair) {
    return __vmaxu2(top, pair & 0x7fff7fff);
}
template <class E>
__device__ float larger_half(uint32_t top) {
    return to_float(bits_as<E>(uint16_t(max(top & 0xffff, top >> 16))));
}

// Neighbouring experts' weights of one token, of the staged pi.
template <class E, int n>
struct alignas(n * sizeof(E)) Weights {
    E of[n];
};
template <int n, class E>
__device__ Weights<E, n> weights_of(const E* staged, int row, int first) {
    return *reinterpret_cast<const Weights<E, n>*>(staged + row * kWeightPitch + first);
}

// z of one expert for a pair of ranks.
template <class E>
__device__ uint32_t mixed_h(uint32_t h, Pair<E> w) {
    return bits_as<uint32_t>(__hmul2_rn(w, bits_as<Pair<E>>(h)));
}
template <class E>
__device__ uint32_t mixed_h(uint32_t h, Pair<E> w, float s) {
    const float2 v = to_float2(bits_as<Pair<E>>(h));
    const float ws = to_float2(w).x * s;
    return bits_as<uint32_t>(rounded2<E>(ws * v.x, ws * v.y));
}

// acc = z B_flat^T over all k, 64 a step.
template <class E, int R, int BO>
__device__ void group_product(const ExpandArgs& p, const char* b, const E* weights, const uint32_t (&h)[2][R / 8],
                              float (&acc)[BO / 2]) {
    using Tile = ExpandTile<R, BO>;
    constexpr int kExperts = Tile::kChunkExperts;
    const int row = threadIdx.x % 32 / 4;
    // Without a swizzle (R = 8) the two halves of k are two experts.
    const uint64_t experts = smem_descriptor(b, Tile::kSlabBytes, 16 * R, swizzle_of(2 * R));
    for (int first = 0; first < p.experts; first += kExperts) {
        const auto w0 = weights_of<kExperts>(weights, row, first), w1 = weights_of<kExperts>(weights, row + 8, first);
        uint32_t z[16];
        if (p.scale) {
            const E* const scale = static_cast<const E*>(p.scale) + first;
#pragma unroll
            for (int i = 0; i < 8; ++i) {  // blocks of 8 k
                const int expert = i * 8 / R, ranks = i % (R / 8);
                const float s = first + expert < p.experts ? to_float(scale[expert]) : 0.0f;
                z[2 * i] = mixed_h<E>(h[0][ranks], twice<E>(w0.of[expert]), s);
                z[2 * i + 1] = mixed_h<E>(h[1][ranks], twice<E>(w1.of[expert]), s);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int expert = i * 8 / R, ranks = i % (R / 8);
                z[2 * i] = mixed_h<E>(h[0][ranks], twice<E>(w0.of[expert]));
                z[2 * i + 1] = mixed_h<E>(h[1][ranks], twice<E>(w1.of[expert]));
            }
        }
        if (first + kExperts > p.experts) {  // what pads k is zero, also where h is infinite
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (first + i * 8 / R >= p.experts) z[2 * i] = z[2 * i + 1] = 0;
            }
        }
        pin(z);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint64_t operand = advanced(experts, (first + k * 16 / R) * Tile::kSlabBytes + k * 16 % R * 2);
            wgmma<E, 0>(acc, z + 4 * k, operand, first > 0 || k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(acc);
        pin(z);
    }
}

// How an expert is added to a sum, t = E(pi_i E(B_i h)).
enum class Sum {
    scaled,   // sum = E(sum + E(scaling E(pi_i E(s_i E(B_i h)))))
    rounded,  // sum = E(sum + E(scaling t)), in packed arithmetic: no s, and E holds scaling
    fused,    // sum = E(sum + scaling t): the same where E holds scaling t, see `fuse_limit`
};

template <class E, int R>
__device__ void start_product(const uint32_t (&h)[2][R / 8], uint64_t outputs, float (&acc)[16]) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < R / 16; ++k) {
        const uint32_t a[4] = {h[0][2 * k], h[1][2 * k], h[0][2 * k + 1], h[1][2 * k + 1]};
        wgmma<E, 0>(acc, a, advanced(outputs, 32 * k), k > 0);
    }
    wgmma_commit();
}

// The `count` experts from `first` in order, 32 outputs at a time; a product runs while the one before it is added.
template <class E, int R, int BO, Sum kind, int count>
__device__ void add_experts(const ExpandArgs& p, int first, uint64_t experts, const E* weights,
                            const uint32_t (&h)[2][R / 8], Pair<E> (&sum)[BO / 4]) {
    constexpr int kParts = BO / 32, kProducts = count * kParts;
    const uint64_t first_slab = advanced(experts, first * ExpandTile<R, BO>::kSlabBytes);
    const int row = threadIdx.x % 32 / 4;
    const Weights<E, count> w[2] = {weights_of<count>(weights, row, first), weights_of<count>(weights, row + 8, first)};
    const Pair<E> scaling = twice<E>(rounded<E>(p.scaling));
    float acc[2][16];
    start_product<E, R>(h, first_slab, acc[0]);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
        const int expert = n / kParts, part = n % kParts;
        if (n + 1 < kProducts) {
            start_product<E, R>(h, advanced(first_slab, (n + 1) * 32 * R * 2), acc[(n + 1) % 2]);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        pin(acc[n % 2]);
        const Pair<E> s =
            kind == Sum::scaled && p.scale ? twice<E>(static_cast<const E*>(p.scale)[first + expert]) : scaling;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            Pair<E>& total = sum[part * 8 + i];
            Pair<E> t = rounded2<E>(acc[n % 2][2 * i], acc[n % 2][2 * i + 1]);
            if (kind == Sum::scaled && p.scale) t = __hmul2_rn(s, t);
            t = __hmul2_rn(twice<E>(w[i % 2].of[expert]), t);
            if constexpr (kind == Sum::fused) {
                total = __hfma2(t, scaling, total);
            } else {
                if (kind == Sum::rounded || p.scaling_exact) {
                    t = __hmul2_rn(t, scaling);
                } else {
                    const float2 v = to_float2(t);
                    t = rounded2<E>(v.x * p.scaling, v.y * p.scaling);
                }
                total = __hadd2_rn(total, t);
            }
        }
    }
}

// sum += every expert in order.
template <class E, int R, int BO, Sum kind>
__device__ void expert_sum(const ExpandArgs& p, const char* b, const E* weights, const uint32_t (&h)[2][R / 8],
                           Pair<E> (&sum)[BO / 4]) {
    const uint64_t experts = smem_descriptor(b, 16, 16 * R, swizzle_of(2 * R));
    int first = 0;
    if constexpr (R <= 16 && kind != Sum::scaled) {  // the others have no registers left for it
        for (; first + 8 <= p.experts; first += 8) add_experts<E, R, BO, kind, 8>(p, first, experts, weights, h, sum);
    }
    for (; first + 4 <= p.experts; first += 4) add_experts<E, R, BO, kind, 4>(p, first, experts, weights, h, sum);
    for (; first < p.experts; ++first) add_experts<E, R, BO, kind, 1>(p, first, experts, weights, h, sum);
}

// The largest |h| for `Sum::fused`. A scaling of 1, 2, 4, ... only shifts the exponent of t, and a subnormal t gains
// bits, so E holds scaling t unless it overflows. It does not where R |B| |h| scaling is far below the largest value of
// E and |pi| <= 1. B is this block's; NaN compares false.
template <class E, int R>
__device__ float fuse_limit(const ExpandArgs& p, const char* b, int b_bytes, uint32_t* b_top) {
    constexpr float kLargest = std::is_same_v<E, bf16> ? 0x1p127f : 0x1p15f;
    uint32_t top = 0;
    for (int i = threadIdx.x * 16; i < b_bytes; i += 256 * 16) {
        const auto v = *reinterpret_cast<const uint4*>(b + i);
        top = magnitude(magnitude(magnitude(magnitude(top, v.x), v.y), v.z), v.w);
    }
    top = __reduce_max_sync(~0u, max(top & 0xffff, top >> 16));
    if (threadIdx.x % 32 == 0) atomicMax(b_top, top);
    named_barrier(3, 256);
    return kLargest / 4 / R / p.scaling / larger_half<E>(*b_top);
}

}  // namespace mtlora::cuda
