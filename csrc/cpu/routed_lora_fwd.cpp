// Forward of `routed_lora`: project (h and logits), softmax, load, and the mixture over experts.

#include "cpu/operands.h"

namespace mtlora::cpu::MTLORA_ISA {

void routed_lora_fwd(const RoutedLoraFwd& p);

namespace {

// ---- h and logits: [tokens, d_in] x [rank + groups * experts, d_in]^T ----

// Logits are rounded to the compute dtype, so pi's own storage holds them until the softmax.
void project(const RoutedLoraFwd& p) {
    const DType E = p.compute_dtype;
    const int64_t logits = p.router.data ? p.groups * p.experts : 0;
    const int64_t h_tiles = ceil_div(p.rank, NR), tiles = h_tiles + ceil_div(logits, NR);
    const Chunks chunks = cut(p.tokens, kTokens, MR, p.threads);
    // x is converted once for a task's tiles; with few tokens the tiles go to different threads instead.
    const Chunks blocks = cut(tiles, 256 / NR, 1, ceil_div(p.threads, chunks.count));

    const int64_t ld_x = pitch(kDepth), ld_c = pitch(blocks.size * NR);
    const int64_t x_size = chunks.size * ld_x, c_size = chunks.size * ld_c;
    const int64_t w_size = kDepth * NR, rows_size = block_floats(NR, kDepth);
    const int64_t floats = 2 * x_size + c_size + w_size + rows_size;
    parallel_for(p.threads, chunks.count * blocks.count, floats, [&](int64_t task, float* x) {
        float *dropped = x + x_size, *c = dropped + x_size, *w = c + c_size, *rows = w + w_size;
        const int64_t token = task / blocks.count * chunks.size, tokens = min(chunks.size, p.tokens - token);
        const int64_t first = task % blocks.count * blocks.size, last = min(tiles, first + blocks.size);
        const bool drops = p.dropout && first < h_tiles;

        for (int64_t k = 0; k < p.d_in; k += kDepth) {
            const int64_t depth = min(kDepth, p.d_in - k);
            load_block(matrix(p.x), token, tokens, k, depth, E, x, ld_x);
            for (int64_t t = 0; drops && t < tokens; ++t) {
                float* row = dropped + t * ld_x;
                memcpy(row, x + t * ld_x, depth * sizeof *row);
                dropout_row(p, token + t, k, depth, row);
                round_row(E, row, depth);
            }
            for (int64_t tile = first; tile < last; ++tile) {
                const bool is_h = tile < h_tiles;
                const Matrix weight = matrix(is_h ? p.lora_a : p.router);
                const int64_t row = (is_h ? tile : tile - h_tiles) * NR;
                const int64_t n = min(NR, (is_h ? p.rank : logits) - row);
                load_transposed(weight, row, n, k, depth, E, rows, w, NR);
                gemm(tokens, n, depth, is_h && drops ? dropped : x, ld_x, 1, w, NR, c + (tile - first) * NR, ld_c,
                     k > 0);
            }
        }

        const Matrix h = matrix(p.h), pi = {p.pi.data, E, logits, 1};
        for (int64_t tile = first; tile < last; ++tile) {
            const bool is_h = tile < h_tiles;
            const int64_t col = (is_h ? tile : tile - h_tiles) * NR;
            const int64_t n = min(NR, (is_h ? p.rank : logits) - col);
            for (int64_t t = 0; t < tokens; ++t) {
                float* row = c + t * ld_c + (tile - first) * NR;
                if (is_h && p.relu) {
                    for (int64_t j = 0; j < n; ++j) row[j] = row[j] < 0 ? 0 : row[j];
                }
                store_row(is_h ? h : pi, token + t, col, n, row);
            }
        }
    });
}

void softmax(const RoutedLoraFwd& p) {
    const int64_t rows = p.tokens * p.groups, rows_per_task = 1024;
    const Matrix pi = {p.pi.data, p.compute_dtype, p.experts, 1};
    parallel_for(p.threads, ceil_div(rows, rows_per_task), round_up(p.experts, VW), [&](int64_t task, float* row) {
        for (int64_t i = task * rows_per_task; i < min(rows, (task + 1) * rows_per_task); ++i) {
            load_row(pi, i, 0, p.experts, row);
            softmax_row(row, p.experts);
            store_row(pi, i, 0, p.experts, row);
        }
    });
}

void mean_weights(const RoutedLoraFwd& p) {
    float* mean = static_cast<float*>(p.load.data);
    const auto load_weights = [&](int64_t row, float* dst) {
        load_row(matrix(p.pi, row / p.groups), row % p.groups, 0, p.experts, dst);
    };
    sum_rows(p.threads, p.tokens * p.groups, p.experts, load_weights, mean);
    for (int64_t i = 0; i < p.experts; ++i) mean[i] *= p.inverse_count;
}

// ---- Mixture ----

// residual + acc, where there is a residual that acc does not hold yet, into out.
void store_output(const RoutedLoraFwd& p, int64_t token, int64_t output, int64_t n, float* acc, float* buffer) {
    if (p.residual.data && !p.accumulate_into_residual) {
        load_row(matrix(p.residual), token, output, n, buffer);
        add_row(acc, buffer, n);
    }
    store_row(matrix(p.out), token, output, n, acc);
}

// One product z_g B_flat[g] per group; K = (expert, rank) in blocks of experts.
void mix_groups(const RoutedLoraFwd& p) {
    const int64_t group_size = p.d_out / p.groups, rank = padded_rank(p);
    const int64_t experts = min(p.experts, max(1, kDepth / rank)), depth = experts * rank;
    const Chunks chunks = cut(p.tokens, kTokens, MR, 1);
    const Chunks tiles = cut(group_size, kColumns, NR, ceil_div(p.threads, chunks.count * p.groups));

    const int64_t ld_z = pitch(depth), ld = pitch(tiles.size);
    const int64_t h_size = block_floats(chunks.size, rank), w_size = round_up(p.experts, 16);
    const int64_t z_size = chunks.size * ld_z, b_size = depth * ld, c_size = chunks.size * ld;
    const int64_t rows_size = block_floats(tiles.size, p.rank);
    const int64_t floats = h_size + 2 * w_size + z_size + b_size + c_size + rows_size;
    parallel_for(p.threads, chunks.count * p.groups * tiles.count, floats, [&](int64_t task, float* h) {
        float *w = h + h_size, *scales = w + w_size, *z = scales + w_size, *b = z + z_size;
        float *c = b + b_size, *rows = c + c_size;
        const int64_t tile = task % tiles.count * tiles.size, group = task / tiles.count % p.groups;
        const int64_t outputs = min(tiles.size, group_size - tile), output = group * group_size + tile;
        const int64_t token = task / tiles.count / p.groups * chunks.size;
        const int64_t tokens = min(chunks.size, p.tokens - token);

        const float* scale = load_scale(p, scales);
        load_padded_h(p, token, tokens, h);
        for (int64_t i = 0; i < p.experts; i += experts) {
            const int64_t n = min(experts, p.experts - i);
            for (int64_t e = 0; e < n; ++e) {
                float* b_e = b + e * rank * ld;
                load_expert(p, i + e, output, outputs, rows, b_e, ld);
                memset(b_e + p.rank * ld, 0, (rank - p.rank) * ld * sizeof *b_e);
            }
            for (int64_t t = 0; t < tokens; ++t) {
                load_weights(p, scale, token + t, group, i, n, w);
                mix(p.compute_dtype, w, n, h + t * rank, rank, z + t * ld_z);
            }
            gemm(tokens, outputs, n * rank, z, ld_z, 1, b, ld, c, ld, i > 0);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            float* row = c + t * ld;
            scale_row(row, outputs, p.scaling);
            store_output(p, token + t, output, outputs, row, rows);
        }
    });
}

// One expert's turn in "eager" numerics, with the roundings of the published modules. Whole vectors of n.
template <class Format>
void add_eager(const RoutedLoraFwd& p, const float* e, const float* pi, const float* scale, int64_t n, float* acc) {
    const bool round_sum = p.out.dtype == Format::dtype || !p.accumulate_into_residual;
    for (int64_t o = 0; o < n; o += VW) {
        vec v = Format::round(load(e + o));
        if (scale) v = Format::round(*scale * v);
        v = Format::round(Format::round(load(pi + o) * v) * p.scaling);
        v = load(acc + o) + v;
        store(acc + o, round_sum ? Format::round(v) : v);
    }
}

void add_fp32(const float* e, const float* w, int64_t n, float* acc) {
    for (int64_t o = 0; o < n; o += VW) store(acc + o, load(acc + o) + load(w + o) * load(e + o));
}

// sum over experts of pi_i (B_i h): small groups, and every group size in "eager" numerics.
void mix_experts(const RoutedLoraFwd& p) {
    const Chunks chunks = cut(p.tokens, 64, MR, 1);
    const Chunks tiles = cut(p.d_out, 64, NR, ceil_div(p.threads, chunks.count));
    const int64_t experts = min(kExperts, p.experts), ld_w = tiles.size, ld = pitch(tiles.size);
    const int64_t h_size = block_floats(chunks.size, p.rank), scale_size = round_up(p.experts, 16);
    const int64_t w_size = chunks.size * experts * ld_w, b_size = p.rank * ld, c_size = chunks.size * ld;
    const int64_t rows_size = max(block_floats(tiles.size, p.rank), spread_floats(p, tiles.size));
    const int64_t floats = h_size + scale_size + w_size + b_size + 2 * c_size + rows_size;
    parallel_for(p.threads, chunks.count * tiles.count, floats, [&](int64_t task, float* h) {
        float *scales = h + h_size, *w = scales + scale_size, *b = w + w_size, *e = b + b_size;
        float *acc = e + c_size, *rows = acc + c_size;
        const int64_t token = task / tiles.count * chunks.size, tokens = min(chunks.size, p.tokens - token);
        const int64_t output = task % tiles.count * tiles.size, outputs = min(tiles.size, p.d_out - output);

        const float* scale = load_scale(p, scales);
        load_block(matrix(p.h), token, tokens, 0, p.rank, p.compute_dtype, h, p.rank);
        if (p.accumulate_into_residual) {
            load_block(matrix(p.residual), token, tokens, output, outputs, p.residual.dtype, acc, ld);
        } else {
            memset(acc, 0, tokens * ld * sizeof *acc);
        }
        for (int64_t i = 0; i < p.experts; ++i) {
            if (i % experts == 0) {
                for (int64_t t = 0; t < tokens; ++t) {
                    spread_weights(p, p.eager ? nullptr : scale, token + t, output, outputs, i,
                                   min(experts, p.experts - i), rows, w + t * experts * ld_w, ld_w);
                }
            }
            load_expert(p, i, output, outputs, rows, b, ld);
            gemm(tokens, outputs, p.rank, h, p.rank, 1, b, ld, e, ld, false);
            const float* w_i = w + i % experts * ld_w;
            for (int64_t t = 0; t < tokens; ++t) {
                const float *e_t = e + t * ld, *w_t = w_i + t * experts * ld_w;
                float* acc_t = acc + t * ld;
                if (!p.eager) {
                    add_fp32(e_t, w_t, outputs, acc_t);
                } else {
                    with_format(p.compute_dtype, [&](auto format) {
                        add_eager<decltype(format)>(p, e_t, w_t, scale ? scale + i : nullptr, outputs, acc_t);
                    });
                }
            }
        }
        for (int64_t t = 0; t < tokens; ++t) {
            float* row = acc + t * ld;
            if (!p.eager) scale_row(row, outputs, p.scaling);
            store_output(p, token + t, output, outputs, row, rows);
        }
    });
}

}  // namespace

void routed_lora_fwd(const RoutedLoraFwd& p) {
    if (p.tokens > 0) {
        project(p);
        if (p.router.data) softmax(p);
    }
    if (p.load.data) mean_weights(p);
    if (p.tokens > 0) {
        if (p.eager || !p.group_form) {
            mix_experts(p);
        } else {
            mix_groups(p);
        }
    }
}

}  // namespace mtlora::cpu::MTLORA_ISA
