"""Rows of one run of `benchmarks model`: printed and saved as they are measured, compared at the end."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .model_contenders import BASE, ModelContender
from .model_layers import Layout
from .results import MODEL_FIELDS, append, provenance
from .timing import Timing


@dataclass(frozen=True)
class ModelShape:
    """A LLaMA by sizes, the tokens of one step as sequences x length, and the adapters put on it."""

    name: str
    config: dict
    batch: int
    length: int
    dtype: torch.dtype
    layouts: tuple[Layout, ...]


class ModelReport:
    """Prints, keeps and saves the rows of one run; folder None saves none."""

    def __init__(self, shape: ModelShape, device: torch.device, folder: Path | None) -> None:
        self.shape, self.device, self.rows, self.folder = shape, device, [], folder
        self._provenance = provenance(device)
        print("  ".join(f"{key} {value}" for key, value in self._provenance.items() if value))
        print(f"{shape.name}, {shape.batch * shape.length} tokens, {shape.dtype}", flush=True)

    @contextmanager
    def row(self, contender: ModelContender, layout: Layout, measure: str) -> Iterator[Callable]:
        """Yields what records one measurement. Running out of memory is a result too."""
        if self.device.type == "cuda":  # here, where the frames of an earlier exception are gone
            gc.collect()
            torch.cuda.empty_cache()
        try:
            yield lambda *args, **kwargs: self._record(contender, layout, measure, *args, **kwargs)
        except torch.OutOfMemoryError:
            self._keep(contender, layout, measure, note="does not fit")

    def _record(
        self,
        contender: ModelContender,
        layout: Layout,
        measure: str,
        time: Timing,
        peak: int | None = None,
        loss: float | None = None,
    ) -> None:
        base = [row for row in self.rows if (row["contender"], row["measure"]) == (BASE.name, measure)]
        over = time.p50 / float(base[-1]["p50_us"]) - 1 if base and contender is not BASE else None
        self._keep(
            contender,
            layout,
            measure,
            p20_us=f"{time.p20:.1f}",
            p50_us=f"{time.p50:.1f}",
            p80_us=f"{time.p80:.1f}",
            over_base=f"{over:.4f}" if over is not None else "",
            peak_gb=f"{peak / 1e9:.2f}" if peak is not None else "",
            loss="" if loss is None else repr(loss),
        )

    def _keep(self, contender: ModelContender, layout: Layout, measure: str, **values: str) -> None:
        layout_name = "" if contender is BASE else layout.name
        adapters = {"placement": layout_name, "rank": layout.rank, "experts": layout.experts, "groups": layout.groups}
        row = (
            self._provenance
            | {"model": self.shape.name, "tokens": self.shape.batch * self.shape.length}
            | {"dtype": str(self.shape.dtype).removeprefix("torch."), "contender": contender.name}
            | {"impl": contender.impl, "measure": measure, "exact": contender.exact}
            | (adapters if layout_name else {})
            | values
        )
        self.rows.append(row)
        if self.folder:  # at once: a run of minutes that is cut loses nothing
            append(self.folder / "model.csv", MODEL_FIELDS, [{k: v for k, v in row.items() if k in MODEL_FIELDS}])
        line = f"  {layout_name:<12}{f'{contender.name} {contender.impl}':<34}{measure:<22}"
        if "note" in values:
            print(line + values["note"], flush=True)
            return
        line += f"{float(values['p50_us']) / 1e3:>10.2f} ms"
        line += f"  {float(values['over_base']):+.1%}" if values["over_base"] else ""
        line += f"  peak {values['peak_gb']} GB" if values["peak_gb"] else ""
        print(line + (f"  loss {float(values['loss']):.6f}" if values["loss"] else ""), flush=True)

    def finish(self) -> int:
        """Exit status: 1 if the losses of exact contenders differ in a place."""
        if self.folder:
            print(f"{len(self.rows)} rows appended to {self.folder / 'model.csv'}")
        losses: dict[str, set[str]] = {}
        for row in self.rows:
            if row["exact"] and row.get("loss"):
                losses.setdefault(row["placement"], set()).add(row["loss"])
        unequal = {placement: values for placement, values in losses.items() if len(values) > 1}
        for placement, values in unequal.items():
            print(f"{placement}: LOSSES DIFFER, {sorted(values)}")
        return int(bool(unequal))
