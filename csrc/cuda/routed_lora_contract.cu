// contract: C_g = dout_g B_flat[g]^T, from which d(w) and d(h) follow without C leaving the registers.
//
// A block owns 64 tokens and two blocks of 128 columns (experts x rank), one for each multiplying warpgroup; a warp
// copies tiles of 64 outputs by TMA. The warpgroups fall out of step by themselves: one multiplies while the other
// sums.
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/cluster.cuh"
#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora_bwd.h"

namespace mtlora::cuda {
namespace {

constexpr int kTokens = 64, kDepth = 64;  // depth: outputs a step, 128 bytes
constexpr int kColumns = 128;             // of a warpgroup: one block of the sum over experts in the reference
constexpr int kWarpgroups = 2;
constexpr int kThreads = 128 * kWarpgroups + 32;
constexpr int kDoutBytes = kTokens * kDepth * 2;
constexpr int kMaxStages = 9;  // five for two warpgroups; nine and no clusters: 18 to 14 us at T = 512

struct ContractArgs {
    CUtensorMap dout;
    const char* b_tiles;
    const uint16_t* pi_tiles;
    const void *h, *scale;
    float *dw, *dh;  // [T, G, N] and [blocks, T, rank]; either may be absent
    int tokens, groups, experts;
    int steps;                // tiles of outputs in a group
    int blocks, tile_blocks;  // of columns: live ones, those in b_tiles
    int per_block;            // a block's: one for each multiplying warpgroup
    int stages, stage_bytes;
    int tile_experts;  // in pi_tiles
    bool whole_runs;   // of experts in d(w): see store_run
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

// The first `valid` of a run of values. `whole`: aligned pieces of up to 16 bytes are valid or not as a whole.
template <int n>
__device__ void store_run(float* to, const float (&from)[n], int valid, bool whole) {
    if (n >= 4 && whole) {
#pragma unroll
        for (int i = 0; i + 3 < n; i += 4) {
            if (i < valid) *reinterpret_cast<float4*>(to + i) = {from[i], from[i + 1], from[i + 2], from[i + 3]};
        }
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (i < valid) to[i] = from[i];
        }
    }
}

// The sum over rank of one group: v[row][e][b] belongs to columns 8 j + 2 q + b of thread q, summed over j already.
// The quad's threads exchange halves until each holds different rows and experts.
template <int experts>
__device__ void store_dw(const ContractArgs& p, const float (&v)[2][experts][2], int token, int group, int first) {
    const int lane = threadIdx.x % 32;
    const bool second_row = lane & 2, second_half = lane & 1;
    float row[experts][2];
#pragma unroll
    for (int e = 0; e < experts; ++e) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const float sent = __shfl_xor_sync(~0u, second_row ? v[0][e][b] : v[1][e][b], 2);
            row[e][b] = (second_row ? v[1][e][b] : v[0][e][b]) + sent;
        }
    }
    float sum[experts / 2];
#pragma unroll
    for (int e = 0; e < experts / 2; ++e) {
        float halves[2];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const float sent = __shfl_xor_sync(~0u, second_half ? row[e][b] : row[e + experts / 2][b], 1);
            halves[b] = (second_half ? row[e + experts / 2][b] : row[e][b]) + sent;
        }
        sum[e] = halves[0] + halves[1];
    }
    const int t = token + (second_row ? 8 : 0);
    const int expert = first + (second_half ? experts / 2 : 0);
    if (t >= p.tokens) return;
    store_run(p.dw + (int64_t(t) * p.groups + group) * p.experts + expert, sum, p.experts - expert, p.whole_runs);
}

template <class E, int R>
struct Multiply {
    static constexpr int kExperts = kColumns / R;
    using Accumulators = float[kColumns / 2];  // c[4 j + 2 row + b] is column 8 j + 2 q + b

    const ContractArgs& p;
    uint64_t *const full, *const empty;
    const int lane, block, first, valid, token;  // first and valid: experts
    uint64_t a, b;                               // the operands of stage 0
    Ring ring;
    int last;  // the stage whose products may still run
    Pair<E> h[2][R / 8];
    uint16_t pi[2][kExperts];  // of the group
    float scale[kExperts];
    float dh[2][R / 8][2] = {};

