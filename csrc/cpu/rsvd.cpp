// batched_rsvd, as mtlora_kernels/reference/rsvd.py. One task is one matrix.
#include "common/spectral.h"
#include "cpu/jacobi.h"

namespace mtlora::cpu::MTLORA_ISA {

constexpr double kNull = 0x1p-22, kPivot = 0x1p-50;
constexpr uint32_t kSketch = 1, kFill = 2;

// One column of a stream of nearly Gaussian numbers; store(row, value).
template <class Store>
static inline void normal(int64_t rows, int64_t column, uint32_t stream, uint64_t seed, Store store) {
    constexpr int BLOCKS = 16;
    for (int64_t row = 0; row < rows; row += BLOCKS) {
        uint32_t c[4][BLOCKS];
        for (int i = 0; i < BLOCKS; ++i) {
            c[0][i] = uint32_t(column);
            c[1][i] = uint32_t(row + i);
            c[2][i] = 0;
            c[3][i] = stream;
        }
        philox(seed, c);
        for (int i = 0; i < min(BLOCKS, rows - row); ++i) {
            int32_t halves = -4 * 0xFFFF;
            for (const auto& word : c) halves += (word[i] & 0xFFFF) + (word[i] >> 16);
            store(row + i, halves * 0x1p-16);
        }
    }
}

// ---- Short side ----

// sigma [rank], descending, and the transpose of V, vt [rank][ld]; g = A^T A is overwritten.
struct ShortSide {
    const Rsvd& p;
    int64_t n, l, ld, ld_l;
    double *g, *w, *sigma, *vt, *y, *q, *t, *reflections, *products;

    static int64_t doubles(const Rsvd& p) {
        const int64_t n = p.cols, l = p.sketch, ld = pitch64(n), ld_l = pitch64(l);
        const int64_t sketched = 3 * pitch64(n * ld_l) + pitch64(l * n) + pitch64((n + kSumLanes) * l);
        return pitch64(n * ld) + 2 * pitch64(l * ld_l) + pitch64(l) + pitch64(l * ld) + sketched;
    }

    ShortSide(const Rsvd& p, Arena& arena) : p(p), n(p.cols), l(p.sketch), ld(pitch64(n)), ld_l(pitch64(l)) {
        g = arena.take(n * ld);
        w = arena.take(2 * pitch64(l * ld_l));
        sigma = arena.take(l);
        vt = arena.take(l * ld);
        y = arena.take(n * ld_l);
        q = arena.take(n * ld_l);
        t = arena.take(n * ld_l);
        reflections = arena.take(l * n);
        products = arena.take((n + kSumLanes) * l);
    }

    void compute() const {
        int order[kMaxWidth];
        if (l == n) {
            jacobi(int(n), g, ld, w, sigma, order);
            for (int64_t i = 0; i < p.rank; ++i)
                for (int64_t j = 0; j < n; ++j) vt[i * ld + j] = w[order[i] * ld + j];
        } else {
            range_basis();
            gemm(n, l, n, g, ld, 1, q, ld_l, t, ld_l, false);
            double *h = w, *wt = w + pitch64(l * ld_l);
            gemm(l, l, n, q, 1, ld_l, t, ld_l, h, ld_l, false);
            for (int64_t i = 0; i < l; ++i)
                for (int64_t j = l; j < ld_l; ++j) h[i * ld_l + j] = 0;
            jacobi(int(l), h, ld_l, wt, sigma, order);
            for (int64_t i = 0; i < p.rank; ++i) {  // row i of vt = W[:, order[i]]^T Q^T, k in order
                const double* weights = wt + order[i] * ld_l;
                for (int64_t j = 0; j < n; ++j) {
                    double sum = 0;
                    for (int64_t k = 0; k < l; ++k) sum += q[j * ld_l + k] * weights[k];
                    vt[i * ld + j] = sum;
                }
            }
        }
        for (int64_t i = 0; i < p.rank; ++i) {
            sigma[i] = __builtin_sqrt(sigma[i] > 0 ? sigma[i] : 0);
            fix_sign(vt + i * ld);
        }
    }

    // q = orth(G ... orth(G Omega))
    void range_basis() const {
        for (int64_t j = 0; j < l; ++j)
            normal(n, j, kSketch, p.seed, [&](int64_t i, double value) { q[i * ld_l + j] = value; });
        for (int64_t power = 0; power <= p.power_iterations; ++power) {
            gemm(n, l, n, g, ld, 1, q, ld_l, y, ld_l, false);
            orthonormal(n, l, y, ld_l, q, reflections, products);
        }
    }

    void fix_sign(double* v) const {
        int64_t largest = 0;
        for (int64_t j = 1; j < n; ++j) largest = __builtin_fabs(v[j]) > __builtin_fabs(v[largest]) ? j : largest;
        if (v[largest] < 0) {
            for (int64_t j = 0; j < n; ++j) v[j] = -v[j];
        }
    }
};

// ---- Long side ----

// U [rows][rank] in place of Z, for the V written before.
struct LongSide {
    const Rsvd& p;
    int64_t n, k, ld_n, ld;
    double *v, *s, *x, *rows, *out;
    float* floats;

