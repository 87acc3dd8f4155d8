"""Backward kernels of `routed_lora`. Every sum over tokens stays in one program: no atomics, one order.

    contract     d(w) and d(h) from C_g = dout_g B_flat[g]^T                      dout read once
    route        d(h), d(w) -> E(d(h)), d(logits) or d(route_weights)             small tensors
    grad_x       d(x) = dropout'(d(h) A) + d(logits) R                            d(x) written once
    grad_b       d(B_flat[g]) = scaling * dout_g^T z_g                            dout read once
    grad_rows    d(A) = d(h)^T dropout(x), d(R) = d(logits)^T x                   x read once

Groups below 16 outputs go through y_i = w_i dout instead: `routed_lora_bwd_small.py`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.arithmetic import next_power_of_two, token_chunk
from ..reference.routed_lora import inverse_count, uses_group_form
from ..reference.routed_lora_bwd import expert_block
from . import configs
from .launch import Launch, ceil_div, plan
from .primitives import (
    dot,
    drop,
    dropout_arguments,
    fp32_chunk,
    load_weights,
    mixed_h,
    operand,
    sum_parts,
    sum_rows,
    token_parts,
    tree_sum,
)
from .routed_lora_bwd_small import contract_small, grad_b_small


@triton.jit
def _contract_range(
    dout_ptr, stride_t, stride_o, b_ptr, o_t, m_t, i_g, i_n, lo, hi, acc, E: tl.constexpr, O: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Add outputs lo .. hi of group i_g to C [BT, experts * RP]."""
    o_c = tl.arange(0, acc.shape[1])
    c_n, c_r = i_n + o_c // RP, o_c % RP
    for i_s in range(lo, hi, BO):
        o_s = i_s + tl.arange(0, BO)
        o_o = i_g * S + o_s
        at = dout_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_o[None, :] * stride_o
        b_g = tl.load(at, m_t[:, None] & (o_s < S)[None, :], other=0.0).to(E)  # [BT, BO]
        b_at = b_ptr + (c_n * O)[None, :] * R + c_r[None, :] + o_o[:, None] * R
        b_b = tl.load(b_at, (o_s < S)[:, None] & ((c_n < N) & (c_r < R))[None, :], other=0.0)  # [BO, columns]
        acc = dot(b_g, b_b, acc)
    return acc


