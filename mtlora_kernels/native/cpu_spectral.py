"""The spectral operators on the CPU kernels of `_C`; same arguments and results as the reference on a CPU."""

import torch
from torch import Tensor

from .. import _C
from .params import set_fields


def _fp32(*shape: int) -> Tensor:
    """Memory for the kernels to write, whatever torch.set_default_dtype and torch.set_default_device say."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _of_layers(params: _C.Spectral, lora_b: Tensor, weights: Tensor, kind: str, **fields):
    """params for a contiguous lora_b [L, N, d, r]; the tensors must outlive the call."""
    layers, experts, d, rank = lora_b.shape
    set_fields(
        params, layers=layers, experts=experts, rows=d, rank=rank, pairwise=kind == "pairwise",
        threads=torch.get_num_threads(), lora_b=lora_b.flatten(0, 1), weights=weights.data_ptr(), **fields,
    )  # fmt: skip
    return params


def batched_rsvd(a: Tensor, rank: int, sketch: int, power_iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [batch, m, rank], S [batch, rank], V [batch, n, rank] in fp32; NaN for a matrix with a NaN or Inf in it."""
    batch, rows, cols = a.shape
    u, s, v = _fp32(batch, rows, rank), _fp32(batch, rank), _fp32(batch, cols, rank)
    params = _C.Rsvd()
    set_fields(
        params, batch=batch, rows=rows, cols=cols, rank=rank, sketch=sketch, power_iterations=power_iterations,
        seed=seed, threads=torch.get_num_threads(), matrices=a, u=u.data_ptr(), s=s.data_ptr(), v=v.data_ptr(),
    )  # fmt: skip
    _C.batched_rsvd_cpu(params)
    return u, s, v


def spectral_weights(lora_b: Tensor, kind: str) -> Tensor:
    """fp32 M [L, N, r, r] for "pairwise", w [L, N, r] in order of descending s for "gram"; NaN if B is not finite."""
    lora_b, (layers, experts, _, rank) = lora_b.contiguous(), lora_b.shape
    weights = _fp32(layers, experts, *(rank,) * (1 + (kind == "pairwise")))
    _C.spectral_weights_cpu(_of_layers(_C.SpectralWeights(), lora_b, weights, kind))
    return weights


def spectral_penalty_fwd(lora_b: Tensor, weights: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """loss and what backward reads, as the reference's."""
    layers, experts, d, rank = lora_b.shape
    lora_b, weights, width = lora_b.contiguous(), weights.contiguous(), experts * rank
    pairwise, loss = kind == "pairwise", _fp32()
    x = lora_b.new_empty((layers, d, width) if pairwise else 0)
    c = _fp32(layers, *((width, width) if pairwise else (experts, rank, rank)))
    fields = {"loss": loss.data_ptr(), "x": x.data_ptr(), "c": c.data_ptr()}
    _C.spectral_penalty_fwd_cpu(_of_layers(_C.SpectralPenaltyFwd(), lora_b, weights, kind, **fields))
    return loss, x, c


def spectral_penalty_bwd(dloss: Tensor, lora_b: Tensor, weights: Tensor, x: Tensor, c: Tensor, kind: str) -> Tensor:
    """The gradient of lora_b, in its dtype, for an fp32 scalar dloss."""
    lora_b, weights, grad = lora_b.contiguous(), weights.contiguous(), lora_b.new_empty(lora_b.shape)
    fields = {"x": x.data_ptr(), "c": c.data_ptr(), "dloss": dloss.data_ptr(), "dlora_b": grad.data_ptr()}
    _C.spectral_penalty_bwd_cpu(_of_layers(_C.SpectralPenaltyBwd(), lora_b, weights, kind, **fields))
    return grad
