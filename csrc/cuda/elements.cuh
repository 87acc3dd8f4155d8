// Arithmetic on pairs of 16-bit elements, each operation rounded once, as PyTorch rounds it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mtlora::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class E>
using Pair = std::conditional_t<std::is_same_v<E, bf16>, __nv_bfloat162, __half2>;

template <class To, class From>
__device__ inline To bits_as(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &v, sizeof(To));
    return to;
}

__device__ inline float to_float(float v) {
    return v;
}
__device__ inline float to_float(bf16 v) {
    return __bfloat162float(v);
}
__device__ inline float to_float(f16 v) {
    return __half2float(v);
}
__device__ inline float2 to_float2(__nv_bfloat162 v) {
    return __bfloat1622float2(v);
}
__device__ inline float2 to_float2(__half2 v) {
    return __half22float2(v);
}

template <class E>
__device__ inline E rounded(float v) {
    if constexpr (std::is_same_v<E, bf16>)
        return __float2bfloat16_rn(v);
    else
        return __float2half_rn(v);
}
template <class E>
__device__ inline Pair<E> rounded2(float low, float high) {
    if constexpr (std::is_same_v<E, bf16>)
        return __floats2bfloat162_rn(low, high);
    else
        return __floats2half2_rn(low, high);
}

// Both halves the same.
template <class E>
__device__ inline Pair<E> twice(E v) {
    if constexpr (std::is_same_v<E, bf16>)
        return __bfloat162bfloat162(v);
    else
        return __half2half2(v);
}

}  // namespace mtlora::cuda
