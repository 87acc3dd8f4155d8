"""python -m mtlora_kernels check | info"""

import argparse
import dataclasses
import importlib
import json
import platform
import sys
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .dispatch import IMPLS, available_impls
from .spectral_dispatch import available_spectral_impls
from .testing.adapters import check_module
from .testing.rows import Row
from .testing.run import run_checks


def devices_present() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def info() -> int:
    print(f"mtlora_kernels {__version__}, python {platform.python_version()}, torch {torch.__version__}")
    try:
        print(f"triton {version('triton')}")
    except PackageNotFoundError:
        print("triton not installed")
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}: {device.name}, sm_{device.major}{device.minor}, CUDA {torch.version.cuda}")
    for device in devices_present():
        spectral = ", ".join(available_spectral_impls(device))
        print(f"implementations on {device}: {', '.join(available_impls(device))}; spectral: {spectral}")
    return 0


def _print_table(rows: list[Row]) -> None:
    total, failed, seconds = Counter(), Counter(), Counter()
    for row in rows:
        key = (row.device, row.impl, row.kind)
        total[key] += 1
        failed[key] += bool(row.mismatches)
        seconds[key] += row.seconds
    print(f"\n{'device':<8}{'impl':<11}{'check':<11}{'cases':>6}{'failed':>8}{'seconds':>9}")
    for key, count in total.items():
        device, impl, kind = key
        print(f"{device:<8}{impl:<11}{kind:<11}{count:>6}{failed[key]:>8}{seconds[key]:>9.1f}")


def _load(spec: str) -> torch.nn.Module:
    package, _, factory = spec.partition(":")
    if not factory:
        raise SystemExit(f"--module is {spec!r}, it must be package.module:factory")
    sys.path.insert(0, "")
    return getattr(importlib.import_module(package), factory)()


def check(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    count = 0

    def progress(row: Row) -> None:
        nonlocal count
        count += 1
        if arguments.json:
            return
        name = f"{row.device} {row.impl} {row.kind}"
        if row.mismatches:
            print(f"DIFFERS {name} {row.case}", *row.mismatches, sep="\n    ", flush=True)
        if count % 100 == 0:
            print(f"{count} checks, {time.perf_counter() - start:.0f} s, now {name}", flush=True)

    if arguments.device and arguments.device not in devices_present():
        raise SystemExit(f"--device is {arguments.device!r}, it must be one of {devices_present()} here")
    if arguments.module:
        rows = check_module(_load(arguments.module).to(arguments.device or "cpu"))
        for row in rows:
            progress(row)
    else:
        devices = [arguments.device] if arguments.device else devices_present()
        impls = [arguments.impl] if arguments.impl else None
        rows = run_checks(devices, impls, arguments.quick, progress, arguments.jobs)
    failed = sum(bool(row.mismatches) for row in rows)
    status = 1 if failed or not rows else 0
    if arguments.json:
        print(json.dumps({"passed": status == 0, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
        return status
    _print_table(rows)
    verdict = f"{failed} of {len(rows)} checks differ" if rows else "nothing could be checked"
    print(f"\n{verdict if status else f'all {len(rows)} checks agree'}, {time.perf_counter() - start:.0f} s")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mtlora_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, implementations")
    options = commands.add_parser("check", help="run the arithmetic contract; exit status 1 on a mismatch")
    options.add_argument("--device", choices=("cpu", "cuda"))
    options.add_argument("--impl", choices=IMPLS, help="only this implementation")
    options.add_argument("--quick", action="store_true", help="fewer shapes and dtypes")
    options.add_argument("--jobs", type=int, default=1, metavar="N", help="worker processes (default: %(default)s)")
    options.add_argument("--json", action="store_true", help="machine-readable rows instead of a table")
    options.add_argument("--module", metavar="PACKAGE.MODULE:FACTORY", help="check the adapter that factory() returns")
    arguments = parser.parse_args()
    if arguments.command == "check" and arguments.jobs < 1:
        raise SystemExit(f"--jobs is {arguments.jobs}, it must be at least 1")
    return info() if arguments.command == "info" else check(arguments)


if __name__ == "__main__":
    sys.exit(main())
