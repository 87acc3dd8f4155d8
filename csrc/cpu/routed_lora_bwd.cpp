// Backward of `routed_lora`: d(w) and d(h) from C_g = dout_g B_flat[g]^T, then d(logits), and from these the
// gradients of x and of the weights. Products over tokens are split over their outputs, never over tokens.

#include "cpu/operands.h"

namespace mtlora::cpu::MTLORA_ISA {

void routed_lora_bwd(const RoutedLoraBwd& p);

namespace {

constexpr int64_t kExpertFormBlock = 32;  // EXPERT_FORM_BLOCK of the reference
constexpr int64_t kExpertSumWidth = 128;  // EXPERT_SUM_WIDTH of the reference

Matrix row_major(const View& v, int64_t cols) {
    return {v.data, v.dtype, cols, 1};
}

// ---- d(w), left in p.dlogits, and d(h) ----

// d(h) of one token: scaled, masked by the activation, rounded.
void finish_dh(const RoutedLoraBwd& p, int64_t token, const float* h, const float* sum) {
    float* dh = p.dh + token * p.rank;
    for (int64_t q = 0; q < p.rank; ++q) dh[q] = p.relu && h[q] <= 0 ? 0 : sum[q] * p.scaling;
    round_row(p.compute_dtype, dh, p.rank);
}

void contract_groups(const RoutedLoraBwd& p) {
    const DType E = p.compute_dtype;
    const int64_t group_size = p.d_out / p.groups, rank = padded_rank(p);
    // The reference sums `summed` experts of C in one tree; two such trees make a block of C that fills the caches.
    const int64_t summed = min(next_power_of_two(p.experts), max(1, kExpertSumWidth / next_power_of_two(p.rank)));
    const int64_t experts = min(p.experts, 2 * summed), trees = ceil_div(experts, summed);
    const Chunks chunks = cut(p.tokens, kTokens, MR, p.threads);

    const int64_t ld_g = pitch(kDepth), ld = pitch(experts * rank);
    const int64_t h_size = block_floats(chunks.size, rank), w_size = round_up(p.experts, 16);
    const int64_t g_size = chunks.size * ld_g, b_size = kDepth * ld, c_size = chunks.size * ld;
    const int64_t tree_size = block_floats(summed, p.rank), sums_size = chunks.size * trees * p.rank;
    const int64_t floats = 2 * h_size + 2 * w_size + g_size + b_size + c_size + tree_size + round_up(sums_size, 16);
    parallel_for(p.threads, chunks.count, floats, [&](int64_t task, float* h) {
        float *dh = h + h_size, *w = dh + h_size, *scales = w + w_size, *g = scales + w_size;
        float *b = g + g_size, *c = b + b_size, *tree = c + c_size, *sums = tree + tree_size;
        const int64_t token = task * chunks.size, tokens = min(chunks.size, p.tokens - token);
        const float* scale = load_scale(p, scales);
        load_padded_h(p, token, tokens, h);
        memset(dh, 0, h_size * sizeof *dh);
        for (int64_t i = 0; i < p.experts; i += experts) {
            const int64_t n = min(experts, p.experts - i);
            memset(sums, 0, sums_size * sizeof *sums);
            for (int64_t group = 0; group < p.groups; ++group) {
                for (int64_t k = 0; k < group_size; k += kDepth) {
                    const int64_t depth = min(kDepth, group_size - k), output = group * group_size + k;
                    load_block(matrix(p.dout), token, tokens, output, depth, E, g, ld_g);
                    for (int64_t e = 0; e < n; ++e) {
                        float* b_e = b + e * rank;
                        load_block(matrix(p.lora_b, i + e), output, depth, 0, p.rank, E, b_e, ld);
                        for (int64_t o = 0; rank > p.rank && o < depth; ++o) b_e[o * ld + p.rank] = 0;
                    }
                    gemm(tokens, n * rank, depth, g, ld_g, 1, b, ld, c, ld, k > 0);
                }
                for (int64_t t = 0; t < tokens; ++t) {
                    const float *c_t = c + t * ld, *h_t = h + t * rank;
                    if (p.dlogits) {
                        float* dw = p.dlogits + ((token + t) * p.groups + group) * p.experts + i;
                        for (int64_t e = 0; e < n; ++e) {
                            const float* c_e = c_t + e * rank;
                            dw[e] = tree_sum(rank, [&](int64_t j) { return load(c_e + j) * load(h_t + j); });
                        }
                    }
                    if (!p.dh) continue;
                    load_weights(p, scale, token + t, group, i, n, w);
                    for (int64_t first = 0; first < n; first += summed) {
                        const int64_t count = min(summed, n - first);
                        float* sum = sums + (t * trees + first / summed) * p.rank;
                        for (int64_t e = 0; e < count; ++e)
                            for (int64_t q = 0; q < p.rank; q += VW)
                                store(tree + e * p.rank + q, w[first + e] * load(c_t + (first + e) * rank + q));
                        tree_sum_rows(tree, count, p.rank);
                        for (int64_t q = 0; q < p.rank; ++q) sum[q] += tree[q];
                    }
                }
            }
            for (int64_t t = 0; p.dh && t < tokens; ++t)
                for (int64_t first = 0; first < n; first += summed)
                    for (int64_t q = 0; q < p.rank; ++q)
                        dh[t * rank + q] += sums[(t * trees + first / summed) * p.rank + q];
        }
        for (int64_t t = 0; p.dh && t < tokens; ++t) finish_dh(p, token + t, h + t * rank, dh + t * rank);
    });
}

// d(w_i)[group] = tree over the group's outputs of dout (B_i h).
void expert_form_dw(const RoutedLoraBwd& p) {
    const DType E = p.compute_dtype;
    const int64_t group_size = p.d_out / p.groups, rank = p.rank;
    const int64_t width = 64 / group_size * group_size;
    const Chunks chunks = cut(p.tokens, 64, MR, 1);
    const int64_t tiles = ceil_div(p.d_out, width);
    const int64_t ld = pitch(width), h_size = block_floats(chunks.size, rank), g_size = chunks.size * ld;
    const int64_t b_size = rank * ld, rows_size = block_floats(width, rank);
    const int64_t floats = h_size + 2 * g_size + b_size + rows_size;
    parallel_for(p.threads, chunks.count * tiles, floats, [&](int64_t task, float* h) {
        float *g = h + h_size, *e = g + g_size, *b = e + g_size, *rows = b + b_size;
        const int64_t token = task / tiles * chunks.size, tokens = min(chunks.size, p.tokens - token);
        const int64_t output = task % tiles * width, outputs = min(width, p.d_out - output);
        load_block(matrix(p.h), token, tokens, 0, rank, E, h, rank);
        load_block(matrix(p.dout), token, tokens, output, outputs, E, g, ld);
        for (int64_t i = 0; i < p.experts; ++i) {
            load_expert(p, i, output, outputs, rows, b, ld);
            gemm(tokens, outputs, rank, h, rank, 1, b, ld, e, ld, false);
            for (int64_t t = 0; t < tokens; ++t) {
                const float *g_t = g + t * ld, *e_t = e + t * ld;
                float* dw = p.dlogits + ((token + t) * p.groups + output / group_size) * p.experts + i;
                if (group_size == 1) {
                    for (int64_t o = 0; o < outputs; ++o) dw[o * p.experts] = g_t[o] * e_t[o];
                } else {
                    for (int64_t o = 0; o < outputs; o += group_size, dw += p.experts)
                        *dw = tree_sum(group_size, [&](int64_t j) { return load(g_t + o + j) * load(e_t + o + j); });
                }
            }
        }
    });
}

// y_i = w_i dout rounded to the compute dtype, for one token and a tile of outputs; y holds w_i on entry.
void weigh(const RoutedLoraBwd& p, const float* g, int64_t outputs, float* y) {
    for (int64_t o = 0; o < outputs; o += VW) store(y + o, load(y + o) * load(g + o));
    round_row(p.compute_dtype, y, outputs);
}

// d(h) = sum over (block of outputs, expert, output) of y_i B_i.
void expert_form_dh(const RoutedLoraBwd& p) {
    const DType E = p.compute_dtype;
    constexpr int64_t BLOCK = kExpertFormBlock;
    const int64_t rank = p.rank, experts = min(kExperts, p.experts);
    const Chunks chunks = cut(p.tokens, 64, MR, p.threads);
    const int64_t ld_y = pitch(experts * BLOCK), ld = pitch(rank);
    const int64_t h_size = block_floats(chunks.size, rank), scale_size = round_up(p.experts, 16);
    const int64_t g_size = chunks.size * BLOCK, y_size = chunks.size * ld_y, b_size = experts * BLOCK * ld;
    const int64_t c_size = chunks.size * ld, rows_size = spread_floats(p, BLOCK);
    const int64_t floats = h_size + scale_size + g_size + y_size + b_size + c_size + rows_size;
    parallel_for(p.threads, chunks.count, floats, [&](int64_t task, float* h) {
        float *scales = h + h_size, *g = scales + scale_size, *y = g + g_size, *b = y + y_size;
        float *c = b + b_size, *rows = c + c_size;
        const int64_t token = task * chunks.size, tokens = min(chunks.size, p.tokens - token);
        const float* scale = load_scale(p, scales);
        load_block(matrix(p.h), token, tokens, 0, rank, E, h, rank);
        for (int64_t output = 0; output < p.d_out; output += BLOCK) {
            const int64_t outputs = min(BLOCK, p.d_out - output);
            load_block(matrix(p.dout), token, tokens, output, outputs, E, g, BLOCK);
            for (int64_t i = 0; i < p.experts; i += experts) {
                const int64_t n = min(experts, p.experts - i);
                for (int64_t e = 0; e < n; ++e) {
                    float* b_e = b + e * BLOCK * ld;
                    load_block(matrix(p.lora_b, i + e), output, outputs, 0, rank, E, b_e, ld);
                    memset(b_e + outputs * ld, 0, (BLOCK - outputs) * ld * sizeof *b_e);
                }
                for (int64_t t = 0; t < tokens; ++t) {
                    float* y_t = y + t * ld_y;
                    spread_weights(p, scale, token + t, output, outputs, i, n, rows, y_t, BLOCK);
                    for (int64_t e = 0; e < n; ++e) {
                        weigh(p, g + t * BLOCK, outputs, y_t + e * BLOCK);
                        memset(y_t + e * BLOCK + outputs, 0, (BLOCK - outputs) * sizeof *y_t);
                    }
                }
                gemm(tokens, rank, n * BLOCK, y, ld_y, 1, b, ld, c, ld, output + i > 0);
            }
        }
        for (int64_t t = 0; t < tokens; ++t) finish_dh(p, token + t, h + t * rank, c + t * ld);
    });
}

// ---- d(expert_scale), d(route_weights), d(logits) ----

void reduce_dscale(const RoutedLoraBwd& p) {
    float* ds = static_cast<float*>(p.dexpert_scale.data);
    const auto load_products = [&](int64_t row, float* dst) {
        load_row(matrix(p.pi, row / p.groups), row % p.groups, 0, p.experts, dst);
        for (int64_t i = 0; i < p.experts; ++i) dst[i] *= p.dlogits[row * p.experts + i];
    };
    sum_rows(p.threads, p.tokens * p.groups, p.experts, load_products, ds);
    for (int64_t i = 0; i < p.experts; ++i) ds[i] *= p.scaling;
}

// From d(w) in p.dlogits to d(pi), and with a router to d(logits) in the same place.
void softmax_bwd(const RoutedLoraBwd& p) {
    const int64_t rows = p.tokens * p.groups, rows_per_task = 1024, n = p.experts;
    const int64_t size = round_up(n, 16);
    parallel_for(p.threads, ceil_div(rows, rows_per_task), 4 * size, [&](int64_t task, float* dpi) {
        float *pi = dpi + size, *factor = pi + size, *balance = factor + size;
        const float* scale = load_scale(p, factor);
        for (int64_t i = 0; i < n; ++i) {
            factor[i] = scale ? scale[i] * p.scaling : p.scaling;
            balance[i] = p.dload.data ? static_cast<const float*>(p.dload.data)[i] * p.inverse_count : 0;
        }
        for (int64_t row = task * rows_per_task; row < min(rows, (task + 1) * rows_per_task); ++row) {
            float* dw = p.dlogits + row * n;
            for (int64_t i = 0; i < n; ++i) dpi[i] = dw[i] * factor[i] + balance[i];
            if (p.dpi.data) store_row(row_major(p.dpi, n), row, 0, n, dpi);
            if (!p.router.data) continue;
            load_row(matrix(p.pi, row / p.groups), row % p.groups, 0, n, pi);
            const float sum = tree_sum(n, [&](int64_t j) { return load(pi + j) * load(dpi + j); });
            for (int64_t i = 0; i < n; i += VW) store(dpi + i, load(pi + i) * (load(dpi + i) - sum));
            round_row(p.compute_dtype, dpi, n);
            memcpy(dw, dpi, n * sizeof *dw);
        }
    });
}

// ---- d(x) = dropout'(d(h) A) + d(logits) R ----

void input_gradient(const RoutedLoraBwd& p) {
    const DType E = p.compute_dtype;
    const int64_t logits = p.router.data ? p.groups * p.experts : 0;
    const Chunks chunks = cut(p.tokens, kTokens, MR, 1);
    const Chunks tiles = cut(p.d_in, kColumns, NR, ceil_div(p.threads, chunks.count));
    const int64_t ld_a = pitch(kDepth), ld = pitch(tiles.size);
    const int64_t a_size = chunks.size * ld_a, b_size = kDepth * ld, c_size = chunks.size * ld;
    const int64_t floats = a_size + b_size + 2 * c_size;
    parallel_for(p.threads, chunks.count * tiles.count, floats, [&](int64_t task, float* a) {
        float *b = a + a_size, *c = b + b_size, *from_router = c + c_size;
        const int64_t token = task / tiles.count * chunks.size, tokens = min(chunks.size, p.tokens - token);
        const int64_t feature = task % tiles.count * tiles.size, features = min(tiles.size, p.d_in - feature);
        const auto product = [&](float* gradient, int64_t rows, const View& weight, float* sum) {
            const Matrix all = {gradient, DType::f32, rows, 1};
            for (int64_t k = 0; k < rows; k += kDepth) {
                const int64_t depth = min(kDepth, rows - k);
                load_block(all, token, tokens, k, depth, DType::f32, a, ld_a);
                load_block(matrix(weight), k, depth, feature, features, E, b, ld);
                gemm(tokens, features, depth, a, ld_a, 1, b, ld, sum, ld, k > 0);
            }
        };
        product(p.dh, p.rank, p.lora_a, c);
        product(p.dlogits, logits, p.router, from_router);
        for (int64_t t = 0; t < tokens; ++t) {
            float* row = c + t * ld;
            if (p.dropout) dropout_row(p, token + t, feature, features, row);
            if (logits) add_row(row, from_router + t * ld, features);
            store_row(row_major(p.dx, p.d_in), token + t, feature, features, row);
        }
    });
}

// ---- d(A) = d(h)^T dropout(x), d(R) = d(logits)^T x ----

// Both at once, as the rows of one matrix: d(A) first.
void projection_gradients(const RoutedLoraBwd& p) {
    const DType E = p.compute_dtype;
    const int64_t logits = p.groups * p.experts;
    const int64_t rows_a = p.dlora_a.data ? p.rank : 0, rows = rows_a + (p.drouter.data ? logits : 0);
    const Chunks tiles = cut(p.d_in, kColumns, NR, p.threads);
    const Chunks blocks = cut(rows, kTokens, MR, 1);
    const int64_t ld_a = pitch(blocks.size), ld = pitch(tiles.size);
    const int64_t a_size = kDepth * ld_a, x_size = kDepth * ld, c_size = blocks.size * ld;
    const int64_t floats = a_size + x_size + c_size;
    parallel_for(p.threads, tiles.count * blocks.count, floats, [&](int64_t task, float* a) {
        float *x = a + a_size, *c = x + x_size;
        const int64_t feature = task / blocks.count * tiles.size, features = min(tiles.size, p.d_in - feature);
        const int64_t first = task % blocks.count * blocks.size, last = min(rows, first + blocks.size);
        const int64_t last_a = max(first, min(rows_a, last));  // rows [first, last_a) are d(A)'s
        const Matrix dh = {p.dh, DType::f32, p.rank, 1}, dlogits = {p.dlogits, DType::f32, logits, 1};
        for (int64_t token = 0; token < p.tokens; token += kDepth) {
            const int64_t depth = min(kDepth, p.tokens - token);
            load_block(matrix(p.x), token, depth, feature, features, E, x, ld);
            if (last_a < last) {
                load_block(dlogits, token, depth, last_a - rows_a, last - last_a, DType::f32, a, ld_a);
                float* c_r = c + (last_a - first) * ld;
                gemm(last - last_a, features, depth, a, 1, ld_a, x, ld, c_r, ld, token > 0);
            }
            if (first < last_a) {
                for (int64_t t = 0; p.dropout && t < depth; ++t) {
                    dropout_row(p, token + t, feature, features, x + t * ld);
                    round_row(E, x + t * ld, features);
                }
                load_block(dh, token, depth, first, last_a - first, DType::f32, a, ld_a);
                gemm(last_a - first, features, depth, a, 1, ld_a, x, ld, c, ld, token > 0);
            }
        }
        for (int64_t row = first; row < last; ++row) {
            const bool is_a = row < rows_a;
            const Matrix gradient = row_major(is_a ? p.dlora_a : p.drouter, p.d_in);
            store_row(gradient, is_a ? row : row - rows_a, feature, features, c + (row - first) * ld);
        }
    });
}

// ---- d(B) ----

// d(B_flat[g]) = dout_g^T z_g.
void expert_gradients_groups(const RoutedLoraBwd& p) {
    const DType E = p.compute_dtype;
    const int64_t group_size = p.d_out / p.groups, rank = p.rank;
    const Chunks tiles = cut(group_size, kColumns, MR, ceil_div(p.threads, p.groups));
    const Chunks blocks = cut(p.experts, max(1, 256 / rank), 1, 1);
    const int64_t ld_g = pitch(tiles.size), ld = pitch(blocks.size * rank);
    const int64_t h_size = block_floats(1, rank), w_size = round_up(p.experts, 16);
    const int64_t g_size = kDepth * ld_g, z_size = kDepth * ld, c_size = tiles.size * ld;
    const int64_t floats = h_size + 2 * w_size + g_size + z_size + c_size;
    parallel_for(p.threads, p.groups * tiles.count * blocks.count, floats, [&](int64_t task, float* h) {
        float *w = h + h_size, *scales = w + w_size, *g = scales + w_size, *z = g + g_size, *c = z + z_size;
        const int64_t i = task % blocks.count * blocks.size, n = min(blocks.size, p.experts - i);
        const int64_t group = task / blocks.count / tiles.count;
        const int64_t tile = task / blocks.count % tiles.count * tiles.size;
        const int64_t outputs = min(tiles.size, group_size - tile), output = group * group_size + tile;
        const float* scale = load_scale(p, scales);
        for (int64_t token = 0; token < p.tokens; token += kDepth) {
            const int64_t depth = min(kDepth, p.tokens - token);
            load_block(matrix(p.dout), token, depth, output, outputs, E, g, ld_g);
            for (int64_t t = 0; t < depth; ++t) {
                load_row(matrix(p.h), token + t, 0, rank, h);
                load_weights(p, scale, token + t, group, i, n, w);
                mix(E, w, n, h, rank, z + t * ld);
            }
            gemm(outputs, n * rank, depth, g, 1, ld_g, z, ld, c, ld, token > 0);
        }
        const Matrix db = row_major(p.dlora_b, rank);
        for (int64_t o = 0; o < outputs; ++o) {
            scale_row(c + o * ld, n * rank, p.scaling);
            for (int64_t e = 0; e < n; ++e)
                store_row(db, (i + e) * p.d_out + output + o, 0, rank, c + o * ld + e * rank);
        }
    });
}

// d(B_i) = y_i^T h, as [rank][outputs] until it is stored.
void expert_gradients_small(const RoutedLoraBwd& p) {
    const DType E = p.compute_dtype;
    const int64_t rank = p.rank, depth_limit = 32;  // y of all experts of a task stays in L2
    const Chunks tiles = cut(p.d_out, 64, NR, p.threads);
    const Chunks blocks = cut(p.experts, kExperts, 1, 1);
    const int64_t ld = pitch(tiles.size), ld_db = round_up(rank, VW);
    const int64_t h_size = block_floats(depth_limit, rank), scale_size = round_up(p.experts, 16);
    const int64_t y_size = depth_limit * ld, c_size = rank * ld;
    const int64_t rows_size = max(spread_floats(p, tiles.size), tiles.size * ld_db);
    const int64_t floats = h_size + scale_size + ld + blocks.size * (y_size + c_size) + rows_size;
    parallel_for(p.threads, tiles.count * blocks.count, floats, [&](int64_t task, float* h) {
        float *scales = h + h_size, *g = scales + scale_size, *y = g + ld, *c = y + blocks.size * y_size;
        float* rows = c + blocks.size * c_size;
        const int64_t i = task % blocks.count * blocks.size, n = min(blocks.size, p.experts - i);
        const int64_t output = task / blocks.count * tiles.size, outputs = min(tiles.size, p.d_out - output);
        const float* scale = load_scale(p, scales);
        for (int64_t token = 0; token < p.tokens; token += depth_limit) {
            const int64_t depth = min(depth_limit, p.tokens - token);
            load_block(matrix(p.h), token, depth, 0, rank, E, h, rank);
            for (int64_t t = 0; t < depth; ++t) {
                load_block(matrix(p.dout), token + t, 1, output, outputs, E, g, ld);
                spread_weights(p, scale, token + t, output, outputs, i, n, rows, y + t * ld, y_size);
                for (int64_t e = 0; e < n; ++e) weigh(p, g, outputs, y + e * y_size + t * ld);
            }
            for (int64_t e = 0; e < n; ++e)
                gemm(rank, outputs, depth, h, 1, rank, y + e * y_size, ld, c + e * c_size, ld, token > 0);
        }
        const Matrix db = row_major(p.dlora_b, rank);
        for (int64_t e = 0; e < n; ++e) {
            transpose(c + e * c_size, ld, rank, outputs, rows, ld_db);
            for (int64_t o = 0; o < outputs; ++o) {
                scale_row(rows + o * ld_db, rank, p.scaling);
                store_row(db, (i + e) * p.d_out + output + o, 0, rank, rows + o * ld_db);
            }
        }
    });
}

}  // namespace

void routed_lora_bwd(const RoutedLoraBwd& p) {
    if (p.group_form) {
        if (p.dh || p.dlogits) contract_groups(p);
        if (p.dlora_b.data) expert_gradients_groups(p);
    } else {
        if (p.dlogits) expert_form_dw(p);
        if (p.dh) expert_form_dh(p);
        if (p.dlora_b.data) expert_gradients_small(p);
    }
    if (p.dexpert_scale.data) reduce_dscale(p);
    if (p.dlogits && (p.dpi.data || p.router.data)) softmax_bwd(p);
    if (p.dx.data) input_gradient(p);
    if (p.dlora_a.data || p.drouter.data) projection_gradients(p);
}

}  // namespace mtlora::cpu::MTLORA_ISA
