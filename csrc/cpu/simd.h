// Vectors of one instruction set, and rows of any dtype moved between tensors and float scratch.
//
// Included only by files that are compiled once per instruction set. Everything lives in the namespace of
// that set and std:: templates stay out: the linker would keep one copy of an inline function for all sets.
#pragma once

#include <cstring>

#include "common/routed_lora.h"
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace mtlora::cpu::MTLORA_ISA {

#if defined(__AVX512F__)
constexpr int VW = 16;  // floats per vector
#elif defined(__AVX2__)
constexpr int VW = 8;
#else
constexpr int VW = 4;
#endif

typedef float vec __attribute__((vector_size(4 * VW)));
typedef double dvec __attribute__((vector_size(4 * VW)));
typedef int32_t ivec __attribute__((vector_size(4 * VW)));
typedef uint32_t uvec __attribute__((vector_size(4 * VW)));
typedef uint16_t hvec __attribute__((vector_size(2 * VW)));

#if defined(__AVX512F__)
constexpr ivec kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
constexpr ivec kLane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr ivec kLane = {0, 1, 2, 3};
#endif

template <class V>
static inline V load_as(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline vec load(const float* p) {
    return load_as<vec>(p);
}
static inline void store(float* p, vec v) {
    memcpy(p, &v, sizeof v);
}
static inline dvec load(const double* p) {
    return load_as<dvec>(p);
}
static inline void store(double* p, dvec v) {
    memcpy(p, &v, sizeof v);
}

// The vector of an element type, and how many elements it holds.
template <class T>
using Vector = decltype(load((const T*)nullptr));
template <class T>
constexpr int WIDTH = sizeof(vec) / sizeof(T);

static inline int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t max(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
static inline int64_t round_up(int64_t a, int64_t b) {
    return ceil_div(a, b) * b;
}

// ---- Storage formats: load and store one vector; round is store, then load ----

struct F32 {
    static constexpr DType dtype = DType::f32;
    typedef float element;
    static vec load(const element* p) { return load_as<vec>(p); }
    static void store(element* p, vec v) { memcpy(p, &v, sizeof v); }
    static vec round(vec v) { return v; }
};

struct BF16 {
    static constexpr DType dtype = DType::bf16;
    typedef uint16_t element;

    static vec load(const element* p) { return (vec)(__builtin_convertvector(load_as<hvec>(p), uvec) << 16); }
    static void store(element* p, vec v) {
        const hvec half = __builtin_convertvector((uvec)round(v) >> 16, hvec);
        memcpy(p, &half, sizeof half);
    }
    static vec round(vec v) {
        const uvec bits = (uvec)v;
        const uvec nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
        return (vec)(v == v ? nearest_even : (uvec{} + 0x7fc00000));
    }
};

struct F16 {
    static constexpr DType dtype = DType::f16;
    typedef uint16_t element;

#if defined(__AVX512F__)
    // The zero-masked forms: GCC 12 warns about an uninitialised operand inside the plain ones.
    static vec load(const element* p) { return (vec)_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(p)); }
    static void store(element* p, vec v) {
        const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
        memcpy(p, &half, sizeof half);
    }
#elif defined(__F16C__)
    static vec load(const element* p) { return (vec)_mm256_cvtph_ps(load_as<__m128i>(p)); }
    static void store(element* p, vec v) {
        const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
        memcpy(p, &half, sizeof half);
    }
#else
    static vec load(const element* p) {
        const uvec bits = __builtin_convertvector(load_as<hvec>(p), uvec);
        const uvec magnitude = bits & 0x7fff;
        const vec subnormal = __builtin_convertvector((ivec)magnitude, vec) * 0x1p-24f;
        uvec out = (magnitude << 13) + 0x38000000;                         // exponent bias 15 to 127
        out = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : out;  // Inf and NaN
        out = magnitude < 0x0400 ? (uvec)subnormal : out;
        return (vec)(out | (bits & 0x8000) << 16);
    }
    static void store(element* p, vec v) {
        const uvec bits = (uvec)v, magnitude = bits & 0x7fffffff;
        // Adding 0.5 leaves a subnormal half, rounded to nearest even, in the low bits.
        const uvec subnormal = (uvec)((vec)magnitude + 0.5f) - 0x3f000000;
        uvec half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
        half = magnitude < 0x38800000 ? subnormal : half;           // below 2^-14
        half = magnitude >= 0x477ff000 ? (uvec{} + 0x7c00) : half;  // 65520 rounds to infinity
        half = magnitude > 0x7f800000 ? (uvec{} + 0x7e00) : half;   // NaN
        const hvec out = __builtin_convertvector(half | ((bits >> 16) & 0x8000), hvec);
        memcpy(p, &out, sizeof out);
    }
#endif
    static vec round(vec v) {
        element half[VW];
        store(half, v);
        return load(half);
    }
};

// Calls f with the format of a dtype. Python passes no other codes; bindings.cpp checks them.
template <class F>
static inline void with_format(DType dtype, F f) {
    switch (dtype) {
        case DType::f32:
            return f(F32());
        case DType::bf16:
            return f(BF16());
        case DType::f16:
            return f(F16());
    }
}

// ---- Rows ----

template <class Format>
static void load_contiguous(const typename Format::element* src, int64_t n, float* dst) {
    int64_t i = 0;
    for (; i + VW <= n; i += VW) store(dst + i, Format::load(src + i));
    if (i < n) {
        typename Format::element tail[VW] = {};
        memcpy(tail, src + i, (n - i) * sizeof *src);
        float wide[VW];
        store(wide, Format::load(tail));
        memcpy(dst + i, wide, (n - i) * sizeof *dst);
    }
}

template <class Format>
static void load_strided(const typename Format::element* src, int64_t stride, int64_t n, float* dst) {
    typename Format::element gathered[16 * VW];
    for (int64_t start = 0; start < n; start += 16 * VW) {
        const int64_t count = min(16 * VW, n - start);
        for (int64_t i = 0; i < count; ++i) gathered[i] = src[(start + i) * stride];
        load_contiguous<Format>(gathered, count, dst + start);
    }
}

template <class Format>
static void store_contiguous(typename Format::element* dst, const float* src, int64_t n) {
    int64_t i = 0;
    for (; i + VW <= n; i += VW) Format::store(dst + i, load(src + i));
    if (i < n) {
        float wide[VW] = {};
        memcpy(wide, src + i, (n - i) * sizeof *src);
        typename Format::element tail[VW];
        Format::store(tail, load(wide));
        memcpy(dst + i, tail, (n - i) * sizeof *dst);
    }
}

static inline void round_row(DType dtype, float* row, int64_t n) {
    if (dtype == DType::f32) return;
    with_format(dtype, [&](auto format) {
        int64_t i = 0;
        for (; i + VW <= n; i += VW) store(row + i, format.round(load(row + i)));
        if (i < n) {
            float tail[VW] = {};
            memcpy(tail, row + i, (n - i) * sizeof *row);
            store(tail, format.round(load(tail)));
            memcpy(row + i, tail, (n - i) * sizeof *row);
        }
    });
}

// Rows of a block lie on different pages, where the hardware prefetchers do not follow.
constexpr int64_t kRowsAhead = 4;

static inline void prefetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// Whole vectors: scratch rows have room up to the next multiple of VW.
static inline void scale_row(float* row, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i += VW) store(row + i, load(row + i) * factor);
}

static inline void add_row(float* sum, const float* row, int64_t n) {
    for (int64_t i = 0; i < n; i += VW) store(sum + i, load(sum + i) + load(row + i));
}

// Part of a tensor seen as a matrix, strides in elements.
struct Matrix {
    void* data;
    DType dtype;
    int64_t row_stride, col_stride;

    void* at(int64_t row, int64_t col) const {
        const int64_t offset = row * row_stride + col * col_stride;
        return static_cast<char*>(data) + offset * (dtype == DType::f32 ? 4 : 2);
    }
};

static inline Matrix matrix(const View& v) {
    return {v.data, v.dtype, v.stride[0], v.stride[1]};
}

// v[index] of a three-dimensional tensor.
static inline Matrix matrix(const View& v, int64_t index) {
    const Matrix whole = {v.data, v.dtype, v.stride[0], 0};
    return {whole.at(index, 0), v.dtype, v.stride[1], v.stride[2]};
}

// Rows [row, row + rows) and columns [col, col + cols), exact in float.
static inline void load_exact(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
                              int64_t ld) {
    if (m.col_stride == 1 && m.row_stride == cols && ld == cols) {  // one long row
        cols *= rows;
        rows = 1;
    }
    with_format(m.dtype, [&](auto format) {
        using Format = decltype(format);
        const auto* src = static_cast<const typename Format::element*>(m.at(row, col));
        for (int64_t i = 0; i < rows; ++i, src += m.row_stride, dst += ld) {
            if (m.col_stride == 1) {
                prefetch(src + kRowsAhead * m.row_stride, cols * sizeof *src);
                load_contiguous<Format>(src, cols, dst);
            } else {
                load_strided<Format>(src, m.col_stride, cols, dst);
            }
        }
    });
}

static inline void load_row(const Matrix& m, int64_t row, int64_t col, int64_t n, float* dst) {
    load_exact(m, row, 1, col, n, dst, n);
}

// The same block rounded to dtype E.
static inline void load_block(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols, DType E,
                              float* dst, int64_t ld) {
    load_exact(m, row, rows, col, cols, dst, ld);
    if (m.dtype == E || E == DType::f32) return;
    for (int64_t i = 0; i < rows; ++i) round_row(E, dst + i * ld, cols);
}

static inline void store_row(const Matrix& m, int64_t row, int64_t col, int64_t n, const float* src) {
    with_format(m.dtype, [&](auto format) {
        using Format = decltype(format);
        store_contiguous<Format>(static_cast<typename Format::element*>(m.at(row, col)), src, n);
    });
}

}  // namespace mtlora::cpu::MTLORA_ISA
