// contract: C_g = dout_g B_flat[g]^T, from which d(w) and d(h) follow without C leaving the registers.
//
// A block owns 64 tokens and two blocks of 128 columns (experts x rank), one for each multiplying warpgroup; a warp
// copies tiles of 64 outputs by TMA. Every block of a cluster needs the same part of B: each loads a share and sends
// it to all.
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
constexpr int kStages = 5;
constexpr int kDoutBytes = kTokens * kDepth * 2;
constexpr int kStageBytes = kDoutBytes + kWarpgroups * kWeightTileBytes;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStages * 8;

struct ContractArgs {
    CUtensorMap dout;
    const char* b_tiles;
    const void *h, *pi, *scale;
    float *dw, *dh;  // [T, G, N] and [blocks, T, rank]; either may be absent
    int tokens, groups, experts;
    int steps;                // tiles of outputs in a group
    int blocks, tile_blocks;  // of columns: live ones, those in b_tiles
    int per_block;            // a block's: one for each multiplying warpgroup
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

// The sum over rank of one group: v[e][b] belongs to columns 8 j + 2 q + b of thread q, summed over j already. The
// quad's threads exchange halves until each holds different rows and experts.
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
    const int t = token + (second_row ? 8 : 0);
    const int expert = first + (second_half ? experts / 2 : 0);
    float* const at = p.dw + (int64_t(t) * p.groups + group) * p.experts + expert;
#pragma unroll
    for (int e = 0; e < experts / 2; ++e) {
        float sum[2];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const float sent = __shfl_xor_sync(~0u, second_half ? row[e][b] : row[e + experts / 2][b], 1);
            sum[b] = (second_half ? row[e + experts / 2][b] : row[e][b]) + sent;
        }
        if (t < p.tokens && expert + e < p.experts) at[e] = sum[0] + sum[1];
    }
}

template <class E, int R>
__device__ void multiply(const ContractArgs& p, const char* tiles, uint64_t* full, uint64_t* empty, int first_token) {
    constexpr int kExperts = kColumns / R;
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4;
    const int block = int(blockIdx.y) * p.per_block + warpgroup;
    const int first = block * kExperts, valid = min(kExperts, p.experts - first);
    const int token = first_token + warp * 16 + lane / 4;
    const uint32_t cluster = cluster_size();

    float2 h[2][R / 8];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int t = token + 8 * row;
        const Pair<E>* at = reinterpret_cast<const Pair<E>*>(static_cast<const E*>(p.h) + int64_t(t) * R) + q;
#pragma unroll
        for (int j = 0; j < R / 8; ++j) h[row][j] = t < p.tokens ? to_float2(at[4 * j]) : float2{0.0f, 0.0f};
    }
    float dh[2][R / 8][2] = {};
    Ring ring;
    for (int group = 0; group < p.groups; ++group) {
        uint16_t w[2][kExperts];  // fetched while the product runs
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int t = token + 8 * row;
            const uint16_t* at =
                static_cast<const uint16_t*>(p.pi) + (int64_t(t) * p.groups + group) * p.experts + first;
#pragma unroll
            for (int e = 0; e < kExperts; ++e) w[row][e] = t < p.tokens && e < valid ? at[e] : uint16_t(0);
        }

        float c[kColumns / 2];
        int last = 0;
        for (int step = 0; step < p.steps; ++step) {
            const char* const tile = tiles + ring.stage * kStageBytes;
            const uint64_t a = smem_descriptor(tile, 16, 1024, Swizzle::b128);
            const char* const weights = tile + kDoutBytes + warpgroup * kWeightTileBytes;
            const uint64_t b = smem_descriptor(weights, kWeightTileBytes / 2, 1024, Swizzle::b128);
            barrier_wait(full + ring.stage, ring.parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {  // 16 outputs: 32 bytes of a row of dout, 16 rows of 128 bytes of B
                wgmma<E, 0, 1>(c, a + 2 * k, b + 128 * k, step > 0 || k > 0);
            }
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();
                if (lane < cluster) barrier_arrive(empty + last, lane);
            }
            last = ring.stage;
            ring.advance(kStages);
        }
        wgmma_wait<0>();
        pin(c);
        if (lane < cluster) barrier_arrive(empty + last, lane);

        if (valid < kExperts) {  // 0 times an infinity would not be nothing
#pragma unroll
            for (int i = 0; i < kColumns / 2; ++i) {
                if (i / (R / 2) >= valid) c[i] = 0.0f;
            }
        }
        // c[4 j + 2 row + b] is column 8 j + 2 q + b.
        if (p.dw) {
            float v[2][kExperts][2];
#pragma unroll
            for (int i = 0; i < 4 * kExperts; ++i) {
                const int row = i / 2 % 2, b = i % 2, e = i / 4;
                float sum[R / 8];
#pragma unroll
                for (int j = 0; j < R / 8; ++j) {
                    sum[j] = c[4 * (e * (R / 8) + j) + 2 * row + b] * (b ? h[row][j].y : h[row][j].x);
                }
                v[row][e][b] = tree_sum(sum);
            }
            store_dw<kExperts>(p, v, token, group, first);
        }
        if (p.dh) {
            float weight[2][kExperts];
#pragma unroll
            for (int e = 0; e < kExperts; ++e) {
                weight[0][e] = to_float(bits_as<E>(w[0][e]));
                weight[1][e] = to_float(bits_as<E>(w[1][e]));
                if (p.scale && e < valid) {
                    const float s = to_float(static_cast<const E*>(p.scale)[first + e]);
                    weight[0][e] = weight[0][e] * s;
                    weight[1][e] = weight[1][e] * s;
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
    if (p.dh) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int t = token + 8 * row;
            float2* at = reinterpret_cast<float2*>(p.dh + (int64_t(block) * p.tokens + t) * R) + q;
#pragma unroll
            for (int j = 0; j < R / 8; ++j) {
                if (t < p.tokens) at[4 * j] = {dh[row][j][0], dh[row][j][1]};
            }
        }
    }
}

