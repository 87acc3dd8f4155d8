"""What the paper reads from trained experts and routers (arXiv 2603.01526, appendix B.2)."""

import torch
from torch import Tensor

from .spectral import batched_rsvd

BANDS = (0.2, 0.5, 1.0)  # ends of the paper's bands, shares of the singular values in descending order


def band_edges(rank: int) -> list[tuple[int, int]]:
    """First position and end of each band of `rank` singular values."""
    ends = [round(end * rank) for end in BANDS]
    return list(zip([0, *ends], ends, strict=False))


def _factors(lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """U [L, N, d, r] and S [L, N, r] of lora_b [L, N, d, r], or of one layer [N, d, r] as L = 1."""
    if lora_b.dim() not in (3, 4):
        raise ValueError(f"lora_b has {lora_b.dim()} dimensions, it must be [N, d, r] or [L, N, d, r]")
    stack = lora_b.detach() if lora_b.dim() == 4 else lora_b.detach()[None]
    u, s, _ = batched_rsvd(stack.flatten(0, 1), stack.shape[-1])
    return u.unflatten(0, stack.shape[:2]), s.unflatten(0, stack.shape[:2])


def band_alignment(lora_b: Tensor) -> Tensor:
    """Alignment of the experts within each band of singular values, eq. 7, [L, 3] in fp32.

    The mean over positions k of the band and pairs i != j of sigma_ik sigma_jk |cos(u_ik, u_jk)|, with u the left
    singular vectors. lora_b: [L, N, d, r] or one layer [N, d, r] (L = 1); N >= 2. The bands are the largest 20 %,
    the next to 50 %, the rest; NaN for one that holds no position, as at ranks below 3.
    """
    u, s = _factors(lora_b)
    experts = s.shape[1]
    if experts < 2:
        raise ValueError(f"lora_b has {experts} expert, it must have 2 or more")
    cosines = torch.einsum("lidk,ljdk->lkij", u, u).abs()
    pairs = s.mT[..., :, None] * s.mT[..., None, :] * cosines
    by_position = (pairs.sum((2, 3)) - pairs.diagonal(dim1=2, dim2=3).sum(2)) / (experts * (experts - 1))
    return torch.stack([by_position[:, first:end].mean(1) for first, end in band_edges(s.shape[2])], 1)


def band_shares(lora_b: Tensor) -> Tensor:
    """Share of the sum of all experts' singular values that lies in each band, [L, 3] in fp32; NaN if all are zero.

    lora_b and bands as in `band_alignment`.
    """
    _, s = _factors(lora_b)
    by_position = s.sum(1)
    in_band = [by_position[:, first:end].sum(1) for first, end in band_edges(s.shape[2])]
    return torch.stack(in_band, 1) / by_position.sum(1, keepdim=True)


def routing_entropy(pi: Tensor) -> Tensor:
    """Mean entropy in nats of the routing weights of one token and group, a scalar; at most log N.

    pi: [..., N], each row summing to 1, such as the weights of `routed_lora`; `load` [N] gives the entropy of the
    experts' overall use. A weight of 0 contributes 0.
    """
    if pi.dim() < 1:
        raise ValueError("pi has no dimensions, it must be [..., N]")
    return torch.special.entr(pi.float()).sum(-1).mean()
