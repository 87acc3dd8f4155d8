"""Which implementation serves a spectral call; see `dispatch.py`."""

import re
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


@torch.compiler.assume_constant_result
@cache
def _has_image(device: torch.device) -> bool:
    """Whether the CUDA kernels, which run from compute capability 8.0, were compiled for this device."""
    if not _BUILT["cuda"] or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability(device)
    for architecture in _module("_C").build_info()["cuda_architectures"]:  # 80, 90a, 86-real, ...
        number, suffix = re.fullmatch(r"(\d+)(.*)", architecture).groups()
        newer = suffix in ("", "-virtual") and int(number) < 10 * major + minor
        if newer or int(number) == 10 * major + minor:
            return True
    return False


def _runs_on(impl: str, device: torch.device) -> bool:
    wanted = _TABLE[impl][0]
    return wanted is None or (wanted == device.type and (impl != "cuda" or _has_image(device)))


def available_spectral_impls(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `impl=` of `batched_rsvd` and `spectral_penalty` accepts on this device, the reference first.

    >>> available_spectral_impls("cpu")
    ('reference', 'cpu')
    """
    device = torch.device(device)
    return tuple(impl for impl in reversed(SPECTRAL_IMPLS) if _BUILT[impl] and _runs_on(impl, device))


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
