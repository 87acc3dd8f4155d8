// spectral_weights and spectral_penalty, as mtlora_kernels/reference/spectral.py.
#include "common/spectral.h"

#include "cpu/jacobi.h"

namespace mtlora::cpu::MTLORA_ISA {

constexpr double kEpsilon = 1e-8;
constexpr int64_t kRows = 64;  // of C and of dB in one task: with a K block of X beside it they fill half of a 1 MB L2

// ---- Weights ----

// exp of a value that is not positive and above -700.
static inline double exp_nonpositive(double v) {
    const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding and subtracting it rounds to the nearest integer
    const double n = (v * 1.4426950408889634 + magic) - magic;
    const double f = (v - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    double factorial = 479001600, p = f * (1 / 6227020800.0) + 1 / 479001600.0;
    for (int degree = 12; degree >= 1; --degree) {
        factorial /= degree;
        p = p * f + 1 / factorial;
    }
    const uint64_t power = uint64_t(int64_t(n) + 1023) << 52;
    double scale;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

void spectral_weights(const SpectralWeights& p) {
    const int64_t n = p.rank, ld = pitch64(n), size = p.pairwise ? n * n : n;
    const int64_t doubles = Gram::doubles(n) + 2 * pitch64(n * ld) + 2 * pitch64(n) + pitch64(n);
    parallel_for(p.threads, p.layers * p.experts, 2 * doubles, [&](int64_t index, float* buffer) {
        Arena arena(buffer);
        double *g = arena.take(n * ld), *vt = arena.take(n * ld);
        double *w = arena.take(n), *lanes = arena.take(2 * n);
        float* out = p.weights + index * size;
        if (!Gram(matrix(p.lora_b, index), p.rows, n, arena).compute(g)) {
            for (int64_t i = 0; i < size; ++i) out[i] = __builtin_nanf("");
            return;
        }
        int order[kMaxWidth];
        jacobi(int(n), g, ld, vt, w, order);
        for (int64_t i = 0; i < n; ++i) lanes[i] = w[i] = __builtin_sqrt(w[i] > 0 ? w[i] : 0);
        tree_sum_rows(lanes, n, 1);
        const double scale = lanes[0] / double(n) + kEpsilon;
        for (int64_t i = 0; i < n; ++i) w[i] = exp_nonpositive(-(w[i] / scale));
        if (!p.pairwise) {
            for (int64_t i = 0; i < n; ++i) out[i] = float(w[i]);
            return;
        }
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < ld; ++j) g[i * ld + j] = 0;
        }
        for (int64_t k = 0; k < n; ++k) {
            const double *v = vt + order[k] * ld, root = __builtin_sqrt(w[k]);
            for (int64_t i = 0; i < n; ++i) {
                const double left = v[i] * root;
                for (int64_t j = 0; j < n; ++j) g[i * ld + j] += left * v[j];
            }
        }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) out[i * n + j] = float(g[i * ld + j]);
    });
}

// ---- Products with the rows of one expert ----

// store(row, float row of B_i m) for the rows of expert `index`, m [rank][rank] in fp32 and contiguous.
template <class Store>
static void times_square(const Spectral& p, int64_t index, const float* m, float* buffer, Store store) {
    const int64_t r = p.rank, ld = pitch64(r);
    Arena arena(buffer);
    double *m64 = arena.take(r * ld), *rows = arena.take(kPackedRows * ld), *out = arena.take(kPackedRows * ld);
    float* floats = arena.take_floats(kPackedRows * ld);
    for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < r; ++j) m64[i * ld + j] = m[i * r + j];
    double ones[kMaxWidth];
    for (double& one : ones) one = 1;
    const Matrix b = matrix(p.lora_b, index);
    for (int64_t row = 0; row < p.rows; row += kPackedRows) {
        const int64_t taken = min(kPackedRows, p.rows - row);
        load_rows64(b, row, taken, r, floats, rows, ld);
        gemm(taken, r, r, rows, ld, 1, m64, ld, out, ld, false);
        for (int64_t i = 0; i < taken; ++i) {
            narrow_row(out + i * ld, ones, r, floats);
            store(row + i, floats);
        }
    }
}

static int64_t times_square_floats(const Spectral& p) {
    const int64_t ld = pitch64(p.rank);
    return 2 * (p.rank * ld + 3 * kPackedRows * ld);
}

// ---- Pairwise, forward ----

static Matrix x_of(const SpectralPenaltyFwd& p, int64_t layer) {
    const int64_t width = p.experts * p.rank;
    const Matrix first = {p.x, p.lora_b.dtype, width, 1};
    return {first.at(layer * p.rows, 0), first.dtype, width, 1};
}

