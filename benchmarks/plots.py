"""`python -m benchmarks plot`: the stored rows as PNG beside them."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on the machines this runs on
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .registry import PACKAGE
from .results import RESULTS, load

Row = dict[str, str]
RIVAL_COLOURS = ("0.35", "0.55", "0.7", "0.82", "0.25", "0.45", "0.62", "0.76", "0.88", "0.15")
OUR_COLOURS = ("tab:blue", "tab:cyan", "tab:green", "tab:olive", "tab:purple", "tab:pink")


def draw_all(folder: Path = RESULTS) -> int:
    drawn = []
    if (folder / "adapter.csv").exists():
        drawn += draw_adapter(folder)
    if (folder / "spectral.csv").exists():
        drawn += draw_spectral(folder)
    if (folder / "train_loss.csv").exists():
        drawn.append(draw_train_loss(folder))
    for path in drawn:
        print(path)
    if not drawn:
        print(f"no rows in {folder}: run `python -m benchmarks adapter` or `train` first")
    return int(not drawn)


def draw_adapter(folder: Path) -> list[Path]:
    """One figure per device: time of the newest row of each (shape, measure, contender), and memory."""
    by_device: dict[str, dict[tuple, Row]] = {}
    for row in load(folder / "adapter.csv"):
        newest = by_device.setdefault(row["device"], {})
        newest[row["shape"], row["measure"], row["contender"]] = row  # the file is in order of time
    drawn = []
    for device, newest in by_device.items():
        path = folder / f"adapter_{_file_stem(device)}.png"
        _draw_device(device, list(newest.values()), path)
        drawn.append(path)
    return drawn


def _file_stem(device: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def _draw_device(device: str, rows: list[Row], path: Path) -> None:
    timed = [row for row in rows if row["ratio_to_floor"]]
    measures = sorted({row["measure"] for row in timed})
    kept = [row for row in timed if row["peak_extra_mb"]]
    figure, axes = plt.subplots(len(measures) + 1, 1, figsize=(11, 4 * (len(measures) + 1)), squeeze=False)
    for ax, measure in zip(axes[:, 0], measures, strict=False):
        group = [row for row in timed if row["measure"] == measure]
        _bars(ax, group, "ratio_to_floor", f"{measure}: time / floor")
        ax.axhline(1, color="tab:red", linewidth=1)
    _bars(
        axes[-1, 0],
        [r for r in kept if r["measure"] == measures[-1]] or kept,
        "peak_extra_mb",
        "peak extra MB",
    )
    axes[0, 0].set_title(device)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize="small")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(ax: Axes, rows: list[Row], value: str, label: str) -> None:
    """One cluster of bars a shape, one bar a contender; logarithmic, because they span three decades."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    rivals = [c for c in contenders if not c.startswith(PACKAGE)]
    ours = [c for c in contenders if c.startswith(PACKAGE)]
    colours = dict(zip(rivals, RIVAL_COLOURS, strict=False)) | dict(zip(ours, OUR_COLOURS, strict=False))
    width = 0.8 / max(1, len(contenders))
    for i, contender in enumerate(rivals + ours):
        found = {row["shape"]: float(row[value]) for row in rows if row["contender"] == contender}
        positions = [k + (i - (len(contenders) - 1) / 2) * width for k, s in enumerate(shapes) if s in found]
        heights = [found[shape] for shape in shapes if shape in found]
        bars = ax.bar(positions, heights, width, color=colours.get(contender), label=contender)
        ax.bar_label(bars, [f"{h:.3g}" for h in heights], fontsize=6, rotation=90, padding=2)
    ax.set_xticks(range(len(shapes)), [s.replace("-r", "\nr") for s in shapes], fontsize="small")
    ax.set_yscale("log")
    ax.margins(y=0.2)
    ax.set_ylabel(label)


def draw_spectral(folder: Path) -> list[Path]:
    """One figure per device: the newest time of each (task, shape, dtype, contender)."""
    by_device: dict[str, dict[tuple, Row]] = {}
    for row in load(folder / "spectral.csv"):
        case = f"{row['task']}\n{row['shape']} {row['dtype']}"
        by_device.setdefault(row["device"], {})[case, row["contender"]] = row | {"shape": case}
    drawn = []
    for device, newest in by_device.items():
        figure, ax = plt.subplots(figsize=(14, 6))
        _bars(ax, list(newest.values()), "p50_us", "us")
        ax.set_title(device)
        figure.legend(*ax.get_legend_handles_labels(), loc="lower center", ncols=6, fontsize="small")
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        drawn.append(folder / f"spectral_{_file_stem(device)}.png")
        figure.savefig(drawn[-1], dpi=120)
        plt.close(figure)
    return drawn


def draw_train_loss(folder: Path) -> Path:
    """Loss curves of the newest run; equal curves lie on each other, so each next one is thinner."""
    rows = load(folder / "train_loss.csv")
    newest = [row for row in rows if row["date"] == rows[-1]["date"]]
    figure, ax = plt.subplots(figsize=(7, 4))
    impls = list(dict.fromkeys(row["impl"] for row in newest))
    for i, impl in enumerate(impls):
        curve = [(int(row["step"]), float(row["loss"])) for row in newest if row["impl"] == impl]
        ax.plot(*zip(*curve, strict=True), label=impl, linewidth=6 / (1 + 3 * i), color="0.75" if i == 0 else None)
    ax.set_xlabel("step")
    ax.set_ylabel("loss, mean of 15 tasks")
    ax.set_title(f"{newest[0]['model']} model, {newest[0]['device']}", fontsize="small")
    ax.legend()
    figure.tight_layout()
    path = folder / "train_loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