    __device__ Multiply(const ContractArgs& p, const char* tiles, uint64_t* full, uint64_t* empty, int first_token)
        : p(p),
          full(full),
          empty(empty),
          lane(threadIdx.x % 32),
          block(int(blockIdx.y) * p.per_block + uniform(threadIdx.x / 128)),
          first(block * kExperts),
          valid(min(kExperts, p.experts - first)),
          token(first_token + threadIdx.x / 32 % 4 * 16 + lane / 4) {
        const char* const weights = tiles + kDoutBytes + uniform(threadIdx.x / 128) * kWeightTileBytes;
        a = smem_descriptor(tiles, 16, 1024, Swizzle::b128);
        b = smem_descriptor(weights, kWeightTileBytes / 2, 1024, Swizzle::b128);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int t = token + 8 * row;
            const Pair<E>* at =
                reinterpret_cast<const Pair<E>*>(static_cast<const E*>(p.h) + int64_t(t) * R) + lane % 4;
#pragma unroll
            for (int j = 0; j < R / 8; ++j) h[row][j] = t < p.tokens ? at[4 * j] : Pair<E>();
        }
#pragma unroll
        for (int e = 0; e < kExperts; ++e) {
            scale[e] = p.scale && e < valid ? to_float(static_cast<const E*>(p.scale)[first + e]) : 1.0f;
        }
    }

    // Fetched while the products run.
    __device__ void load_pi(int group) {
        if (!p.dh) return;
        const int64_t tile = int64_t(group) * gridDim.x + blockIdx.x;
        const uint16_t* const at = p.pi_tiles + (tile * p.tile_experts + first) * 64 + token % 64;
#pragma unroll
        for (int e = 0; e < kExperts; ++e) {
#pragma unroll
            for (int row = 0; row < 2; ++row) pi[row][e] = at[e * 64 + 8 * row];
        }
    }

    __device__ void release() {
        if (lane == 0) barrier_arrive(empty + last);
    }

    __device__ void multiply(Accumulators& c) {
        for (int step = 0; step < p.steps; ++step) {
            const uint32_t stage = ring.stage * p.stage_bytes;
            const uint64_t dout = advanced(a, stage), weights = advanced(b, stage);
            barrier_wait(full + ring.stage, ring.parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {  // 16 outputs: 32 bytes of a row of dout, 16 rows of 128 bytes of B
                wgmma<E, 0, 1>(c, advanced(dout, 32 * k), advanced(weights, 2048 * k), step > 0 || k > 0);
            }
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();
                release();
            }
            last = ring.stage;
            ring.advance(p.stages);
        }
        wgmma_wait<0>();
        pin(c);
        release();
        if (valid < kExperts) {  // 0 times an infinity would not be nothing
#pragma unroll
            for (int i = 0; i < kColumns / 2; ++i) {
                if (i / (R / 2) >= valid) c[i] = 0.0f;
            }
        }
    }

    __device__ void sum(Accumulators& c, int group) {
        if (p.dw) {
            float v[2][kExperts][2];
#pragma unroll
            for (int i = 0; i < 4 * kExperts; ++i) {
                const int row = i / 2 % 2, b = i % 2, e = i / 4;
                float sum[R / 8];
#pragma unroll
                for (int j = 0; j < R / 8; ++j) {
                    const float2 pair = to_float2(h[row][j]);
                    sum[j] = c[4 * (e * (R / 8) + j) + 2 * row + b] * (b ? pair.y : pair.x);
                }
                v[row][e][b] = tree_sum(sum);
            }
            store_dw<kExperts>(p, v, token, group, first);
        }
        if (p.dh) {
            float weight[2][kExperts];
#pragma unroll
            for (int e = 0; e < kExperts; ++e) {
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    weight[row][e] = to_float(bits_as<E>(pi[row][e])) * scale[e];  // times 1 changes nothing
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
    }

    __device__ void run() {
        for (int group = 0; group < p.groups; ++group) {
            load_pi(group);
            Accumulators c;
            multiply(c);
            sum(c, group);
        }
        if (!p.dh) return;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int t = token + 8 * row;
            float2* at = reinterpret_cast<float2*>(p.dh + (int64_t(block) * p.tokens + t) * R) + lane % 4;
#pragma unroll
            for (int j = 0; j < R / 8; ++j) {
                if (t < p.tokens) at[4 * j] = {dh[row][j][0], dh[row][j][1]};
            }
        }
    }
};

