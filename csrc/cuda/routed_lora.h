// `routed_lora` on Hopper: the host entry points and what their files share.
#pragma once

#include <cstdint>

#include "common/routed_lora.h"

namespace mtlora::cuda {

// What these kernels take is decided in mtlora_kernels/limits.py; they trust it.
void routed_lora_fwd(const RoutedLoraFwd& f);

void project(const RoutedLoraFwd& f);  // h and pi
void expand(const RoutedLoraFwd& f);   // out, from h and pi; in fp32 where its dtype says so, for few tokens

// out = residual + mixture, rounded once: contiguous [tokens, outputs], mixture in fp32; 16-byte rows of the residual.
void routed_lora_add(const View& residual, const View& mixture, const View& out, int64_t tokens, int64_t outputs,
                     void* stream);

int64_t routed_lora_bwd_workspace(const RoutedLoraBwd& f);  // bytes
void routed_lora_bwd(const RoutedLoraBwd& f);

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace mtlora::cuda
