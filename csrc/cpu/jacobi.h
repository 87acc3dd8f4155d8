// Small dense fp64 algebra of one matrix, as mtlora_kernels/reference/jacobi.py: Gram matrix, Jacobi eigenvalues,
// Householder basis. Rows of fp64 scratch have a pitch of whole tiles.
#pragma once

#include "cpu/gemm.h"
#include "cpu/math.h"

namespace mtlora::cpu::MTLORA_ISA {

constexpr int kMaxWidth = 64;  // of the matrices whose eigenvalues are computed
constexpr int kMaxSweeps = 24;
constexpr double kRotate = 0x1p-54;
constexpr int64_t kPackedRows = 128;  // rows of a matrix in fp64 at a time: 16 KB at the width of an adapter

static inline int64_t pitch64(int64_t cols) {
    return round_up(cols, 8);
}

// Hands out pieces of a thread's scratch, each on its own cache lines.
struct Arena {
    double* next;

    explicit Arena(float* buffer) : next(reinterpret_cast<double*>(buffer)) {}
    double* take(int64_t doubles) {
        double* piece = next;
        next += pitch64(doubles);
        return piece;
    }
    float* take_floats(int64_t floats) { return reinterpret_cast<float*>(take(ceil_div(floats, 2))); }
};

// ---- Rows between fp32 and fp64 ----

typedef float narrow_vec __attribute__((vector_size(2 * VW)));  // as many floats as a dvec has doubles

static inline void widen_row(const float* src, int64_t n, double* dst) {
    int64_t j = 0;
    for (; j + WIDTH<double> <= n; j += WIDTH<double>)
        store(dst + j, __builtin_convertvector(load_as<narrow_vec>(src + j), dvec));
    for (; j < n; ++j) dst[j] = src[j];
}

// dst[j] = src[j] factor[j]; src and factor are readable in whole vectors.
static inline void narrow_row(const double* src, const double* factor, int64_t n, float* dst) {
    int64_t j = 0;
    for (; j + WIDTH<double> <= n; j += WIDTH<double>) {
        const narrow_vec v = __builtin_convertvector(load(src + j) * load(factor + j), narrow_vec);
        memcpy(dst + j, &v, sizeof v);
    }
    for (; j < n; ++j) dst[j] = float(src[j] * factor[j]);
}

// Rows [row, row + rows) of m in fp64 at pitch ld, zeros after the last column. floats is rows * cols of scratch,
// unused when the rows can be read in place.
static inline void load_rows64(const Matrix& m, int64_t row, int64_t rows, int64_t cols, float* floats, double* dst,
                               int64_t ld) {
    const float* src = floats;
    int64_t ld_src = cols;
    if (m.dtype == DType::f32 && m.col_stride == 1) {
        src = static_cast<const float*>(m.at(row, 0));
        ld_src = m.row_stride;
    } else {
        load_exact(m, row, rows, 0, cols, floats, cols);
    }
    if (ld_src == ld) {  // one long row
        widen_row(src, rows * ld, dst);
        return;
    }
    for (int64_t i = 0; i < rows; ++i) {
        if (src != floats) prefetch(src + (i + kRowsAhead) * ld_src, cols * sizeof *src);
        widen_row(src + i * ld_src, cols, dst + i * ld);
        for (int64_t j = cols; j < ld; ++j) dst[i * ld + j] = 0;
    }
}

// ---- Gram matrix ----

struct Gram {
    Matrix a;
    int64_t rows, n, ld;
    double* packed;  // [kPackedRows][ld]
    float* floats;   // [kPackedRows][n]
    double* levels;  // [log2(kSumLanes)][n][ld]

    static int64_t doubles(int64_t n) {
        const int64_t ld = pitch64(n);
        return pitch64(kPackedRows * ld) + pitch64(kPackedRows * n) + pitch64(5 * n * ld);
    }

    Gram(const Matrix& a, int64_t rows, int64_t n, Arena& arena) : a(a), rows(rows), n(n), ld(pitch64(n)) {
        packed = arena.take(kPackedRows * ld);
        floats = arena.take_floats(kPackedRows * n);
        levels = arena.take(5 * n * ld);
    }

