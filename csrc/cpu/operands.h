// Blocks of the operator's tensors, brought into float scratch as operands of `gemm`.
#pragma once

#include "cpu/gemm.h"
#include "cpu/math.h"

namespace mtlora::cpu::MTLORA_ISA {

// Tokens, and outputs or features, of one task: its operands and accumulators fit a 1 MB L2. More tokens share the
// packing of the weights; forward at T 1024, d 4096, r 16, N 16, G 2 on one core, 192 / 256 / 384 tokens: 34.1 / 33.9
// / 32.7 ms.
constexpr int64_t kTokens = 384;
constexpr int64_t kColumns = 128;
// Depth of one K block: a column of tiles of b and the rows of a beside it take half of a 32 KB L1.
constexpr int64_t kDepth = 128;
// Experts whose routing weights are spread over outputs at a time.
constexpr int64_t kExperts = 16;

// Room for rows that are loaded at their own width and then read in whole vectors.
static inline int64_t block_floats(int64_t rows, int64_t cols) {
    return round_up(rows * cols, 16) + 16;
}

// dst[j][i] = m(row + i, col + j): the columns of a product from rows that run along K. buffer is
// block_floats(rows, cols), and stays unused when the rows can be read in place.
static inline void load_transposed(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols, DType E,
                                   float* buffer, float* dst, int64_t ld) {
    const float* src = buffer;
    int64_t ld_src = cols;
    if (m.dtype == DType::f32 && E == DType::f32 && m.col_stride == 1 && cols % VW == 0) {
        src = static_cast<const float*>(m.at(row, col));
        ld_src = m.row_stride;
    } else {
        load_block(m, row, rows, col, cols, E, buffer, cols);
    }
    transpose(src, ld_src, rows, cols, dst, ld);
}

// B_i[o, :] for a tile of outputs, as [rank][outputs].
static inline void load_expert(const RoutedLora& p, int64_t expert, int64_t output, int64_t outputs, float* buffer,
                               float* dst, int64_t ld) {
    load_transposed(matrix(p.lora_b, expert), output, outputs, 0, p.rank, p.compute_dtype, buffer, dst, ld);
}

// w_i = pi_i s_i for experts [expert, expert + n) of one group; scale is null without expert_scale.
static inline void load_weights(const RoutedLora& p, const float* scale, int64_t token, int64_t group, int64_t expert,
                                int64_t n, float* w) {
    load_row(matrix(p.pi, token), group, expert, n, w);
    if (scale) {
        for (int64_t i = 0; i < n; ++i) w[i] *= scale[expert + i];
    }
}

// expert_scale rounded to the compute dtype, in buffer; null when there is none.
static inline const float* load_scale(const RoutedLora& p, float* buffer) {
    if (!p.expert_scale.data) return nullptr;
    const Matrix row = {p.expert_scale.data, p.expert_scale.dtype, 0, p.expert_scale.stride[0]};
    load_block(row, 0, 1, 0, p.experts, p.compute_dtype, buffer, p.experts);
    return buffer;
}

// The reference pads the rank with zeros to a power of two. Only next to an Inf or NaN does a zero matter, and
// then one zero does what many do.
static inline int64_t padded_rank(const RoutedLora& p) {
    return next_power_of_two(p.rank) == p.rank ? p.rank : p.rank + 1;
}

// Rows of h at a pitch of the padded rank, zero included.
static inline void load_padded_h(const RoutedLora& p, int64_t token, int64_t tokens, float* h) {
    const int64_t ld = padded_rank(p);
    load_block(matrix(p.h), token, tokens, 0, p.rank, p.compute_dtype, h, ld);
    for (int64_t t = 0; ld > p.rank && t < tokens; ++t) h[t * ld + p.rank] = 0;
}

// z[i * rank + q] = w[i] h[q], rounded to the compute dtype. Whole vectors: what an expert writes past its rank,
// the next one overwrites.
static inline void mix(DType E, const float* w, int64_t experts, const float* h, int64_t rank, float* z) {
    for (int64_t i = 0; i < experts; ++i) {
        for (int64_t q = 0; q < rank; q += VW) store(z + i * rank + q, w[i] * load(h + q));
    }
    round_row(E, z, experts * rank);
}

// Room for the routing weights of the groups that a tile of outputs touches.
static inline int64_t spread_floats(const RoutedLora& p, int64_t outputs) {
    const int64_t group_size = p.d_out / p.groups;
    return block_floats(min(p.groups, ceil_div(outputs, group_size) + 1), kExperts);
}

// dst[i][o] = w[group(output + o), expert + i]: the weights of one token spread over outputs.
static void spread_weights(const RoutedLora& p, const float* scale, int64_t token, int64_t output, int64_t outputs,
                           int64_t expert, int64_t experts, float* buffer, float* dst, int64_t ld) {
    const int64_t group_size = p.d_out / p.groups;
    const int64_t first = output / group_size, groups = (output + outputs - 1) / group_size - first + 1;
    load_block(matrix(p.pi, token), first, groups, expert, experts, p.pi.dtype, buffer, experts);
    if (scale) {
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t i = 0; i < experts; ++i) buffer[g * experts + i] *= scale[expert + i];
    }
    if (group_size == 1) return transpose(buffer, experts, groups, experts, dst, ld);
    for (int64_t i = 0; i < experts; ++i) {
        float* row = dst + i * ld;
        for (int64_t g = 0, o = 0; g < groups; ++g) {
            const int64_t end = min(outputs, (first + g + 1) * group_size - output);
            for (; o < end; ++o) row[o] = buffer[g * experts + i];
        }
    }
}

}  // namespace mtlora::cpu::MTLORA_ISA
