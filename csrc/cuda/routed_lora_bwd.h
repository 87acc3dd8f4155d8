// What the files of the backward share.
#pragma once

#include <cstdint>

#include "common/routed_lora.h"
#include "cuda/routed_lora.h"

namespace mtlora::cuda {

// Workspaces; absent where no gradient asked for reads them. All but the rows may lie in d(x).
struct Buffers {
    float* dw;          // [T, G, N]; pi d(w) after `route` where d(expert_scale) is asked for
    float* dh;          // [blocks of 128 columns, T, rank]
    void* rows;         // [T, row_pitch]: d(h), zeros up to padded_rank, d(logits)
    void* b_tiles;      // [G, steps, weight_blocks]: contract_depth outputs by 128 columns, as wgmma reads them
    void* pi_tiles;     // [G, tiles of 64 tokens, tile_experts, 64]: runs of eight tokens in the order of swizzled<128>
    float* chunk_sums;  // [chunks of tokens, columns, features] of d(lora_b), then of the rows' product
    float* sums;        // partial sums of d(expert_scale)
};

void pack(const RoutedLoraBwd& f, const Buffers& w);       // B and pi into tiles
void contract(const RoutedLoraBwd& f, const Buffers& w);   // the rows, or d(w) and the parts of d(h), from dout and B
void route(const RoutedLoraBwd& f, const Buffers& w);      // from these, d(h) and d(logits) as rows, d(pi)
void grad_b(const RoutedLoraBwd& f, const Buffers& w);     // d(lora_b), from dout, h and pi
void grad_rows(const RoutedLoraBwd& f, const Buffers& w);  // d(lora_a) and d(router), from the rows and x
void grad_x(const RoutedLoraBwd& f, const Buffers& w);     // from the rows, A and the router

int contract_blocks(const RoutedLoraBwd& f);   // of 128 columns, that a block of `contract` multiplies
int contract_depth(const RoutedLoraBwd& f);    // outputs of its step
bool contract_routes(const RoutedLoraBwd& f);  // whether it makes the rows

// Columns of d(h) in a row: a step of wgmma at least.
inline int padded_rank(const RoutedLoraBwd& f) {
    return f.rank < 16 ? 16 : int(f.rank);
}
// Columns of a row up to the last of d(logits).
inline int row_width(const RoutedLoraBwd& f) {
    return f.router.data ? padded_rank(f) + int(f.groups * f.experts) : int(f.rank);
}
// 128 bytes, 64 columns: a row of a TMA box is one line of L2 (75 to 64 us for grad_rows at G = 32).
inline int64_t row_pitch(const RoutedLoraBwd& f) {
    return ceil_div(padded_rank(f) + (f.router.data ? f.groups * f.experts : 0), 64) * 64;
}
// Partial sums over tokens, of the larger of the two products that have any.
inline int64_t chunk_sums(const RoutedLoraBwd& f) {
    const int64_t b = f.dlora_b.data ? f.experts * f.rank * f.d_out : 0;
    const int64_t rows = f.dlora_a.data || f.drouter.data ? row_width(f) * f.d_in : 0;
    return ceil_div(f.tokens, f.token_chunk) * (b > rows ? b : rows);
}
// Blocks of 128 columns, experts x rank: live ones.
inline int column_blocks(const RoutedLoraBwd& f) {
    return int(ceil_div(f.experts * f.rank, 128));
}
// The same in pairs.
inline int weight_blocks(const RoutedLoraBwd& f) {
    return int(ceil_div(f.experts * f.rank, 256) * 2);
}
// Experts in whole blocks of 256 columns.
inline int tile_experts(const RoutedLoraBwd& f) {
    return int(ceil_div(f.experts * f.rank, 256) * 256 / f.rank);
}

}  // namespace mtlora::cuda