// Rows [row, row + rows) of C = X^T X from their diagonal on, experts' own blocks zero, and the mirrored columns.
static void cross_rows(const SpectralPenaltyFwd& p, int64_t layer, int64_t row, int64_t rows, float* buffer) {
    const int64_t width = p.experts * p.rank, cols = width - row, ld = pitch(cols);
    float *x = buffer, *c = buffer + kPackedRows * ld, *out = p.c + layer * width * width;
    const Matrix source = x_of(p, layer);
    for (int64_t k = 0; k < p.rows; k += kPackedRows) {
        const int64_t depth = min(kPackedRows, p.rows - k);
        load_exact(source, k, depth, row, cols, x, ld);
        gemm(rows, cols, depth, x, 1, ld, x, ld, c, ld, k > 0);
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = row + i; j < width; ++j) {
            const bool same = j / p.rank == (row + i) / p.rank;
            out[(row + i) * width + j] = out[j * width + row + i] = same ? 0 : c[i * ld + j - row];
        }
    }
}

// The sum of squares of rows of C, tree over columns, into sums.
static void square_rows(const SpectralPenaltyFwd& p, int64_t task, double* squares, double* sums) {
    const int64_t width = p.experts * p.rank;
    for (int64_t row = task * kRows; row < min((task + 1) * kRows, p.layers * width); ++row) {
        for (int64_t j = 0; j < width; ++j) squares[j] = double(p.c[row * width + j]) * double(p.c[row * width + j]);
        tree_sum_rows(squares, width, 1);
        sums[row] = squares[0];
    }
}

static void pairwise_fwd(const SpectralPenaltyFwd& p) {
    const int64_t r = p.rank, width = p.experts * r;
    parallel_for(p.threads, p.layers * p.experts, times_square_floats(p), [&](int64_t index, float* buffer) {
        const Matrix x = x_of(p, index / p.experts);
        times_square(p, index, p.weights + index * r * r, buffer,
                     [&](int64_t row, const float* values) { store_row(x, row, index % p.experts * r, r, values); });
    });
    const int64_t tiles = ceil_div(width, kRows), ld = pitch(width);
    parallel_for(p.threads, p.layers * tiles, (kPackedRows + kRows) * ld, [&](int64_t task, float* buffer) {
        const int64_t row = task % tiles * kRows;
        cross_rows(p, task / tiles, row, min(kRows, width - row), buffer);
    });
    const int64_t rows = p.layers * width, lanes = width + kSumLanes;
    double* sums = reinterpret_cast<double*>(scratch(2 * (rows + kSumLanes + p.threads * lanes)));
    double* squares = sums + rows + kSumLanes;
    parallel_for(p.threads, ceil_div(rows, kRows), reinterpret_cast<float*>(squares), 2 * lanes,
                 [&](int64_t task, float* mine) { square_rows(p, task, reinterpret_cast<double*>(mine), sums); });
    for (int64_t layer = 0; layer < p.layers; ++layer) {
        double* of_layer = sums + layer * width;
        for (int64_t i = 0; i < width; ++i) squares[i] = of_layer[i];
        tree_sum_rows(squares, width, 1);
        sums[layer] = squares[0];  // at or before the rows it was read from
    }
    tree_sum_rows(sums, p.layers, 1);
    *p.loss = float(sums[0] * 0.5);
}

// ---- Pairwise, backward ----

// k [width][ld] = E(K of one layer, largest element in [1, 2)); returns the factor that undoes the scaling.
static float scaled_k(const SpectralPenaltyBwd& p, int64_t layer, float* k, int64_t ld, float* buffer) {
    const int64_t r = p.rank, ld_r = pitch64(r), width = p.experts * r;
    Arena arena(buffer);
    double *c64 = arena.take(width * ld_r), *mt = arena.take(r * ld_r), *out = arena.take(width * ld_r);
    float* floats = arena.take_floats(width * r);
    float largest = 0;
    for (int64_t i = 0; i < p.experts; ++i) {
        const Matrix c = {p.c + layer * width * width + i * r, DType::f32, width, 1};
        const float* m = p.weights + (layer * p.experts + i) * r * r;
        load_rows64(c, 0, width, r, floats, c64, ld_r);
        for (int64_t a = 0; a < r; ++a)
            for (int64_t b = 0; b < r; ++b) mt[a * ld_r + b] = m[b * r + a];
        gemm(width, r, r, c64, ld_r, 1, mt, ld_r, out, ld_r, false);
        for (int64_t row = 0; row < width; ++row) {
            for (int64_t j = 0; j < r; ++j) {
                const float value = float(2 * out[row * ld_r + j]), size = __builtin_fabsf(value);
                k[row * ld + i * r + j] = value;
                largest = size > largest || size != size ? size : largest;
            }
        }
    }
    uint32_t bits;
    memcpy(&bits, &largest, sizeof bits);
    const uint32_t exponent = uint32_t(max(1, min(253, bits >> 23 & 255)));
    const uint32_t down_bits = (254 - exponent) << 23, up_bits = exponent << 23;
    float down, up;
    memcpy(&down, &down_bits, sizeof down);
    memcpy(&up, &up_bits, sizeof up);
    for (int64_t row = 0; row < width; ++row) {
        for (int64_t j = 0; j < width; ++j) k[row * ld + j] *= down;
        round_row(p.lora_b.dtype, k + row * ld, width);
    }
    return up;
}

