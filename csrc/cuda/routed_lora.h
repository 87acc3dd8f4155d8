// `routed_lora` on Hopper: the host entry points and what their files share.
#pragma once

#include <cstdint>

#include "common/routed_lora.h"

namespace mtlora::cuda {

// What these kernels take is decided in mtlora_kernels/dispatch.py; they trust it.
void routed_lora_fwd(const RoutedLoraFwd& f);

void project(const RoutedLoraFwd& f);  // h and pi
void expand(const RoutedLoraFwd& f);   // out, from h and pi

void routed_lora_bwd(const RoutedLoraBwd& f);

void contract(const RoutedLoraBwd& f);   // d(w) and the parts of d(h), from dout and B
void route(const RoutedLoraBwd& f);      // d(h) and d(logits) as rows, d(pi)
void grad_b(const RoutedLoraBwd& f);     // d(lora_b), from dout, h and pi
void grad_rows(const RoutedLoraBwd& f);  // d(lora_a) and d(router), from the rows and x
void grad_x(const RoutedLoraBwd& f);     // from the rows, A and the router

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Router rows of one group in a tile: a power of two, 8 at least (the narrowest wgmma).
inline int padded_experts(int experts) {
    int padded = 8;
    while (padded < experts) padded *= 2;
    return padded;
}

// A row of the backward's workspace `rows`: d(h), padded to a step of wgmma, then d(logits); 16 bytes aligned.
inline int padded_rank(const RoutedLoraBwd& f) {
    return f.rank < 16 ? 16 : int(f.rank);
}
inline int64_t row_pitch(const RoutedLoraBwd& f) {
    return ceil_div(padded_rank(f) + (f.router.data ? f.groups * f.experts : 0), 8) * 8;
}

}  // namespace mtlora::cuda
