// contract: C_g = dout_g B_flat[g]^T, from which d(w) and d(h) follow without C leaving the registers, and from them,
// where a block sees all experts and nothing else reads d(w), rows = [d(h) | d(logits)].
//
// A block owns 64 tokens and two or four blocks of 128 columns (experts x rank), one for each multiplying warpgroup,
// which fall out of step by themselves: one multiplies while the others sum. A warp copies tiles of outputs and of pi
// by TMA; a warpgroup turns each group's d(w), which the others leave in shared memory, into d(logits) or stores it.
#include <cuda_runtime.h>
#include <stdlib.h>
#include <string.h>

#include <stdexcept>

#include "cuda/cluster.cuh"
#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora_bwd.h"
#include "cuda/tensor.cuh"

namespace mtlora::cuda {
namespace {

constexpr int kTokens = 64;
constexpr int kColumns = 128;                // of a warpgroup: one block of the sum over experts in the reference
constexpr int kMaxStages = 9;                // five for two warpgroups; nine and no clusters: 18 to 14 us at T = 512
constexpr int kPiStages = 3, kDwStages = 2;  // groups of pi and of d(w) in shared memory
constexpr int kPiRow = kTokens * 2;          // bytes of an expert in a tile of pi
constexpr int kFinishRows = 3 * 32;          // tokens that three warps keep d(logits) of, two sixteens each
constexpr int kRun = 4;                      // groups of d(logits) stored at once: 8 bytes an expert

// Words of a run of one token, with room for `padded` experts in its last group: twice an odd number, so that tokens
// are on different banks.
__host__ __device__ constexpr int run_words(int experts, int padded) {
    return (((kRun - 1) * experts + padded + 3) / 4 | 1) * 2;
}

inline bool probe(const char* v) {
    return getenv("MTLORA_PROBE") && strstr(getenv("MTLORA_PROBE"), v);
}

// Of a block with `warpgroups` that multiply.
template <int R, int warpgroups, int depth>
struct Plan {
    static constexpr int kWarpgroups = warpgroups, kDepth = depth;                      // depth: outputs a step
    static constexpr int kDoutBytes = kTokens * kDepth * 2, kHalfBytes = kDepth * 128;  // half: of 128 columns
    static constexpr int kExperts = warpgroups * (kColumns / R);
    static constexpr int kDwPitch = kExperts + 4;  // floats of a token
    static constexpr int kThreads = 128 * (warpgroups + 1);
    static constexpr bool kMovesRegisters = warpgroups == 4;  // from 96: 104 to multiply, 64 for the rest
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
    int halves;               // of blocks, live ones
    int copied;               // bytes of a half: without the rows beyond a group that is one step
    int per_block;            // a block's: one for each multiplying warpgroup
    int tile_experts;         // in pi_tiles
    int padded_rank, padded_experts;
    int stages, stage_bytes;
    int pi_at, dw_at, logits_at, constants_at, barriers_at;  // in shared memory
};

// A block's shared memory: rings of tiles, of pi and of d(w), d(logits) on their way out, constants of each expert.
struct Shared {
    char *tiles, *pi, *logits;
    float* dw;
    float *scale, *factor, *load;
    uint64_t *full, *empty, *pi_full, *pi_empty, *dw_full, *dw_empty;

    __device__ Shared(const ContractArgs& p, char* base)
        : tiles(base),
          pi(base + p.pi_at),
          logits(base + p.logits_at),
          dw(reinterpret_cast<float*>(base + p.dw_at)),
          scale(reinterpret_cast<float*>(base + p.constants_at)),
          factor(scale + 32),
          load(factor + 32),
          full(reinterpret_cast<uint64_t*>(base + p.barriers_at)),
          empty(full + p.stages),
          pi_full(empty + p.stages),
          pi_empty(pi_full + kPiStages),
          dw_full(pi_empty + kPiStages),
          dw_empty(dw_full + kDwStages) {}
};

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

// One of two sums of the thread and of the thread `mask` away, which gets the other: v[0] to lanes without that bit.
__device__ inline float exchange(const float (&v)[2], int lane, int mask) {
    const bool second = lane & mask;
    const float sent = __shfl_xor_sync(~0u, second ? v[0] : v[1], mask);
    return (second ? v[1] : v[0]) + sent;
}

template <class E, int R, class P, int kExperts>
struct Multiply {
    static constexpr int kValues = kExperts * R / 2;
    using Accumulators = float[kValues];  // c[4 j + 2 row + b] is column 8 j + 2 q + b

