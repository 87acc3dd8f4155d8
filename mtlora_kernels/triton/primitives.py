"""Device functions shared by the kernels, and the launch helpers that every launcher uses.

Names inside kernels: capitals are sizes (T tokens, D features, O outputs, N experts, R rank, G groups; a P suffix
is the size padded to a power of two), BT, BK, BO are tile sizes, i_ is an index, o_ an offset vector, m_ a mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..reference.arithmetic import FP32_CHUNK, SUM_ROWS, next_power_of_two, token_chunk
from .configs import INTERPRET, Tile
from .launch import Launch, ceil_div, plan

_INTERPRET = tl.constexpr(INTERPRET)
_SUM_ROWS = tl.constexpr(SUM_ROWS)
_ROW_TILE = Tile(1, 0, 0, 1, 1)
_PART_TILE = Tile(1, 1024, 0, 4, 1)


@triton.jit
def exp(v):
    """CUDA's exp (libdevice), which is PyTorch's; tl.exp is another function."""
    if _INTERPRET:
        return tl.exp(v)
    else:
        return libdevice.exp(v)


@triton.jit
def dot(a, b, acc):
    """acc + a b with fp32 accumulation in k order; fp32 operands stay IEEE.

    max_num_imprecise_acc means nothing for these dtypes but keeps the compiler from folding an add of the result
    into the accumulator, which would change the order of the sum.
    """
    return tl.dot(a, b, acc, input_precision="ieee", max_num_imprecise_acc=1)


@triton.jit
def _halve(v, n: tl.constexpr):
    """[X, Y, n] -> [X, Y, n / 2], s[:n/2] + s[n/2:]."""
    pair = tl.permute(tl.reshape(v, [v.shape[0], v.shape[1], 2, n // 2]), (0, 1, 3, 2))
    low, high = tl.split(pair)
    return low + high


@triton.jit
def tree_sum(v):
    """[X, Y, n] -> [X, Y], n a power of two up to 128, in the order of `reference.arithmetic.tree_sum`."""
    if v.shape[2] == 128:
        lanes = tl.permute(tl.reshape(v, [v.shape[0], v.shape[1], 2, 2, 32]), (0, 1, 4, 2, 3))
        even, odd = tl.split(lanes)
        lane_0, lane_2 = tl.split(even)
        lane_1, lane_3 = tl.split(odd)
        v = ((lane_0 + lane_1) + lane_2) + lane_3
    if v.shape[2] >= 64:
        v = _halve(v, 64)
    if v.shape[2] >= 32:
        v = _halve(v, 32)
    if v.shape[2] >= 16:
        v = _halve(v, 16)
    if v.shape[2] >= 8:
        v = _halve(v, 8)
    if v.shape[2] >= 4:
        v = _halve(v, 4)
    if v.shape[2] >= 2:
        v = _halve(v, 2)
    return tl.reshape(v, [v.shape[0], v.shape[1]])


@triton.jit
def drop(v, seed, o_t, i_k, threshold, inverse_keep):
    """fp32 v [BT, BK] times inverse_keep where Philox keeps (token o_t, feature i_k + column), else 0.

    The mask is applied to the bits: a boolean between a load and a dot makes Triton permute k inside mma.sync
    fragments, and with it the order of the sum.
    """
    BT: tl.constexpr = v.shape[0]
    BK: tl.constexpr = v.shape[1]
    block = (i_k // 4 + tl.arange(0, BK // 4))[None, :] + tl.zeros_like(o_t)[:, None]
    token = o_t[:, None] + tl.zeros_like(block)
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(seed, block, token, zero, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BT, BK])
    keep = ~((words.to(tl.int64) - threshold) >> 63).to(tl.int32)
    return ((v * inverse_keep).to(tl.int32, bitcast=True) & keep).to(tl.float32, bitcast=True)


@triton.jit
def load_weights(pi_ptr, scale_ptr, o_t, i_g, o_n, T, N: tl.constexpr, G: tl.constexpr, HAS_SCALE: tl.constexpr):
    """w [BT, experts] of one group: pi in its own dtype, or pi * s in fp32."""
    at = pi_ptr + (o_t.to(tl.int64)[:, None] * G + i_g) * N + o_n[None, :]
    w = tl.load(at, (o_t < T)[:, None] & (o_n < N)[None, :], other=0.0)
    if HAS_SCALE:
        w = w.to(tl.float32) * tl.load(scale_ptr + o_n, o_n < N, other=0.0).to(tl.float32)[None, :]
    return w


@triton.jit
def mixed_h(h, w):
    """z [BT, N*R] in h's dtype from h [BT, R] and w [BT, N] (16-bit w: the product itself rounds once)."""
    if w.dtype == h.dtype:
        z = w[:, :, None] * h[:, None, :]
    else:
        z = (w[:, :, None] * h.to(tl.float32)[:, None, :]).to(h.dtype)
    return tl.reshape(z, [h.shape[0], w.shape[1] * h.shape[1]])


