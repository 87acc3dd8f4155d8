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
constexpr int kRun = 4;  // experts of pi a thread moves; padded_experts holds whole runs

struct PackArgs {
    const uint4* b;
    const uint16_t* pi;
    uint4* b_tiles;
    uint32_t* pi_tiles;
    int tokens, groups, group_size, experts, rank;
    int steps, blocks;  // tiles of B in a group
    int tiles, padded_experts;  // of pi: of 64 tokens
    bool whole_runs;            // of pi: aligned, and experts or not as a whole
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

// One unit of a warp: 64 tokens, two a lane, of kRun experts.
__device__ inline void pack_pi(const PackArgs& p, int unit) {
    const int runs = p.padded_experts / kRun, expert = unit % runs * kRun, group = unit / runs % p.groups;
    const int tile = unit / runs / p.groups, lane = threadIdx.x % 32;
    if (tile >= p.tiles) return;
    uint16_t v[2][kRun];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = tile * 64 + 2 * lane + i;
        const uint16_t* const from = p.pi + (int64_t(token) * p.groups + group) * p.experts + expert;
        if (p.whole_runs) {
            uint2 run = {0, 0};
            if (token < p.tokens && expert < p.experts) run = *reinterpret_cast<const uint2*>(from);
            memcpy(v[i], &run, sizeof(run));
        } else {
#pragma unroll
            for (int e = 0; e < kRun; ++e) v[i][e] = token < p.tokens && expert + e < p.experts ? from[e] : uint16_t(0);
        }
    }
    uint32_t* const to = p.pi_tiles + ((int64_t(group) * p.tiles + tile) * p.padded_experts + expert) * 32 + lane;
#pragma unroll
    for (int e = 0; e < kRun; ++e) to[e * 32] = v[0][e] | uint32_t(v[1][e]) << 16;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const PackArgs p) {
    grid_dependency_wait();
    launch_dependents();
    if (int(blockIdx.x) < p.b_blocks) {
        const int unit = int(blockIdx.x) * kThreads + threadIdx.x;
        if (unit < p.b_units) pack_b(p, unit);
        return;
    }
    pack_pi(p, (int(blockIdx.x) - p.b_blocks) * (kThreads / 32) + int(threadIdx.x) / 32);
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
    p.tiles = int(ceil_div(f.tokens, 64));
    p.padded_experts = tile_experts(f);
    p.whole_runs = f.experts % kRun == 0 && reinterpret_cast<uintptr_t>(f.pi.data) % 8 == 0;
    if (w.b_tiles) p.b_units = p.groups * p.steps * p.blocks * kTileUnits;
    p.b_blocks = int(ceil_div(p.b_units, kThreads));
    const int64_t pi_units = w.pi_tiles ? p.tiles * f.groups * (p.padded_experts / kRun) : 0;
    const int64_t blocks = p.b_blocks + ceil_div(pi_units, kThreads / 32);
    launch<pack_kernel>("routed_lora pack", dim3(unsigned(blocks)), kThreads, 0, f.stream, true, p);
}

}  // namespace mtlora::cuda