    const ContractArgs& p;
    const Shared& s;
    const int lane, warpgroup, valid, row;  // valid: experts
    const int64_t token;
    uint64_t a, b;  // the operands of stage 0
    uint32_t pi_at;
    float* dw_at;
    Ring ring, pi_ring, dw_ring;
    int last;  // the stage whose products may still run
    Pair<E> h[2][R / 8];
    float dh[2][R / 8][2] = {};

    __device__ Multiply(const ContractArgs& p, const Shared& s, int warpgroup, int valid)
        : p(p),
          s(s),
          lane(threadIdx.x % 32),
          warpgroup(warpgroup),
          valid(valid),
          row(threadIdx.x / 32 % 4 * 16 + lane / 4),
          token(int64_t(blockIdx.x) * kTokens + row) {
        constexpr Swizzle swizzle = swizzle_of(P::kDepth * 2);
        const int first = warpgroup * (kColumns / R);
        a = smem_descriptor(s.tiles, 16, P::kDepth * 16, swizzle);
        b = smem_descriptor(s.tiles + P::kDoutBytes + warpgroup * 2 * P::kHalfBytes, P::kHalfBytes, 1024,
                            Swizzle::b128);
        dw_at = s.dw + (row + (lane & 2 ? 8 : 0)) * P::kDwPitch + first + (lane & 1 ? kExperts / 2 : 0);
        // Matrix i of eight tokens: a pair of experts for each of the four threads that share a token.
        const int matrix = lane / 8 % kExperts, pair = matrix % (kExperts / 2), second = matrix / (kExperts / 2);
        pi_at = smem_address(s.pi) + (first + 2 * pair + lane % 2) * kPiRow + threadIdx.x / 32 % 4 * 32 + second * 16;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t t = token + 8 * i;
            const Pair<E>* at = reinterpret_cast<const Pair<E>*>(static_cast<const E*>(p.h) + t * R) + lane % 4;
#pragma unroll
            for (int j = 0; j < R / 8; ++j) h[i][j] = t < p.tokens ? at[4 * j] : Pair<E>();
        }
    }

    __device__ void arrive(uint64_t* barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    }

