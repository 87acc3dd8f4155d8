// What surrounds the products of `contract`: its shared memory, the tiles it loads, and what becomes of d(w).
#pragma once

#include <cuda_runtime.h>

#include "cuda/cluster.cuh"
#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/routed_lora_bwd.h"
#include "cuda/tensor.cuh"

namespace mtlora::cuda {

constexpr int kTokens = 64;
constexpr int kColumns = 128;        // of a warpgroup: one block of the sum over experts in the reference
constexpr int kPiStages = 4;         // groups of pi in shared memory
constexpr int kPiRow = kTokens * 2;  // bytes of an expert in a tile of pi
constexpr int kFinishing = 3;        // warps, beside the one that loads

// Of a block with `warpgroups` that multiply, `depth` outputs a step.
template <int rank, int warpgroups, int depth>
struct Plan {
    static constexpr int kRank = rank, kWarpgroups = warpgroups, kDepth = depth;
    static constexpr int kThreads = 128 * (warpgroups + 1);
    static constexpr bool kMovesRegisters = warpgroups == 4;                            // to those that multiply
    static constexpr int kDoutBytes = kTokens * kDepth * 2, kHalfBytes = kDepth * 128;  // half: of 128 columns
    static constexpr int kBlockExperts = kColumns / rank;
    static constexpr int kExperts = warpgroups * kBlockExperts < 8 ? 8 : warpgroups * kBlockExperts;  // with room
    static constexpr int kPiBytes = kExperts * kPiRow;
    static constexpr int kDwPitch = kExperts % 16 ? kExperts : kExperts + 8;  // rows of eight tokens on all banks
    static constexpr int kDwFloats = kTokens * kDwPitch;
    static constexpr int kDwStages = depth == 64 ? 2 : 4;  // groups of d(w)
    // Of tiles; five for two warpgroups. Nine and no clusters: 18 to 14 us at T = 512. No more than 32 barriers in all:
    // what compute-sanitizer tracks.
    static constexpr int kMaxStages = depth == 64 ? 9 : 6;
    static constexpr int kPiAt = 1024, kDwAt = kPiAt + kPiStages * kPiBytes;
    static constexpr int kTilesAt = kDwAt + kDwStages * kDwFloats * 4;
};

struct ContractArgs {
    CUtensorMap dout;
    const char *b_tiles, *pi_tiles;
    const void *h, *scale;
    const float* dload;
    float *dw, *dh;  // for `route`: [T, G, N] and [blocks, T, rank]; either may be absent
    void* rows;      // or, instead of both: [T, pitch]
    int64_t pitch;
    float scaling, inverse_count;
    bool relu, sums_w, sums_h;
    int tokens, groups, experts;
    int steps;                // tiles of outputs in a group
    int blocks, tile_blocks;  // of columns: live ones, those in b_tiles
    int per_block;            // a block's: one for each multiplying warpgroup
    int tile_experts;         // in pi_tiles
    int padded_rank, padded_experts;
    int stages, stage_bytes, logits_at;
    int run, run_words;  // groups of d(logits) stored at once, a power of two; of a token in shared memory
};

// A block's shared memory: barriers, constants of each expert, rings of pi, of d(w) and of tiles, d(logits) on their
// way out. All but the last start at a constant.
template <class P>
struct Shared {
    char* const base;

    __device__ uint64_t* barrier(int i) const { return reinterpret_cast<uint64_t*>(base) + i; }
    __device__ uint64_t* full(int stage) const { return barrier(stage); }
    __device__ uint64_t* empty(int stage) const { return barrier(P::kMaxStages + stage); }
    __device__ uint64_t* pi_full(unsigned group) const { return barrier(2 * P::kMaxStages + group % kPiStages); }
    __device__ uint64_t* pi_empty(unsigned group) const {
        return barrier(2 * P::kMaxStages + kPiStages + group % kPiStages);
    }
    __device__ uint64_t* dw_full(unsigned group) const {
        return barrier(2 * P::kMaxStages + 2 * kPiStages + group % P::kDwStages);
    }
    __device__ uint64_t* dw_empty(unsigned group) const {
        return barrier(2 * P::kMaxStages + 2 * kPiStages + P::kDwStages + group % P::kDwStages);
    }
    __device__ float* constants(int which) const { return reinterpret_cast<float*>(base + 512) + which * 32; }
    __device__ float* scale() const { return constants(0); }
    __device__ float* factor() const {  // with scaling
        return constants(1);
    }
    __device__ float* load() const {  // d(load) / (T G)
        return constants(2);
    }
    __device__ char* pi(unsigned group) const { return base + P::kPiAt + group % kPiStages * P::kPiBytes; }
    __device__ float* dw(unsigned group) const {
        return reinterpret_cast<float*>(base + P::kDwAt) + group % P::kDwStages * P::kDwFloats;
    }
    __device__ char* tiles() const { return base + P::kTilesAt; }
};

// The parity of a group's turn in a ring.
template <int stages>
__device__ inline uint32_t parity(unsigned group) {
    return group / stages & 1;
}

// s[:n/2] + s[n/2:] until one is left.
template <int n>
__device__ float tree_sum(const float (&v)[n]) {
    if constexpr (n == 1) {
        return v[0];
    } else {
        float halves[n / 2];
#pragma unroll
        for (int i = 0; i < n / 2; ++i) halves[i] = v[i] + v[i + n / 2];
        return tree_sum(halves);
    }
}

// A pair of elements that lies in a register.
template <class E>
__device__ float2 unpacked(uint32_t v) {
    if constexpr (std::is_same_v<E, bf16>)
        return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000)};  // one operation each
    else
        return to_float2(bits_as<Pair<E>>(v));
}

