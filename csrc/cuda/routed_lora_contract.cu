// contract: C_g = dout_g B_flat[g]^T, from which d(w) and d(h) follow without C leaving the registers, and from them,
// where a block sees all experts and nothing else reads d(w), rows = [d(h) | d(logits)].
//
// A block owns 64 tokens and up to four blocks of 128 columns (experts x rank), one for each multiplying warpgroup,
// which fall out of step by themselves: one multiplies while the others sum. Of one more warpgroup, a thread copies
// tiles by TMA, and three warps turn each group's d(w), which is left in shared memory, into d(logits) or store it.
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/routed_lora_contract.cuh"

namespace mtlora::cuda {
namespace {

// One of two sums of the thread and of the thread `mask` away, which gets the other: v[0] to lanes without that bit.
__device__ inline float exchange(const float (&v)[2], int lane, int mask) {
    const bool second = lane & mask;
    const float sent = __shfl_xor_sync(~0u, second ? v[0] : v[1], mask);
    return (second ? v[1] : v[0]) + sent;
}

// The row of a tile that a thread of a warpgroup has; the other is eight further on.
__device__ inline int tile_row() {
    return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
}

// What a thread has of d(h): of its two rows, columns 8 j + 2 q + b.
template <class P>
struct PartOfDh {
    float v[2][P::kRank / 8][2] = {};
};

// A warpgroup with kExperts experts, those of its block of columns or, where no more are live, a few of them.
template <class E, class P, int kExperts>
struct Multiply {
    static constexpr int R = P::kRank;
    static constexpr int kValues = kExperts * R / 2;
    using Accumulators = float[kValues];  // c[4 j + 2 row + b] is column 8 j + 2 q + b

    const ContractArgs& p;
    const Shared<P>& s;
    const int lane, warpgroup, valid;  // valid: experts
    uint64_t a, b;                     // the operands of stage 0
    uint32_t pi_at;
    int dw_at;
    Ring ring;
    int last;  // the stage whose products may still run
    Pair<E> h[2][R / 8];
    PartOfDh<P> dh;

    __device__ Multiply(const ContractArgs& p, const Shared<P>& s, int warpgroup, int valid)
        : p(p), s(s), lane(threadIdx.x % 32), warpgroup(warpgroup), valid(valid) {
        constexpr Swizzle swizzle = swizzle_of(P::kDepth * 2);
        const int first = warpgroup * P::kBlockExperts;
        a = smem_descriptor(s.tiles(), 16, P::kDepth * 16, swizzle);
        b = smem_descriptor(s.tiles() + P::kDoutBytes + warpgroup * 2 * P::kHalfBytes, P::kHalfBytes, 1024,
                            Swizzle::b128);
        dw_at = (tile_row() + (lane & 2 ? 8 : 0)) * P::kDwPitch + first + (lane & 1 ? kExperts / 2 : 0);
        // Matrix i of eight tokens: a pair of experts for each of the four threads that share a token.
        const int matrix = lane / 8 % kExperts, pair = matrix % (kExperts / 2), second = matrix / (kExperts / 2);
        const int expert = first + 2 * pair + lane % 2, unit = threadIdx.x / 32 % 4 * 2 + second;
        const int number = int(blockIdx.y) * p.per_block * P::kBlockExperts + expert;
        pi_at = uint32_t(expert * kPiRow + (unit ^ number % 8) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t t = int64_t(blockIdx.x) * kTokens + tile_row() + 8 * i;
            const Pair<E>* at = reinterpret_cast<const Pair<E>*>(static_cast<const E*>(p.h) + t * R) + lane % 4;
#pragma unroll
            for (int j = 0; j < R / 8; ++j) h[i][j] = t < p.tokens ? at[4 * j] : Pair<E>();
        }
    }

    __device__ void multiply(Accumulators& c) {
        for (int step = 0; step < p.steps; ++step) {
            const uint32_t stage = ring.stage * p.stage_bytes;
            const uint64_t dout = advanced(a, stage), weights = advanced(b, stage);
            barrier_wait(s.full(ring.stage), ring.parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < P::kDepth / 16; ++k) {  // 16 outputs: 32 bytes of a row of dout, 16 rows of B
                wgmma<E, 0, 1>(c, advanced(dout, 32 * k), advanced(weights, 2048 * k), step > 0 || k > 0);
            }
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();
                if (lane == 0) barrier_arrive(s.empty(last));
            }
            last = ring.stage;
            ring.advance(p.stages);
        }
        wgmma_wait<0>();
        pin(c);
        if (lane == 0) barrier_arrive(s.empty(last));
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
    __device__ void sum_over_rank(const Accumulators& c, int group) {
        constexpr int kHalf = kExperts / 2, kRunExperts = kHalf < 4 ? kHalf : 4;
        struct alignas(4 * kRunExperts) Run {
            float v[kRunExperts];
        };
        Run* const to = reinterpret_cast<Run*>(s.dw(group) + dw_at);
        barrier_wait(s.dw_empty(group), parity<P::kDwStages>(group) ^ 1);
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
            run.v[e % kRunExperts] = halves[0] + halves[1];
            if (valid < kExperts && e >= live) run.v[e % kRunExperts] = 0.0f;
            if (e % kRunExperts == kRunExperts - 1) to[e / kRunExperts] = run;
        }
        barrier_arrive(s.dw_full(group));
    }