    __device__ void multiply(Accumulators& c) {
        for (int step = 0; step < p.steps; ++step) {
            const uint32_t stage = ring.stage * p.stage_bytes;
            const uint64_t dout = advanced(a, stage), weights = advanced(b, stage);
            barrier_wait(s.full + ring.stage, ring.parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < P::kDepth / 16; ++k) {  // 16 outputs: 32 bytes of a row of dout, 16 rows of B
                wgmma<E, 0, 1>(c, advanced(dout, 32 * k), advanced(weights, 2048 * k), step > 0 || k > 0);
            }
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();
                if (lane == 0) barrier_arrive(s.empty + last);
            }
            last = ring.stage;
            ring.advance(p.stages);
        }
        wgmma_wait<0>();
        pin(c);
        if (lane == 0) barrier_arrive(s.empty + last);
        if (valid < kExperts) {  // 0 times an infinity would not be nothing
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                if (i / (R / 2) >= valid) c[i] = 0.0f;
            }
        }
    }

    // c h of one expert, row and b, summed over j.
    __device__ float rank_sum(const Accumulators& c, int e, int row, int b) {
        float sum[R / 8];
#pragma unroll
        for (int j = 0; j < R / 8; ++j) {
            const float2 pair = to_float2(h[row][j]);
            sum[j] = c[4 * (e * (R / 8) + j) + 2 * row + b] * (b ? pair.y : pair.x);
        }
        return tree_sum(sum);
    }

    // d(w): the quad's threads, whose columns are 8 j + 2 q + b, exchange halves until each has other rows and experts.
    __device__ void sum_over_rank(const Accumulators& c) {
        constexpr int kHalf = kExperts / 2, kRunExperts = kHalf < 4 ? kHalf : 4;
        struct alignas(4 * kRunExperts) Run {
            float v[kRunExperts];
        };
        Run* const to = reinterpret_cast<Run*>(dw_at + dw_ring.stage * (kTokens * P::kDwPitch));
        barrier_wait(s.dw_empty + dw_ring.stage, dw_ring.parity ^ 1);
        const int live = valid - (lane & 1 ? kHalf : 0);  // 0 times an infinity of h is not nothing either
        Run run;
#pragma unroll
        for (int e = 0; e < kHalf; ++e) {
            float halves[2];
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                float of_row[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float rows[2] = {rank_sum(c, e + i * kHalf, 0, b), rank_sum(c, e + i * kHalf, 1, b)};
                    of_row[i] = exchange(rows, lane, 2);
                }
                halves[b] = exchange(of_row, lane, 1);
            }
            run.v[e % kRunExperts] = e < live ? halves[0] + halves[1] : 0.0f;
            if (e % kRunExperts == kRunExperts - 1) to[e / kRunExperts] = run;
        }
        arrive(s.dw_full + dw_ring.stage);
        dw_ring.advance(kDwStages);
    }

    __device__ void sum_over_experts(const Accumulators& c) {
        constexpr int kLoads = kExperts < 4 ? 1 : kExperts / 4;
        uint32_t pairs[4 * kLoads];  // of row 0, then of row 8
        barrier_wait(s.pi_full + pi_ring.stage, pi_ring.parity);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int second = 4 * i / (kExperts / 2), pair = 4 * i % (kExperts / 2);
            uint32_t m[4];
            load_matrices<true>(m, pi_at + pi_ring.stage * (P::kExperts * kPiRow) +
                                       (kExperts > 4 ? second * 16 + pair * 2 * kPiRow : 0));
#pragma unroll
            for (int n = 0; n < 4; ++n) pairs[4 * i + n] = m[n];
        }
        arrive(s.pi_empty + pi_ring.stage);
        pi_ring.advance(kPiStages);
        float weight[2][kExperts];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
            for (int e = 0; e < kExperts; ++e) {
                const float2 pair = to_float2(bits_as<Pair<E>>(pairs[row * (kExperts / 2) + e / 2]));
                weight[row][e] = e % 2 ? pair.y : pair.x;
            }
        }
        if (p.scale) {
#pragma unroll
            for (int e = 0; e < kExperts; ++e) {
                const float scale = s.scale[warpgroup * (kColumns / R) + e];
#pragma unroll
                for (int row = 0; row < 2; ++row) weight[row][e] = weight[row][e] * scale;
            }
        }