    // g += or = the products of the rows of one lane; tiles left of the diagonal are not computed.
    void lane(int64_t index, double* g) const {
        const Matrix strided = {a.at(index, 0), a.dtype, kSumLanes * a.row_stride, a.col_stride};
        const int64_t count = ceil_div(rows - index, kSumLanes);
        for (int64_t row = 0; row < count; row += kPackedRows) {
            const int64_t taken = min(kPackedRows, count - row);
            load_rows64(strided, row, taken, n, floats, packed, ld);
            for (int64_t i = 0; i < n; i += 8) {
                gemm(min(8, n - i), n - i, taken, packed + i, 1, ld, packed + i, ld, g + i * ld + i, ld, row > 0);
            }
        }
    }

    // The sum over lanes index, index + width, ...: one node of the halving tree.
    void node(int64_t width, int64_t index, double* g, double* spare) const {
        if (width == kSumLanes) return lane(index, g);
        node(2 * width, index, g, spare);
        if (index + width >= rows) return;
        node(2 * width, index + width, spare, spare + n * ld);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = i / 8 * 8; j < ld; j += WIDTH<double>)
                store(g + i * ld + j, load(g + i * ld + j) + load(spare + i * ld + j));
    }

    // g [n][ld] = a^T a. False if a holds a NaN or an infinity.
    bool compute(double* g) const {
        node(1, 0, g, levels);
        bool finite = true;
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < i; ++j) g[i * ld + j] = g[j * ld + i];
            for (int64_t j = n; j < ld; ++j) g[i * ld + j] = 0;
            finite = finite && g[i * ld + i] - g[i * ld + i] == 0;
        }
        return finite;
    }
};

// ---- Jacobi ----

// The rotations of one round. Column j becomes keep[j] * column j + mix[j] * column partner[j].
struct Round {
    int pairs = 0, p[kMaxWidth / 2], q[kMaxWidth / 2], partner[kMaxWidth];
    double app[kMaxWidth / 2], aqq[kMaxWidth / 2], apq[kMaxWidth / 2];
    double t[kMaxWidth / 2], c[kMaxWidth / 2], s[kMaxWidth / 2];
    double keep[kMaxWidth], mix[kMaxWidth];

    void add(int one, int other, int n) {
        if (one >= n || other >= n) return;
        p[pairs] = one < other ? one : other;
        q[pairs] = one < other ? other : one;
        ++pairs;
    }

    // Round k of n indices; false if no pair has to rotate.
    bool plan(int k, int n, const double* g, int64_t ld, double threshold) {
        const int last = n - 1 + n % 2;
        pairs = 0;
        add(k, last, n);
        for (int i = 1; i < (last + 1) / 2; ++i) add((k + i) % last, (k - i + last) % last, n);
        bool any = false;
        for (int i = 0; i < pairs; ++i) {
            app[i] = g[p[i] * ld + p[i]];
            aqq[i] = g[q[i] * ld + q[i]];
            apq[i] = g[p[i] * ld + q[i]];
            any |= __builtin_fabs(apq[i]) > threshold;
        }
        if (!any) return false;
        for (int i = 0; i < pairs; ++i) {
            const double gap = aqq[i] - app[i], twice = 2 * apq[i];
            const double root = __builtin_sqrt(gap * gap + twice * twice);
            const double tangent = twice / (gap + (gap < 0 ? -root : root));
            t[i] = __builtin_fabs(apq[i]) > threshold ? tangent : 0;
            c[i] = 1 / __builtin_sqrt(1 + t[i] * t[i]);
            s[i] = t[i] * c[i];
        }
        for (int j = 0; j < n; ++j) {
            partner[j] = j;
            keep[j] = 1;
            mix[j] = 0;
        }
        for (int i = 0; i < pairs; ++i) {
            partner[p[i]] = q[i];
            partner[q[i]] = p[i];
            keep[p[i]] = keep[q[i]] = c[i];
            mix[p[i]] = -s[i];
            mix[q[i]] = s[i];
        }
        return true;
    }

    void columns(double* g, int n, int64_t ld) const {
        for (int i = 0; i < n; ++i) {
            double* row = g + i * ld;
            double other[kMaxWidth];
            for (int j = 0; j < n; ++j) other[j] = row[partner[j]];
            for (int j = 0; j < n; ++j) row[j] = keep[j] * row[j] + mix[j] * other[j];
        }
    }

