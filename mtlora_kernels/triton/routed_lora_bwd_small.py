"""Backward of small groups (below 16 outputs): through y_i = w_i dout, expert by expert.

d(w_i)[g] = sum over the group's outputs of dout (B_i h)
d(h)      = sum over (block of outputs, expert, output) of y_i B_i        K in that order
d(B_i)    = scaling * y_i^T h
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.arithmetic import next_power_of_two, token_chunk
from ..reference.routed_lora_bwd import EXPERT_FORM_BLOCK
from . import configs
from .launch import Launch, ceil_div, plan
from .primitives import dot, fp32_chunk, token_parts, tree_sum


@triton.jit
def _load_y(
    dout_ptr,
    pi_ptr,
    scale_ptr,
    o_t,
    o_o,
    i_n,
    m,
    stride_t,
    stride_o,
    E: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """y_i = E(w_i dout) on the tile of tokens o_t and outputs o_o, whose shapes broadcast."""
    g = tl.load(dout_ptr + o_t.to(tl.int64) * stride_t + o_o * stride_o, m, other=0.0).to(E).to(tl.float32)
    w = tl.load(pi_ptr + (o_t.to(tl.int64) * G + o_o // S) * N + i_n, m, other=0.0).to(tl.float32)
    if HAS_SCALE:
        w = w * tl.load(scale_ptr + i_n).to(tl.float32)
    return (w * g).to(E)


@triton.jit(do_not_specialize=["T"])
def _grad_w_kernel(
    dout_ptr, b_ptr, h_ptr, dw_ptr, T, stride_t, stride_o, O: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, SP: tl.constexpr, GB: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dw [BT, GB, N]: the outputs of GB groups, each padded to SP, are the columns of one tile."""
    E: tl.constexpr = h_ptr.dtype.element_ty
    S: tl.constexpr = O // G
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, GB * SP)
    o_g = tl.program_id(0) * GB + o_c // SP
    m_o = (o_c % SP < S) & (o_g < G)
    o_o = o_g * S + o_c % SP
    o_r = tl.arange(0, RP)
    m_t = o_t < T
    b_h = tl.load(h_ptr + o_t.to(tl.int64)[:, None] * R + o_r[None, :], m_t[:, None] & (o_r < R)[None, :], other=0.0)
    g_at = dout_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_o[None, :] * stride_o
    b_g = tl.load(g_at, m_t[:, None] & m_o[None, :], other=0.0).to(E).to(tl.float32)
    w_g = tl.program_id(0) * GB + tl.arange(0, GB)
    for i_n in range(N):
        b_at = b_ptr + (i_n * O + o_o).to(tl.int64)[None, :] * R + o_r[:, None]
        b_b = tl.load(b_at, (o_r < R)[:, None] & m_o[None, :], other=0.0)
        e = b_g * dot(b_h, b_b, tl.zeros([BT, GB * SP], tl.float32))
        dw = tree_sum(tl.reshape(e, [BT, GB, SP]))
        at = dw_ptr + (o_t.to(tl.int64)[:, None] * G + w_g[None, :]) * N + i_n
        tl.store(at, dw, m_t[:, None] & (w_g < G)[None, :])


