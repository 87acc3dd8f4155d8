// Host side of a launch: checked errors, tensor maps, shared memory and dependent launches.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>

#include "common/routed_lora.h"
#include "cuda/elements.cuh"

namespace mtlora::cuda {

constexpr int kMaxSharedBytes = 227 * 1024;     // of a block on Hopper
constexpr int kDefaultSharedBytes = 48 * 1024;  // more has to be asked for; static arrays count too

// Throws std::runtime_error with the kernel's name and what CUDA says.
void check(cudaError_t status, const char* kernel);
// The same for a launch, also of what the device's shared memory does not hold.
void check_launch(cudaError_t status, const char* kernel, int shared_bytes);

int current_device();
int multiprocessors();
int max_shared_bytes();  // of a block on this device

// A tiled view of `data` (bf16 or f16): sizes and box in elements from the innermost dimension, which is contiguous;
// strides in elements, of the other dimensions. swizzle follows the bytes of a row of the box (128 at most).
struct Dimension {
    int64_t size, stride;  // the innermost stride is 1 and not read
    int box;
};
CUtensorMap tensor_map(const void* data, DType dtype, std::initializer_list<Dimension> dimensions);

// run(element) with an element of the dtype, whose type chooses a kernel.
template <class Run>
void for_dtype(DType dtype, Run run) {
    switch (dtype) {
        case DType::f32:
            return run(float());
        case DType::bf16:
            return run(bf16());
        case DType::f16:
            return run(f16());
    }
}

// One kernel with one parameter struct. `dependent` lets it start while the kernel before it in the stream still
// runs, once that has called launch_dependents. More than one: `cluster` blocks along x form a cluster.
template <auto kernel, class Params>
void launch(const char* name, dim3 grid, int threads, int shared_bytes, void* stream, bool dependent,
            const Params& params, int cluster = 1) {
    if (shared_bytes > kDefaultSharedBytes) {
        static std::atomic<uint64_t> prepared{0};  // a bit per device
        const uint64_t device = uint64_t(1) << (current_device() & 63);
        if (!(prepared.load(std::memory_order_relaxed) & device)) {
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared_bytes()), name);
            prepared.fetch_or(device, std::memory_order_relaxed);
        }
    }
    cudaLaunchAttribute attributes[2];
    unsigned count = 0;
    if (dependent) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {unsigned(cluster), 1, 1};
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = count;
    check_launch(cudaLaunchKernelEx(&config, kernel, params), name, shared_bytes);
}

}  // namespace mtlora::cuda
