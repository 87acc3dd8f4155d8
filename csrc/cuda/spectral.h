// The spectral kernels: the host entry points and what their files share.
#pragma once

#include <cstdint>

#include "common/spectral.h"

namespace mtlora::cuda {

// These trust the checks of mtlora_kernels/spectral_inputs.py. Columns of the matrices are contiguous.

int64_t rsvd_workspace(const Rsvd& p);  // doubles
void batched_rsvd(const Rsvd& p);

int64_t spectral_workspace(const Spectral& p);  // doubles, for weights and forward
void spectral_weights(const SpectralWeights& p);
void spectral_penalty_fwd(const SpectralPenaltyFwd& p);
int64_t spectral_bwd_workspace(const SpectralPenaltyBwd& p);  // doubles
void spectral_penalty_bwd(const SpectralPenaltyBwd& p);

// The pairwise products, for fp32, and for 16-bit elements where experts * rank is a multiple of 8; the second ends in
// the gradient. Otherwise they are the caller's: `spectral_features` (x), C = X^T X, `spectral_loss`, and
// `spectral_slope` (scaled_k), X scaled_k, `spectral_gradient`.
void spectral_cross_product(const SpectralPenaltyFwd& p);
void spectral_gradient_product(const SpectralPenaltyBwd& p, const void* scaled_k, const float* up);
void spectral_features(const SpectralPenaltyFwd& p);
void spectral_loss(const SpectralPenaltyFwd& p);
void spectral_slope(const SpectralPenaltyBwd& p);
void spectral_gradient(const SpectralPenaltyBwd& p);

struct RsvdWorkspace {
    double *gram, *product, *basis, *scale, *inverse;
};
void short_side(const Rsvd& p, const RsvdWorkspace& w);  // S, V and scale, from gram

// out = rounded(fp32(a w) ...), the rows of many matrices times a small square or thin one, k in order.
struct Projection {
    const void* a;  // element (layer, expert, row, i) at strides, columns contiguous
    int64_t a_layer, a_expert, a_row;
    const float* w;  // [layers * experts, n, k], or [.., k, n] if transposed
    bool transposed;
    const double* scale;  // [layers * experts, k]: multiplies the fp64 sum; 0 asks for a normal number instead
    double factor;        // the same for all, where scale is null
    const float* dloss;   // multiplies the fp32 result; may be null
    float* largest;       // [layers * experts, blocks]: largest magnitude of a block's results; may be null
    void* out;
    int64_t out_layer, out_expert, out_row;
    int64_t layers, experts, rows;
    int n, k;
    uint64_t seed;
    DType dtype, out_dtype;  // out_dtype is dtype or f32
};
void project(const Projection& p, void* stream);
int64_t projection_blocks(int64_t rows);

}  // namespace mtlora::cuda