@triton.jit(do_not_specialize=["T"])
def _grad_h_kernel(
    dout_ptr, b_ptr, pi_ptr, scale_ptr, dh_ptr, T, stride_t, stride_o, O: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_SCALE: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    """dh [BT, R]: one accumulator over k = (block of BO outputs, expert, output)."""
    E: tl.constexpr = pi_ptr.dtype.element_ty
    S: tl.constexpr = O // G
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_r = tl.arange(0, RP)
    acc = tl.zeros([BT, RP], tl.float32)
    chunk = tl.zeros([BT, RP], tl.float32)
    for i in range(((O + BO - 1) // BO) * N):
        o_o = (i // N) * BO + tl.arange(0, BO)
        m = (o_t < T)[:, None] & (o_o < O)[None, :]
        y = _load_y(
            dout_ptr, pi_ptr, scale_ptr, o_t[:, None], o_o[None, :], i % N, m, stride_t, stride_o, E, S, G, N, HAS_SCALE
        )
        b_at = b_ptr + ((i % N) * O + o_o).to(tl.int64)[:, None] * R + o_r[None, :]
        b_b = tl.load(b_at, (o_o < O)[:, None] & (o_r < R)[None, :], other=0.0)  # [BO, RP]
        if CHUNK:
            chunk = dot(y, b_b, chunk)
            if ((i + 1) * BO) % CHUNK == 0:
                acc += chunk
                chunk = tl.zeros_like(chunk)
        else:
            acc = dot(y, b_b, acc)
    if CHUNK:
        acc += chunk
    tl.store(dh_ptr + o_t.to(tl.int64)[:, None] * R + o_r[None, :], acc, (o_t < T)[:, None] & (o_r < R)[None, :])


@triton.jit(do_not_specialize=["T", "tokens"])
def _grad_b_small_kernel(
    dout_ptr, h_ptr, pi_ptr, scale_ptr, parts_ptr, T, tokens, stride_t, stride_o, O: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_SCALE: tl.constexpr, CHUNK: tl.constexpr, BO: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """One part of db [BO, R] of one expert; K walks a chunk of tokens, BT a step."""
    E: tl.constexpr = h_ptr.dtype.element_ty
    S: tl.constexpr = O // G
    i_n = tl.program_id(0)
    o_o = tl.program_id(1) * BO + tl.arange(0, BO)
    o_r = tl.arange(0, RP)
    m_o = o_o < O
    acc = tl.zeros([BO, RP], tl.float32)
    chunk = tl.zeros([BO, RP], tl.float32)
    lo = tl.program_id(2) * tokens
    for i_t in range(lo, min(lo + tokens, T), BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < T
        y = _load_y(
            dout_ptr, pi_ptr, scale_ptr, o_t[:, None], o_o[None, :], i_n, m_t[:, None] & m_o[None, :], stride_t,
            stride_o, E, S, G, N, HAS_SCALE,
        )  # fmt: skip
        b_h = tl.load(
            h_ptr + o_t.to(tl.int64)[:, None] * R + o_r[None, :], m_t[:, None] & (o_r < R)[None, :], other=0.0
        )
        if CHUNK:
            chunk = dot(tl.trans(y), b_h, chunk)
            if (i_t + BT) % CHUNK == 0:
                acc += chunk
                chunk = tl.zeros_like(chunk)
        else:
            acc = dot(tl.trans(y), b_h, acc)
    if CHUNK:
        acc += chunk
    at = parts_ptr + ((tl.program_id(2) * N + i_n).to(tl.int64) * O + o_o)[:, None] * R + o_r[None, :]
    tl.store(at, acc, m_o[:, None] & (o_r < R)[None, :])


@plan
def _contract_small_plan(
    tokens: int, d_out: int, strides: tuple[int, int], rank: int, experts: int, groups: int, fp32: bool, has_scale: bool
) -> tuple[Launch, Launch]:
    """grad_w and grad_h."""
    tile, size_p = configs.small_groups(fp32), next_power_of_two(d_out // groups)
    group_block, row_tiles = tile.columns // size_p, ceil_div(tokens, tile.rows)
    common = {
        "T": tokens, "stride_t": strides[0], "stride_o": strides[1], "O": d_out, "G": groups, "N": experts, "R": rank,
        "RP": max(16, next_power_of_two(rank)), "BT": tile.rows,
    }  # fmt: skip
    grad_w = Launch(
        _grad_w_kernel, (ceil_div(groups, group_block), row_tiles, 1), tile, SP=size_p, GB=group_block, **common
    )
    grad_h = Launch(
        _grad_h_kernel, (row_tiles, 1, 1), tile, HAS_SCALE=has_scale, CHUNK=fp32_chunk(fp32), BO=EXPERT_FORM_BLOCK,
        **common,
    )  # fmt: skip
    return grad_w, grad_h


def contract_small(dout, b, h, pi, expert_scale) -> tuple[Tensor, Tensor]:
    """dw fp32 [T, G, N] and dh fp32 [1, T, r]."""
    (tokens, groups, experts), (_, d_out, rank) = pi.shape, b.shape
    dw = h.new_empty(pi.shape, dtype=torch.float32)
    dh = h.new_empty((1, tokens, rank), dtype=torch.float32)
    grad_w, grad_h = _contract_small_plan(
        tokens, d_out, dout.stride(), rank, experts, groups, h.dtype is torch.float32, expert_scale is not None
    )
    grad_w(dout, b, h, dw)
    grad_h(dout, b, pi, expert_scale, dh)
    return dw, dh


@plan
def _grad_b_small_plan(
    tokens: int, d_out: int, strides: tuple[int, int], rank: int, experts: int, groups: int, fp32: bool, has_scale: bool
) -> Launch:
    tile, size = configs.small_groups(fp32), token_chunk(tokens)
    return Launch(
        _grad_b_small_kernel, (experts, ceil_div(d_out, tile.columns), ceil_div(tokens, size)), tile, T=tokens,
        tokens=size, stride_t=strides[0], stride_o=strides[1], O=d_out, G=groups, N=experts, R=rank,
        RP=max(16, next_power_of_two(rank)), HAS_SCALE=has_scale, CHUNK=fp32_chunk(fp32), BO=tile.columns,
        BT=tile.depth,
    )  # fmt: skip


def grad_b_small(dout, h, pi, lora_b, expert_scale) -> Tensor:
    """Parts of d(lora_b), not scaled."""
    (tokens, groups, experts), (_, d_out, rank) = pi.shape, lora_b.shape
    parts = token_parts(lora_b, tokens)
    grad_b = _grad_b_small_plan(
        tokens, d_out, dout.stride(), rank, experts, groups, h.dtype is torch.float32, expert_scale is not None
    )
    grad_b(dout, h, pi, expert_scale, parts)
    return parts
