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
# The spectral operators: name -> (device type, module with batched_rsvd, module with the other three), fastest first
_SPECTRAL_TABLE = {
    "cpu": ("cpu", "native.cpu_spectral", "native.cpu_spectral"),
    "cuda": ("cuda", "native.cuda_spectral", "native.cuda_spectral"),
    "reference": (None, "reference.rsvd", "reference.spectral"),
}
SPECTRAL_IMPLS = tuple(_SPECTRAL_TABLE)

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


def _has_spectral_cuda() -> bool:
    """Whether the extension was built with the CUDA kernels; asked for CUDA tensors only, as it loads `_C`."""
    if not _BUILT["cpu"]:
        return False
    from . import _C  # as a statement, which torch.compile can trace

    return hasattr(_C, "batched_rsvd_cuda")


def available_spectral_impls(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `impl=` of `batched_rsvd` and `spectral_penalty` accepts on this device, the reference first.

    >>> available_spectral_impls("cpu")
    ('reference', 'cpu')
    """
    kind = torch.device(device).type
    built = {"cpu": lambda: _BUILT["cpu"], "cuda": _has_spectral_cuda, "reference": lambda: True}
    return tuple(i for i in reversed(SPECTRAL_IMPLS) if _SPECTRAL_TABLE[i][0] in (None, kind) and built[i]())


def resolve_spectral(impl: str | None, device: torch.device) -> str:
    """The implementation of a spectral call. None: the fastest on this device; a name: that one or ValueError."""
    available = available_spectral_impls(device)
    if impl is None:
        return available[-1]
    if impl not in available:
        raise ValueError(f"impl is {impl!r}, it must be None or one of {available} for tensors on {device}")
    return impl


def resolve(impl: str | None, device: torch.device, compute_dtype: torch.dtype) -> str:
    """The implementation of this call. None: the fastest that supports it; a name: that one or ValueError."""
    available = available_impls(device)
    if impl is None:
        # A CPU tensor reaches Triton's interpreter, a test tool, by name only: its own device type is "cuda".
        return next(
            i for i in IMPLS if i in available and compute_dtype in _TABLE[i][1] and _TABLE[i][0] in (None, device.type)
        )
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, it must be None or one of {IMPLS}")
    if impl not in available:
        raise ValueError(f"impl is {impl!r}, it must be one of {available} for tensors on {device}")
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


@cache
def batched_rsvd_kernel(impl: str):
    """batched_rsvd of an implementation; its module is imported on first use."""
    return _module(_SPECTRAL_TABLE[impl][1]).batched_rsvd


@cache
def spectral_kernels(impl: str) -> ModuleType:
    """The module with spectral_weights, spectral_penalty_fwd and spectral_penalty_bwd of an implementation."""
    return _module(_SPECTRAL_TABLE[impl][2])