// Tiles of both, one thread.
__device__ inline void load(const ContractArgs& p, char* tiles, uint64_t* full, uint64_t* empty, int first_token) {
    const uint32_t cluster = cluster_size(), bytes = uint32_t(p.per_block) * kWeightTileBytes, share = bytes / cluster;
    const uint16_t all = uint16_t((1u << cluster) - 1);
    const int64_t pitch = int64_t(p.tile_blocks) * kWeightTileBytes;  // of a step
    const uint32_t mine = cluster_rank() * share;
    const char* from = p.b_tiles + int64_t(blockIdx.y) * bytes + mine;
    Ring ring;
    for (int group = 0; group < p.groups; ++group) {
        for (int step = 0; step < p.steps; ++step, from += pitch) {
            char* const tile = tiles + ring.stage * kStageBytes;
            uint64_t* const barrier = full + ring.stage;
            barrier_wait(empty + ring.stage, ring.parity ^ 1);
            barrier_expect(barrier, kDoutBytes + bytes);
            tma_load(tile, &p.dout, barrier, step * kDepth, group, first_token);
            if (cluster == 1)
                bulk_load(tile + kDoutBytes, from, share, barrier);
            else
                bulk_load_multicast(tile + kDoutBytes + mine, from, share, barrier, all);
            ring.advance(kStages);
        }
    }
}

template <class E, int R>
__global__ void __launch_bounds__(kThreads, 1) contract_kernel(const __grid_constant__ ContractArgs p) {
    extern __shared__ char raw[];
    char* const tiles = raw + (1024 - smem_address(raw) % 1024) % 1024;
    uint64_t* const full = reinterpret_cast<uint64_t*>(tiles + kStages * kStageBytes);
    uint64_t* const empty = full + kStages;
    const int warpgroups = min(p.per_block, p.blocks - int(blockIdx.y) * p.per_block);
    const int first_token = int(blockIdx.x) * kTokens;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, 4 * uint32_t(warpgroups) * cluster_size());
        }
        barrier_init_fence();
    }
    cluster_sync();
    grid_dependency_wait();
    launch_dependents();

    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == kWarpgroups) {
        if (threadIdx.x == 128 * kWarpgroups) load(p, tiles, full, empty, first_token);
    } else if (warpgroup < warpgroups) {
        multiply<E, R>(p, tiles, full, empty, first_token);
    }
    cluster_sync();  // the others may still signal this block's barriers
}

template <class E, int R>
void launch_contract(const RoutedLoraBwd& f, const Buffers& w) {
    const int64_t size = f.d_out / f.groups, tiles = ceil_div(f.tokens, kTokens);
    const int cluster = tiles >= 4   ? 4
                        : tiles >= 2 ? 2
                                     : 1;  // 126 us with 4 (H100); 2 has not been timed since B is packed
    ContractArgs p = {};
    p.dout = tensor_map(f.dout.data, f.compute_dtype,
                        {{size, 1, kDepth}, {f.groups, size, 1}, {f.tokens, f.dout.stride[0], kTokens}});
    p.b_tiles = static_cast<const char*>(w.b_tiles);
    p.h = f.h.data;
    p.pi = f.pi.data;
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
    const dim3 grid(unsigned(ceil_div(tiles, cluster) * cluster), unsigned(ceil_div(p.blocks, p.per_block)));
    launch<contract_kernel<E, R>>("routed_lora contract", grid, kThreads, kSharedBytes, f.stream, true, p, cluster);
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