@triton.jit(do_not_specialize=["rows"])
def _sum_rows_kernel(v_ptr, out_ptr, rows, N: tl.constexpr, NP: tl.constexpr):
    """out [runs, N] = sums of runs of 256 rows of v [rows, N] in order."""
    i_run = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, NP)
    acc = tl.zeros([NP], tl.float32)
    for i in range(_SUM_ROWS):
        row = i_run * _SUM_ROWS + i
        acc += tl.load(v_ptr + row * N + o_n, (o_n < N) & (row < rows), other=0.0).to(tl.float32)
    tl.store(out_ptr + i_run * N + o_n, acc, o_n < N)


@plan
def _sum_rows_plan(rows: int, n: int) -> Launch:
    grid = (ceil_div(rows, SUM_ROWS), 1, 1)
    return Launch(_sum_rows_kernel, grid, _ROW_TILE, rows=rows, N=n, NP=next_power_of_two(n))


def sum_rows(v: Tensor) -> Tensor:
    """fp32 sum over dim 0 of contiguous [rows, N], in the order of `reference.arithmetic.sum_rows`."""
    rows, n = v.shape
    if rows == 0:
        return v.new_zeros(n, dtype=torch.float32)
    first = True
    while first or rows > 1:
        out = v.new_empty(ceil_div(rows, SUM_ROWS), n, dtype=torch.float32)
        _sum_rows_plan(rows, n)(v, out)
        v, rows, first = out, out.shape[0], False
    return v[0]


@triton.jit
def _sum_part(parts_ptr, out_ptr, factor, size, parts, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(parts_ptr + o, o < size, other=0.0)
    for i in range(1, parts):
        acc += tl.load(parts_ptr + i * size.to(tl.int64) + o, o < size, other=0.0)
    tl.store(out_ptr + o, (acc * factor).to(out_ptr.dtype.element_ty), o < size)


@triton.jit(do_not_specialize=["size_0", "size_1", "size_2", "parts"])
def _sum_parts_kernel(
    parts_0_ptr, out_0_ptr, parts_1_ptr, out_1_ptr, parts_2_ptr, out_2_ptr, factor_0, factor_1, factor_2, size_0,
    size_1, size_2, parts, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = factor * (part 0 + part 1 + ...) in that order, of up to three products."""
    if tl.program_id(1) == 0:
        _sum_part(parts_0_ptr, out_0_ptr, factor_0, size_0, parts, BLOCK)
    if COUNT > 1:
        if tl.program_id(1) == 1:
            _sum_part(parts_1_ptr, out_1_ptr, factor_1, size_1, parts, BLOCK)
    if COUNT > 2:
        if tl.program_id(1) == 2:
            _sum_part(parts_2_ptr, out_2_ptr, factor_2, size_2, parts, BLOCK)


@plan
def _sum_parts_plan(parts: int, sizes: tuple[int, ...], factors: tuple[float, ...]) -> Launch:
    count = len(sizes)
    sizes, factors = sizes + (0,) * (3 - count), factors + (0.0,) * (3 - count)
    return Launch(
        _sum_parts_kernel, (ceil_div(max(sizes), _PART_TILE.columns), count, 1), _PART_TILE, factor_0=factors[0],
        factor_1=factors[1], factor_2=factors[2], size_0=sizes[0], size_1=sizes[1], size_2=sizes[2], parts=parts,
        COUNT=count, BLOCK=_PART_TILE.columns,
    )  # fmt: skip


def token_parts(like: Tensor, tokens: int) -> Tensor:
    """fp32 [chunks of tokens, *like.shape]: the partial sums of a product whose K is all tokens."""
    return like.new_empty(ceil_div(tokens, token_chunk(tokens)), *like.shape, dtype=torch.float32)


def sum_parts(*products: tuple[Tensor | None, Tensor | None, float]) -> list[Tensor | None]:
    """Of each (parts, like, factor): factor * the ordered sum of parts in like's dtype; None where parts is None."""
    wanted = [product for product in products if product[0] is not None]
    if not wanted:
        return [None] * len(products)
    count = wanted[0][0].shape[0]
    outs = [(like.new_empty if count else like.new_zeros)(*like.shape) for _, like, _ in wanted]
    launch = _sum_parts_plan(count, tuple([out.numel() for out in outs]), tuple([factor for *_, factor in wanted]))
    pointers = [t for (parts, *_), out in zip(wanted, outs, strict=True) for t in (parts, out)]
    if count:
        launch(*pointers, *[None] * (6 - len(pointers)))
    found = iter(outs)
    return [None if parts is None else next(found) for parts, *_ in products]


def fp32_chunk(fp32: bool) -> int:
    """K chunk whose products are added in order: fp32 operands only, 0 keeps one accumulator."""
    return FP32_CHUNK if fp32 else 0


def dropout_arguments(dropout_p: float) -> dict:
    """Kernel parameters of dropout; without it the seed pointer is never read."""
    return {"threshold": int(dropout_p * 2**32), "inverse_keep": 1 / (1 - dropout_p), "DROPOUT": dropout_p > 0}


def operand(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """t in the compute dtype and contiguous, as kernels read weights."""
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()
