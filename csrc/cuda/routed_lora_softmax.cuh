// Softmax of rounded logits that lie in shared memory, with the bits of PyTorch's on CUDA: its expf, its order of
// addition, IEEE division.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"

namespace mtlora::cuda {

// Half the power of two at or above n.
template <int n>
constexpr int kHalf = n <= 2 ? 1 : 2 * kHalf<(n + 1) / 2>;

// Halving tree over n values >= 0 and zeros up to a power of two: s[: half] + s[half :], down to one.
template <int n>
__device__ float tree_sum(const float (&s)[n]) {
    constexpr int half = kHalf<n>;
    float sums[half];
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] = i + half < n ? s[i] + s[i + half] : s[i];
    if constexpr (half == 1)
        return sums[0];
    else
        return tree_sum(sums);
}

// expf(a) for -62 <= a <= 0, without its last multiplication: the exponent is added to the bits instead. The same bits
// for every float there and every difference of two 16-bit values: all were compared.
__device__ inline float exp_common(float a) {
    const float t = __fmaf_rd(__saturatef(__fmaf_rn(a, 0.0057249800302088261f, 0.5f)), 252.0f, 12582786.0f);
    const float whole = t - 12582912.0f;
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;"
        : "=f"(power)
        : "f"(__fmaf_rn(a, 1.925963033500011079e-08f, __fmaf_rn(a, 1.4426950216293334961f, -whole))));
    return __uint_as_float(__float_as_uint(power) + (__float_as_uint(t) << 23));
}

// What __bfloat1622float2 takes three instructions for.
template <class E>
__device__ float2 unpacked(uint32_t pair) {
    if constexpr (std::is_same_v<E, bf16>)
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
    else
        return to_float2(bits_as<Pair<E>>(pair));
}

template <class P>
__device__ P swapped(P pair) {
    return bits_as<P>(__byte_perm(bits_as<uint32_t>(pair), 0, 0x1032));
}

// The words of a run of n 16-bit values, P - 4 < n <= P, that starts on any of them: on the second half of a word only
// if n is odd. The values around it are other threads'.
template <int P>
struct Words {
    const bool odd;
    const int whole;  // words, a first half included
    const int half;   // n odd: the value that shares its word with others', the first or the last

    __device__ Words(const char* at, int n)
        : odd(smem_address(at) & 2), whole((n + int(odd)) / 2), half(odd ? 0 : n - 1) {}

    __device__ bool owns(int i) const { return (i > 0 || !odd) && (i < P / 2 - 2 || i < whole); }
};

// The run as pairs, with anything beyond n.
template <int P, bool aligned>
__device__ void load_run(uint32_t (&v)[P / 2], const char* from, int n) {
    if constexpr (aligned) {
#pragma unroll
        for (int i = 0; i < P / 8; ++i) {
            const uint4 unit = reinterpret_cast<const uint4*>(from)[i];
            v[4 * i] = unit.x, v[4 * i + 1] = unit.y, v[4 * i + 2] = unit.z, v[4 * i + 3] = unit.w;
        }
    } else {
        const Words<P> run(from, n);
        const uint32_t* const words = reinterpret_cast<const uint32_t*>(from - 2 * run.odd);
        uint32_t w[P / 2 + 1] = {};
#pragma unroll
        for (int i = 0; i < P / 2; ++i) {
            if (run.owns(i)) w[i] = words[i];
        }
        if (n % 2) {
            const uint32_t half = reinterpret_cast<const uint16_t*>(from)[run.half];
            if (run.odd)
                w[0] = half << 16;
            else if (n == P - 1)
                w[P / 2 - 1] = half;
            else
                w[P / 2 - 2] = half;
        }
#pragma unroll
        for (int i = 0; i < P / 2; ++i) v[i] = __byte_perm(w[i], w[i + 1], run.odd ? 0x5432 : 0x3210);
    }
}

