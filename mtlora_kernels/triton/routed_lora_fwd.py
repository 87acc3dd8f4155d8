"""Forward kernels of `routed_lora`: project x to h and pi, then expand to out. Two launches.

project   h = E(act(dropout(x) A^T)), pi = E(softmax(E(x R^T)))              x read once
expand    out = residual + scaling * z_g B_flat[g]^T                          groups of 16 outputs and more
expert_sum  the same as a sum over experts: small groups, and numerics "eager"
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.arithmetic import next_power_of_two
from ..reference.routed_lora import inverse_count, is_representable, output_dtype, uses_group_form
from . import configs
from .launch import Launch, ceil_div, plan
from .primitives import (
    dot,
    drop,
    dropout_arguments,
    exp,
    fp32_chunk,
    load_weights,
    mixed_h,
    operand,
    sum_rows,
    tree_sum,
)


@triton.jit
def _project_range(
    x_ptr, a_ptr, router_ptr, seed, threshold, inverse_keep, T, stride_t, stride_d, o_t, row_ptr, m_row, acc_h, acc_l,
    lo, hi, E: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BK: tl.constexpr,
    HAS_H: tl.constexpr, HAS_ROUTER: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add features lo .. hi to h's accumulator [BT, RP] and the logits' [BT, columns]."""
    m_t = o_t < T
    o_r = tl.arange(0, RP)
    for i_k in range(lo, hi, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < D
        x_at = x_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_k[None, :] * stride_d
        b_x = tl.load(x_at, m_t[:, None] & m_k[None, :], other=0.0).to(E)  # [BT, BK]
        if HAS_H:
            b_a = tl.load(a_ptr + o_r[None, :] * D + o_k[:, None], (o_r < R)[None, :] & m_k[:, None], other=0.0)
            b_xd = b_x
            if DROPOUT:
                b_xd = drop(b_x.to(tl.float32), seed, o_t, i_k, threshold, inverse_keep).to(E)
            acc_h = dot(b_xd, b_a, acc_h)
        if HAS_ROUTER:
            b_w = tl.load(row_ptr[None, :] + o_k[:, None], m_row[None, :] & m_k[:, None], other=0.0)
            acc_l = dot(b_x, b_w, acc_l)
    return acc_h, acc_l


@triton.jit(do_not_specialize=["T", "threshold"])
def _project_kernel(
    x_ptr, a_ptr, router_ptr, h_ptr, pi_ptr, seed_ptr, threshold, inverse_keep, T, stride_t, stride_d,
    D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, G: tl.constexpr,
    GB: tl.constexpr, HAS_H: tl.constexpr, HAS_ROUTER: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
    CHUNK: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of BT tokens: h [BT, R], and pi [BT, GB, N] of GB groups."""
    E: tl.constexpr = h_ptr.dtype.element_ty
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, GB * NP)
    i_g = tl.program_id(1) * GB + o_c // NP
    m_row = (o_c % NP < N) & (i_g < G)
    row_ptr = a_ptr + o_c  # never read without a router
    if HAS_ROUTER:
        row_ptr = router_ptr + (i_g * N + o_c % NP).to(tl.int64) * D
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc_h = tl.zeros([BT, RP], tl.float32)
    acc_l = tl.zeros([BT, GB * NP], tl.float32)
    if CHUNK:
        for lo in range(0, D, CHUNK):
            chunk_h, chunk_l = _project_range(
                x_ptr, a_ptr, router_ptr, seed, threshold, inverse_keep, T, stride_t, stride_d, o_t, row_ptr, m_row,
                tl.zeros([BT, RP], tl.float32), tl.zeros([BT, GB * NP], tl.float32), lo,
                min(lo + CHUNK, D), E, D, R, RP, BK, HAS_H, HAS_ROUTER, DROPOUT,
            )  # fmt: skip
            acc_h += chunk_h
            acc_l += chunk_l
    else:
        acc_h, acc_l = _project_range(
            x_ptr, a_ptr, router_ptr, seed, threshold, inverse_keep, T, stride_t, stride_d, o_t, row_ptr, m_row,
            acc_h, acc_l, 0, D, E, D, R, RP, BK, HAS_H, HAS_ROUTER, DROPOUT,
        )  # fmt: skip
    m_t = (o_t < T)[:, None]
    if HAS_H:
        o_r = tl.arange(0, RP)
        if RELU:
            acc_h = tl.where(acc_h < 0, 0.0, acc_h)
        h_at = h_ptr + o_t.to(tl.int64)[:, None] * R + o_r[None, :]
        tl.store(h_at, acc_h.to(E), m_t & (o_r < R)[None, :])
    if HAS_ROUTER:
        logits = tl.where(m_row[None, :], acc_l.to(E).to(tl.float32), float("-inf"))
        logits = tl.reshape(logits, [BT, GB, NP])
        e = exp(logits - tl.max(logits, 2)[:, :, None])
        m_n = tl.reshape(m_row, [1, GB, NP])
        total = tl.broadcast_to(tree_sum(tl.where(m_n, e, 0.0))[:, :, None], [BT, GB, NP])
        pi = tl.math.div_rn(tl.where(m_n, e, 1.0), total)  # a zero numerator takes the division's slow path
        pi_at = pi_ptr + o_t.to(tl.int64)[:, None] * (G * N) + (i_g * N + o_c % NP)[None, :]
        tl.store(pi_at, tl.reshape(pi, [BT, GB * NP]).to(E), m_t & m_row[None, :])


@triton.jit
def _load_experts(b_ptr, o_k, o_o, m_o, O: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """B_flat^T [K, BO] of experts and ranks k = n * RP + rank and outputs o_o."""
    at = b_ptr + (o_k // RP * O)[:, None] * R + (o_k % RP)[:, None] + o_o[None, :] * R
    return tl.load(at, ((o_k // RP < N) & (o_k % RP < R))[:, None] & m_o[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "tiles"])
def _expand_kernel(
    h_ptr, pi_ptr, b_ptr, scale_ptr, residual_ptr, out_ptr, scaling, T, tiles, stride_t, stride_o,
    O: tl.constexpr, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, EXPERTS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """A run of column tiles of one group, for BT tokens; K runs over chunks of EXPERTS experts."""
    S: tl.constexpr = O // G
    tiles_per_group: tl.constexpr = (S + BO - 1) // BO
    K: tl.constexpr = EXPERTS * RP
    z_once: tl.constexpr = N <= EXPERTS
    i_g = tl.program_id(0) * tiles // tiles_per_group
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    o_n = tl.arange(0, EXPERTS)
    o_r = tl.arange(0, RP)
    o_k = tl.arange(0, K)
    h_at = h_ptr + o_t.to(tl.int64)[:, None] * R + o_r[None, :]
    b_h = tl.load(h_at, (o_t < T)[:, None] & (o_r < R)[None, :], other=0.0)
    if z_once:
        z = mixed_h(b_h, load_weights(pi_ptr, scale_ptr, o_t, i_g, o_n, T, N, G, HAS_SCALE))
    for i in range(tiles):
        o_s = ((tl.program_id(0) * tiles + i) % tiles_per_group) * BO + tl.arange(0, BO)
        m_o = o_s < S
        o_o = i_g * S + o_s
        m = (o_t < T)[:, None] & m_o[None, :]
        if HAS_RESIDUAL:  # before the product, which hides its latency
            at = residual_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_o[None, :] * stride_o
            residual = tl.load(at, m, other=0.0)
        acc = tl.zeros([BT, BO], tl.float32)
        if z_once:
            acc = dot(z, _load_experts(b_ptr, o_k, o_o, m_o, O, N, R, RP), acc)
        else:
            for i_n in range(0, N, EXPERTS):
                w = load_weights(pi_ptr, scale_ptr, o_t, i_g, i_n + o_n, T, N, G, HAS_SCALE)
                b_b = _load_experts(b_ptr, i_n * RP + o_k, o_o, m_o, O, N, R, RP)
                if CHUNK:
                    acc += dot(mixed_h(b_h, w), b_b, tl.zeros([BT, BO], tl.float32))
                else:
                    acc = dot(mixed_h(b_h, w), b_b, acc)
        y = acc * scaling
        if HAS_RESIDUAL:
            y = residual.to(tl.float32) + y
        tl.store(out_ptr + o_t.to(tl.int64)[:, None] * O + o_o[None, :], y.to(out_ptr.dtype.element_ty), m)


@triton.jit(do_not_specialize=["T"])
def _expert_sum_kernel(
    h_ptr, pi_ptr, b_ptr, scale_ptr, residual_ptr, out_ptr, scaling, T, stride_t, stride_o,
    O: tl.constexpr, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, EAGER: tl.constexpr, SCALING_IN_E: tl.constexpr, INTO_RESIDUAL: tl.constexpr,
    ONE_GROUP: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """out [BT, BO] expert by expert. EAGER rounds where the published modules do."""
    E: tl.constexpr = h_ptr.dtype.element_ty
    S: tl.constexpr = O // G
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    o_o = tl.program_id(0) * BO + tl.arange(0, BO)
    o_r = tl.arange(0, RP)
    m_o = o_o < O
    m = (o_t < T)[:, None] & m_o[None, :]
    b_h = tl.load(
        h_ptr + o_t.to(tl.int64)[:, None] * R + o_r[None, :], (o_t < T)[:, None] & (o_r < R)[None, :], other=0.0
    )
    if INTO_RESIDUAL:
        SUM: tl.constexpr = out_ptr.dtype.element_ty
        at = residual_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_o[None, :] * stride_o
        acc = tl.load(at, m, other=0.0).to(SUM)
    elif EAGER:
        SUM: tl.constexpr = E
        acc = tl.zeros([BT, BO], E)
    else:
        SUM: tl.constexpr = tl.float32
        acc = tl.zeros([BT, BO], tl.float32)
    for i_n in range(N):
        b_at = b_ptr + (i_n * O + o_o).to(tl.int64)[None, :] * R + o_r[:, None]
        b_b = tl.load(b_at, (o_r < R)[:, None] & m_o[None, :], other=0.0)  # [RP, BO]
        e = dot(b_h, b_b, tl.zeros([BT, BO], tl.float32))
        if ONE_GROUP:
            i_g = (tl.program_id(0) * BO) // S
            w = tl.load(pi_ptr + (o_t.to(tl.int64) * G + i_g) * N + i_n, o_t < T, other=0.0)[:, None]
        else:
            w = tl.load(pi_ptr + (o_t.to(tl.int64)[:, None] * G + (o_o // S)[None, :]) * N + i_n, m, other=0.0)
        if EAGER:  # products and sums of E are rounded once: their fp32 value is exact or rounds the same way
            e = e.to(E)
            if HAS_SCALE:
                e = tl.load(scale_ptr + i_n) * e
            t = w * e
            if SCALING_IN_E:
                t = t * tl.full([1, 1], scaling, E)
            else:
                t = (t.to(tl.float32) * scaling).to(E)
            acc = acc + t.to(SUM)
        else:
            w = w.to(tl.float32)
            if HAS_SCALE:
                w = w * tl.load(scale_ptr + i_n).to(tl.float32)
            acc += w * e
    y = acc.to(tl.float32)
    if not EAGER:
        y = y * scaling
    if HAS_RESIDUAL and not INTO_RESIDUAL:
        at = residual_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_o[None, :] * stride_o
        y = tl.load(at, m, other=0.0).to(tl.float32) + y
    tl.store(out_ptr + o_t.to(tl.int64)[:, None] * O + o_o[None, :], y.to(out_ptr.dtype.element_ty), m)


@plan
def _project_plan(
    tokens: int, d_in: int, strides: tuple[int, int], rank: int, experts: int, groups: int, fp32: bool, direct: bool,
    has_router: bool, relu: bool, dropout_p: float,
) -> tuple[Launch, ...]:  # fmt: skip
    """h and pi in one launch, or in two where the router's rows do not fit one tile beside h."""
    padded = next_power_of_two(experts)
    columns_cap, columns_block = (64, 32) if fp32 else (configs.ROUTER_COLUMNS, configs.ROUTER_BLOCK)
    one_tile = next_power_of_two(groups) * padded <= columns_cap
    group_block = next_power_of_two(groups) if one_tile else max(1, columns_block // padded)
    group_block = max(group_block, 16 // padded)

    def project(has_h: bool, has_router: bool) -> Launch:
        tile = configs.project(tokens, group_block * padded if has_router else 16, has_h, fp32, direct)
        grid = (ceil_div(tokens, tile.rows), ceil_div(groups, group_block) if has_router else 1, 1)
        return Launch(
            _project_kernel, grid, tile, T=tokens, stride_t=strides[0], stride_d=strides[1], D=d_in, R=rank,
            RP=max(16, next_power_of_two(rank)), N=experts, NP=padded if has_router else 16, G=groups,
            GB=group_block if has_router else 1, HAS_H=has_h, HAS_ROUTER=has_router, RELU=relu,
            CHUNK=fp32_chunk(fp32), BT=tile.rows, BK=tile.depth, **dropout_arguments(dropout_p),
        )  # fmt: skip

    return (project(True, has_router),) if one_tile or not has_router else (project(True, False), project(False, True))


@plan
def _mix_plan(
    tokens: int, d_out: int, strides: tuple[int, int] | None, rank: int, experts: int, groups: int, E: torch.dtype,
    has_scale: bool, scaling: float, numerics: str, into_residual: bool,
) -> Launch:  # fmt: skip
    """expand, or expert_sum for small groups and numerics "eager"; strides are the residual's."""
    group_size, fp32, rank_p = d_out // groups, E is torch.float32, next_power_of_two(rank)
    stride_t, stride_o = strides or (0, 0)
    common = {
        "scaling": scaling, "T": tokens, "stride_t": stride_t, "stride_o": stride_o, "O": d_out, "G": groups,
        "N": experts, "R": rank, "HAS_SCALE": has_scale, "HAS_RESIDUAL": strides is not None,
    }  # fmt: skip
    if numerics == "fp32" and uses_group_form(group_size):
        experts_k = max(min(next_power_of_two(experts), 256 // rank_p), 16 // rank_p)
        tile = configs.expand(tokens, group_size, experts <= experts_k, fp32)
        tiles_per_group, row_tiles = ceil_div(group_size, tile.columns), ceil_div(tokens, tile.rows)
        tiles = configs.expand_tiles(row_tiles, groups, tiles_per_group)
        return Launch(
            _expand_kernel, (groups * tiles_per_group // tiles, row_tiles, 1), tile, tiles=tiles, RP=rank_p,
            EXPERTS=experts_k, CHUNK=fp32_chunk(fp32), BT=tile.rows, BO=tile.columns, **common,
        )  # fmt: skip
    tile = configs.expert_sum(tokens, group_size, fp32)
    return Launch(
        _expert_sum_kernel, (ceil_div(d_out, tile.columns), ceil_div(tokens, tile.rows), 1), tile,
        RP=max(16, rank_p), EAGER=numerics == "eager", INTO_RESIDUAL=into_residual,
        SCALING_IN_E=is_representable(scaling, E), ONE_GROUP=group_size % tile.columns == 0,
        BT=tile.rows, BO=tile.columns, **common,
    )  # fmt: skip


def routed_lora_fwd(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor | None,
    route_weights: Tensor | None,
    residual: Tensor | None,
    expert_scale: Tensor | None,
    seed: Tensor | None,
    *,
    scaling: float,
    num_groups: int,
    numerics: str,
    activation: str | None,
    dropout_p: float,
    compute_dtype: torch.dtype,
    accumulate_into_residual: bool,
    return_load: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The signature and returns of `reference.routed_lora.routed_lora_fwd`."""
    E, (tokens, d_in), (experts, d_out, rank) = compute_dtype, x.shape, lora_b.shape
    a, b, router = operand(lora_a, E), operand(lora_b, E), operand(router, E)
    expert_scale = operand(expert_scale, E)
    h = x.new_empty(tokens, rank, dtype=E)
    out = x.new_empty(tokens, d_out, dtype=output_dtype(residual, E))
    if route_weights is not None:
        pi = route_weights.to(E, copy=True, memory_format=torch.contiguous_format)
    else:
        pi = (x.new_ones if router is None else x.new_empty)(tokens, num_groups, experts, dtype=E)
    load = None
    if tokens:
        project = _project_plan(
            tokens, d_in, x.stride(), rank, experts, num_groups, E is torch.float32,
            x.dtype == E and dropout_p == 0, router is not None, activation == "relu", dropout_p,
        )  # fmt: skip
        for launch in project:
            launch(x, a, router, h, pi, seed)
        mix = _mix_plan(
            tokens, d_out, None if residual is None else residual.stride(), rank, experts, num_groups, E,
            expert_scale is not None, scaling, numerics, accumulate_into_residual,
        )  # fmt: skip
        mix(h, pi, b, expert_scale, residual, out)
    if return_load:
        load = sum_rows(pi.view(-1, experts)) * inverse_count(tokens, num_groups)
    return out, load, h, pi
