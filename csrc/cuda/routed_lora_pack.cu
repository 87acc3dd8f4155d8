// pack: B and pi rearranged once into the tiles that the products copy, so that a copy is one run of bytes instead of
// rows of 2 * rank bytes, and pi comes with its tokens side by side. 154 to 126 us for contract in clusters of four.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora_bwd.h"

namespace mtlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileUnits = kWeightTileBytes / 16;
constexpr int kPitch = 33;  // of a token's experts in shared memory: 32 tokens touch different banks

struct PackArgs {
    const uint4* b;
    const uint16_t* pi;
    uint4* b_tiles;
    uint32_t* pi_tiles;
    int tokens, groups, group_size, experts, rank;
    int steps, blocks;  // tiles of B in a group
    int padded_experts;
    int b_blocks, b_units;  // of the grid, and of 16 bytes
};

// One unit: eight columns of one output.
__device__ inline void pack_b(const PackArgs& p, int unit) {
    const int within = unit % kTileUnits, tile = unit / kTileUnits;
    const int block = tile % p.blocks, step = tile / p.blocks % p.steps, group = tile / p.blocks / p.steps;
    const int output = within / 8 % 64, column = block * 128 + within / 512 * 64 + within % 8 * 8;
    const int expert = column / p.rank, at = step * 64 + output;
    uint4 v = {0, 0, 0, 0};
    if (expert < p.experts && at < p.group_size) {
        const int64_t row = int64_t(expert) * p.groups * p.group_size + group * p.group_size + at;
        v = p.b[(row * p.rank + column % p.rank) / 8];
    }
    p.b_tiles[int64_t(tile) * kTileUnits + (swizzled<128>(uint32_t(within % 512 * 16)) >> 4) + within / 512 * 512] = v;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const PackArgs p) {
    extern __shared__ uint16_t staged[];  // [64 tokens][kPitch]
    grid_dependency_wait();
    launch_dependents();
    if (int(blockIdx.x) < p.b_blocks) {
        const int unit = int(blockIdx.x) * kThreads + threadIdx.x;
        if (unit < p.b_units) pack_b(p, unit);
        return;
    }
    const int block = int(blockIdx.x) - p.b_blocks, group = block % p.groups, tile = block / p.groups;
    const int tokens = min(64, p.tokens - tile * 64);
    const uint16_t* const from = p.pi + (int64_t(tile) * 64 * p.groups + group) * p.experts;
    for (int i = threadIdx.x; i < 64 * p.padded_experts; i += kThreads) {
        const int token = i / p.padded_experts, expert = i % p.padded_experts;
        const bool live = token < tokens && expert < p.experts;
        staged[token * kPitch + expert] = live ? from[int64_t(token) * p.groups * p.experts + expert] : uint16_t(0);
    }
    __syncthreads();
    uint32_t* const to = p.pi_tiles + (int64_t(group) * ((p.tokens + 63) / 64) + tile) * p.padded_experts * 32;
    for (int i = threadIdx.x; i < 32 * p.padded_experts; i += kThreads) {
        const uint16_t* const pair = staged + i % 32 * 2 * kPitch + i / 32;
        to[i] = pair[0] | uint32_t(pair[kPitch]) << 16;
    }
}

}  // namespace

void pack(const RoutedLoraBwd& f, const Buffers& w) {
    PackArgs p = {};
    p.b = static_cast<const uint4*>(f.lora_b.data);
    p.pi = static_cast<const uint16_t*>(f.pi.data);
    p.b_tiles = static_cast<uint4*>(w.b_tiles);
    p.pi_tiles = static_cast<uint32_t*>(w.pi_tiles);
    p.tokens = int(f.tokens);
    p.groups = int(f.groups);
    p.group_size = int(f.d_out / f.groups);
    p.experts = int(f.experts);
    p.rank = int(f.rank);
    p.steps = int(ceil_div(p.group_size, 64));
    p.blocks = weight_blocks(f);
    p.padded_experts = tile_experts(f);
    if (w.b_tiles) p.b_units = p.groups * p.steps * p.blocks * kTileUnits;
    p.b_blocks = int(ceil_div(p.b_units, kThreads));
    const int64_t pi_blocks = w.pi_tiles ? ceil_div(f.tokens, 64) * f.groups : 0;
    launch<pack_kernel>("routed_lora pack", dim3(unsigned(p.b_blocks + pi_blocks)), kThreads, 64 * kPitch * 2, f.stream,
                        true, p);
}

}  // namespace mtlora::cuda
