// `routed_lora` on Hopper: the host entry points and what their files share.
#pragma once

#include <cstdint>

#include "common/routed_lora.h"

namespace mtlora::cuda {

// What these kernels take is decided in mtlora_kernels/limits.py; they trust it.
void routed_lora_fwd(const RoutedLoraFwd& f);

void project(const RoutedLoraFwd& f);  // h and pi
void expand(const RoutedLoraFwd& f);   // out, from h and pi

int64_t routed_lora_bwd_workspace(const RoutedLoraBwd& f);  // bytes
void routed_lora_bwd(const RoutedLoraBwd& f);

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace mtlora::cuda
