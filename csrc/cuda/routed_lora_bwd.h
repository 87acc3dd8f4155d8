// What the files of the backward share.
#pragma once

#include <cstdint>

#include "common/routed_lora.h"
#include "cuda/routed_lora.h"

namespace mtlora::cuda {

// Workspaces; absent where no gradient asked for reads them.
struct Buffers {
    float* dw;       // [T, G, N]; pi d(w) after `route` where d(expert_scale) is asked for
    float* dh;       // [blocks of 128 columns, T, rank]
    void* rows;      // [T, row_pitch]: d(h), zeros up to padded_rank, d(logits)
    void* b_tiles;   // [G, steps of 64 outputs, weight_blocks]: 64 outputs by 128 columns, as wgmma reads them
    void* pi_tiles;  // [G, tiles of 64 tokens, tile_experts, 64]
    float* sums;     // partial sums of d(expert_scale)
};

constexpr int kWeightTileBytes = 64 * 128 * 2;

void pack(const RoutedLoraBwd& f, const Buffers& w);       // B and pi into tiles
void contract(const RoutedLoraBwd& f, const Buffers& w);   // d(w) and the parts of d(h), from dout and B
void route(const RoutedLoraBwd& f, const Buffers& w);      // d(h) and d(logits) as rows, d(pi)
void grad_b(const RoutedLoraBwd& f, const Buffers& w);     // d(lora_b), from dout, h and pi
void grad_rows(const RoutedLoraBwd& f, const Buffers& w);  // d(lora_a) and d(router), from the rows and x
void grad_x(const RoutedLoraBwd& f, const Buffers& w);     // from the rows, A and the router

// Columns of d(h) in a row: a step of wgmma at least.
inline int padded_rank(const RoutedLoraBwd& f) {
    return f.rank < 16 ? 16 : int(f.rank);
}
// 128 bytes: a row of a TMA box is one line of L2.
inline int64_t row_pitch(const RoutedLoraBwd& f) {
    return ceil_div(padded_rank(f) + (f.router.data ? f.groups * f.experts : 0), 64) * 64;
}
// Blocks of 128 columns, experts x rank, in pairs.
inline int weight_blocks(const RoutedLoraBwd& f) {
    return int(ceil_div(f.experts * f.rank, 256) * 2);
}
// Experts in whole blocks of 256 columns.
inline int tile_experts(const RoutedLoraBwd& f) {
    return int(ceil_div(f.experts * f.rank, 256) * 256 / f.rank);
}

}  // namespace mtlora::cuda
