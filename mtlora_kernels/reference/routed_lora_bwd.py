"""Backward of `routed_lora` in plain PyTorch, from explicit formulas; one backward serves both numerics.

    C_g       = dout_g B_flat[g]^T                              [T, N*r]
    d(w_i)    = h . C_g[i]          d(h) = scaling * sum over g, i of w_i C_g[i]
    d(logits) = pi (d(pi) - sum over N of pi d(pi))
    d(x)      = dropout'(d(h) A) + d(logits) R
    d(A)      = d(h)^T dropout(x)   d(R) = d(logits)^T x   d(B_flat[g]) = scaling * dout_g^T z_g

Shapes as in `routed_lora.py`; dout is [T, d_out], dload [N] or None. d(residual) is dout itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .arithmetic import acc_dtype, arithmetic_for, next_power_of_two, sum_rows, tree_sum
from .philox import keep_mask
from .routed_lora import (
    dropped,
    expert_weights,
    flat_experts,
    inverse_count,
    mixed_h,
    padded_rank,
    per_output,
    uses_group_form,
)

EXPERT_FORM_BLOCK = 32  # outputs per K block when a small group's product runs over (block, expert, output)
EXPERT_SUM_WIDTH = 128  # columns of C that are summed over experts in one tree: two of them fill a warpgroup tile


def expert_block(num_experts: int, rank: int) -> int:
    """How many experts one tree sums before its result joins the running total of d(h)."""
    return min(next_power_of_two(num_experts), max(1, EXPERT_SUM_WIDTH // next_power_of_two(rank)))


def routed_lora_bwd(
    dout: Tensor,
    dload: Tensor | None,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor | None,
    h: Tensor,
    pi: Tensor,
    expert_scale: Tensor | None,
    seed: Tensor | None,
    *,
    scaling: float,
    activation: str | None,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, lora_a, lora_b, router, route_weights, expert_scale), None where not in needs.

    Each comes in its tensor's dtype; that of route_weights, which is not an argument, in the accumulation dtype.
    """
    E, acc = h.dtype, acc_dtype(h.dtype)
    arithmetic = arithmetic_for(x.device, E)
    g, x_e, a, b = dout.to(E), x.to(E), lora_a.to(E), lora_b.to(E)
    (experts, d_out, _), (tokens, num_groups, _) = b.shape, pi.shape
    w = expert_weights(pi, expert_scale)
    contract = _group_form_bwd if uses_group_form(d_out // num_groups) else _expert_form_bwd
    dw, dh, db = contract(arithmetic, g, b, h, w)

    dh = dh * scaling
    dh = (torch.where(h <= 0, 0, dh) if activation == "relu" else dh).to(E)
    db = (db * scaling).transpose(0, 1)
    dpi, ds = dw * scaling, None
    if expert_scale is not None:
        dpi = dw * (expert_scale.to(E).to(acc) * scaling)
        ds = sum_rows((pi.to(acc) * dw).reshape(-1, experts)) * scaling
    if dload is not None:
        dpi = dpi + dload.to(acc) * inverse_count(tokens, num_groups)

    dx, dr = arithmetic.dot(dh, a), None
    if dropout_p > 0:
        dx = torch.where(keep_mask(seed, *x.shape, dropout_p), dx * (1 / (1 - dropout_p)), 0)
    if router is not None:
        p = pi.to(acc)
        dlogits = (p * (dpi - tree_sum(p * dpi)[..., None])).to(E).flatten(1)
        dx = dx + arithmetic.dot(dlogits, router.to(E))
        dr = arithmetic.dot_tokens(dlogits.T, x_e)
    da = arithmetic.dot_tokens(dh.T, dropped(x_e, seed, dropout_p))

    grads = (dx, da, db, dr, dpi, ds)
    owners = (x, lora_a, lora_b, router, dpi, expert_scale)
    asked = zip(grads, owners, needs, strict=True)
    return tuple(grad.to(owner.dtype) if need and owner is not None else None for grad, owner, need in asked)


def _group_form_bwd(arithmetic, g: Tensor, b: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d(w) [T, G, N] and d(h) [T, r] from C_g, and d(B) [d_out, N, r]; none of them scaled."""
    (experts, _, rank), num_groups = b.shape, w.shape[1]
    g = g.unflatten(1, (num_groups, -1)).transpose(0, 1)
    c = arithmetic.dot(g, flat_experts(b, num_groups)).unflatten(-1, (experts, -1))
    dw = tree_sum(c * padded_rank(h).to(c.dtype)[:, None, :]).transpose(0, 1)
    weighted = w.transpose(0, 1)[..., None] * c
    dh, block = 0, expert_block(experts, rank)
    for start in range(0, experts, block):
        block_sum = 0
        for weighted_g in weighted:
            block_sum = block_sum + tree_sum(weighted_g[:, start : start + block].transpose(1, 2))
        dh = dh + block_sum
    db = arithmetic.dot_tokens(g.mT, mixed_h(w, h)).flatten(0, 1).unflatten(-1, (experts, -1))
    return dw, dh[:, :rank], db[..., :rank]


def _expert_form_bwd(arithmetic, g: Tensor, b: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same three through y_i = w_i dout, [T, d_out]; K of d(h) runs over (block of outputs, expert, output)."""
    (experts, d_out, rank), (tokens, num_groups, _) = b.shape, w.shape
    group_size, blocks = d_out // num_groups, -(-d_out // EXPERT_FORM_BLOCK)
    y = g.new_zeros(tokens, experts, blocks * EXPERT_FORM_BLOCK)
    b_rows = b.new_zeros(experts, blocks * EXPERT_FORM_BLOCK, rank)
    b_rows[:, :d_out] = b
    dw = []
    for i in range(experts):
        e = arithmetic.dot(h, b[i].T)
        dw.append(tree_sum((g.to(e.dtype) * e).view(tokens, num_groups, group_size)))
        y[:, i, :d_out] = per_output(w[:, :, i], group_size) * g.to(e.dtype)
    y_blocks = y.unflatten(-1, (blocks, -1)).transpose(1, 2).flatten(1)
    b_blocks = b_rows.view(experts, blocks, -1, rank).transpose(0, 1).flatten(0, 2)
    db = [arithmetic.dot_tokens(y[:, i, :d_out].T, h) for i in range(experts)]
    return torch.stack(dw, -1), arithmetic.dot(y_blocks, b_blocks), torch.stack(db, 1)
