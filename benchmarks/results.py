"""Rows of results: what ran, on what, from which commit; appended to results/<command>.csv."""

import csv
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import mtlora_kernels

RESULTS = Path(__file__).parent / "results"
PROVENANCE = ("date", "commit", "device", "torch", "triton", "mtlora_kernels")
ADAPTER_FIELDS = (
    *PROVENANCE, "shape", "tokens", "d", "rank", "experts", "groups", "dtype", "contender", "impl",
    "numerics", "measure", "p20_us", "p50_us", "p80_us", "floor_us", "ratio_to_floor", "peak_extra_mb",
    "copy_gb_s", "product_tflop_s",
)  # fmt: skip
ACCURACY_FIELDS = (
    *PROVENANCE, "shape", "contender", "impl", "numerics", "result", "max_error", "relative_error",
    "ratio_to_published",
)  # fmt: skip
KERNEL_FIELDS = (
    *PROVENANCE, "shape", "impl", "numerics", "measure", "step", "kernel", "p20_us", "p50_us", "p80_us",
)  # fmt: skip
TRAIN_FIELDS = (
    *PROVENANCE, "model", "impl", "steps", "p20_us", "p50_us", "p80_us", "loss_first", "loss_last",
    "mean_accuracy", "accuracy",
)  # fmt: skip
MODEL_FIELDS = (
    *PROVENANCE, "model", "tokens", "dtype", "placement", "rank", "experts", "groups", "contender",
    "impl", "measure", "p20_us", "p50_us", "p80_us", "over_base", "peak_gb", "loss", "note",
)  # fmt: skip
LOSS_FIELDS = (*PROVENANCE, "model", "impl", "step", "loss")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


@cache
def commit() -> str:
    """Short hash of the checkout, with -dirty if tracked files differ from it; unknown outside one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(device: torch.device) -> dict[str, str]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "mtlora_kernels": mtlora_kernels.__version__,
    }


def append(path: Path, fields: tuple[str, ...], rows: Iterable[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def load(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
