"""The order of every sum and the place of every rounding, in plain PyTorch.

Two providers share one interface:

``Portable``  any device: dot products walk k = 0, 1, 2, ... with a separate fp32 multiply and fp32 add
              per step, and exp is built from basic IEEE operations. The CPU kernels follow it.
``Cuda``      NVIDIA tensor cores: ``torch.mm(..., out_dtype=torch.float32)`` on cuBLASLt without split-K,
              which keeps one accumulator along K, and CUDA's own exp. Triton and CUDA kernels follow it.

``acc`` below is the accumulation dtype: float32, or float64 when the operator runs in float64.
"""

import torch
from torch import Tensor

from .cublas import one_accumulator

SUM_LANES = 32  # a warp: CUDA's softmax strides its lane sums by 32 before the halving tree
SUM_ROWS = 256  # rows per partial sum of `sum_rows`
FP32_CHUNK = 256  # cuBLAS fp32 walks K in this order only up to 256, so longer K is cut and added in order
TOKEN_CHUNK = 2048  # tokens per accumulator where K is all tokens: enough pieces to fill a GPU at T = 8192 ...
MAX_TOKEN_CHUNKS = 8  # ... and few enough that their fp32 partial sums stay small at any T


def acc_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def zero_padded(v: Tensor, dim: int, size: int) -> Tensor:
    """Append zeros along dim until it has the given size."""
    missing = size - v.shape[dim]
    if missing == 0:
        return v
    shape = list(v.shape)
    shape[dim] = missing
    return torch.cat([v, v.new_zeros(shape)], dim)


def tree_sum(v: Tensor) -> Tensor:
    """Sum over the last dim: lanes strided by 32 in order, then a halving tree s[:n/2] + s[n/2:]."""
    lanes = min(SUM_LANES, next_power_of_two(v.shape[-1]))
    v = zero_padded(v, -1, -(-v.shape[-1] // lanes) * lanes)
    s = v[..., :lanes]
    for start in range(lanes, v.shape[-1], lanes):
        s = s + v[..., start : start + lanes]
    while lanes > 1:
        lanes //= 2
        s = s[..., :lanes] + s[..., lanes:]
    return s[..., 0]


def sum_rows(v: Tensor) -> Tensor:
    """Sum over dim 0 of [rows, n]: runs of 256 rows in order, then the run sums the same way."""
    while v.shape[0] > 1:
        runs = -(-v.shape[0] // SUM_ROWS)
        v = zero_padded(v, 0, runs * SUM_ROWS).reshape(runs, SUM_ROWS, -1)
        s = v[:, 0]
        for row in range(1, SUM_ROWS):
            s = s + v[:, row]
        v = s
    return v[0] if v.shape[0] else v.new_zeros(v.shape[1])


def token_chunk(tokens: int) -> int:
    """Tokens per accumulator of `Cuda.dot_tokens`."""
    return TOKEN_CHUNK * max(1, -(-tokens // (TOKEN_CHUNK * MAX_TOKEN_CHUNKS)))


class Portable:
    """Explicit order, basic IEEE operations: the same bits on any device."""

    @staticmethod
    def dot(a: Tensor, b: Tensor) -> Tensor:
        """[..., M, K] x [..., K, N] -> acc [..., M, N]; k in order, no fused multiply-add."""
        acc = acc_dtype(a.dtype)
        a, b = a.to(acc), b.to(acc)
        out = a.new_zeros((*a.shape[:-1], b.shape[-1]))
        for k in range(a.shape[-1]):
            out += a[..., k, None] * b[..., None, k, :]
        return out

    dot_tokens = dot

    @staticmethod
    def exp(v: Tensor) -> Tensor:
        """exp of a non-positive fp32 tensor, within 2 ulp; results below the smallest normal are 0.

        Cody-Waite reduction v = n ln2 + f, |f| <= ln2 / 2, and the degree-7 Taylor polynomial of exp(f).
        """
        if v.dtype == torch.float64:
            return torch.exp(v)
        magic = 12582912.0  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer
        n = (v * 1.4426950408889634 + magic) - magic
        f = (v - n * 0.693359375) - n * -2.12194440e-4
        p = f * (1 / 5040) + 1 / 720
        for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            p = p * f + coefficient
        power = ((n.clamp(-126.0, 0.0).nan_to_num().to(torch.int32) + 127) << 23).view(torch.float32)
        return torch.where(v < -87.0, 0.0, p * power)


class Cuda:
    """PyTorch's own tensor-core products with one accumulator along K."""

    @staticmethod
    def dot(a: Tensor, b: Tensor) -> Tensor:
        """[..., M, K] x [..., K, N] -> fp32 [..., M, N]."""
        if a.dim() == 3:
            return torch.stack([Cuda.dot(a_i, b_i) for a_i, b_i in zip(a, b, strict=True)])
        (m, k), n = a.shape, b.shape[1]
        if 0 in (m, n, k):
            return a.new_zeros(m, n, dtype=torch.float32)
        fp32 = a.dtype == torch.float32
        # Zero rows and columns, and plain row-major operands, keep cuBLAS on the kernels whose K order was
        # measured; zeros add nothing.
        a = zero_padded(a, 0, max(512, m) if fp32 else -(-m // 64) * 64)
        a = zero_padded(a, 1, -(-k // 64) * 64).contiguous()
        b = zero_padded(zero_padded(b, 0, a.shape[1]), 1, -(-n // 64) * 64).contiguous()
        with one_accumulator():
            if not fp32:
                return torch.mm(a, b, out_dtype=torch.float32)[:m, :n]
            out = torch.mm(a[:, :FP32_CHUNK], b[:FP32_CHUNK])
            for start in range(FP32_CHUNK, a.shape[1], FP32_CHUNK):
                stop = start + FP32_CHUNK
                out = out + torch.mm(a[:, start:stop], b[start:stop])
            return out[:m, :n]

    @staticmethod
    def dot_tokens(a: Tensor, b: Tensor) -> Tensor:
        """[..., M, T] x [..., T, N], where K is all tokens: chunks of them, added in order in fp32."""
        size = token_chunk(a.shape[-1])
        out = Cuda.dot(a[..., :size], b[..., :size, :])
        for start in range(size, a.shape[-1], size):
            out = out + Cuda.dot(a[..., start : start + size], b[..., start : start + size, :])
        return out

    exp = staticmethod(torch.exp)


def arithmetic_for(device: torch.device, compute_dtype: torch.dtype) -> type[Portable] | type[Cuda]:
    """The provider whose bits the kernels of this device reproduce."""
    return Cuda if device.type == "cuda" and compute_dtype != torch.float64 else Portable
