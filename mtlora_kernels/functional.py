"""Public functions: validate, flatten to tokens, choose the implementation, call the operator."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from . import eager
from .requirements import require_tensor
from .settle import settled
from .validation import seed_tensor, stacked_experts, token_route_weights


@overload
def routed_lora(
    x: Tensor, lora_a: Tensor, lora_b: Tensor | Sequence[Tensor], router: Tensor | None = ...,
    residual: Tensor | None = ..., *, scaling: float = ..., num_groups: int = ..., numerics: str = ...,
    activation: str | None = ..., expert_scale: Tensor | None = ..., dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ..., route_weights: Tensor | None = ...,
    compute_dtype: torch.dtype | None = ..., accumulate_into_residual: bool = ..., return_load: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def routed_lora(
    x: Tensor, lora_a: Tensor, lora_b: Tensor | Sequence[Tensor], router: Tensor | None = ...,
    residual: Tensor | None = ..., *, scaling: float = ..., num_groups: int = ..., numerics: str = ...,
    activation: str | None = ..., expert_scale: Tensor | None = ..., dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ..., route_weights: Tensor | None = ...,
    compute_dtype: torch.dtype | None = ..., accumulate_into_residual: bool = ..., return_load: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def routed_lora(
    x: Tensor, lora_a: Tensor, lora_b: Tensor | Sequence[Tensor], router: Tensor | None = ...,
    residual: Tensor | None = ..., *, scaling: float = ..., num_groups: int = ..., numerics: str = ...,
    activation: str | None = ..., expert_scale: Tensor | None = ..., dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ..., route_weights: Tensor | None = ...,
    compute_dtype: torch.dtype | None = ..., accumulate_into_residual: bool = ..., return_load: bool,
    impl: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def routed_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor | Sequence[Tensor],
    router: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scaling: float = 1.0,
    num_groups: int = 1,
    numerics: str = "fp32",
    activation: str | None = None,
    expert_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    route_weights: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    accumulate_into_residual: bool = False,
    return_load: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A mixture of LoRA experts with one shared down-projection, routed per token and output group.

    ``residual + scaling * sum_i pi[..., group(o), i] * (B_i h)[o] * s_i`` with ``h = act(dropout(x) A^T)`` and
    ``pi`` the softmax over the N experts of ``x router^T``. mtLoRA (arXiv 2603.01526), eq. 3 to 6; with
    num_groups = 1 it is HydraLoRA's layer. Weights cannot be merged into a base weight: pi depends on the token.

    Args:
        x: [..., d_in]; float32, bfloat16, float16 (float64: reference only). Any strides.
        lora_a: [r, d_in], the shared down-projection.
        lora_b: [N, d_out, r], or a sequence of N tensors [d_out, r] (stacked on every call).
        router: [num_groups * N, d_in], row g * N + i (group-major). None only if N = 1 or route_weights is given.
        residual: [..., d_out], added to the mixture; None adds nothing.
        scaling: factor of the mixture, alpha / r in the published configurations.
        num_groups: G, a divisor of d_out; group g covers outputs [g * d_out / G, (g + 1) * d_out / G).
        numerics: "fp32" keeps the mixture in fp32 with one rounding at the end; "eager" rounds where the
            published modules round: on CUDA in bf16 and fp16, without split-K, their every bit.
        activation: None or "relu" (bottleneck and AdaptFormer styles).
        expert_scale: [N], a learnable factor per expert, or None.
        dropout_p: probability in [0, 1) of zeroing an element of x before lora_a; the router sees undropped x.
            Pass 0 in evaluation.
        dropout_seed: Philox key, an int or an int64 tensor of one element on x's device (a tensor keeps CUDA
            graphs replayable). None draws one from torch's default generator.
        route_weights: pi from outside, [..., G, N], or one row per sequence, [batch, G, N] for x [batch, s, d_in].
        compute_dtype: E, the dtype of products and saved intermediates; by default autocast's dtype where autocast
            is on, else x's dtype. Other tensors are cast to it as they are loaded.
        accumulate_into_residual: numerics="eager" only. False adds residual after the expert sum (block adapters);
            True starts the expert sum at residual (component layers).
        return_load: also return load [N] in fp32, the mean of pi over tokens and groups (see `balance_loss`).
        impl: None picks the fastest implementation that supports the call; a name (`available_impls`) is that
            one or an error.

    Returns:
        out [..., d_out] in promote_types(residual.dtype, compute_dtype), or (out, load) with return_load.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing was launched.
        RuntimeError: on a second derivative.
    """
    b = lora_b if isinstance(lora_b, Tensor) else stacked_experts(lora_b)
    chosen, dtype = settled(
        (x, lora_a, b, router, residual, expert_scale, route_weights), scaling, num_groups, numerics, activation,
        dropout_p, accumulate_into_residual, impl, compute_dtype,
    )  # fmt: skip
    leading, d_out, flat = x.shape[:-1], b.shape[1], x.dim() == 2
    out, load = eager.routed_lora(
        x,
        x if flat else x.reshape(-1, x.shape[-1]),
        lora_a,
        b,
        router,
        None if route_weights is None else token_route_weights(route_weights, x),
        residual if flat or residual is None else residual.reshape(-1, d_out),
        expert_scale,
        seed_tensor(dropout_seed, x) if dropout_p > 0 else None,
        float(scaling),
        num_groups,
        numerics,
        activation,
        float(dropout_p),
        dtype,
        accumulate_into_residual,
        return_load,
        chosen,
    )
    out = out if flat else out.view(*leading, d_out)
    return (out, load) if return_load else out


def balance_loss(load: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' load, var(load) / (mean(load)^2 + 1e-10), a scalar.

    load: [N], the second output of `routed_lora` with return_load=True. The variance is unbiased, as in the
    published trainers; one expert gives 0.
    """
    require_tensor("load", load)
    if load.dim() != 1:
        raise ValueError(f"load has shape {tuple(load.shape)}, it must be [N]")
    if load.numel() == 1:
        return load.sum() * 0
    return load.var() / (load.mean() ** 2 + 1e-10)