#pragma unroll
        for (int i = 0; i < R / 2; ++i) {
            const int row = i / 2 % 2, b = i % 2, j = i / 4;
            float sum[kExperts];
#pragma unroll
            for (int e = 0; e < kExperts; ++e) {
                sum[e] = weight[row][e] * c[4 * (e * (R / 8) + j) + 2 * row + b];
            }
            dh[row][j][b] = dh[row][j][b] + tree_sum(sum);
        }
    }

    __device__ void run(int live) {
        for (int group = 0; group < p.groups; ++group) {
            Accumulators c;
            multiply(c);
            if (p.sums_w) sum_over_rank(c);
            if (p.sums_h) sum_over_experts(c);
        }
        if (p.dh) {
            const int64_t block = int64_t(blockIdx.y) * p.per_block + warpgroup;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int64_t t = token + 8 * i;
                float2* at = reinterpret_cast<float2*>(p.dh + (block * p.tokens + t) * R) + lane % 4;
#pragma unroll
                for (int j = 0; j < R / 8; ++j) {
                    if (t < p.tokens) at[4 * j] = {dh[i][j][0], dh[i][j][1]};
                }
            }
        } else if (p.rows) {
            add_parts(live);
        }
    }

    // d(h) of the block's tokens: the warpgroups' parts in order, scaled; zeros up to padded_rank.
    __device__ void add_parts(int live) {
        float* const parts = reinterpret_cast<float*>(s.tiles);
        named_barrier(1, 128 * live);  // no products read the tiles any more
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float2* at = reinterpret_cast<float2*>(parts + (warpgroup * kTokens + row + 8 * i) * R) + lane % 4;
#pragma unroll
            for (int j = 0; j < R / 8; ++j) at[4 * j] = {dh[i][j][0], dh[i][j][1]};
        }
        named_barrier(1, 128 * live);
        for (int i = threadIdx.x; i < kTokens * p.padded_rank; i += 128 * live) {
            const int row = i / p.padded_rank, rank = i % p.padded_rank;
            const int64_t t = int64_t(blockIdx.x) * kTokens + row;
            float v = 0;
            if (rank < R) {
                for (int block = 0; block < live; ++block) v = v + parts[(block * kTokens + row) * R + rank];
                v = v * p.scaling;
                if (p.relu && t < p.tokens && to_float(static_cast<const E*>(p.h)[t * R + rank]) <= 0) v = 0;
            }
            if (t < p.tokens) static_cast<E*>(p.rows)[t * p.pitch + rank] = rounded<E>(v);
        }
    }
};

// What becomes of d(w), 16 tokens a warp and turn: three warps share the four sixteens of a group, the one that has two
// changes with every run of groups.
template <class E, int kExperts, int pitch>
struct Finish {
    const ContractArgs& p;
    const Shared& s;
    const int lane;
    const int64_t tile;  // its first token

    __device__ void run(int first, int experts) {
        const int warp = threadIdx.x / 32 % 4 - 1;
        Ring ring, pi_ring;
        for (int group = 0; group < p.groups; ++group) {
            barrier_wait(s.dw_full + ring.stage, ring.parity);
            if (p.rows) barrier_wait(s.pi_full + pi_ring.stage, pi_ring.parity);
            for (int row = (warp + group / kRun) % 3 * 16; row < kTokens; row += 48) {
                const float* const dw = s.dw + (ring.stage * kTokens + row) * pitch;
                if (p.rows)
                    route(group, row, dw, s.pi + pi_ring.stage * (kExperts * kPiRow));
                else
                    store(group, tile + row, dw, first, experts);
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(s.dw_empty + ring.stage);
                    if (p.rows) barrier_arrive(s.pi_empty + pi_ring.stage);
                }
            }
            ring.advance(kDwStages);
            pi_ring.advance(kPiStages);
        }
    }

    // As it is, for the kernel `route`.
    __device__ void store(int group, int64_t token, const float* dw, int first, int experts) {
        if (lane >= experts) return;
        float* const to = p.dw + (token * p.groups + group) * p.experts + first + lane;
#pragma unroll 4
        for (int i = 0; i < 16; ++i) {
            if (token + i < p.tokens) to[int64_t(i) * p.groups * p.experts] = dw[i * pitch + lane];
        }
    }

    // d(logits) = pi (d(pi) - sum over N of pi d(pi)): two threads a token take the even and the odd experts. Those
    // beyond N, whose pi and d(w) are 0, overwrite what the next group writes after them.
    __device__ void route(int group, int row, const float* dw, const char* pi_tile) {
        constexpr int kHalf = kExperts / 2;
        const int odd = lane % 2, words = run_words(p.experts, kExperts);
        char* const staged = s.logits + (threadIdx.x / 32 % 4 - 1 + row / 48 * 3) * 16 * words * 4;  // the warp's
        const float* const from = dw + lane / 2 * pitch + odd;
        const E* const weights = reinterpret_cast<const E*>(pi_tile) + odd * kTokens + row + lane / 2;
        float dpi[kHalf], pi[kHalf], sum[kHalf];
#pragma unroll
        for (int i = 0; i < kHalf; ++i) dpi[i] = from[2 * i];
        if (p.scale) {
#pragma unroll
            for (int i = 0; i < kHalf; ++i) dpi[i] = dpi[i] * s.factor[2 * i + odd];
        } else {
#pragma unroll
            for (int i = 0; i < kHalf; ++i) dpi[i] = dpi[i] * p.scaling;
        }
        if (p.dload) {
#pragma unroll
            for (int i = 0; i < kHalf; ++i) dpi[i] = dpi[i] + s.load[2 * i + odd];
        }
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            pi[i] = to_float(weights[2 * i * kTokens]);
            sum[i] = pi[i] * dpi[i];
        }
        if (p.padded_experts < kExperts) {  // the tree pads N to a power of two by 0; -0 changes nothing
            const int padded = (p.padded_experts + 1 - odd) / 2;
#pragma unroll
            for (int i = 0; i < kHalf; ++i) sum[i] = i < padded ? sum[i] : -0.0f;
        }
        float total = tree_sum(sum);
        total = total + __shfl_xor_sync(~0u, total, 1);
        E* const to = reinterpret_cast<E*>(staged + lane / 2 * words * 4) + group % kRun * p.experts + odd;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) to[2 * i] = rounded<E>(pi[i] * (dpi[i] - total));
        if (group % kRun == kRun - 1 || group == p.groups - 1) {
            __syncwarp();
            store_run(staged, words, tile + row, group - group % kRun, group % kRun + 1);
        }
    }

    // At most N pieces of 8 bytes a token; the last may reach into the padding of the rows.
    __device__ void store_run(const char* staged, int words, int64_t token, int group, int groups) {
        if (4 * lane >= groups * p.experts) return;
        const int rows = int(min(int64_t(16), p.tokens - token));
        const uint2* from = reinterpret_cast<const uint2*>(staged) + lane;
        uint2* to =
            reinterpret_cast<uint2*>(static_cast<E*>(p.rows) + token * p.pitch + p.padded_rank + group * p.experts) +
            lane;
#pragma unroll 4
        for (int i = 0; i < 16; ++i, from += words / 2, to += p.pitch / 4) {
            if (i < rows) *to = *from;
        }
    }
};

