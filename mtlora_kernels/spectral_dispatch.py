"""Which implementation serves a spectral call; see `dispatch.py`."""

from functools import cache
from types import ModuleType

import torch

from .dispatch import _BUILT, _module

# name -> (device type, module with batched_rsvd, module with the other three operators), fastest first
_TABLE = {
    "cpu": ("cpu", "native.cpu_spectral", "native.cpu_spectral"),
    "cuda": ("cuda", "native.cuda_spectral", "native.cuda_spectral"),
    "reference": (None, "reference.rsvd", "reference.spectral"),
}
SPECTRAL_IMPLS = tuple(_TABLE)
_SPECTRAL_BUILT = _BUILT | {"cuda": _BUILT["cuda"] and hasattr(_module("_C"), "batched_rsvd_cuda")}


def available_spectral_impls(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `impl=` of `batched_rsvd` and `spectral_penalty` accepts on this device, the reference first.

    >>> available_spectral_impls("cpu")
    ('reference', 'cpu')
    """
    kind = torch.device(device).type
    return tuple(i for i in reversed(SPECTRAL_IMPLS) if _SPECTRAL_BUILT[i] and _TABLE[i][0] in (None, kind))


def resolve_spectral(impl: str | None, device: torch.device) -> str:
    """The implementation of a spectral call. None: the fastest on this device; a name: that one or ValueError."""
    available = available_spectral_impls(device)
    if impl is None:
        return available[-1]
    if impl not in available:
        raise ValueError(f"impl is {impl!r}, it must be None or one of {available} for tensors on {device}")
    return impl


@cache
def batched_rsvd_kernel(impl: str):
    """batched_rsvd of an implementation; its module is imported on first use."""
    return _module(_TABLE[impl][1]).batched_rsvd


@cache
def spectral_kernels(impl: str) -> ModuleType:
    """The module with spectral_weights, spectral_penalty_fwd and spectral_penalty_bwd of an implementation."""
    return _module(_TABLE[impl][2])
