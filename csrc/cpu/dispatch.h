// What the kernels of every instruction set share, compiled once without any of those sets.
#pragma once

#include "common/routed_lora.h"
#include "common/spectral.h"

namespace mtlora::cpu {

// The instruction set in use: the best one of this machine, or the one named by MTLORA_CPU_ISA.
const char* isa();

void routed_lora_fwd(const RoutedLoraFwd& p);
void routed_lora_bwd(const RoutedLoraBwd& p);
void batched_rsvd(const Rsvd& p);
void spectral_weights(const SpectralWeights& p);
void spectral_penalty_fwd(const SpectralPenaltyFwd& p);
void spectral_penalty_bwd(const SpectralPenaltyBwd& p);

// The calling thread's scratch memory, cache-line aligned. It is kept between calls, because fresh pages cost
// more than the work of a one-token call; a later call may move it.
float* scratch(int64_t floats);

int thread_index();

}  // namespace mtlora::cpu