static void pairwise_bwd(const SpectralPenaltyBwd& p) {
    const int64_t r = p.rank, width = p.experts * r, ld = pitch(width), ld_r = pitch64(r);
    const int64_t k_floats = width * ld, local = 2 * (2 * width * ld_r + r * ld_r) + width * ld_r + 64;
    const int64_t tiles = ceil_div(p.rows, kRows), mine = max(local, 2 * kRows * ld);
    const int64_t shared = p.layers * k_floats + round_up(p.layers, 16);
    float* k = scratch(shared + p.threads * round_up(mine, 16));
    float *up = k + p.layers * k_floats, *buffers = k + shared;
    parallel_for(p.threads, p.layers, buffers, round_up(mine, 16), [&](int64_t layer, float* buffer) {
        up[layer] = scaled_k(p, layer, k + layer * k_floats, ld, buffer);
    });
    const float dloss = *p.dloss;
    parallel_for(p.threads, p.layers * tiles, buffers, round_up(mine, 16), [&](int64_t task, float* buffer) {
        const int64_t layer = task / tiles, row = task % tiles * kRows, rows = min(kRows, p.rows - row);
        float *x = buffer, *out = buffer + kRows * ld;
        load_exact(x_of(p, layer), row, rows, 0, width, x, ld);
        gemm(rows, width, width, x, ld, 1, k + layer * k_floats, ld, out, ld, false);
        const float factor = up[layer] * dloss;
        for (int64_t i = 0; i < rows; ++i) {
            scale_row(out + i * ld, width, factor);
            for (int64_t expert = 0; expert < p.experts; ++expert) {
                const Matrix grad = {p.dlora_b, p.lora_b.dtype, r, 1};
                store_row(grad, (layer * p.experts + expert) * p.rows + row + i, 0, r, out + i * ld + expert * r);
            }
        }
    });
}

// ---- The published Gram form ----

static void gram_fwd(const SpectralPenaltyFwd& p) {
    const int64_t r = p.rank, ld = pitch64(r), count = p.layers * p.experts;
    const int64_t doubles = Gram::doubles(r) + pitch64(r * ld) + 2 * pitch64(2 * r);
    const int64_t mine = 2 * round_up(doubles, 8), sums_floats = 2 * round_up(count + kSumLanes, 8);
    float* buffers = scratch(sums_floats + p.threads * mine);
    double* sums = reinterpret_cast<double*>(buffers);
    parallel_for(p.threads, count, buffers + sums_floats, mine, [&](int64_t index, float* buffer) {
        Arena arena(buffer);
        double *g = arena.take(r * ld), *lanes = arena.take(2 * r), *row_sums = arena.take(2 * r);
        Gram(matrix(p.lora_b, index), p.rows, r, arena).compute(g);
        for (int64_t i = 0; i < r; ++i) lanes[i] = g[i * ld + i];
        tree_sum_rows(lanes, r, 1);
        const double c = __builtin_sqrt(lanes[0] / double(r)) + kEpsilon;
        const float* w = p.weights + index * r;
        float* slope = p.c + index * r * r;
        for (int64_t i = 0; i < r; ++i) {
            for (int64_t j = 0; j < r; ++j) {
                const double pair = double(w[i]) * double(w[j]);
                const double weighted = pair * (g[i * ld + j] - (i == j ? c * c : 0));
                lanes[j] = weighted * weighted;
                slope[i * r + j] = float(pair * weighted * (4.0 / double(count)));
            }
            tree_sum_rows(lanes, r, 1);
            row_sums[i] = lanes[0];
        }
        tree_sum_rows(row_sums, r, 1);
        sums[index] = row_sums[0];
    });
    tree_sum_rows(sums, count, 1);
    *p.loss = float(sums[0] / double(count));
}

static void gram_bwd(const SpectralPenaltyBwd& p) {
    const float dloss = *p.dloss;
    const int64_t r = p.rank;
    parallel_for(p.threads, p.layers * p.experts, times_square_floats(p), [&](int64_t index, float* buffer) {
        const Matrix grad = {p.dlora_b, p.lora_b.dtype, r, 1};
        times_square(p, index, p.c + index * r * r, buffer, [&](int64_t row, float* values) {
            for (int64_t j = 0; j < r; ++j) values[j] *= dloss;
            store_row(grad, index * p.rows + row, 0, r, values);
        });
    });
}

void spectral_penalty_fwd(const SpectralPenaltyFwd& p) {
    p.pairwise ? pairwise_fwd(p) : gram_fwd(p);
}
void spectral_penalty_bwd(const SpectralPenaltyBwd& p) {
    p.pairwise ? pairwise_bwd(p) : gram_bwd(p);
}

}  // namespace mtlora::cpu::MTLORA_ISA
