"""The spectral contenders: this package's operators and the ways PyTorch offers, one signature per task.

A decomposition is called with matrices [batch, m, n] and a rank and returns (u, s, vh); values alone return (s, v) or
what carries them; a penalty is called with lora_b [L, N, d, r] and returns the loss and its gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import mtlora_kernels as mk

from .registry import PACKAGE

OVERSAMPLING, POWER_ITERATIONS = 8, 1  # as in mk.batched_rsvd
DRIVERS = ("gesvdj", "gesvd", "gesvda")  # of cuSOLVER; the default is gesvdj with fallbacks


@dataclass(frozen=True)
class Contender:
    """impl is empty for rivals; loops is True for those that call a solver once per matrix, half a second on a GPU."""

    name: str
    call: Callable[..., object]
    impl: str = ""
    loops: bool = False
    in_graph: bool = False


def svd(driver: str | None, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(a.float(), full_matrices=False, driver=driver)
    return u[:, :, :rank], s[:, :rank], vh[:, :rank]


def gram_eigh(dtype: torch.dtype, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors of A^T A, then U = A V / sigma: short, and NaN where sigma is zero."""
    a = a.to(dtype)
    values, v = torch.linalg.eigh(a.mT @ a)
    s, v = values.flip(1)[:, :rank].clamp(min=0).sqrt(), v.flip(2)[:, :, :rank]
    return ((a @ v) / s[:, None]).float(), s.float(), v.mT.float()


def low_rank(a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(a.float(), min(rank + OVERSAMPLING, *a.shape[1:]), niter=POWER_ITERATIONS)
    return u[:, :, :rank], s[:, :rank], v.mT[:, :rank]


def gram_eigh_values(dtype: torch.dtype, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    a = a.to(dtype)
    values, v = torch.linalg.eigh(a.mT @ a)
    return values.flip(1).clamp(min=0).sqrt(), v.flip(2)


def _ours(device: torch.device, impls: Sequence[str], bind: Callable[[str], Callable]) -> list[Contender]:
    """Each implementation called eagerly and, on a GPU, the kernels also as a CUDA graph."""
    found = []
    for impl in impls:
        found.append(Contender(f"{PACKAGE} {impl}", bind(impl), impl))
        if device.type == "cuda" and impl != "reference":
            found.append(Contender(f"{PACKAGE} {impl}, graph", bind(impl), impl, in_graph=True))
    return found


def decompositions(device: torch.device, impls: Sequence[str]) -> list[Contender]:
    rivals = [Contender("linalg.svd", partial(svd, None), loops=True)]
    if device.type == "cuda":
        rivals += [Contender(f"linalg.svd {d}", partial(svd, d), loops=d != "gesvda") for d in DRIVERS]
    rivals += [
        Contender("Gram + eigh fp32", partial(gram_eigh, torch.float32), loops=True),  # above 32 columns
        Contender("Gram + eigh fp64", partial(gram_eigh, torch.float64), loops=True),
        Contender("svd_lowrank", low_rank, loops=True),
    ]
    return rivals + _ours(device, impls, lambda impl: partial(mk.batched_rsvd, impl=impl))


def values(device: torch.device, impls: Sequence[str]) -> list[Contender]:
    """Singular values and V; ours goes on to the weights of the penalty."""

    def weights(impl: str, a: Tensor, rank: int) -> Sequence[Tensor]:
        return mk.SpectralWeights().of([a[None]], "pairwise", impl)

    rivals = [c for c in decompositions(device, ()) if "Gram" not in c.name]
    rivals += [
        Contender("Gram + eigh fp32", partial(gram_eigh_values, torch.float32)),
        Contender("Gram + eigh fp64", partial(gram_eigh_values, torch.float64), loops=True),
    ]
    return rivals + _ours(device, impls, lambda impl: partial(weights, impl))


# ---- Penalties ----


def _with_gradient(loss: Callable[[Tensor], Tensor], lora_b: Tensor) -> tuple[Tensor, Tensor]:
    leaf = lora_b.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def _decay(s: Tensor) -> Tensor:
    return torch.exp(-s / (s.mean(-1, keepdim=True) + 1e-8))


def loop_gram(lora_b: Tensor) -> Tensor:
    """The trainers' form and way: one matrix after the other, a solver call and a host read for each."""
    losses, rank = [], lora_b.shape[-1]
    for b in lora_b.flatten(0, 1).unbind():
        with torch.no_grad():
            w = _decay(torch.linalg.svdvals(b.float())).to(b.dtype)
            target = (b.norm().item() / rank**0.5 + 1e-8) ** 2
        gap = b.mT @ b - target * torch.eye(rank, dtype=b.dtype, device=b.device)
        losses.append((gap * w[:, None] * w).square().sum())
    return torch.stack(losses).mean()


def batched_pairwise(lora_b: Tensor) -> Tensor:
    """The paper's form without a loop: eigenvectors of all Gram matrices at once, one product per layer."""
    layers, experts, _, rank = lora_b.shape
    with torch.no_grad():
        s, v = gram_eigh_values(torch.float32, lora_b.flatten(0, 1), rank)
        m = ((v * _decay(s).sqrt()[:, None]) @ v.mT).unflatten(0, (layers, experts)).to(lora_b.dtype)
    x = (lora_b @ m).transpose(1, 2).flatten(2)
    cross = (x.mT @ x).float().unflatten(1, (experts, rank)).unflatten(3, (experts, rank))
    blocks = cross.square().sum((2, 4))
    return (blocks.sum() - blocks.diagonal(dim1=1, dim2=2).sum()) / 2


def penalties(kind: str, device: torch.device, impls: Sequence[str]) -> list[Contender]:
    name, loss = ("batched PyTorch", batched_pairwise) if kind == "pairwise" else ("loop over matrices", loop_gram)
    rival = Contender(name, partial(_with_gradient, loss), loops=kind == "gram")

    def bind(impl: str) -> Callable:
        return partial(_with_gradient, partial(mk.spectral_penalty, kind=kind, impl=impl))

    return [rival, *_ours(device, impls, bind)]