    __device__ void sum_over_experts(const Accumulators& c, int group) {
        constexpr int kLoads = kExperts < 4 ? 1 : kExperts / 4;
        uint32_t pairs[4 * kLoads];  // of row 0, then of row 8
        barrier_wait(s.pi_full(group), parity<kPiStages>(group));
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int second = 4 * i / (kExperts / 2), pair = 4 * i % (kExperts / 2);
            uint32_t m[4];
            const uint32_t at = (smem_address(s.pi(group)) + pi_at) ^ (kExperts > 4 ? second * 16 : 0);
            load_matrices<true>(m, at + (kExperts > 4 ? pair * 2 * kPiRow : 0));
#pragma unroll
            for (int n = 0; n < 4; ++n) pairs[4 * i + n] = m[n];
        }
        barrier_arrive(s.pi_empty(group));
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float weight[kExperts];
#pragma unroll
            for (int e = 0; e < kExperts; ++e) {
                const float2 pair = unpacked<E>(pairs[row * (kExperts / 2) + e / 2]);
                weight[e] = e % 2 ? pair.y : pair.x;
            }
            if (p.scale) {
#pragma unroll
                for (int e = 0; e < kExperts; ++e) {
                    weight[e] = weight[e] * s.scale()[warpgroup * P::kBlockExperts + e];
                }
            }
#pragma unroll
            for (int i = 0; i < R / 4; ++i) {
                const int b = i % 2, j = i / 2;
                float sum[kExperts];
#pragma unroll
                for (int e = 0; e < kExperts; ++e) {
                    sum[e] = weight[e] * c[4 * (e * (R / 8) + j) + 2 * row + b];
                }
                dh.v[row][j][b] = dh.v[row][j][b] + tree_sum(sum);
            }
        }
    }

    __device__ PartOfDh<P> run() {
        for (int group = 0; group < p.groups; ++group) {
            Accumulators c;
            multiply(c);
            if (p.sums_w) sum_over_rank(c, group);
            if (p.sums_h) sum_over_experts(c, group);
        }
        return dh;
    }
};

// A warpgroup's part of d(h): to memory for `route`, or added to those of the block's others, in order, and scaled;
// zeros up to padded_rank.
template <class E, class P>
__device__ void finish_dh(const ContractArgs& p, const Shared<P>& s, const PartOfDh<P>& dh, int warpgroup, int live) {
    constexpr int R = P::kRank;
    const int row = tile_row(), lane = threadIdx.x % 32;
    const int64_t first = int64_t(blockIdx.x) * kTokens, block = int64_t(blockIdx.y) * p.per_block + warpgroup;
    float* const parts = reinterpret_cast<float*>(s.tiles());
    if (p.rows) named_barrier(1, 128 * live);  // no products read the tiles any more
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t t = first + row + 8 * i;
        if (!p.rows && t >= p.tokens) continue;
        float* const to = p.rows ? parts + (warpgroup * kTokens + row + 8 * i) * R : p.dh + (block * p.tokens + t) * R;
#pragma unroll
        for (int j = 0; j < R / 8; ++j) {
            *reinterpret_cast<float2*>(to + 8 * j + lane % 4 * 2) = {dh.v[i][j][0], dh.v[i][j][1]};
        }
    }
    if (!p.rows) return;
    named_barrier(1, 128 * live);
    for (int i = threadIdx.x; i < kTokens * p.padded_rank; i += 128 * live) {
        const int row = i / p.padded_rank, rank = i % p.padded_rank;
        const int64_t t = first + row;
        float v = 0;
        if (rank < R) {
            for (int block = 0; block < live; ++block) v = v + parts[(block * kTokens + row) * R + rank];
            v = v * p.scaling;
            if (p.relu && t < p.tokens && to_float(static_cast<const E*>(p.h)[t * R + rank]) <= 0) v = 0;
        }
        if (t < p.tokens) static_cast<E*>(p.rows)[t * p.pitch + rank] = rounded<E>(v);
    }
}