// Tiles of dout, B and pi, one thread.
template <class P, int R>
__device__ void load(const ContractArgs& p, const Shared& s, int live) {
    const int first = int(blockIdx.y) * p.per_block, halves = min(2 * live, p.halves - 2 * first);
    const int64_t pitch = int64_t(p.tile_blocks) * kWeightTileBytes;  // of 64 outputs
    const uint32_t pi_bytes =
        uint32_t(p.rows ? P::kExperts : p.per_block * (kColumns / R)) * kPiRow;  // all that is summed
    const char* from = p.b_tiles + first * kWeightTileBytes;
    const char* pi_from = p.pi_tiles + (int64_t(blockIdx.x) * p.tile_experts + first * (kColumns / R)) * kPiRow;
    Ring ring, pi_ring;
    for (int group = 0; group < p.groups; ++group) {
        if (p.sums_h) {
            barrier_wait(s.pi_empty + pi_ring.stage, pi_ring.parity ^ 1);
            barrier_expect(s.pi_full + pi_ring.stage, pi_bytes);
            bulk_load(s.pi + pi_ring.stage * (P::kExperts * kPiRow), pi_from, pi_bytes, s.pi_full + pi_ring.stage);
            pi_from += int64_t(gridDim.x) * p.tile_experts * kPiRow;
            pi_ring.advance(kPiStages);
        }
        for (int step = 0; step < p.steps; ++step) {
            char* const tile = s.tiles + ring.stage * p.stage_bytes;
            uint64_t* const barrier = s.full + ring.stage;
            const int output = step * P::kDepth;
            barrier_wait(s.empty + ring.stage, ring.parity ^ 1);
            barrier_expect(barrier, uint32_t(P::kDoutBytes + halves * p.copied));
            tma_load(tile, &p.dout, barrier, output, group, int(blockIdx.x) * kTokens);
            const char* const at = from + output / 64 * pitch + output % 64 * 128;
            for (int half = 0; half < halves; ++half) {
                bulk_load(tile + P::kDoutBytes + half * P::kHalfBytes, at + half * (kWeightTileBytes / 2),
                          uint32_t(p.copied), barrier);
            }
            ring.advance(p.stages);
        }
        from += (p.group_size + 63) / 64 * pitch;
    }
}

