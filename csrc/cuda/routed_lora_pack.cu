// pack: B and pi rearranged once into the tiles that the products copy, so that a copy is one run of bytes instead of
// rows of 2 * rank bytes, and pi comes with its tokens side by side. 154 to 126 us for contract in clusters of four.
#include <cuda_runtime.h>

#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora_bwd.h"

namespace mtlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSlabColumns = 128;         // groups x experts of pi in shared memory
constexpr int kPitch = kSlabColumns + 1;  // of a token's: the tokens of a warp touch different banks

struct PackArgs {
    const uint4* b;
    const uint16_t* pi;
    uint4* b_tiles;
    uint32_t* pi_tiles;
    int tokens, groups, group_size, experts, rank;
    int depth, steps, blocks;   // tiles of B: outputs, and those in a group
    int tiles, padded_experts;  // of pi: of 64 tokens
    int slabs, slab_groups;     // of groups, as many as fit
    int b_blocks, b_units;      // of the grid, and of 16 bytes
};

// One unit: eight columns of one output.
__device__ inline void pack_b(const PackArgs& p, int unit) {
    const int half_units = p.depth * 8, half = unit / half_units, within = unit % half_units;
    const int tile = half / 2, block = tile % p.blocks, step = tile / p.blocks % p.steps;
    const int group = tile / p.blocks / p.steps;
    const int at = step * p.depth + within / 8, column = block * 128 + half % 2 * 64 + within % 8 * 8;
    const int expert = column / p.rank;
    uint4 v = {0, 0, 0, 0};
    if (expert < p.experts && at < p.group_size) {
        const int64_t row = int64_t(expert) * p.groups * p.group_size + group * p.group_size + at;
        v = p.b[(row * p.rank + column % p.rank) / 8];
    }
    p.b_tiles[int64_t(half) * half_units + (swizzled<128>(uint32_t(within * 16)) >> 4)] = v;
}

// 64 tokens of a few groups, `slab` of a tile: read along the experts, written along the tokens.
__device__ inline void pack_pi(const PackArgs& p, int tile, int slab) {
    extern __shared__ uint16_t staged[];  // [64 tokens][kPitch]
    const int group = slab * p.slab_groups, groups = min(p.slab_groups, p.groups - group);
    const int columns = groups * p.experts;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 64; i += kThreads / 32) {
        const int row = i + warp, token = tile * 64 + row;
        const uint16_t* const from = p.pi + (int64_t(token) * p.groups + group) * p.experts;
#pragma unroll
        for (int first = 0; first < kSlabColumns; first += 32) {
            const int column = first + lane;
            const bool live = token < p.tokens && column < columns;
            staged[row * kPitch + column] = live ? from[column] : uint16_t(0);
        }
    }
    __syncthreads();
    static_assert(kThreads / 32 == 8);  // an expert's runs of eight tokens lie in another order, and so on other banks
    const int at = (lane / 4 ^ warp) * 4 + lane % 4;
    for (int g = 0; g < groups; ++g) {
        const uint16_t* const pair = staged + 2 * lane * kPitch + g * p.experts;
        uint32_t* const to = p.pi_tiles + (int64_t(group + g) * p.tiles + tile) * p.padded_experts * 32 + at;
        for (int expert = warp; expert < p.padded_experts; expert += kThreads / 32) {
            to[expert * 32] = expert < p.experts ? pair[expert] | uint32_t(pair[kPitch + expert]) << 16 : 0;
        }
    }
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const PackArgs p) {
    grid_dependency_wait();
    launch_dependents();
    if (int(blockIdx.x) < p.b_blocks) {
        const int unit = int(blockIdx.x) * kThreads + threadIdx.x;
        if (unit < p.b_units) pack_b(p, unit);
        return;
    }
    const int block = int(blockIdx.x) - p.b_blocks;
    pack_pi(p, block / p.slabs, block % p.slabs);
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
    p.depth = contract_depth(f);
    p.steps = int(ceil_div(p.group_size, p.depth));
    p.blocks = weight_blocks(f);
    p.tiles = int(ceil_div(f.tokens, 64));
    p.padded_experts = tile_experts(f);
    p.slab_groups = kSlabColumns / int(f.experts);
    p.slabs = int(ceil_div(f.groups, p.slab_groups));
    if (w.b_tiles) p.b_units = p.groups * p.steps * p.blocks * p.depth * 16;
    p.b_blocks = int(ceil_div(p.b_units, kThreads));
    const int64_t blocks = p.b_blocks + (w.pi_tiles ? int64_t(p.tiles) * p.slabs : 0);
    launch<pack_kernel>("routed_lora pack", dim3(unsigned(blocks)), kThreads, 64 * kPitch * 2, f.stream, true, p);
}

}  // namespace mtlora::cuda
