"""The spectral operators on the CUDA kernels of `_C`; same arguments and results as the reference on a GPU."""

import torch
from torch import Tensor

from .. import _C
from ..reference.arithmetic import Cuda
from .params import set_fields

WORKSPACE = 2**28  # bytes: larger batches of `batched_rsvd` are cut, and such pieces fill any GPU


def _rows_contiguous(matrices: Tensor) -> Tensor:
    """[batch, m, n] with the elements of a row side by side; the same tensor where they are."""
    return matrices if matrices.stride(2) == 1 or matrices.shape[2] == 1 else matrices.contiguous()


def _stream(t: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(t.get_device())  # a tenth of the time of torch.cuda.current_stream


def batched_rsvd(a: Tensor, rank: int, sketch: int, power_iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [batch, m, rank], S [batch, rank], V [batch, n, rank] in fp32; NaN for a matrix with a NaN or Inf in it."""
    batch, rows, cols = a.shape
    u, s, v = (a.new_empty(batch, *shape, dtype=torch.float32) for shape in ((rows, rank), (rank,), (cols, rank)))
    params = _C.Rsvd()
    set_fields(
        params, rows=rows, cols=cols, rank=rank, sketch=sketch, power_iterations=power_iterations, seed=seed,
        stream=_stream(a),
    )  # fmt: skip
    params.batch = 1
    piece = max(1, WORKSPACE // (8 * _C.rsvd_workspace(params)))
    workspace = None
    for first in range(0, batch, piece):
        last = min(first + piece, batch)
        part = _rows_contiguous(a[first:last])
        params.batch = last - first
        if workspace is None:
            workspace = a.new_empty(_C.rsvd_workspace(params), dtype=torch.float64)
        set_fields(
            params, matrices=part, workspace=workspace.data_ptr(), u=u[first].data_ptr(), s=s[first].data_ptr(),
            v=v[first].data_ptr(),
        )  # fmt: skip
        _C.batched_rsvd_cuda(params)
    return u, s, v


def _of_layers(params: _C.Spectral, lora_b: Tensor, weights: Tensor, kind: str, **fields) -> Tensor:
    """Sets params for a contiguous lora_b [L, N, d, r]; returns the workspace, which must outlive the call."""
    layers, experts, d, rank = lora_b.shape
    set_fields(
        params, layers=layers, experts=experts, rows=d, rank=rank, pairwise=kind == "pairwise", stream=_stream(lora_b),
        lora_b=lora_b.flatten(0, 1), weights=weights.data_ptr(), **fields,
    )  # fmt: skip
    workspace = lora_b.new_empty(_C.spectral_workspace(params), dtype=torch.float64)
    params.workspace = workspace.data_ptr()
    return workspace


def _has_products(x: Tensor) -> bool:
    """Whether the kernels do the products with x [L, d, N*r]; `Cuda.dot` does the others."""
    return x.dtype == torch.float32 or x.shape[2] % 8 == 0


def spectral_weights(lora_b: Tensor, kind: str) -> Tensor:
    """fp32 M [L, N, r, r] for "pairwise", w [L, N, r] in order of descending s for "gram"; NaN if B is not finite."""
    lora_b, (layers, experts, _, rank) = lora_b.contiguous(), lora_b.shape
    weights = lora_b.new_empty(layers, experts, *(rank,) * (1 + (kind == "pairwise")), dtype=torch.float32)
    params = _C.SpectralWeights()
    _workspace = _of_layers(params, lora_b, weights, kind)
    _C.spectral_weights_cuda(params)
    return weights


def spectral_penalty_fwd(lora_b: Tensor, weights: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """loss and what backward reads, as the reference's."""
    layers, experts, d, rank = lora_b.shape
    lora_b, weights, width = lora_b.contiguous(), weights.contiguous(), experts * rank
    loss = lora_b.new_empty((), dtype=torch.float32)
    params = _C.SpectralPenaltyFwd()
    _workspace = _of_layers(params, lora_b, weights, kind, loss=loss.data_ptr())
    if kind == "pairwise":
        x, c = lora_b.new_empty(layers, d, width), weights.new_empty(layers, width, width)
        set_fields(params, x=x.data_ptr(), c=c.data_ptr())
        _C.spectral_features_cuda(params)
        if _has_products(x):
            _C.spectral_cross_product_cuda(params)
        else:
            c = Cuda.dot(x.mT, x)
            params.c = c.data_ptr()
    else:
        x, c = lora_b.new_empty(0), weights.new_empty(layers, experts, rank, rank)
        params.c = c.data_ptr()
    _C.spectral_loss_cuda(params)
    return loss, x, c


def spectral_penalty_bwd(dloss: Tensor, lora_b: Tensor, weights: Tensor, x: Tensor, c: Tensor, kind: str) -> Tensor:
    """The gradient of lora_b, in its dtype, for an fp32 scalar dloss."""
    lora_b, weights, grad = lora_b.contiguous(), weights.contiguous(), lora_b.new_empty(lora_b.shape)
    params = _C.SpectralPenaltyBwd()
    fields = {"x": x.data_ptr(), "c": c.data_ptr(), "dloss": dloss.data_ptr(), "dlora_b": grad.data_ptr()}
    _workspace = _of_layers(params, lora_b, weights, kind, **fields)
    if kind == "pairwise":
        k, scaled_k, up = torch.empty_like(c), torch.empty_like(c, dtype=x.dtype), c.new_empty(len(c))
        set_fields(params, k=k.data_ptr(), scaled_k=scaled_k.data_ptr(), up=up.data_ptr())
        _C.spectral_slope_cuda(params)
        if _has_products(x):
            _C.spectral_gradient_product_cuda(params)
            return grad
        product = Cuda.dot(x, scaled_k)
        params.product = product.data_ptr()
    _C.spectral_gradient_cuda(params)
    return grad