template <class E, int R, class P>
__global__ void __launch_bounds__(P::kThreads, 1) contract_kernel(const __grid_constant__ ContractArgs p) {
    constexpr int kExperts = kColumns / R, kFew = kExperts < 8 ? 2 : kExperts / 4;
    extern __shared__ char raw[];
    const Shared s(p, raw + (1024 - smem_address(raw) % 1024) % 1024);
    const int live = min(p.per_block, p.blocks - int(blockIdx.y) * p.per_block);
    if (threadIdx.x == 0) {
        const uint32_t multiplying = 4 * uint32_t(live);
        init_stages(s.full, s.empty, p.stages, multiplying);
        init_stages(s.pi_full, s.pi_empty, kPiStages, multiplying + (p.rows && p.sums_w ? 4 : 0));
        for (int i = 0; i < kDwStages; ++i) {
            barrier_init(s.dw_full + i, multiplying);
            barrier_init(s.dw_empty + i, 4);
        }
        barrier_init_fence();
    }
    for (int i = threadIdx.x; i < kDwStages * kTokens * P::kDwPitch; i += P::kThreads) s.dw[i] = 0;
    if (p.copied < P::kHalfBytes) {  // rows that no copy reaches
        for (int i = 16 * threadIdx.x; i < p.pi_at; i += 16 * P::kThreads) {
            *reinterpret_cast<uint4*>(s.tiles + i) = {0, 0, 0, 0};
        }
        fence_async_proxy();
    }
    grid_dependency_wait();
    launch_dependents();
    const int first = int(blockIdx.y) * p.per_block * kExperts, expert = threadIdx.x;
    if (expert < P::kExperts) {
        const bool in = first + expert < p.experts;
        const float scale = in && p.scale ? to_float(static_cast<const E*>(p.scale)[first + expert]) : 1.0f;
        s.scale[expert] = scale;
        s.factor[expert] = scale * p.scaling;
        s.load[expert] = in && p.dload ? p.dload[first + expert] * p.inverse_count : 0.0f;
    }
    __syncthreads();

    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == P::kWarpgroups) {
        if constexpr (P::kMovesRegisters) shrink_registers<64>();
        if (threadIdx.x % 128 == 0) load<P, R>(p, s, live);
        if (threadIdx.x % 128 >= 32 && p.sums_w) {
            Finish<E, P::kExperts, P::kDwPitch> finish = {p, s, int(threadIdx.x % 32), int64_t(blockIdx.x) * kTokens};
            finish.run(first, min(live * kExperts, p.experts - first));
        }
    } else {
        if constexpr (P::kMovesRegisters) grow_registers<104>();
        if (warpgroup >= live) return;
        const int valid = min(kExperts, p.experts - first - warpgroup * kExperts);
        if (kFew < kExperts && valid <= kFew)
            Multiply<E, R, P, kFew>(p, s, warpgroup, valid).run(live);
        else
            Multiply<E, R, P, kExperts>(p, s, warpgroup, valid).run(live);
    }
}