// Tiles of dout, B and pi by TMA, one thread.
template <class P>
__device__ void load(const ContractArgs& p, const Shared<P>& s) {
    const int block = int(blockIdx.y) * p.per_block;
    const uint32_t b_bytes = uint32_t(p.per_block) * 2 * P::kHalfBytes;
    const uint32_t pi_bytes = uint32_t(p.per_block * P::kBlockExperts) * kPiRow;
    const char* b = p.b_tiles + block * 2 * P::kHalfBytes;
    const char* pi = p.pi_tiles + (int64_t(blockIdx.x) * p.tile_experts + block * P::kBlockExperts) * kPiRow;
    Ring ring;
    for (int group = 0; group < p.groups; ++group) {
        for (int step = 0; step < p.steps; ++step) {
            char* const tile = s.tiles() + ring.stage * p.stage_bytes;
            uint64_t* const barrier = s.full(ring.stage);
            barrier_wait(s.empty(ring.stage), ring.parity ^ 1);
            barrier_expect(barrier, P::kDoutBytes + b_bytes);
            tma_load(tile, &p.dout, barrier, step * P::kDepth, group, int(blockIdx.x) * kTokens);
            bulk_load(tile + P::kDoutBytes, b, b_bytes, barrier);
            b += int64_t(p.tile_blocks) * 2 * P::kHalfBytes;
            ring.advance(p.stages);
        }
        if (p.sums_h) {
            barrier_wait(s.pi_empty(group), parity<kPiStages>(group) ^ 1);
            barrier_expect(s.pi_full(group), pi_bytes);
            bulk_load(s.pi(group), pi, pi_bytes, s.pi_full(group));
            pi += int64_t(gridDim.x) * p.tile_experts * kPiRow;
        }
    }
}

// What becomes of d(w): d(logits), or itself for the kernel `route`. Three warps take eight tokens at a time, always
// the same ones.
template <class E, class P>
struct Finish {
    static constexpr int kRuns = P::kExperts / 8;  // of eight experts: two for each of the four threads of a token

    const ContractArgs& p;
    const Shared<P>& s;
    const int lane, warp;
    const int64_t token;  // the tile's first

    __device__ Finish(const ContractArgs& p, const Shared<P>& s)
        : p(p),
          s(s),
          lane(threadIdx.x % 32),
          warp(uniform(threadIdx.x / 32 % 4) - 1),
          token(int64_t(blockIdx.x) * kTokens) {}

    __device__ void run(int first, int experts) {
        for (int group = 0; group < p.groups; ++group) {
            barrier_wait(s.dw_full(group), parity<P::kDwStages>(group));
            if (p.rows) barrier_wait(s.pi_full(group), parity<kPiStages>(group));
            if (!p.rows) {
                for (int row = 8 * warp; row < kTokens; row += 8 * kFinishing) store(group, row, first, experts);
            } else if (p.scale || p.dload) {
                route<true>(group);
            } else {
                route<false>(group);
            }
            barrier_arrive(s.dw_empty(group));
            if (p.rows) barrier_arrive(s.pi_empty(group));
        }
    }

