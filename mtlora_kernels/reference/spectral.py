"""The spectral penalty in plain PyTorch: the specification that every kernel reproduces bit for bit.

mtLoRA, arXiv 2603.01526, eq. 2 ("pairwise"), with w(s) = exp(-s / mean s) of the singular values of B_i, held constant:

    M_i  = V diag(sqrt(w)) V^T,  X = [B_1 M_1 .. B_N M_N],  loss = sum over layers and i < j of ||X_i^T X_j||_F^2
    dB_i = 2 (X C)_i M_i^T with C = X^T X without its diagonal blocks

and the published trainer's form ("gram"), with c = ||B||_F / sqrt(r) and w held constant:

    loss = mean over matrices of ||(w w^T) * (B^T B - c^2 I)||_F^2

lora_b is [L, N, d, r], E its dtype; ``.to(E)`` marks a rounding. Products of fp32 values in fp64 are exact. The
products over d and over N*r of the pairwise form are the provider's (`arithmetic.py`).
"""

import torch
from torch import Tensor

from .arithmetic import Portable, arithmetic_for, tree_sum
from .jacobi import gram, square_root
from .rsvd import short_side

EPSILON = 1e-8  # added to mean s and to c, as published: w = 1 for a zero matrix


def exp_nonpositive(v: Tensor) -> Tensor:
    """exp of a non-positive fp64 tensor above -700, within 2 ulp: v = n ln2 + f, Taylor polynomial of degree 13."""
    magic = 6755399441055744.0  # 1.5 * 2**52: adding and subtracting it rounds to the nearest integer
    n = (v * 1.4426950408889634 + magic) - magic
    f = (v - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    p, factorial = f * (1 / 6227020800) + 1 / 479001600, 479001600
    for degree in range(12, 0, -1):
        factorial //= degree
        p = p * f + 1 / factorial
    return p * ((n.nan_to_num().to(torch.int64) + 1023) << 52).view(torch.float64)


def spectral_weights(lora_b: Tensor, kind: str) -> Tensor:
    """fp32 M [L, N, r, r] for "pairwise", w [L, N, r] in order of descending s for "gram"; NaN if B is not finite."""
    b, rank = lora_b.flatten(0, 1), lora_b.shape[-1]
    g = gram(b)
    finite = g.diagonal(dim1=1, dim2=2).isfinite().all(1)[:, None]
    s, v = short_side(torch.where(finite[..., None], g, 0), rank, 0, 0)
    w = exp_nonpositive(-(s / (tree_sum(s) / rank + EPSILON)[:, None]))
    w = torch.where(finite, w, torch.nan)
    if kind == "pairwise":
        w = Portable.dot(v * square_root(w)[:, None], v.mT)
    return w.float().unflatten(0, lora_b.shape[:2])


def spectral_penalty_fwd(lora_b: Tensor, weights: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """loss, an fp32 scalar, and for backward X in E [L, d, N*r] and C in fp32 [L, N*r, N*r] ("pairwise"), or an empty
    tensor and the derivative by B^T B in fp32 [L, N, r, r] ("gram")."""
    E, (layers, experts, d, rank) = lora_b.dtype, lora_b.shape
    if kind == "gram":
        g = gram(lora_b.flatten(0, 1))
        c = square_root(tree_sum(g.diagonal(dim1=1, dim2=2)) / rank) + EPSILON
        w = weights.double().flatten(0, 1)
        pair = w[:, :, None] * w[:, None]
        weighted = pair * (g - torch.diag_embed((c * c)[:, None].expand(-1, rank)))
        loss = tree_sum(tree_sum(tree_sum(weighted * weighted))) / (layers * experts)
        slope = pair * weighted * (4 / (layers * experts))
        return loss.float(), lora_b.new_empty(0), slope.float().unflatten(0, (layers, experts))
    x = Portable.dot(lora_b.double(), weights.double()).float().to(E)
    x = x.transpose(1, 2).reshape(layers, d, experts * rank)
    c = arithmetic_for(x.device, E).dot(x.mT, x)
    expert = torch.arange(experts * rank, device=x.device) // rank
    c = torch.where(expert[:, None] != expert, c, 0)
    square = c.double() * c.double()
    return (tree_sum(tree_sum(tree_sum(square))) * 0.5).float(), x, c


def spectral_penalty_bwd(dloss: Tensor, lora_b: Tensor, weights: Tensor, x: Tensor, c: Tensor, kind: str) -> Tensor:
    """The gradient of lora_b, in its dtype, for an fp32 scalar dloss."""
    E, (experts, rank) = lora_b.dtype, (lora_b.shape[1], lora_b.shape[3])
    if kind == "gram":
        return (Portable.dot(lora_b.double(), c.double()).float() * dloss).to(E)
    blocks = c.double().unflatten(-1, (experts, rank)).transpose(1, 2)  # [L, N, N*r, r]
    k = (2 * Portable.dot(blocks, weights.double().mT)).float()
    k = k.transpose(1, 2).reshape(c.shape)
    # A power of two brings the largest element of each layer to [1, 2): fp16 would lose small ones.
    exponent = ((k.abs().amax((1, 2)).view(torch.int32) >> 23) & 255).clamp(1, 253)
    down, up = (((e << 23).view(torch.float32))[:, None, None] for e in (254 - exponent, exponent))
    db = arithmetic_for(x.device, E).dot(x, (k * down).to(E)) * (up * dloss)
    return db.unflatten(-1, (experts, rank)).transpose(1, 2).to(E)
