// Arguments of the `batched_rsvd` and `spectral_penalty` kernels; symbols and shapes are those of
// mtlora_kernels/reference/{rsvd,spectral}.py.
#pragma once

#include "common/routed_lora.h"

namespace mtlora {

// U, S and V of matrices with rows >= cols. The results are contiguous.
struct Rsvd {
    int64_t batch, rows, cols, rank;
    int64_t sketch;  // rank <= sketch <= min(cols, 64); the decomposition is exact when sketch = cols
    int64_t power_iterations;
    uint64_t seed;
    int32_t threads;    // CPU only
    void* stream;       // CUDA only
    double* workspace;  // CUDA only
    View matrices;      // [batch, rows, cols]
    float* u;           // [batch, rows, rank]
    float* s;           // [batch, rank]
    float* v;           // [batch, cols, rank]
};

// lora_b is [layers * experts, rows, rank]; everything else is contiguous.
struct Spectral {
    int64_t layers, experts, rows, rank;
    bool pairwise;    // else the published Gram form
    int32_t threads;  // CPU only
    void* stream;     // CUDA only, as the workspace
    double* workspace;
    View lora_b;
    float* weights;  // pairwise: M [layers * experts, rank, rank]; gram: w [layers * experts, rank]
};

struct SpectralWeights : Spectral {};  // writes weights

// Reads weights. For backward, pairwise writes x and c, gram writes the slope by B^T B in c.
struct SpectralPenaltyFwd : Spectral {
    float* loss;
    void* x;   // dtype of lora_b, [layers, rows, experts * rank]
    float* c;  // [layers, experts * rank, experts * rank] or [layers * experts, rank, rank]
};

// Reads weights, x and c.
struct SpectralPenaltyBwd : SpectralPenaltyFwd {
    const float* dloss;
    void* dlora_b;  // dtype of lora_b, [layers * experts, rows, rank]
    // CUDA only, pairwise, where the library multiplies x and scaled_k:
    void* scaled_k;        // dtype of lora_b, shape of c; else in the workspace
    const float* product;  // [layers, rows, experts * rank]
};

}  // namespace mtlora