template <class E, int R, class P>
void launch_contract(const RoutedLoraBwd& f, const Buffers& w) {
    const int64_t size = f.d_out / f.groups, tiles = ceil_div(f.tokens, kTokens);
    ContractArgs p = {};
    p.dout = tensor_map(f.dout.data, f.compute_dtype,
                        {{size, 1, P::kDepth}, {f.groups, size, 1}, {f.tokens, f.dout.stride[0], kTokens}});
    p.b_tiles = static_cast<const char*>(w.b_tiles);
    p.pi_tiles = static_cast<const char*>(w.pi_tiles);
    p.h = f.h.data;
    p.scale = f.expert_scale.data;
    p.dload = static_cast<const float*>(f.dload.data);
    const bool routes = contract_routes(f);
    if (routes)
        p.rows = w.rows;
    else
        p.dw = w.dw, p.dh = w.dh;
    p.pitch = row_pitch(f);
    p.scaling = f.scaling;
    p.inverse_count = f.inverse_count;
    p.relu = f.relu;
    p.sums_w = routes ? f.router.data != nullptr : w.dw != nullptr;
    p.sums_h = w.rows != nullptr;
    p.tokens = int(f.tokens);
    p.groups = int(f.groups);
    p.group_size = int(size);
    p.experts = int(f.experts);
    for (p.padded_experts = 1; p.padded_experts < p.experts;) p.padded_experts *= 2;
    p.steps = int(ceil_div(size, P::kDepth));
    p.blocks = column_blocks(f);
    p.halves = int(ceil_div(f.experts * R, kColumns / 2));
    p.copied = p.steps == 1 && !probe("notrim") ? int(size) * 128 : P::kHalfBytes;
    p.tile_blocks = weight_blocks(f);
    p.per_block = contract_blocks(f);
    p.tile_experts = tile_experts(f);
    p.padded_rank = padded_rank(f);
    p.stage_bytes = P::kDoutBytes + p.per_block * 2 * P::kHalfBytes;
    const int logits = routes && p.sums_w ? kFinishRows * run_words(p.experts, P::kExperts) * 4 : 0;
    const auto bytes = [&] {
        p.pi_at = p.stages * p.stage_bytes;
        p.dw_at = p.pi_at + kPiStages * P::kExperts * kPiRow;
        p.logits_at = p.dw_at + kDwStages * kTokens * P::kDwPitch * 4;
        p.constants_at = p.logits_at + logits;
        p.barriers_at = p.constants_at + 3 * 32 * 4;
        return 1024 + p.barriers_at + 2 * (p.stages + kPiStages + kDwStages) * 8;
    };
    for (p.stages = kMaxStages; bytes() > kMaxSharedBytes;) --p.stages;
    const dim3 grid(unsigned(tiles), unsigned(ceil_div(p.blocks, p.per_block)));
    launch<contract_kernel<E, R, P>>("routed_lora contract", grid, P::kThreads, bytes(), f.stream, true, p);
}

template <class E, int R>
void choose_plan(const RoutedLoraBwd& f, const Buffers& w) {
    if constexpr (R == 16 || R == 32) {  // 32 experts of rank 8 are two blocks of columns; rank 64 takes more registers
        if (contract_blocks(f) > 2) return launch_contract<E, R, Plan<R, 4, 32>>(f, w);
    }
    if (f.d_out / f.groups <= 32 && !probe("d64"))
        launch_contract<E, R, Plan<R, 2, 32>>(f, w);
    else
        launch_contract<E, R, Plan<R, 2, 64>>(f, w);
}

template <class E>
void choose_rank(const RoutedLoraBwd& f, const Buffers& w) {
    switch (f.rank) {
        case 8:
            return choose_plan<E, 8>(f, w);
        case 16:
            return choose_plan<E, 16>(f, w);
        case 32:
            return choose_plan<E, 32>(f, w);
        case 64:
            return choose_plan<E, 64>(f, w);
        default:
            throw std::runtime_error("routed_lora contract: rank must be 8, 16, 32 or 64");
    }
}

}  // namespace

// Blocks of 128 columns a block multiplies: one where that fills the GPU, all up to four, or two.
int contract_blocks(const RoutedLoraBwd& f) {
    const int blocks = column_blocks(f);
    if (blocks == 1 || ceil_div(f.tokens, kTokens) * blocks <= multiprocessors()) return 1;
    return blocks <= (f.rank < 64 ? 4 : 2) ? blocks : 2;
}

bool contract_routes(const RoutedLoraBwd& f) {
    return contract_blocks(f) == column_blocks(f) && !f.dpi.data && !f.dexpert_scale.data && !probe("unfused");
}

void contract(const RoutedLoraBwd& f, const Buffers& w) {
    if (f.compute_dtype == DType::bf16)
        choose_rank<bf16>(f, w);
    else
        choose_rank<f16>(f, w);
}

}  // namespace mtlora::cuda
