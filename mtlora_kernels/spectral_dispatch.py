"""Which implementation serves a spectral call; see `dispatch.py`."""

import re
from functools import cache
from types import ModuleType

import torch

from .dispatch import BUILT, load_module

# name -> (device type, module with batched_rsvd, module with the other three operators), fastest first
_TABLE = {
    "cpu": ("cpu", "native.cpu_spectral", "native.cpu_spectral"),
    "cuda": ("cuda", "native.cuda_spectral", "native.cuda_spectral"),
    "reference": (None, "reference.rsvd", "reference.spectral"),
}
SPECTRAL_IMPLS = tuple(_TABLE)


def _images() -> tuple[tuple[int, bool], ...]:
    """(compute capability, whether later ones can use it too) of each compiled image of the CUDA kernels."""
    architectures = load_module("_C").build_info()["cuda_architectures"] if BUILT["cuda"] else ()
    parts = [re.fullmatch(r"(\d+)(.*)", name).groups() for name in architectures]  # 80, 90a, 86-real, ...
    return tuple((int(number), suffix in ("", "-virtual")) for number, suffix in parts)


_IMAGES = _images()


def _has_image(device: torch.device) -> bool:
    """Whether the CUDA kernels, which run from compute capability 8.0, were compiled for this device."""
    if not _IMAGES or not torch.cuda.is_available():
        return False
    properties = torch.cuda.get_device_properties(device)  # which torch.compile takes as a constant
    own = 10 * properties.major + properties.minor
    return any(own == number or (newer and own > number) for number, newer in _IMAGES)


def _runs_on(impl: str, device: torch.device) -> bool:
    wanted = _TABLE[impl][0]
    return wanted is None or (wanted == device.type and (impl != "cuda" or _has_image(device)))


def available_spectral_impls(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `impl=` of `batched_rsvd` and `spectral_penalty` accepts on this device, the reference first.

    >>> available_spectral_impls("cpu")
    ('reference', 'cpu')
    """
    device = torch.device(device)
    return tuple(impl for impl in reversed(SPECTRAL_IMPLS) if BUILT[impl] and _runs_on(impl, device))


def _resolve(impl: str | None, device: torch.device) -> str:
    available = available_spectral_impls(device)
    if impl is None:
        return available[-1]
    if impl not in available:
        raise ValueError(f"impl is {impl!r}, it must be None or one of {available} for tensors on {device}")
    return impl


_resolve_once = cache(_resolve)  # asking the driver costs a call some 10 us


def resolve_spectral(impl: str | None, device: torch.device) -> str:
    """The implementation of a spectral call. None: the fastest on this device; a name: that one or ValueError."""
    return (_resolve if torch.compiler.is_compiling() else _resolve_once)(impl, device)


@cache
def batched_rsvd_kernel(impl: str):
    """batched_rsvd of an implementation; its module is imported on first use."""
    return load_module(_TABLE[impl][1]).batched_rsvd


@cache
def spectral_kernels(impl: str) -> ModuleType:
    """The module with spectral_weights, spectral_penalty_fwd and spectral_penalty_bwd of an implementation."""
    return load_module(_TABLE[impl][2])
