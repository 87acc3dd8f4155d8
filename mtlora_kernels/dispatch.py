"""Which implementation serves a call: one table, one resolver. An explicit request works or raises."""

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)

# name -> (device type, compute dtypes, module with routed_lora_fwd, module with routed_lora_bwd), fastest first
_TABLE = {
    "cpu": ("cpu", LOW_PRECISION, "native.cpu", "native.cpu"),
    "triton": ("cuda", LOW_PRECISION, "triton.routed_lora_fwd", "triton.routed_lora_bwd"),
    "reference": (None, (*LOW_PRECISION, torch.float64), "reference.routed_lora", "reference.routed_lora_bwd"),
}
IMPLS = tuple(_TABLE)


_BUILT = {
    "cpu": importlib.util.find_spec("mtlora_kernels._C") is not None,
    "triton": importlib.util.find_spec("triton") is not None,
    "reference": True,
}


def _runs_on(impl: str, device_type: str) -> bool:
    wanted = _TABLE[impl][0]
    if impl == "triton" and device_type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return wanted is None or wanted == device_type


def available_impls(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `impl=` accepts for tensors on this device, the reference first.

    >>> available_impls("cpu")
    ('reference', 'cpu')
    """
    kind = torch.device(device).type
    return tuple(impl for impl in reversed(IMPLS) if _runs_on(impl, kind) and _BUILT[impl])


def resolve(impl: str | None, device: torch.device, compute_dtype: torch.dtype) -> str:
    """The implementation of this call. None: the fastest that supports it; a name: that one or ValueError."""
    kind = device.type
    if impl is None:
        # A CPU tensor reaches Triton's interpreter, a test tool, by name only: its own device type is "cuda".
        return next(i for i in IMPLS if _BUILT[i] and compute_dtype in _TABLE[i][1] and _TABLE[i][0] in (None, kind))
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, it must be None or one of {IMPLS}")
    if not (_BUILT[impl] and _runs_on(impl, kind)):
        raise ValueError(f"impl is {impl!r}, it must be one of {available_impls(device)} for tensors on {device}")
    if compute_dtype not in _TABLE[impl][1]:
        raise ValueError(f"impl is {impl!r}, it must be 'reference' for compute_dtype {compute_dtype}")
    return impl


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"mtlora_kernels.{name}")


@cache
def routed_lora_kernels(impl: str):
    """(forward, backward) of an implementation; its module is imported on first use."""
    _, _, forward, backward = _TABLE[impl]
    return _module(forward).routed_lora_fwd, _module(backward).routed_lora_bwd