// The first n of them back.
template <int P, bool aligned>
__device__ void store_run(char* to, const uint32_t (&v)[P / 2], int n) {
    if constexpr (aligned) {
#pragma unroll
        for (int i = 0; i < P / 8; ++i)
            reinterpret_cast<uint4*>(to)[i] = {v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
    } else {
        const Words<P> run(to, n);
        uint32_t* const words = reinterpret_cast<uint32_t*>(to - 2 * run.odd);
#pragma unroll
        for (int i = 0; i < P / 2; ++i) {
            const uint32_t word = __byte_perm(v[i > 0 ? i - 1 : 0], v[i], run.odd ? 0x5432 : 0x7654);
            if (run.owns(i)) words[i] = word;
        }
        if (n % 2) {
            const uint32_t last = n == P - 1 ? v[P / 2 - 1] : v[P / 2 - 2];
            reinterpret_cast<uint16_t*>(to)[run.half] = uint16_t(run.odd ? v[0] : last);
        }
    }
}

// One group of one token in place: rounded logits to pi. P: its experts, rounded up to a multiple of four; `aligned`:
// P experts on 16 bytes.
template <class E, int P, bool aligned>
__device__ void softmax(char* row, int experts) {
    uint32_t v[P / 2];
    load_run<P, aligned>(v, row, experts);
    if constexpr (!aligned) {  // the first value instead of what is not there
        const uint32_t first = __byte_perm(v[0], v[0], 0x1010);
#pragma unroll
        for (int i = P / 2 - 2; i < P / 2; ++i) {
            if (2 * i >= experts)
                v[i] = first;
            else if (2 * i + 1 >= experts)
                v[i] = __byte_perm(v[i], first, 0x5410);
        }
    }
    Pair<E> most = bits_as<Pair<E>>(v[0]), least = most;
#pragma unroll
    for (int i = 1; i < P / 2; ++i) {
        most = __hmax2_nan(most, bits_as<Pair<E>>(v[i]));
        least = __hmin2_nan(least, bits_as<Pair<E>>(v[i]));
    }
    most = __hmax2_nan(most, swapped(most));
    least = __hmin2_nan(least, swapped(least));
    const float top = unpacked<E>(bits_as<uint32_t>(most)).x, bottom = unpacked<E>(bits_as<uint32_t>(least)).x;
    float e[P];
#pragma unroll
    for (int i = 0; i < P / 2; ++i) {
        const float2 pair = unpacked<E>(v[i]);
        e[2 * i] = pair.x - top, e[2 * i + 1] = pair.y - top;
    }
    const auto absent = [&](int i) { return !aligned && i >= P - 3 && i >= experts; };
    if (__builtin_expect(bottom - top >= -62.0f, true)) {  // no NaN, and e >= 2^-90
#pragma unroll
        for (int i = 0; i < P; ++i) e[i] = absent(i) ? 0.0f : exp_common(e[i]);
        const float sum = tree_sum(e);
        // What __fdiv_rn does unless a remainder could underflow, with one reciprocal.
        float r;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(sum));
        r = __fmaf_rn(r, __fmaf_rn(-sum, r, 1.0f), r);
#pragma unroll
        for (int i = 0; i < P; ++i) {
            const float q = __fmul_rn(r, e[i]);
            e[i] = __fmaf_rn(r, __fmaf_rn(-sum, q, e[i]), q);
        }
    } else {
#pragma unroll
        for (int i = 0; i < P; ++i) e[i] = absent(i) ? 0.0f : expf(e[i]);
        const float sum = tree_sum(e);
#pragma unroll
        for (int i = 0; i < P; ++i) e[i] = __fdiv_rn(e[i], sum);
    }
#pragma unroll
    for (int i = 0; i < P / 2; ++i) v[i] = bits_as<uint32_t>(rounded2<E>(e[2 * i], e[2 * i + 1]));
    store_run<P, aligned>(row, v, experts);
}

// run(P, aligned) as types for `experts` of at most `most`.
template <int most, int P, class Run>
__device__ void for_experts_from(int experts, Run run) {
    if constexpr (P == 8 || P == 24 || P == 32) {
        if (experts == P) return run(std::integral_constant<int, P>(), std::true_type());
    }
    if constexpr (P < most) {
        if (experts > P) return for_experts_from<most, P + 4>(experts, run);
    }
    run(std::integral_constant<int, P>(), std::false_type());
}
template <int most, class Run>
__device__ void for_experts(int experts, Run run) {
    // The usual number first: each comparison lies far from the last, and the first time is waited for.
    if (experts == 16) return run(std::integral_constant<int, 16>(), std::true_type());
    for_experts_from<most, 4>(experts, run);
}

// Rows of 8 `octets` tokens, `pitch` bytes apart, each the logits of `groups` groups side by side, in place. By a warp
// of several; a thread takes a token and a group at a time. Eight tokens and, where groups start on odd words, every
// other group side by side meet no bank twice.
template <class E, int most, int pitch>
__device__ void softmax_rows(char* rows, int octets, int groups, int experts, int warp, int warps) {
    const int lane = threadIdx.x % 32, stride = 1 + experts % 2, evens = (groups + stride - 1) / stride;
    for_experts<most>(experts, [&](auto P, auto aligned) {
        int octet = 0, k = 4 * warp + lane / 8;
#pragma unroll 1
        for (;; k += 4 * warps) {
            for (; k >= groups; k -= groups) ++octet;
            if (octet >= octets) break;
            const int group = k < evens ? k * stride : 2 * (k - evens) + 1;
            softmax<E, decltype(P)::value, decltype(aligned)::value>(
                rows + (lane % 8 + 8 * octet) * pitch + group * experts * int(sizeof(E)), experts);
        }
    });
}

}  // namespace mtlora::cuda