    static int64_t doubles(const Rsvd& p) {
        const int64_t n = p.cols, k = p.rank, ld_n = pitch64(n), ld = pitch64(k);
        return pitch64(n * ld) + 2 * pitch64(k * ld) + pitch64(kPackedRows * ld_n) + pitch64(kPackedRows * ld) +
               pitch64(kPackedRows * n);
    }

    LongSide(const Rsvd& p, Arena& arena) : p(p), n(p.cols), k(p.rank), ld_n(pitch64(n)), ld(pitch64(k)) {
        v = arena.take(n * ld);
        s = arena.take(k * ld);
        x = arena.take(k * ld);
        rows = arena.take(kPackedRows * ld_n);
        out = arena.take(kPackedRows * ld);
        floats = arena.take_floats(kPackedRows * n);
    }

    // Z = A V / sigma, or noise where sigma is null.
    void project(const Matrix& a, const double* sigma, const float* v32, float* z) const {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < k; ++j) v[i * ld + j] = v32[i * k + j];
        double inverse[kMaxWidth];
        bool kept[kMaxWidth];
        for (int64_t j = 0; j < k; ++j) {
            inverse[j] = 1 / sigma[j];
            kept[j] = sigma[j] > kNull * sigma[0];
        }
        for (int64_t row = 0; row < p.rows; row += kPackedRows) {
            const int64_t taken = min(kPackedRows, p.rows - row);
            load_rows64(a, row, taken, n, floats, rows, ld_n);
            gemm(taken, k, n, rows, ld_n, 1, v, ld, out, ld, false);
            for (int64_t i = 0; i < taken; ++i) narrow_row(out + i * ld, inverse, k, z + (row + i) * k);
        }
        for (int64_t j = 0; j < k; ++j) {
            if (kept[j]) continue;
            normal(p.rows, j, kFill, p.seed, [&](int64_t row, double value) { z[row * k + j] = float(value); });
        }
    }

    // x = L^-1 for s = L L^T; s is overwritten.
    void invert_cholesky() const {
        double smallest[kMaxWidth];
        for (int64_t i = 0; i < k; ++i) {
            smallest[i] = s[i * ld + i] * kPivot;
            for (int64_t j = 0; j < ld; ++j) x[i * ld + j] = i == j;
        }
        for (int64_t j = 0; j < k; ++j) {
            const double diagonal = s[j * ld + j] > smallest[j] ? s[j * ld + j] : smallest[j];
            const double pivot = 1 / __builtin_sqrt(diagonal);
            double column[kMaxWidth];
            for (int64_t i = j + 1; i < k; ++i) column[i] = s[i * ld + j] * pivot;
            for (int64_t c = 0; c <= j; ++c) x[j * ld + c] *= pivot;
            for (int64_t i = j + 1; i < k; ++i) {
                for (int64_t c = 0; c <= j; ++c) x[i * ld + c] -= column[i] * x[j * ld + c];
                for (int64_t c = j + 1; c < k; ++c) s[i * ld + c] -= column[i] * column[c];
            }
        }
    }

    // U = Z L^-T
    void orthonormalise(float* u) const {
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < k; ++j) s[i * ld + j] = x[j * ld + i];
        const Matrix z = {u, DType::f32, k, 1};
        double ones[kMaxWidth];
        for (double& one : ones) one = 1;
        for (int64_t row = 0; row < p.rows; row += kPackedRows) {
            const int64_t taken = min(kPackedRows, p.rows - row);
            load_rows64(z, row, taken, k, floats, rows, ld);
            for (int64_t j = 0; j < k; j += 8) {  // L^-T is upper triangular
                gemm(taken, min(8, k - j), min(k, j + 8), rows, ld, 1, s + j, ld, out + j, ld, false);
            }
            for (int64_t i = 0; i < taken; ++i) narrow_row(out + i * ld, ones, k, u + (row + i) * k);
        }
    }
};

void batched_rsvd(const Rsvd& p) {
    const int64_t n = p.cols, k = p.rank;
    const int64_t doubles = ShortSide::doubles(p) + LongSide::doubles(p) + Gram::doubles(n) + Gram::doubles(k);
    parallel_for(p.threads, p.batch, 2 * doubles, [&](int64_t index, float* buffer) {
        Arena arena(buffer);
        const Matrix a = matrix(p.matrices, index);
        float *u = p.u + index * p.rows * k, *s = p.s + index * k, *v = p.v + index * n * k;
        const ShortSide short_side(p, arena);
        const LongSide long_side(p, arena);
        if (!Gram(a, p.rows, n, arena).compute(short_side.g)) {
            const float nan = __builtin_nanf("");
            for (int64_t i = 0; i < p.rows * k; ++i) u[i] = nan;
            for (int64_t i = 0; i < k; ++i) s[i] = nan;
            for (int64_t i = 0; i < n * k; ++i) v[i] = nan;
            return;
        }
        short_side.compute();
        for (int64_t i = 0; i < k; ++i) {
            s[i] = float(short_side.sigma[i]);
            for (int64_t j = 0; j < n; ++j) v[j * k + i] = float(short_side.vt[i * short_side.ld + j]);
        }
        long_side.project(a, short_side.sigma, v, u);
        Gram({u, DType::f32, k, 1}, p.rows, k, arena).compute(long_side.s);
        long_side.invert_cholesky();
        long_side.orthonormalise(u);
    });
}

}  // namespace mtlora::cpu::MTLORA_ISA
