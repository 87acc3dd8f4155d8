"""Tile choice by shape class: a table, never a timing at run time.

K order never depends on these numbers, so they change speed and not bits. Rows were measured on an H200, or where
they say so on an H100; the attempts are in README.md beside this file.
"""

import os
from dataclasses import dataclass

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
ROUTER_COLUMNS = 512  # padded router rows that fit in one tile's accumulators beside h ...
ROUTER_BLOCK = 128  # ... and those of one tile where they do not fit: 800 rows 96 us, in blocks of 256 108 us (H100)
PROGRAMS = 132  # multiprocessors of an H100 or H200

# Times below: bf16, T = 8192, d = 4096, r = 16, N = 16, G = 2, one kernel in a CUDA graph.


def project(tokens: int, columns: int, whole: bool, fp32: bool, direct: bool) -> Tile:
    """x [T, d_in] -> h and pi. columns: padded router rows in one tile. 21 us; 24 us with depth 64 and 8 warps.

    whole: they are all of them; a block of them takes 8 warps (19200 rows: 2.1 ms, with 4 warps 2.5 ms, H100).
    direct: x reaches the product as it was loaded. Otherwise 16-row tiles, which use mma.sync, see k permuted.
    """
    if fp32:
        return Tile(16 if tokens <= SMALL_BATCH else 32, columns, 32, 4, 2)
    if tokens <= SMALL_BATCH and direct:
        return Tile(16, columns, 128 if columns <= 128 else 64, 4, 4)
    warps = 4 if columns <= 128 and whole else 8
    return Tile(64, columns, 128 if columns <= 64 else 64, warps, 4 if columns <= 256 else 3)


def expand(tokens: int, group_size: int, one_z: bool, fp32: bool) -> Tile:
    """z [T, N*r] x B_flat -> out, group form. one_z: one product holds every expert.

    On an H100: 32 columns in 3 stages 76 us, 64 in 1 stage 83 us, 128 and 8 warps 79 us, 64 rows 90 us and more.
    Small groups walk few tiles, too few for stages: G = 32 85 us, in 3 stages 101 us. Groups of 24 outputs: 94 us,
    with 64 columns 134 us, with 64 rows 115 us.
    """
    if fp32:
        return Tile(32, 32, 0, 4, 2)
    if tokens <= SMALL_BATCH:
        return Tile(16, 64, 0, 4, 2)
    if one_z and group_size >= 1024:
        return Tile(128, 32, 0, 4, 3)
    return Tile(128, 32 if group_size <= 32 else 64, 0, 4, 1)


def expand_tiles(row_tiles: int, groups: int, tiles_per_group: int) -> int:
    """Column tiles a program walks with one z: 8 at most, fewer when programs would not cover the chip twice."""
    most = max(1, min(8, row_tiles * groups * tiles_per_group // (2 * PROGRAMS)))
    return next(tiles for tiles in range(most, 0, -1) if tiles_per_group % tiles == 0)


def expert_sum(tokens: int, group_size: int, fp32: bool) -> Tile:
    """out as a sum over experts: numerics "eager", and small groups. 92 us; 64 columns 100 us, 8 warps 106 us.

    A tile that spans groups gathers a weight for every output and wants few of them a thread, so that the weights
    stay in the first cache. G = 768 of the vision runs on an H100: 1.2 ms, 4 warps 3.4 ms, 64 x 128 tiles 7.5 ms.
    """
    if fp32:
        return Tile(32, 64, 0, 4, 2)
    if group_size % 64:
        return Tile(16, 64, 0, 8, 3)
    return Tile(16 if tokens <= SMALL_BATCH else 64, 64 if group_size % 128 else 128, 0, 4, 4)


def contract(tokens: int, fp32: bool, direct: bool) -> Tile:
    """dout [T, d_out] x B -> d(w), d(h). 53 us; 4 warps 58 us, 64 rows 92 us. direct as in `project`."""
    if fp32:
        return Tile(32, 0, 32, 4, 2)
    if tokens <= SMALL_BATCH:
        return Tile(16 if direct else 64, 0, 64, 4, 3)
    return Tile(128, 0, 64, 8, 4)


def route(columns: int) -> Tile:
    """d(w) -> d(logits), one tile of all experts of some groups. 4 us."""
    return Tile(max(1, 4096 // columns), columns, 0, 4, 1)


def grad_x(depth: int, fp32: bool) -> Tile:
    """dh A + dlogits R. 31 us with depth 32, 34 us with 64; G = 32: 86 us with depth 64, 99 us with 32."""
    if fp32:
        return Tile(32, 64, 32, 4, 2)
    return Tile(64, 128, 32 if depth <= 32 else 64, 4, 3)


def grad_b(fp32: bool) -> Tile:
    """K = tokens; rows are outputs, depth is tokens a step, columns are experts x rank. 69 us; 64 columns 82 us."""
    if fp32:
        return Tile(64, 64, 32, 4, 2)
    return Tile(128, 128, 64, 4, 3)


def grad_rows(router_rows: int, fp32: bool) -> Tile:
    """d(A), d(router): K = tokens; rows are input features, columns rows of the router.

    25 us with 64 rows and depth 64; G = 32: 96 us with 256 columns, 115 us with 128.
    """
    columns = min(64 if fp32 else 256, 1 << max(4, (router_rows - 1).bit_length()))
    if fp32:
        return Tile(64, columns, 32, 4, 2)
    if columns > 64:
        return Tile(128, columns, 64, 8, 4 if columns == 256 else 3)
    return Tile(64, columns, 64, 4, 6)


def small_groups(fp32: bool) -> Tile:
    """Backward of groups below 16 outputs."""
    return Tile(32 if fp32 else 64, 64, 32, 4, 2)
