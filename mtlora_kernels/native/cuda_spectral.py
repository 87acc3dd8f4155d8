"""The spectral operators on the CUDA kernels of `_C`; same arguments and results as the reference on a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _C
from ..reference.arithmetic import Cuda
from .params import DTYPE_CODES, set_fields
from .plan import Plan, addresses, plans, raw_stream

WORKSPACE = 2**28  # bytes: larger batches of `batched_rsvd` are cut, and such pieces fill any GPU


def _rows_contiguous(matrices: Tensor) -> Tensor:
    """[batch, m, n] with the elements of a row side by side; the same tensor where they are."""
    return matrices if matrices.stride(2) == 1 or matrices.shape[2] == 1 else matrices.contiguous()


def _launch(run: Callable, plan: Plan, *tensors: Tensor | None) -> None:
    run(plan.params, raw_stream(tensors[0]), addresses(tensors))


def batched_rsvd(a: Tensor, rank: int, sketch: int, power_iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [batch, m, rank], S [batch, rank], V [batch, n, rank] in fp32; NaN for a matrix with a NaN or Inf in it."""
    batch, rows, cols = a.shape
    u, s, v = (a.new_empty(batch, *shape, dtype=torch.float32) for shape in ((rows, rank), (rank,), (cols, rank)))
    settings = rank, sketch, power_iterations, seed
    piece = max(1, WORKSPACE // _rsvd_plan(1, a, *settings).workspace)
    for first in range(0, batch, piece):
        part = _rows_contiguous(a[first : first + piece])
        plan = _rsvd_plan(len(part), part, *settings)
        _launch(_C.batched_rsvd_cuda, plan, part, u[first:], s[first:], v[first:], plan.new_workspace(part))
    return u, s, v


def _rsvd_plan(batch: int, a: Tensor, *settings: int) -> Plan:
    key = (_C.Rsvd, a.get_device(), batch, a.shape, a.stride(), a.dtype, *settings)
    plan = plans.get(key)
    if plan is not None:
        return plan
    (_, rows, cols), (rank, sketch, power_iterations, seed) = a.shape, settings
    params = _C.Rsvd()
    set_fields(
        params, batch=batch, rows=rows, cols=cols, rank=rank, sketch=sketch, power_iterations=power_iterations,
        seed=seed, matrices=a,
    )  # fmt: skip
    return plans.keep(key, Plan(params, 8 * _C.rsvd_workspace(params)))


def _layers_plan(Params: type, workspace: Callable, lora_b: Tensor, kind: str) -> Plan:
    """Of Params for a contiguous lora_b [L, N, d, r], with a workspace of workspace(params) doubles."""
    key = (Params, lora_b.get_device(), kind, lora_b.shape, lora_b.dtype)
    plan = plans.get(key)
    if plan is not None:
        return plan
    layers, experts, d, rank = lora_b.shape
    params = Params()
    set_fields(
        params, layers=layers, experts=experts, rows=d, rank=rank, pairwise=kind == "pairwise",
        lora_b=_C.View(0, DTYPE_CODES[lora_b.dtype], (d * rank, rank, 1)),
    )  # fmt: skip
    return plans.keep(key, Plan(params, 8 * workspace(params)))


def _has_products(x: Tensor) -> bool:
    """Whether the kernels do the products with x [L, d, N*r]; `Cuda.dot` does the others."""
    return x.dtype == torch.float32 or x.shape[2] % 8 == 0


def spectral_weights(lora_b: Tensor, kind: str) -> Tensor:
    """fp32 M [L, N, r, r] for "pairwise", w [L, N, r] in order of descending s for "gram"; NaN if B is not finite."""
    lora_b, (layers, experts, _, rank) = lora_b.contiguous(), lora_b.shape
    weights = lora_b.new_empty(layers, experts, *(rank,) * (1 + (kind == "pairwise")), dtype=torch.float32)
    plan = _layers_plan(_C.SpectralWeights, _C.spectral_workspace, lora_b, kind)
    _launch(_C.spectral_weights_cuda, plan, lora_b, weights, plan.new_workspace(lora_b))
    return weights


def spectral_penalty_fwd(lora_b: Tensor, weights: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """loss and what backward reads, as the reference's."""
    layers, experts, d, rank = lora_b.shape
    lora_b, weights, width = lora_b.contiguous(), weights.contiguous(), experts * rank
    loss = lora_b.new_empty((), dtype=torch.float32)
    if kind == "pairwise":
        x, c = lora_b.new_empty(layers, d, width), weights.new_empty(layers, width, width)
    else:
        x, c = lora_b.new_empty(0), weights.new_empty(layers, experts, rank, rank)
    plan = _layers_plan(_C.SpectralPenaltyFwd, _C.spectral_workspace, lora_b, kind)
    tensors = lora_b, weights, loss, x, c, plan.new_workspace(lora_b)
    if kind == "gram" or _has_products(x):
        _launch(_C.spectral_penalty_fwd_cuda, plan, *tensors)
    else:
        _launch(_C.spectral_features_cuda, plan, *tensors)
        c.copy_(Cuda.dot(x.mT, x))
        _launch(_C.spectral_loss_cuda, plan, *tensors)
    return loss, x, c


def spectral_penalty_bwd(dloss: Tensor, lora_b: Tensor, weights: Tensor, x: Tensor, c: Tensor, kind: str) -> Tensor:
    """The gradient of lora_b, in its dtype, for an fp32 scalar dloss."""
    lora_b, weights, grad = lora_b.contiguous(), weights.contiguous(), lora_b.new_empty(*lora_b.shape)
    plan = _layers_plan(_C.SpectralPenaltyBwd, _C.spectral_bwd_workspace, lora_b, kind)
    tensors, workspace = (lora_b, weights, x, c, dloss, grad), plan.new_workspace(lora_b)
    if kind == "gram" or _has_products(x):
        _launch(_C.spectral_penalty_bwd_cuda, plan, *tensors, None, None, workspace)
    else:
        scaled_k = torch.empty_like(c, dtype=x.dtype)
        _launch(_C.spectral_slope_cuda, plan, *tensors, scaled_k, None, workspace)
        _launch(_C.spectral_gradient_cuda, plan, *tensors, scaled_k, Cuda.dot(x, scaled_k), workspace)
    return grad
