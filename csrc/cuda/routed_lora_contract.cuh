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
constexpr int kMaxStages = 9;        // five for two warpgroups; nine and no clusters: 18 to 14 us at T = 512
constexpr int kPiStages = 4;         // groups of pi in shared memory
constexpr int kPiRow = kTokens * 2;  // bytes of an expert in a tile of pi

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
    int tokens, groups, group_size, experts;
    int steps;                // tiles of outputs in a group
    int blocks, tile_blocks;  // of columns: live ones, those in b_tiles
    int per_block;            // a block's: one for each multiplying warpgroup
    int halves;               // of blocks, live ones
    int copied;               // bytes of a half: without the rows beyond a group that is one step
    int tile_experts;         // in pi_tiles
    int padded_rank, padded_experts;
    int stages, stage_bytes, logits_at;
    int run;  // groups of d(logits) stored at once
};

// A block's shared memory: barriers, constants of each expert, rings of pi, of d(w) and of tiles, d(logits) on their
// way out. All but the last start at a constant.
template <class P>
struct Shared {
    char* const base;

    __device__ uint64_t* barrier(int i) const { return reinterpret_cast<uint64_t*>(base) + i; }
    __device__ uint64_t* full(int stage) const { return barrier(stage); }
    __device__ uint64_t* empty(int stage) const { return barrier(kMaxStages + stage); }
    __device__ uint64_t* pi_full(unsigned group) const { return barrier(2 * kMaxStages + group % kPiStages); }
    __device__ uint64_t* pi_empty(unsigned group) const {
        return barrier(2 * kMaxStages + kPiStages + group % kPiStages);
    }
    __device__ uint64_t* dw_full(unsigned group) const {
        return barrier(2 * kMaxStages + 2 * kPiStages + group % P::kDwStages);
    }
    __device__ uint64_t* dw_empty(unsigned group) const {
        return barrier(2 * kMaxStages + 2 * kPiStages + P::kDwStages + group % P::kDwStages);
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

__device__ inline void warp_arrive(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
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

// Tiles of dout, B and pi by TMA, one warp: each half of a block of columns is a lane's.
template <class P>
struct Load {
    const ContractArgs& p;
    const Shared<P>& s;
    const int lane, halves;
    const char *b, *pi;
    Ring ring;
    int group = 0, step = 0, loaded = 0;

    __device__ Load(const ContractArgs& p, const Shared<P>& s, int live)
        : p(p), s(s), lane(threadIdx.x % 32), halves(min(2 * live, p.halves - 2 * int(blockIdx.y) * p.per_block)) {
        const int block = int(blockIdx.y) * p.per_block;
        b = p.b_tiles + (2 * block + lane) * (kWeightTileBytes / 2);
        pi = p.pi_tiles + (int64_t(blockIdx.x) * p.tile_experts + block * P::kBlockExperts) * kPiRow;
    }

    __device__ void load_pi() {
        const uint32_t bytes = uint32_t(p.per_block * P::kBlockExperts) * kPiRow;
        barrier_wait(s.pi_empty(group), parity<kPiStages>(group) ^ 1);
        if (lane == 0) {
            barrier_expect(s.pi_full(group), bytes);
            bulk_load(s.pi(group), pi, bytes, s.pi_full(group));
        }
        pi += int64_t(gridDim.x) * p.tile_experts * kPiRow;
    }

    // The first `steps` of all groups.
    __device__ void until(int steps) {
        for (; loaded < steps; ++loaded) {
            if (p.sums_h && step == 0) load_pi();
            char* const tile = s.tiles() + ring.stage * p.stage_bytes;
            uint64_t* const barrier = s.full(ring.stage);
            const int output = step * P::kDepth;
            const int64_t pitch = int64_t(p.tile_blocks) * kWeightTileBytes;  // of 64 outputs
            barrier_wait(s.empty(ring.stage), ring.parity ^ 1);
            if (lane == 0) barrier_expect(barrier, uint32_t(P::kDoutBytes + halves * p.copied));
            __syncwarp();
            if (lane == 31) tma_load(tile, &p.dout, barrier, output, group, int(blockIdx.x) * kTokens);
            if (lane < halves) {
                bulk_load(tile + P::kDoutBytes + lane * P::kHalfBytes, b + output / 64 * pitch + output % 64 * 128,
                          uint32_t(p.copied), barrier);
            }
            ring.advance(p.stages);
            if (++step == p.steps) {
                step = 0;
                ++group;
                b += (p.group_size + 63) / 64 * pitch;
            }
        }
    }
};

// Words of a token's run of d(logits), with room for `padded` experts in its last group: twice an odd number, for the
// banks.
__host__ __device__ constexpr int run_words(int run, int experts, int padded) {
    return (((run - 1) * experts + padded + 3) / 4 | 1) * 2;
}

// What becomes of d(w): d(logits), or itself for the kernel `route`. 16 tokens a warp; the first one loads, too.
template <class E, class P>
struct Finish {
    static constexpr int kRuns = P::kExperts / 8;  // of eight experts: two for each of the four threads of a token

    const ContractArgs& p;
    const Shared<P>& s;
    const int lane, warp;
    const int64_t token;  // the warp's first

    __device__ Finish(const ContractArgs& p, const Shared<P>& s)
        : p(p),
          s(s),
          lane(threadIdx.x % 32),
          warp(uniform(threadIdx.x / 32 % 4)),
          token(int64_t(blockIdx.x) * kTokens + 16 * warp) {}

    __device__ void run(int live) {
        Load<P> load(p, s, live);
        const int steps = p.groups * p.steps;
        if (warp == 0) load.until(min(min(p.stages, kPiStages * p.steps), steps));
        for (int group = 0; group < p.groups; ++group) {
            if (warp == 0) load.until((group + 1) * p.steps);
            if (!p.sums_w) continue;
            barrier_wait(s.dw_full(group), parity<P::kDwStages>(group));
            if (warp == 0) {  // what has room, as all products of this group are summed
                load.until(min(min((group + 1) * p.steps + p.stages, (group + kPiStages) * p.steps), steps));
            }
            if (p.rows) {
                barrier_wait(s.pi_full(group), parity<kPiStages>(group));
                if (p.scale || p.dload)
                    route<true>(group);
                else
                    route<false>(group);
                warp_arrive(s.pi_empty(group));
            } else {
                store(group, live * P::kBlockExperts);
            }
            warp_arrive(s.dw_empty(group));
        }
    }

    __device__ void store(int group, int experts) {
        const int first = int(blockIdx.y) * p.per_block * P::kBlockExperts;
        if (lane >= min(experts, p.experts - first)) return;
        const float* const from = s.dw(group) + 16 * warp * P::kDwPitch + lane;
        float* const to = p.dw + (token * p.groups + group) * p.experts + first + lane;
#pragma unroll 4
        for (int i = 0; i < 16; ++i) {
            if (token + i < p.tokens) to[int64_t(i) * p.groups * p.experts] = from[i * P::kDwPitch];
        }
    }

    // d(logits) = pi (d(pi) - sum over N of pi d(pi)), of experts 8 m + 2 q + b in thread q of a token. Those beyond N,
    // whose pi and d(w) are 0, are overwritten by the next group.
    template <bool scaled>
    __device__ void route(int group) {
        constexpr int kLoads = kRuns < 2 ? 1 : kRuns / 2;
        uint32_t weights[4 * kLoads];  // of the first eight tokens, then of the others
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int matrix = 4 * i + lane / 8, m = matrix % kRuns, second = matrix / kRuns % 2;
            uint32_t w[4];
            load_matrices<true>(w, smem_address(s.pi(group)) +
                                       swizzled<128>(uint32_t((8 * m + lane % 8) * kPiRow + 32 * warp + 16 * second)));
#pragma unroll
            for (int n = 0; n < 4; ++n) weights[4 * i + n] = w[n];
        }
        const int q = lane % 4, at = group % p.run, words = run_words(p.run, p.experts, P::kExperts);
        char* const staged = s.base + p.logits_at + 16 * warp * words * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 8 * half + lane / 4;
            const float* const dw = s.dw(group) + (16 * warp + row) * P::kDwPitch + 2 * q;
            float pi[kRuns][2], dpi[kRuns][2], total[2];
#pragma unroll
            for (int m = 0; m < kRuns; ++m) {
                const float2 weight = unpacked<E>(weights[half * kRuns + m]);
                const float2 v = *reinterpret_cast<const float2*>(dw + 8 * m);
                pi[m][0] = weight.x, pi[m][1] = weight.y;
                dpi[m][0] = v.x, dpi[m][1] = v.y;
            }
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                float sum[kRuns];
#pragma unroll
                for (int m = 0; m < kRuns; ++m) {
                    const int e = 8 * m + 2 * q + b;
                    dpi[m][b] = dpi[m][b] * (scaled ? s.factor()[e] : p.scaling);
                    if (scaled && p.dload) dpi[m][b] = dpi[m][b] + s.load()[e];
                    sum[m] = pi[m][b] * dpi[m][b];
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
            const float all = total[0] + total[1];
            E* const to = reinterpret_cast<E*>(staged + row * words * 4) + at * p.experts + 2 * q;
            const bool aligned = at * p.experts % 2 == 0;
#pragma unroll
            for (int m = 0; m < kRuns; ++m) {
                const Pair<E> pair = rounded2<E>(pi[m][0] * (dpi[m][0] - all), pi[m][1] * (dpi[m][1] - all));
                if (aligned)
                    *reinterpret_cast<Pair<E>*>(to + 8 * m) = pair;
                else
                    to[8 * m] = pair.x, to[8 * m + 1] = pair.y;
            }
        }
        if (at == p.run - 1 || group == p.groups - 1) {
            __syncwarp();
            store_run(staged, words, group - at, at + 1);
        }
    }

    // In pieces of 8 bytes, the last of which may reach into the padding of the rows. Two groups are up to 16 pieces.
    __device__ void store_run(const char* staged, int words, int group, int groups) {
        const int lanes = p.run == 2 ? 16 : 32, piece = lane % lanes;
        if (4 * piece >= groups * p.experts) return;
        const uint2* const from = reinterpret_cast<const uint2*>(staged) + piece;
        E* const row = static_cast<E*>(p.rows) + token * p.pitch + p.padded_rank + group * p.experts;
        uint2* const to = reinterpret_cast<uint2*>(row) + piece;
        const int rows = int(min(int64_t(16), p.tokens - token));
#pragma unroll 4
        for (int i = lane / lanes; i < rows; i += 32 / lanes) to[i * (p.pitch / 4)] = from[i * (words / 2)];
    }
};

}  // namespace mtlora::cuda
