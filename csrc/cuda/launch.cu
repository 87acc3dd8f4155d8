#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace mtlora::cuda {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver at run time, so that the extension loads on machines without one.
Encode encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
}

CUtensorMapSwizzle swizzle_of(int row_bytes) {
    switch (row_bytes) {
        case 128:
            return CU_TENSOR_MAP_SWIZZLE_128B;
        case 64:
            return CU_TENSOR_MAP_SWIZZLE_64B;
        case 32:
            return CU_TENSOR_MAP_SWIZZLE_32B;
        case 16:
            return CU_TENSOR_MAP_SWIZZLE_NONE;
        default:
            throw std::runtime_error("tensor_map: a row of " + std::to_string(row_bytes) + " bytes has no swizzle");
    }
}

int attribute(cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, current_device()), "cudaDeviceGetAttribute");
    return value;
}

}  // namespace

void check(cudaError_t status, const char* kernel) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // a launch error is not sticky once read
    std::string message = std::string(kernel) + ": " + cudaGetErrorString(status);
    if (status == cudaErrorNoKernelImageForDevice) message += "; this extension was not built for this device";
    throw std::runtime_error(message);
}

void check_launch(cudaError_t status, const char* kernel, int shared_bytes) {
    if (status == cudaErrorInvalidValue && shared_bytes > max_shared_bytes()) {
        cudaGetLastError();
        throw std::runtime_error(std::string(kernel) + ": these sizes need " + std::to_string(shared_bytes) +
                                 " bytes of shared memory, a block has " + std::to_string(max_shared_bytes()) +
                                 " on this device");
    }
    check(status, kernel);
}

int current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

int multiprocessors() {
    return attribute(cudaDevAttrMultiProcessorCount);
}

int max_shared_bytes() {
    return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

CUtensorMap tensor_map(const void* data, DType dtype, std::initializer_list<Dimension> dimensions) {
    static const Encode encode = encoder();
    constexpr int kMaxRank = 5, kElementBytes = 2;
    cuuint64_t sizes[kMaxRank], strides[kMaxRank];
    cuuint32_t box[kMaxRank], steps[kMaxRank];
    cuuint32_t rank = 0;
    for (const Dimension& d : dimensions) {
        sizes[rank] = cuuint64_t(d.size);
        box[rank] = cuuint32_t(d.box);
        steps[rank] = 1;
        if (rank) strides[rank - 1] = cuuint64_t(d.stride) * kElementBytes;
        ++rank;
    }
    CUtensorMap map;
    const auto encoded = [&] {
        return encode(&map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                      rank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      swizzle_of(dimensions.begin()->box * kElementBytes), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    CUresult status = encoded();
    if (status == CUDA_ERROR_INVALID_CONTEXT) {  // a thread that has called nothing of CUDA yet
        check(cudaSetDevice(current_device()), "cudaSetDevice");
        status = encoded();
    }
    if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
    return map;
}

}  // namespace mtlora::cuda
