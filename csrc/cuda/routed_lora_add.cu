// out = E(residual + mixture): what is left for after a block whose adapter ran beside it.
#include <cuda_runtime.h>

#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora.h"

namespace mtlora::cuda {
namespace {

constexpr int kThreads = 128, kOutputs = 8;  // of a thread: 16 bytes of the residual

struct AddArgs {
    const void* residual;
    const float* mixture;
    void* out;
    int64_t pitch;  // of the residual's rows
    int outputs;
};

template <class E>
__global__ void add_kernel(const AddArgs p) {
    const int output = int(blockIdx.x * kThreads + threadIdx.x) * kOutputs;
    if (output >= p.outputs) return;
    const int64_t token = blockIdx.y, at = token * p.outputs + output;
    union {
        uint4 unit;
        Pair<E> pairs[kOutputs / 2];
    } v;
    v.unit = *reinterpret_cast<const uint4*>(static_cast<const E*>(p.residual) + token * p.pitch + output);
    float4 sum[kOutputs / 4];
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) sum[i] = reinterpret_cast<const float4*>(p.mixture + at)[i];
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
        const float2 low = to_float2(v.pairs[2 * i]), high = to_float2(v.pairs[2 * i + 1]);
        v.pairs[2 * i] = rounded2<E>(low.x + sum[i].x, low.y + sum[i].y);
        v.pairs[2 * i + 1] = rounded2<E>(high.x + sum[i].z, high.y + sum[i].w);
    }
    *reinterpret_cast<uint4*>(static_cast<E*>(p.out) + at) = v.unit;
}

}  // namespace

void routed_lora_add(const View& residual, const View& mixture, const View& out, int64_t tokens, int64_t outputs,
                     void* stream) {
    const AddArgs p{residual.data, static_cast<const float*>(mixture.data), out.data, residual.stride[0], int(outputs)};
    const dim3 grid(unsigned(ceil_div(outputs, kThreads * kOutputs)), unsigned(tokens));
    const auto run = [&](auto element) {
        launch<add_kernel<decltype(element)>>("routed_lora add", grid, kThreads, 0, stream, false, p);
    };
    if (out.dtype == DType::bf16)
        run(bf16());
    else
        run(f16());
}

}  // namespace mtlora::cuda
