"""From tensors to the parameter structs of `_C`; the tensors must outlive the call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..reference.routed_lora import inverse_count, uses_group_form

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/common/routed_lora.h
_ABSENT = _C.View(0, 0, ())


def view(tensor: Tensor | None) -> _C.View:
    if tensor is None:
        return _ABSENT
    return _C.View(tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride())


def set_fields(params: _C.RoutedLora, **fields) -> None:
    for name, value in fields.items():
        setattr(params, name, view(value) if value is None or isinstance(value, Tensor) else value)


def set_common(params, x, lora_a, lora_b, router, expert_scale, seed, h, pi, scaling, activation, dropout_p) -> None:
    """What forward and backward share."""
    tokens, num_groups, experts = pi.shape
    set_fields(
        params, tokens=tokens, d_in=x.shape[1], d_out=lora_b.shape[1], rank=lora_b.shape[2], experts=experts,
        groups=num_groups, compute_dtype=DTYPE_CODES[h.dtype], scaling=scaling, relu=activation == "relu",
        group_form=uses_group_form(lora_b.shape[1] // num_groups), inverse_count=inverse_count(tokens, num_groups),
        x=x, lora_a=lora_a, lora_b=lora_b, router=router, expert_scale=expert_scale, h=h, pi=pi,
    )  # fmt: skip
    if dropout_p > 0:
        set_fields(
            params, dropout=True, keep_scale=1 / (1 - dropout_p), drop_threshold=int(dropout_p * 2**32),
            seed=seed.data_ptr(),
        )  # fmt: skip


def new_gradients(
    needs: Sequence[bool], x: Tensor, lora_a: Tensor, lora_b: Tensor, router: Tensor | None, pi: Tensor,
    expert_scale: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients to be written of those asked for, in their dtypes, d(pi) and d(expert_scale) in fp32, else None."""
    gradients = [
        None if t is None or not need else t.new_empty(*t.shape)
        for need, t in zip(needs[:4], (x, lora_a, lora_b, router), strict=True)
    ] + [
        None if t is None or not need else t.new_empty(*t.shape, dtype=torch.float32)
        for need, t in zip(needs[4:], (pi, expert_scale), strict=True)
    ]
    if len(pi) == 0:  # nothing is launched for no tokens
        gradients = [g if g is None else g.zero_() for g in gradients]
    return gradients
