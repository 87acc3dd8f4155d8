"""Tile choice by shape class: a table, never a timing at run time.

K order never depends on these numbers, so they change speed and not bits. Rows were measured on an H200; the
attempts are in README.md beside this file.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Tile:
    """rows (tokens, or outputs in the K = T products), columns, k depth of one step, warps, pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict:
        """enable_fp_fusion off: a * b + c must round twice, as in the reference."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


SMALL_BATCH = 1024  # tokens up to which 16-row tiles give more parallelism than 64-row tiles give reuse
ROUTER_COLUMNS = 512  # padded router rows that fit in one tile's accumulators beside h


def project(tokens: int, columns: int, fp32: bool) -> Tile:
    """x [T, d_in] -> h and pi. columns: padded router rows in one tile."""
    if fp32:
        return Tile(16 if tokens <= SMALL_BATCH else 32, columns, 32, 4, 2)
    if tokens <= SMALL_BATCH:
        return Tile(16, columns, 128 if columns <= 128 else 64, 4, 4)
    return Tile(64, columns, 128 if columns <= 64 else 64, 4 if columns <= 128 else 8, 4 if columns <= 256 else 3)


def expand(tokens: int, group_size: int, fp32: bool) -> Tile:
    """z [T, N*r] x B_flat -> out, group form; depth is set by the experts of one chunk."""
    if fp32:
        return Tile(32, 32, 0, 4, 2)
    if tokens <= SMALL_BATCH:
        return Tile(16, 64, 0, 4, 2)
    return Tile(128, 128 if group_size >= 128 else 64, 0, 8, 2)


def expert_sum(tokens: int, fp32: bool) -> Tile:
    """out as a sum over experts: numerics "eager", and small groups."""
    if fp32:
        return Tile(32, 64, 0, 4, 2)
    return Tile(16 if tokens <= SMALL_BATCH else 64, 128, 0, 4, 3)


def contract(tokens: int, fp32: bool) -> Tile:
    """dout [T, d_out] x B -> d(w), d(h)."""
    if fp32:
        return Tile(32, 0, 32, 4, 2)
    return Tile(16 if tokens <= SMALL_BATCH else 64, 0, 64, 4, 3)


def route(columns: int) -> Tile:
    """d(w) -> d(logits), one tile of all experts of some groups."""
    return Tile(max(1, 4096 // columns), columns, 0, 4, 1)


def grad_x(fp32: bool) -> Tile:
    if fp32:
        return Tile(32, 64, 32, 4, 2)
    return Tile(64, 128, 64, 4, 3)


def grad_b(fp32: bool) -> Tile:
    """K = T; rows are outputs, depth is tokens a step, columns are experts x rank."""
    if fp32:
        return Tile(64, 64, 32, 4, 2)
    return Tile(64, 128, 64, 4, 3)


def grad_rows(router_rows: int, fp32: bool) -> Tile:
    """d(A), d(router): K = T; rows are input features, columns rows of the router."""
    columns = min(64 if fp32 else 128, 1 << max(4, (router_rows - 1).bit_length()))
    if fp32:
        return Tile(64, columns, 32, 4, 2)
    return Tile(64, columns, 128, 4, 4)


def small_groups(fp32: bool) -> Tile:
    """Backward of groups below 16 outputs."""
    return Tile(32 if fp32 else 64, 64, 32, 4, 2)


def expand_tiles(row_tiles: int, column_tiles: int, programs: int = 132) -> int:
    """Column tiles a program walks, so that about one wave of programs covers the output."""
    return max(1, min(column_tiles, row_tiles * column_tiles // programs))


def on_device(t: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