@triton.jit(do_not_specialize=["T"])
def _contract_kernel(
    dout_ptr, b_ptr, h_ptr, pi_ptr, scale_ptr, dw_ptr, dh_ptr, T, stride_t, stride_o, O: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, EXPERTS: tl.constexpr, HAS_SCALE: tl.constexpr,
    CHUNK: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One block of experts for BT tokens: dw [BT, G, EXPERTS], and its part of dh [BT, R]."""
    E: tl.constexpr = h_ptr.dtype.element_ty
    S: tl.constexpr = O // G
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    m_t = o_t < T
    i_n = tl.program_id(0) * EXPERTS
    o_n = i_n + tl.arange(0, EXPERTS)
    o_r = tl.arange(0, RP)
    m_h = m_t[:, None] & (o_r < R)[None, :]
    b_h = tl.load(h_ptr + o_t.to(tl.int64)[:, None] * R + o_r[None, :], m_h, other=0.0).to(tl.float32)
    dh = tl.zeros([BT, RP], tl.float32)
    for i_g in range(G):
        c = tl.zeros([BT, EXPERTS * RP], tl.float32)
        if CHUNK:
            for lo in range(0, S, CHUNK):
                c += _contract_range(
                    dout_ptr, stride_t, stride_o, b_ptr, o_t, m_t, i_g, i_n, lo, min(lo + CHUNK, S),
                    tl.zeros([BT, EXPERTS * RP], tl.float32), E, O, S, N, R, RP, BO,
                )  # fmt: skip
        else:
            c = _contract_range(dout_ptr, stride_t, stride_o, b_ptr, o_t, m_t, i_g, i_n, 0, S, c, E, O, S, N, R, RP, BO)
        c = tl.reshape(c, [BT, EXPERTS, RP])
        dw = tree_sum(c * b_h[:, None, :])
        at = dw_ptr + (o_t.to(tl.int64)[:, None] * G + i_g) * N + o_n[None, :]
        tl.store(at, dw, m_t[:, None] & (o_n < N)[None, :])
        w = load_weights(pi_ptr, scale_ptr, o_t, i_g, o_n, T, N, G, HAS_SCALE).to(tl.float32)
        dh += tree_sum(tl.permute(w[:, :, None] * c, (0, 2, 1)))
    at = dh_ptr + (tl.program_id(0) * T.to(tl.int64) + o_t)[:, None] * R + o_r[None, :]
    tl.store(at, dh, m_h)


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    dw_ptr, dh_ptr, h_ptr, pi_ptr, scale_ptr, dload_ptr, dlogits_ptr, dpi_ptr, dh_out_ptr, weighted_ptr, scaling,
    inverse_count, T, BLOCKS, N: tl.constexpr, NP: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_LOAD: tl.constexpr, HAS_ROUTER: tl.constexpr, HAS_DPI: tl.constexpr,
    RELU: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dh = E(act'(scaling * sum of blocks)) and, of GB groups, dpi and dlogits = E(pi (dpi - sum pi dpi))."""
    E: tl.constexpr = h_ptr.dtype.element_ty
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    if tl.program_id(1) == 0:
        o_r = tl.arange(0, RP)
        m_h = (o_t < T)[:, None] & (o_r < R)[None, :]
        o_h = o_t.to(tl.int64)[:, None] * R + o_r[None, :]
        dh = tl.zeros([BT, RP], tl.float32)
        for i_block in range(BLOCKS):
            dh += tl.load(dh_ptr + i_block * T.to(tl.int64) * R + o_h, m_h, other=0.0)
        dh = dh * scaling
        if RELU:
            dh = tl.where(tl.load(h_ptr + o_h, m_h, other=0.0) <= 0, 0.0, dh)
        tl.store(dh_out_ptr + o_h, dh.to(E), m_h)
    o_c = tl.arange(0, GB * NP)
    i_g, i_n = tl.program_id(1) * GB + o_c // NP, o_c % NP
    m = (o_t < T)[:, None] & ((i_g < G) & (i_n < N))[None, :]
    at = o_t.to(tl.int64)[:, None] * (G * N) + (i_g * N + i_n)[None, :]
    dw = tl.load(dw_ptr + at, m, other=0.0)
    p = tl.load(pi_ptr + at, m, other=0.0).to(tl.float32)
    dpi = dw * scaling
    if HAS_SCALE:
        tl.store(weighted_ptr + at, p * dw, m)
        s = tl.load(scale_ptr + i_n, i_n < N, other=0.0).to(tl.float32)
        dpi = dw * (s * scaling)[None, :]
    if HAS_LOAD:
        dpi = dpi + (tl.load(dload_ptr + i_n, i_n < N, other=0.0).to(tl.float32) * inverse_count)[None, :]
    if HAS_DPI:
        tl.store(dpi_ptr + at, dpi, m)
    if HAS_ROUTER:
        p, dpi = tl.reshape(p, [BT, GB, NP]), tl.reshape(dpi, [BT, GB, NP])
        inner = tree_sum(tl.where(tl.reshape(m, [BT, GB, NP]), p * dpi, 0.0))
        dlogits = p * (dpi - inner[:, :, None])
        tl.store(dlogits_ptr + at, tl.reshape(dlogits, [BT, GB * NP]).to(E), m)


@triton.jit
def _rows_times(
    rows_ptr, b_ptr, o_t, m_t, o_d, m_d, K: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr
):
    """rows [BT, K] x b [K, BD] of contiguous rows [T, K] and b [K, D]."""
    acc = tl.zeros([o_t.shape[0], o_d.shape[0]], tl.float32)
    chunk = tl.zeros([o_t.shape[0], o_d.shape[0]], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_r = tl.load(
            rows_ptr + o_t.to(tl.int64)[:, None] * K + o_k[None, :], m_t[:, None] & (o_k < K)[None, :], other=0.0
        )
        b_b = tl.load(
            b_ptr + o_k.to(tl.int64)[:, None] * D + o_d[None, :], (o_k < K)[:, None] & m_d[None, :], other=0.0
        )
        if CHUNK:
            chunk = dot(b_r, b_b, chunk)
            if (i_k + BK) % CHUNK == 0:
                acc += chunk
                chunk = tl.zeros_like(chunk)
        else:
            acc = dot(b_r, b_b, acc)
    return acc + chunk if CHUNK else acc


@triton.jit(do_not_specialize=["T", "threshold"])
def _grad_x_kernel(
    dh_ptr, a_ptr, dlogits_ptr, router_ptr, dx_ptr, seed_ptr, threshold, inverse_keep, T, D: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, GN: tl.constexpr, HAS_ROUTER: tl.constexpr, DROPOUT: tl.constexpr,
    CHUNK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx [BT, BD] = dropout'(dh A) + dlogits R."""
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    i_d = tl.program_id(0) * BD
    o_d = i_d + tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    dx = _rows_times(dh_ptr, a_ptr, o_t, m_t, o_d, m_d, R, D, RP, CHUNK)
    if DROPOUT:
        dx = drop(dx, tl.load(seed_ptr), o_t, i_d, threshold, inverse_keep)
    if HAS_ROUTER:
        dx += _rows_times(dlogits_ptr, router_ptr, o_t, m_t, o_d, m_d, GN, D, BK, CHUNK)
    at = dx_ptr + o_t.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(at, dx.to(dx_ptr.dtype.element_ty), m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["T", "tokens"])
def _grad_b_kernel(
    dout_ptr, h_ptr, pi_ptr, scale_ptr, parts_ptr, T, tokens, stride_t, stride_o, O: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, EXPERTS: tl.constexpr, HAS_SCALE: tl.constexpr,
    CHUNK: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One part of db, of BO outputs of one group and EXPERTS experts; K walks a chunk of tokens, BT a step."""
    E: tl.constexpr = h_ptr.dtype.element_ty
    S: tl.constexpr = O // G
    tiles_per_group: tl.constexpr = (S + BO - 1) // BO
    i_g = tl.program_id(1) // tiles_per_group
    o_s = (tl.program_id(1) % tiles_per_group) * BO + tl.arange(0, BO)
    m_o = o_s < S
    o_o = i_g * S + o_s
    i_n = tl.program_id(0) * EXPERTS
    o_n = i_n + tl.arange(0, EXPERTS)
    o_r = tl.arange(0, RP)
    acc = tl.zeros([BO, EXPERTS * RP], tl.float32)
    chunk = tl.zeros([BO, EXPERTS * RP], tl.float32)
    lo = tl.program_id(2) * tokens
    for i_t in range(lo, min(lo + tokens, T), BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < T
        at = dout_ptr + o_t.to(tl.int64)[None, :] * stride_t + o_o[:, None] * stride_o
        b_g = tl.load(at, m_o[:, None] & m_t[None, :], other=0.0).to(E)  # [BO, BT]
        b_h = tl.load(
            h_ptr + o_t.to(tl.int64)[:, None] * R + o_r[None, :], m_t[:, None] & (o_r < R)[None, :], other=0.0
        )
        w = load_weights(pi_ptr, scale_ptr, o_t, i_g, o_n, T, N, G, HAS_SCALE)
        if CHUNK:
            chunk = dot(b_g, mixed_h(b_h, w), chunk)
            if (i_t + BT) % CHUNK == 0:
                acc += chunk
                chunk = tl.zeros_like(chunk)
        else:
            acc = dot(b_g, mixed_h(b_h, w), acc)
    if CHUNK:
        acc += chunk
    o_c = tl.arange(0, EXPERTS * RP)
    c_n, c_r = i_n + o_c // RP, o_c % RP
    at = parts_ptr + (tl.program_id(2) * N + c_n).to(tl.int64)[None, :] * (O * R) + c_r[None, :] + o_o[:, None] * R
    tl.store(at, acc, m_o[:, None] & ((c_n < N) & (c_r < R))[None, :])


@triton.jit
def _add_rows(x, rows_ptr, o_t, o_c, T, acc, total, ends_chunk, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """acc [BD, BC] + x^T rows over a step of tokens; fp32 moves acc into total when a chunk of K is complete."""
    b_r = tl.load(
        rows_ptr + o_t.to(tl.int64)[:, None] * COUNT + o_c[None, :],
        (o_t < T)[:, None] & (o_c < COUNT)[None, :],
        other=0.0,
    )
    acc = dot(tl.trans(x), b_r, acc)
    if CHUNK:
        if ends_chunk:
            total += acc
            acc = tl.zeros_like(acc)
    return acc, total


@triton.jit(do_not_specialize=["T", "tokens", "threshold"])
def _grad_rows_kernel(
    x_ptr, dh_ptr, dlogits_ptr, da_ptr, dr_ptr, seed_ptr, threshold, inverse_keep, T, tokens, stride_t, stride_d,
    D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, GN: tl.constexpr, HAS_A: tl.constexpr, HAS_ROUTER: tl.constexpr,
    DROPOUT: tl.constexpr, CHUNK: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One part of da [R, D] = dh^T dropout(x) and dr [GN, D] = dlogits^T x; K walks a chunk of tokens."""
    E: tl.constexpr = dh_ptr.dtype.element_ty
    i_d = tl.program_id(1) * BD
    o_d = i_d + tl.arange(0, BD)
    o_r = tl.arange(0, RP)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_d = o_d < D
    acc_a = tl.zeros([BD, RP], tl.float32)
    sum_a = tl.zeros([BD, RP], tl.float32)
    acc_r = tl.zeros([BD, BC], tl.float32)
    sum_r = tl.zeros([BD, BC], tl.float32)
    lo = tl.program_id(2) * tokens
    for i_t in range(lo, min(lo + tokens, T), BT):
        o_t = i_t + tl.arange(0, BT)
        at = x_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_d[None, :] * stride_d
        b_x = tl.load(at, (o_t < T)[:, None] & m_d[None, :], other=0.0).to(E)  # [BT, BD]
        ends_chunk = False
        if CHUNK:
            ends_chunk = (i_t + BT) % CHUNK == 0
        if HAS_A:
            b_xd = b_x
            if DROPOUT:
                b_xd = drop(b_x.to(tl.float32), tl.load(seed_ptr), o_t, i_d, threshold, inverse_keep).to(E)
            acc_a, sum_a = _add_rows(b_xd, dh_ptr, o_t, o_r, T, acc_a, sum_a, ends_chunk, R, CHUNK)
        if HAS_ROUTER:
            acc_r, sum_r = _add_rows(b_x, dlogits_ptr, o_t, o_c, T, acc_r, sum_r, ends_chunk, GN, CHUNK)
    if CHUNK:
        acc_a += sum_a
        acc_r += sum_r
    if HAS_A:
        at = da_ptr + (tl.program_id(2) * R + o_r).to(tl.int64)[None, :] * D + o_d[:, None]
        tl.store(at, acc_a, m_d[:, None] & (o_r < R)[None, :])
    if HAS_ROUTER:
        at = dr_ptr + (tl.program_id(2) * GN + o_c).to(tl.int64)[None, :] * D + o_d[:, None]
        tl.store(at, acc_r, m_d[:, None] & (o_c < GN)[None, :])


@plan
def _contract_plan(
    tokens: int, d_out: int, strides: tuple[int, int], rank: int, experts: int, groups: int, fp32: bool, direct: bool,
    has_scale: bool,
) -> Launch:  # fmt: skip
    rank_p, block = next_power_of_two(rank), expert_block(experts, rank)
    tile = configs.contract(tokens, fp32, direct)
    return Launch(
        _contract_kernel, (ceil_div(experts, block), ceil_div(tokens, tile.rows), 1), tile, T=tokens,
        stride_t=strides[0], stride_o=strides[1], O=d_out, G=groups, N=experts, R=rank, RP=rank_p,
        EXPERTS=max(block, 16 // rank_p), HAS_SCALE=has_scale, CHUNK=fp32_chunk(fp32), BT=tile.rows, BO=tile.depth,
    )  # fmt: skip


def _contract(dout, b, h, pi, expert_scale) -> tuple[Tensor, Tensor]:
    """dw fp32 [T, G, N] and the parts of dh, fp32 [blocks, T, r]."""
    (tokens, groups, experts), (_, d_out, rank) = pi.shape, b.shape
    dw = h.new_empty(*pi.shape, dtype=torch.float32)
    dh = h.new_empty(ceil_div(experts, expert_block(experts, rank)), tokens, rank, dtype=torch.float32)
    contract = _contract_plan(
        tokens, d_out, dout.stride(), rank, experts, groups, h.dtype is torch.float32, dout.dtype == h.dtype,
        expert_scale is not None,
    )  # fmt: skip
    contract(dout, b, h, pi, expert_scale, dw, dh)
    return dw, dh


@plan
def _route_plan(
    tokens: int, rank: int, experts: int, groups: int, blocks: int, scaling: float, relu: bool, has_scale: bool,
    has_load: bool, has_router: bool, has_dpi: bool,
) -> Launch:  # fmt: skip
    padded = next_power_of_two(experts)
    group_block = min(next_power_of_two(groups), max(1, 256 // padded))
    tile = configs.route(group_block * padded)
    return Launch(
        _route_kernel, (ceil_div(tokens, tile.rows), ceil_div(groups, group_block), 1), tile, scaling=scaling,
        inverse_count=inverse_count(tokens, groups), T=tokens, BLOCKS=blocks, N=experts, NP=padded, G=groups,
        GB=group_block, R=rank, RP=next_power_of_two(rank), HAS_SCALE=has_scale, HAS_LOAD=has_load,
        HAS_ROUTER=has_router, HAS_DPI=has_dpi, RELU=relu, BT=tile.rows,
    )  # fmt: skip


def _route(dw, dh_parts, h, pi, expert_scale, dload, scaling, activation, has_router, needs_dpi):
    """dh [T, r] and dlogits [T, G*N] in the compute dtype, dpi fp32 [T, G, N], d(expert_scale) fp32 [N]."""
    (tokens, groups, experts), (blocks, _, rank) = pi.shape, dh_parts.shape
    dh = torch.empty_like(h)
    dlogits = torch.empty_like(pi) if has_router else None
    dpi = torch.empty_like(dw) if needs_dpi else None
    weighted = None if expert_scale is None else torch.empty_like(dw)
    route = _route_plan(
        tokens, rank, experts, groups, blocks, scaling, activation == "relu", expert_scale is not None,
        dload is not None, has_router, needs_dpi,
    )  # fmt: skip
    route(dw, dh_parts, h, pi, expert_scale, dload, dlogits, dpi, dh, weighted)
    ds = None if weighted is None else sum_rows(weighted.view(-1, experts)) * scaling
    return dh, dlogits, dpi, ds


@plan
def _grad_x_plan(
    tokens: int, d_in: int, rank: int, router_rows: int, fp32: bool, has_router: bool, dropout_p: float
) -> Launch:
    tile = configs.grad_x(router_rows, fp32)
    return Launch(
        _grad_x_kernel, (ceil_div(d_in, tile.columns), ceil_div(tokens, tile.rows), 1), tile, T=tokens, D=d_in, R=rank,
        RP=max(16, next_power_of_two(rank)), GN=router_rows, HAS_ROUTER=has_router, CHUNK=fp32_chunk(fp32),
        BT=tile.rows, BD=tile.columns, BK=tile.depth, **dropout_arguments(dropout_p),
    )  # fmt: skip


def _grad_x(x, dh, a, dlogits, router, seed, dropout_p) -> Tensor:
    (tokens, rank), (_, d_in) = dh.shape, a.shape
    dx = x.new_empty(tokens, d_in)
    rows = 0 if router is None else router.shape[0]
    grad_x = _grad_x_plan(tokens, d_in, rank, rows, dh.dtype is torch.float32, router is not None, dropout_p)
    grad_x(dh, a, dlogits, router, dx, seed)
    return dx


@plan
def _grad_b_plan(
    tokens: int, d_out: int, strides: tuple[int, int], rank: int, experts: int, groups: int, fp32: bool, has_scale: bool
) -> Launch:
    rank_p, tile = next_power_of_two(rank), configs.grad_b(fp32)
    block = max(1, min(next_power_of_two(experts) * rank_p, tile.columns) // rank_p, 16 // rank_p)
    size = token_chunk(tokens)
    grid = (ceil_div(experts, block), groups * ceil_div(d_out // groups, tile.rows), ceil_div(tokens, size))
    return Launch(
        _grad_b_kernel, grid, tile, T=tokens, tokens=size, stride_t=strides[0], stride_o=strides[1], O=d_out, G=groups,
        N=experts, R=rank, RP=rank_p, EXPERTS=block, HAS_SCALE=has_scale, CHUNK=fp32_chunk(fp32), BO=tile.rows,
        BT=tile.depth,
    )  # fmt: skip


def _grad_b(dout, h, pi, lora_b, expert_scale) -> Tensor:
    """Parts of d(lora_b), not scaled."""
    (tokens, groups, experts), (_, d_out, rank) = pi.shape, lora_b.shape
    parts = token_parts(lora_b, tokens)
    grad_b = _grad_b_plan(
        tokens, d_out, dout.stride(), rank, experts, groups, h.dtype is torch.float32, expert_scale is not None
    )
    grad_b(dout, h, pi, expert_scale, parts)
    return parts


@plan
def _grad_rows_plan(
    tokens: int, d_in: int, strides: tuple[int, int], rank: int, router_rows: int, fp32: bool, need_a: bool,
    need_router: bool, dropout_p: float,
) -> tuple[Launch, ...]:  # fmt: skip
    """d(A) and d(router) in one launch, so that x is read once, where one tile holds both."""
    tile, size = configs.grad_rows(router_rows, fp32), token_chunk(tokens)

    def grad_rows(has_a: bool, has_router: bool) -> Launch:
        columns = ceil_div(router_rows, tile.columns) if has_router else 1
        return Launch(
            _grad_rows_kernel, (columns, ceil_div(d_in, tile.rows), ceil_div(tokens, size)), tile, T=tokens,
            tokens=size, stride_t=strides[0], stride_d=strides[1], D=d_in, R=rank, RP=max(16, next_power_of_two(rank)),
            GN=router_rows, HAS_A=has_a, HAS_ROUTER=has_router, CHUNK=fp32_chunk(fp32), BD=tile.rows,
            BC=tile.columns if has_router else 16, BT=tile.depth, **dropout_arguments(dropout_p),
        )  # fmt: skip

    if need_a and need_router and router_rows > tile.columns:
        return grad_rows(True, False), grad_rows(False, True)
    return (grad_rows(need_a, need_router),)


def _grad_rows(x, dh, dlogits, lora_a, router, need_a, need_router, seed, dropout_p):
    """Parts of d(lora_a) and d(router), or None."""
    (tokens, d_in), rank = x.shape, dh.shape[1]
    da = token_parts(lora_a, tokens) if need_a else None
    dr = token_parts(router, tokens) if need_router else None
    launches = _grad_rows_plan(
        tokens, d_in, x.stride(), rank, router.shape[0] if need_router else 1, dh.dtype is torch.float32, need_a,
        need_router, dropout_p,
    )  # fmt: skip
    for launch in launches:
        launch(x, dh, dlogits, da, dr, seed)
    return da, dr


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
    """The signature and returns of `reference.routed_lora_bwd.routed_lora_bwd`."""
    E = h.dtype
    need_x, need_a, need_b, need_router, need_weights, need_scale = needs
    need_router, need_scale = need_router and router is not None, need_scale and expert_scale is not None
    a, b, router_e, scale_e = operand(lora_a, E), operand(lora_b, E), operand(router, E), operand(expert_scale, E)
    parts_a = parts_b = parts_r = dx = dpi = ds = None
    group_form = uses_group_form(b.shape[1] // pi.shape[1])
    if need_b:
        parts_b = (_grad_b if group_form else grad_b_small)(dout, h, pi, lora_b, scale_e)
    if need_x or need_a or need_router or need_weights or need_scale:
        dw, dh_parts = (_contract if group_form else contract_small)(dout, b, h, pi, scale_e)
        dh, dlogits, dpi, ds = _route(
            dw, dh_parts, h, pi, scale_e, dload, scaling, activation, router is not None, need_weights
        )
        del dw, dh_parts
    if need_a or need_router:
        parts_a, parts_r = _grad_rows(x, dh, dlogits, lora_a, router, need_a, need_router, seed, dropout_p)
    da, db, dr = sum_parts((parts_a, lora_a, 1.0), (parts_b, lora_b, scaling), (parts_r, router, 1.0))
    del parts_a, parts_b, parts_r
    if need_x:  # last: d(x) is the largest result, and nothing temporary is held beside it
        dx = _grad_x(x, dh, a, dlogits, router_e, seed, dropout_p)
    return dx, da, db, dr, dpi, ds.to(expert_scale.dtype) if need_scale else None