    __device__ void store(int group, int row, int first, int experts) {
        if (lane >= experts) return;
        const float* const from = s.dw(group) + row * P::kDwPitch + lane;
        float* const to = p.dw + ((token + row) * p.groups + group) * p.experts + first + lane;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (token + row + i < p.tokens) to[int64_t(i) * p.groups * p.experts] = from[i * P::kDwPitch];
        }
    }

    template <bool scaled>
    __device__ void route(int group) {
        static_assert(kTokens == 8 * 8 && kFinishing == 3);
        route_eights<scaled, 2>(group, 8 * warp);  // two at a time hide each other's latencies
        if (warp < 2) route_eights<scaled, 1>(group, 8 * (warp + 6));
    }

    // d(logits) = pi (d(pi) - sum over N of pi d(pi)), of experts 8 m + 2 q + b in thread q of a token. Those beyond N,
    // whose pi and d(w) are 0, are overwritten by the next group.
    template <bool scaled, int eights>
    __device__ void route_eights(int group, int first_row) {
        const int q = lane % 4, at = group & (p.run - 1), words = p.run_words;
        float pi[eights][kRuns][2], dpi[eights][kRuns][2], all[eights];
#pragma unroll
        for (int i = 0; i < eights; ++i) {
            const int row = first_row + 8 * kFinishing * i;
            const float* const dw = s.dw(group) + (row + lane / 4) * P::kDwPitch + 2 * q;
            uint32_t weights[4];
            load_matrices<true>(
                weights, smem_address(s.pi(group)) + swizzled<128>(uint32_t(lane % P::kExperts * kPiRow + row * 2)));
#pragma unroll
            for (int m = 0; m < kRuns; ++m) {
                const float2 weight = unpacked<E>(weights[m]), v = *reinterpret_cast<const float2*>(dw + 8 * m);
                pi[i][m][0] = weight.x, pi[i][m][1] = weight.y;
                dpi[i][m][0] = v.x, dpi[i][m][1] = v.y;
            }
        }
#pragma unroll
        for (int i = 0; i < eights; ++i) {
            float total[2];
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                float sum[kRuns];
#pragma unroll
                for (int m = 0; m < kRuns; ++m) {
                    const int e = 8 * m + 2 * q + b;
                    float& v = dpi[i][m][b];
                    v = v * (scaled ? s.factor()[e] : p.scaling);
                    if (scaled && p.dload) v = v + s.load()[e];
                    sum[m] = pi[i][m][b] * v;
                }
                if (p.padded_experts < P::kExperts) {  // the tree pads N to a power of two by 0; -0 changes nothing
#pragma unroll
                    for (int m = 0; m < kRuns; ++m) {
                        sum[m] = 8 * m + 2 * q + b < p.padded_experts ? sum[m] : -0.0f;
                    }
                }
                total[b] = tree_sum(sum);
                total[b] = total[b] + __shfl_xor_sync(~0u, total[b], 2);
                total[b] = total[b] + __shfl_xor_sync(~0u, total[b], 1);
            }
            all[i] = total[0] + total[1];
        }
        const bool aligned = at * p.experts % 2 == 0;
#pragma unroll
        for (int i = 0; i < eights; ++i) {
            char* const staged = s.base + p.logits_at + (first_row + 8 * kFinishing * i + lane / 4) * words * 4;
            E* const to = reinterpret_cast<E*>(staged) + at * p.experts + 2 * q;
#pragma unroll
            for (int m = 0; m < kRuns; ++m) {
                const Pair<E> pair =
                    rounded2<E>(pi[i][m][0] * (dpi[i][m][0] - all[i]), pi[i][m][1] * (dpi[i][m][1] - all[i]));
                if (aligned)
                    *reinterpret_cast<Pair<E>*>(to + 8 * m) = pair;
                else
                    to[8 * m] = pair.x, to[8 * m + 1] = pair.y;
            }
        }
        __syncwarp();
        if (at == p.run - 1 || group == p.groups - 1) {
#pragma unroll
            for (int i = 0; i < eights; ++i) store_run(first_row + 8 * kFinishing * i, group - at, at + 1);
            __syncwarp();
        }
    }

    // Eight tokens, in pieces of 8 bytes, the last of which may reach into the padding of the rows. Two groups are up
    // to 16 pieces.
    __device__ void store_run(int row, int group, int groups) {
        const int lanes = p.run == 2 ? 16 : 32, piece = lane % lanes, first = lane / lanes, stride = 32 / lanes;
        if (4 * piece >= groups * p.experts) return;
        const int64_t t = token + row + first;
        const int from_stride = p.run_words / 2;
        const int64_t to_stride = p.pitch / 4;
        const uint2* from = reinterpret_cast<const uint2*>(s.base + p.logits_at) + (row + first) * from_stride + piece;
        E* const start = static_cast<E*>(p.rows) + t * p.pitch + p.padded_rank + group * p.experts;
        uint2* to = reinterpret_cast<uint2*>(start) + piece;
        const int rows = int(min(int64_t(8 - first), p.tokens - t));
        for (int i = 0; i < rows; i += stride, from += stride * from_stride, to += stride * to_stride) *to = *from;
    }
};

}  // namespace mtlora::cuda
