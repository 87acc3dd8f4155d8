// Arguments of the `routed_lora` kernels: plain structs of pointers, sizes and strides, filled from Python.
#pragma once

#include <cstdint>

namespace mtlora {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// A tensor of up to three dimensions, strides in elements. Absent when data is null.
struct View {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t stride[3] = {0, 0, 0};
};

// Symbols and shapes are those of mtlora_kernels/reference/routed_lora.py.
struct RoutedLora {
    int64_t tokens, d_in, d_out, rank, experts, groups;
    DType compute_dtype;
    float scaling;
    float inverse_count;  // 1 / (tokens * groups)
    bool relu;
    bool group_form;  // one product per group, or a sum over experts: uses_group_form of the reference

    bool dropout;
    float keep_scale;         // 1 / (1 - dropout_p)
    uint32_t drop_threshold;  // an element is kept when its Philox word is at least this
    const int64_t* seed;

    int32_t threads;  // CPU only
    void* stream;     // CUDA only

    View x;             // [tokens, d_in]
    View lora_a;        // [rank, d_in]
    View lora_b;        // [experts, d_out, rank]
    View router;        // [groups * experts, d_in] or absent
    View expert_scale;  // [experts] or absent
    View h;             // [tokens, rank], compute dtype
    View pi;            // [tokens, groups, experts], compute dtype
};

// h is written; pi too when there is a router, and read otherwise.
struct RoutedLoraFwd : RoutedLora {
    bool eager;
    bool accumulate_into_residual;
    bool scaling_exact;  // scaling is a value of the compute dtype; CUDA only
    View residual;       // [tokens, d_out] or absent
    View out;            // contiguous [tokens, d_out]
    View load;           // contiguous float [experts], absent when not asked for
    float* workspace;    // partial sums of load; CUDA only
};

// Gradients that are absent are not computed. Those present are contiguous.
struct RoutedLoraBwd : RoutedLora {
    View dout;   // [tokens, d_out]
    View dload;  // contiguous float [experts] or absent
    View dx, dlora_a, dlora_b, drouter;
    View dpi;             // float [tokens, groups, experts]
    View dexpert_scale;   // [experts]
    float* dlogits;       // CPU only: workspace [tokens, groups, experts], absent when no gradient reads it
    float* dh;            // CPU only: workspace [tokens, rank], absent when no gradient reads it
    void* workspace;      // CUDA only: cuda::routed_lora_bwd_workspace bytes
    int64_t token_chunk;  // CUDA only: tokens of one accumulator where K is all tokens
};

}  // namespace mtlora
