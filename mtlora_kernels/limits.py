"""What an implementation takes, by dtype and size: each rule a phrase for the error of an explicit request."""

from typing import NamedTuple

import torch

from .reference.routed_lora import GROUP_FORM_MIN_SIZE


class Call(NamedTuple):
    """What limits may look at: dtypes and sizes, never values or addresses."""

    compute_dtype: torch.dtype
    x_dtype: torch.dtype
    out_dtype: torch.dtype
    d_in: int
    d_out: int
    rank: int
    experts: int
    groups: int
    eager: bool
    dropout: bool
    float64: bool  # of a tensor besides route_weights, which every implementation copies


HOPPER_ROUTER_ROWS = 1216  # 19 tiles of 64: what fits shared memory beside the rest in d(x)'s kernel
LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def low_precision(call: Call) -> str | None:
    return None if call.compute_dtype in LOW_PRECISION else f"compute_dtype is {call.compute_dtype}"


def cpu_limits(call: Call) -> str | None:
    """The C++ kernels read tensors as they are, and know three dtypes."""
    return low_precision(call) or ("a tensor has dtype torch.float64" if call.float64 else None)


def hopper_limits(call: Call) -> str | None:
    """What csrc/cuda does not specialise: the first such property of the call, as a phrase."""
    size = call.d_out // call.groups
    ranks = (16, 32, 64) if call.eager else (8, 16, 32, 64)
    # One by one: under torch.compile(dynamic=True) sizes are symbols, which no f-string on the way may hold.
    if call.compute_dtype not in (torch.bfloat16, torch.float16):
        return f"compute_dtype is {call.compute_dtype}"
    if call.x_dtype != call.compute_dtype:
        return f"x has dtype {call.x_dtype} besides compute_dtype {call.compute_dtype}"
    if call.out_dtype != call.compute_dtype:
        return f"out has dtype {call.out_dtype}"
    if call.rank not in ranks:
        return f"the rank is {call.rank}, not one of {ranks}"
    if call.experts > 32:
        return f"there are {call.experts} experts, more than 32"
    if call.groups * call.experts > HOPPER_ROUTER_ROWS:
        return f"a token has {call.groups * call.experts} weights, G * N, more than {HOPPER_ROUTER_ROWS}"
    if call.d_in % 8 != 0:
        return f"d_in is {call.d_in}, not a multiple of 8"
    if size % 8 != 0 or size < GROUP_FORM_MIN_SIZE:
        return f"a group has {size} outputs, not 16, 24, 32, ..."
    return "dropout_p is not 0" if call.dropout else None