// Tiles of both, one thread.
__device__ inline void load(const ContractArgs& p, char* tiles, uint64_t* full, uint64_t* empty, int first_token) {
    const uint32_t bytes = uint32_t(p.per_block) * kWeightTileBytes;
    const int64_t pitch = int64_t(p.tile_blocks) * kWeightTileBytes;  // of a step
    const char* from = p.b_tiles + int64_t(blockIdx.y) * bytes;
    Ring ring;
    for (int group = 0; group < p.groups; ++group) {
        for (int step = 0; step < p.steps; ++step, from += pitch) {
            char* const tile = tiles + ring.stage * p.stage_bytes;
            uint64_t* const barrier = full + ring.stage;
            barrier_wait(empty + ring.stage, ring.parity ^ 1);
            barrier_expect(barrier, kDoutBytes + bytes);
            tma_load(tile, &p.dout, barrier, step * kDepth, group, first_token);
            bulk_load(tile + kDoutBytes, from, bytes, barrier);
            ring.advance(p.stages);
        }
    }
}

template <class E, int R>
__global__ void __launch_bounds__(kThreads, 1) contract_kernel(const __grid_constant__ ContractArgs p) {
    extern __shared__ char raw[];
    char* const tiles = raw + (1024 - smem_address(raw) % 1024) % 1024;
    uint64_t* const full = reinterpret_cast<uint64_t*>(tiles + p.stages * p.stage_bytes);
    uint64_t* const empty = full + p.stages;
    const int warpgroups = min(p.per_block, p.blocks - int(blockIdx.y) * p.per_block);
    const int first_token = int(blockIdx.x) * kTokens;
    if (threadIdx.x == 0) {
        init_stages(full, empty, p.stages, 4 * uint32_t(warpgroups));
        barrier_init_fence();
    }
    __syncthreads();
    grid_dependency_wait();
    launch_dependents();

    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == kWarpgroups) {
        if (threadIdx.x == 128 * kWarpgroups) load(p, tiles, full, empty, first_token);
    } else if (warpgroup < warpgroups) {
        Multiply<E, R>(p, tiles, full, empty, first_token).run();
    }
}

template <class E, int R>
void launch_contract(const RoutedLoraBwd& f, const Buffers& w) {
    const int64_t size = f.d_out / f.groups, tiles = ceil_div(f.tokens, kTokens);
    ContractArgs p = {};
    p.dout = tensor_map(f.dout.data, f.compute_dtype,
                        {{size, 1, kDepth}, {f.groups, size, 1}, {f.tokens, f.dout.stride[0], kTokens}});
    p.b_tiles = static_cast<const char*>(w.b_tiles);
    p.h = f.h.data;
    p.pi_tiles = static_cast<const uint16_t*>(w.pi_tiles);
    p.scale = f.expert_scale.data;
    p.dw = w.dw;
    p.dh = w.dh;
    p.tokens = int(f.tokens);
    p.groups = int(f.groups);
    p.experts = int(f.experts);
    p.steps = int(ceil_div(size, kDepth));
    p.blocks = int(ceil_div(f.experts * R, kColumns));
    p.tile_blocks = weight_blocks(f);
    p.per_block = p.blocks == 1 || tiles * p.blocks <= multiprocessors() ? 1 : kWarpgroups;
    p.tile_experts = tile_experts(f);
    p.whole_runs = f.experts % 4 == 0;
    p.stage_bytes = kDoutBytes + p.per_block * kWeightTileBytes;
    const auto bytes = [&] { return 1024 + p.stages * (p.stage_bytes + 16); };
    for (p.stages = kMaxStages; bytes() > kMaxSharedBytes;) --p.stages;
    const dim3 grid(unsigned(tiles), unsigned(ceil_div(p.blocks, p.per_block)));
    launch<contract_kernel<E, R>>("routed_lora contract", grid, kThreads, bytes(), f.stream, true, p);
}

template <class E>
void choose_rank(const RoutedLoraBwd& f, const Buffers& w) {
    switch (f.rank) {
        case 8:
            return launch_contract<E, 8>(f, w);
        case 16:
            return launch_contract<E, 16>(f, w);
        case 32:
            return launch_contract<E, 32>(f, w);
        case 64:
            return launch_contract<E, 64>(f, w);
        default:
            throw std::runtime_error("routed_lora contract: rank must be 8, 16, 32 or 64");
    }
}

}  // namespace

void contract(const RoutedLoraBwd& f, const Buffers& w) {
    if (f.compute_dtype == DType::bf16)
        choose_rank<bf16>(f, w);
    else
        choose_rank<f16>(f, w);
}

}  // namespace mtlora::cuda