template <class E, class P>
__global__ void __launch_bounds__(P::kThreads, 1) contract_kernel(const __grid_constant__ ContractArgs p) {
    constexpr int kExperts = P::kBlockExperts, kFew = kExperts < 8 ? 2 : kExperts / 4;
    extern __shared__ char raw[];
    const Shared<P> s = {raw + (1024 - smem_address(raw) % 1024) % 1024};
    const int live = min(p.per_block, p.blocks - int(blockIdx.y) * p.per_block);
    if (threadIdx.x == 0) {
        // A lane arrives for its warp where only products read; every thread where loads and stores meet.
        const uint32_t multiplying = 128 * uint32_t(live), finishing = 32 * kFinishing;
        init_stages(s.full(0), s.empty(0), p.stages, multiplying / 32);
        init_stages(s.pi_full(0), s.pi_empty(0), kPiStages, multiplying + (p.rows && p.sums_w ? finishing : 0));
        for (int i = 0; i < P::kDwStages; ++i) {
            barrier_init(s.dw_full(i), multiplying);
            barrier_init(s.dw_empty(i), finishing);
        }
        barrier_init_fence();
    }
    // Experts beyond those of the block, whose pi and d(w) nothing writes, are nothing.
    for (int i = P::kPiAt + 16 * threadIdx.x; i < P::kTilesAt; i += 16 * P::kThreads) {
        *reinterpret_cast<uint4*>(s.base + i) = {0, 0, 0, 0};
    }
    fence_async_proxy();
    grid_dependency_wait();
    launch_dependents();
    const int first = int(blockIdx.y) * p.per_block * kExperts, expert = threadIdx.x;
    if (expert < 32) {
        const bool in = first + expert < p.experts;
        const float scale = in && p.scale ? to_float(static_cast<const E*>(p.scale)[first + expert]) : 1.0f;
        s.scale()[expert] = scale;
        s.factor()[expert] = scale * p.scaling;
        s.load()[expert] = in && p.dload ? p.dload[first + expert] * p.inverse_count : 0.0f;
    }
    __syncthreads();

    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == P::kWarpgroups) {
        if constexpr (P::kMovesRegisters) shrink_registers<64>();  // from 96 at the start
        if (threadIdx.x % 128 == 0) load(p, s);
        if (threadIdx.x % 128 >= 32 && p.sums_w) {
            Finish<E, P>(p, s).run(first, min(live * kExperts, p.experts - first));
        }
    } else {
        if constexpr (P::kMovesRegisters) grow_registers<104>();
        if (warpgroup >= live) return;
        const int valid = min(kExperts, p.experts - first - warpgroup * kExperts);
        PartOfDh<P> dh;
        if (kFew < kExperts && valid <= kFew)
            dh = Multiply<E, P, kFew>(p, s, warpgroup, valid).run();
        else
            dh = Multiply<E, P, kExperts>(p, s, warpgroup, valid).run();
        if (p.sums_h) finish_dh<E>(p, s, dh, warpgroup, live);
    }
}

template <class E, class P>
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
    p.experts = int(f.experts);
    for (p.padded_experts = 1; p.padded_experts < p.experts;) p.padded_experts *= 2;
    p.steps = int(ceil_div(size, P::kDepth));
    p.blocks = column_blocks(f);
    p.tile_blocks = weight_blocks(f);
    p.per_block = contract_blocks(f);
    p.tile_experts = tile_experts(f);
    p.padded_rank = padded_rank(f);
    p.stage_bytes = P::kDoutBytes + p.per_block * 2 * P::kHalfBytes;
    p.run = p.experts % 2 ? 4 : 2;  // whole pieces of 8 bytes
    // Room for all experts of the last group, in twice an odd number of words: tokens on different banks.
    p.run_words = (((p.run - 1) * p.experts + P::kExperts + 3) / 4 | 1) * 2;
    const int logits = routes && p.sums_w ? kTokens * p.run_words * 4 : 0;
    const auto bytes = [&] {
        p.logits_at = P::kTilesAt + p.stages * p.stage_bytes;
        return 1024 + p.logits_at + logits;
    };
    for (p.stages = P::kMaxStages; bytes() > kMaxSharedBytes;) --p.stages;
    const dim3 grid(unsigned(tiles), unsigned(ceil_div(p.blocks, p.per_block)));
    launch<contract_kernel<E, P>>("routed_lora contract", grid, P::kThreads, bytes(), f.stream, true, p);
}

template <class E, int R>
void choose_plan(const RoutedLoraBwd& f, const Buffers& w) {
    if constexpr (R == 16) {
        if (contract_blocks(f) > 2) return launch_contract<E, Plan<R, 4, 32>>(f, w);
    }
    if (contract_depth(f) == 32)
        launch_contract<E, Plan<R, 2, 32>>(f, w);
    else
        launch_contract<E, Plan<R, 2, 64>>(f, w);
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

// Blocks of 128 columns a block multiplies: one where that fills the GPU, else two, or up to four at rank 16: higher
// ranks would need more registers, and 32 experts of rank 8 are two blocks.
int contract_blocks(const RoutedLoraBwd& f) {
    const int blocks = column_blocks(f);
    if (blocks == 1 || ceil_div(f.tokens, kTokens) * blocks <= multiprocessors()) return 1;
    return f.rank == 16 && blocks <= 4 ? blocks : 2;
}

int contract_depth(const RoutedLoraBwd& f) {
    return contract_blocks(f) > 2 || f.d_out / f.groups <= 32 ? 32 : 64;
}

bool contract_routes(const RoutedLoraBwd& f) {
    return contract_blocks(f) == column_blocks(f) && !f.dpi.data && !f.dexpert_scale.data;
}

void contract(const RoutedLoraBwd& f, const Buffers& w) {
    if (f.compute_dtype == DType::bf16)
        choose_rank<bf16>(f, w);
    else
        choose_rank<f16>(f, w);
}

}  // namespace mtlora::cuda