    void rows(double* g, int64_t ld) const {
        for (int i = 0; i < pairs; ++i) {
            if (t[i] == 0) continue;
            double *row_p = g + p[i] * ld, *row_q = g + q[i] * ld;
            for (int64_t j = 0; j < ld; j += WIDTH<double>) {
                const dvec x = load(row_p + j), y = load(row_q + j);
                store(row_p + j, c[i] * x - s[i] * y);
                store(row_q + j, s[i] * x + c[i] * y);
            }
        }
    }

    void diagonal(double* g, int64_t ld, double threshold) const {
        for (int i = 0; i < pairs; ++i) {
            g[p[i] * ld + p[i]] = app[i] - t[i] * apq[i];
            g[q[i] * ld + q[i]] = aqq[i] + t[i] * apq[i];
            if (__builtin_fabs(apq[i]) > threshold) g[p[i] * ld + q[i]] = g[q[i] * ld + p[i]] = 0;
        }
    }
};

// The rows of vt become the eigenvectors of g, and order[i] says which one belongs to the i-th largest eigenvalue,
// values[i]. g is overwritten.
static inline void jacobi(int n, double* g, int64_t ld, double* vt, double* values, int* order) {
    for (int i = 0; i < n; ++i) {
        values[i] = g[i * ld + i];
        for (int64_t j = 0; j < ld; ++j) vt[i * ld + j] = i == j;
    }
    double lanes[kMaxWidth];
    for (int i = 0; i < n; ++i) lanes[i] = values[i];
    tree_sum_rows(lanes, n, 1);
    const double threshold = lanes[0] * kRotate;
    bool rotated = true;
    for (int sweep = 0; sweep < kMaxSweeps && rotated; ++sweep) {
        rotated = false;
        for (int k = 0; k < n - 1 + n % 2; ++k) {
            Round round;
            if (!round.plan(k, n, g, ld, threshold)) continue;
            rotated = true;
            round.columns(g, n, ld);
            round.rows(g, ld);
            round.diagonal(g, ld, threshold);
            round.rows(vt, ld);
        }
    }
    for (int i = 0; i < n; ++i) {
        int before = 0;
        for (int j = 0; j < n; ++j)
            before += g[j * ld + j] > g[i * ld + i] || (g[j * ld + j] == g[i * ld + i] && j < i);
        order[before] = i;
    }
    for (int i = 0; i < n; ++i) values[i] = g[order[i] * ld + order[i]];
}

// ---- Householder ----

// x[:, first:cols] -= v (beta v^T x); products is [n][cols] of scratch, at least 32 rows.
static inline void reflect(double* x, int64_t n, int64_t first, int64_t cols, int64_t ld, const double* v, double beta,
                           double* products) {
    const int64_t width = cols - first;
    if (width <= 0) return;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < width; ++j) products[i * width + j] = v[i] * x[i * ld + first + j];
    tree_sum_rows(products, n, width);
    for (int64_t j = 0; j < width; ++j) products[j] *= beta;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < width; ++j) x[i * ld + first + j] -= v[i] * products[j];
}

// q [n][ld] = orth(y); y [n][ld] and vs [cols][n] are overwritten.
static inline void orthonormal(int64_t n, int64_t cols, double* y, int64_t ld, double* q, double* vs,
                               double* products) {
    double betas[kMaxWidth];
    for (int64_t j = 0; j < cols; ++j) {
        double* v = vs + j * n;
        for (int64_t i = 0; i < n; ++i) v[i] = i < j ? 0 : y[i * ld + j];
        for (int64_t i = 0; i < n; ++i) products[i] = v[i] * v[i];
        tree_sum_rows(products, n, 1);
        const double square = products[0], head = v[j], norm = __builtin_sqrt(square);
        v[j] = head + (head < 0 ? -norm : norm);
        betas[j] = square > 0 ? 1 / (square + __builtin_fabs(head) * norm) : 0;
        reflect(y, n, j + 1, cols, ld, v, betas[j], products);
    }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < ld; ++j) q[i * ld + j] = i == j && j < cols;
    for (int64_t j = cols - 1; j >= 0; --j) reflect(q, n, j, cols, ld, vs + j * n, betas[j], products);
}

}  // namespace mtlora::cpu::MTLORA_ISA
