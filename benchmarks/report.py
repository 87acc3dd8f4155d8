"""Collects rows of one adapter run, prints each as it is measured and saves them."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .floors import Rates, floor_us, measure_rates
from .registry import Contender
from .results import ADAPTER_FIELDS, RESULTS, append, provenance
from .shapes import DTYPE_NAMES, Shape
from .timing import Timing

# With one of two cores taken, a 0.4 ms call measured 8 ms: threads wait for each other by scheduler ticks.
BUSY_LOAD = 0.5


@dataclass
class Report:
    """Rows of a run. `failed` is set by the first result that differs from the reference."""

    device: torch.device
    save: bool
    folder: Path = RESULTS
    failed: bool = False
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._provenance = provenance(self.device)
        print("  ".join(f"{key} {value}" for key, value in self._provenance.items() if value))
        if self.device.type == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY_LOAD:
            print(f"other programs are running (load {os.getloadavg()[0]:.1f}): do not quote these times")

    def begin(self, shape: Shape) -> None:
        self._rates: Rates = measure_rates(self.device, shape.dtype)
        print(f"\n{shape.name}  ({self._rates})", flush=True)

    def note(self, contender: Contender, text: str) -> None:
        print(f"  {contender.name:<32}{text}", flush=True)

    def mismatch(self, contender: Contender, names: list[str]) -> None:
        self.failed = True
        self.note(contender, f"DIFFERS FROM THE REFERENCE, not timed: {', '.join(names)}")

    def record(
        self,
        shape: Shape,
        contender: Contender,
        measure: str,
        time: Timing,
        *,
        peak: int | None,
        has_floor: bool,
    ) -> None:
        """Print and keep one measurement; host times have no floor."""
        floor = floor_us(shape, self._rates, measure) if has_floor else None
        ratio = time.p50 / floor if floor else None
        line = f"{measure:<20}{time.p50:>11.1f} us  [{time.p20:.1f}, {time.p80:.1f}]"
        line += f"  {ratio:.1f} x floor" if ratio else ""
        line += f"  peak +{peak / 1e6:.0f} MB" if peak is not None else ""
        self.note(contender, line + self._speedups(shape, contender, measure, time))
        self.rows.append(
            {
                **self._provenance,
                "shape": shape.name,
                "tokens": shape.tokens,
                "d": shape.d,
                "rank": shape.rank,
                "experts": shape.experts,
                "groups": shape.groups,
                "dtype": DTYPE_NAMES[shape.dtype],
                "contender": contender.name,
                "impl": contender.impl,
                "numerics": contender.numerics,
                "measure": measure,
                "p20_us": f"{time.p20:.2f}",
                "p50_us": f"{time.p50:.2f}",
                "p80_us": f"{time.p80:.2f}",
                "floor_us": f"{floor:.2f}" if floor else "",
                "ratio_to_floor": f"{ratio:.3f}" if ratio else "",
                "peak_extra_mb": f"{peak / 1e6:.2f}" if peak is not None else "",
                "copy_gb_s": f"{self._rates.copy / 1e9:.1f}",
                "product_tflop_s": f"{self._rates.product / 1e12:.4g}",
            }
        )

    def _speedups(self, shape: Shape, contender: Contender, measure: str, time: Timing) -> str:
        if not contender.impl:
            return ""
        rivals = [r for r in self.rows if (r["shape"], r["measure"], r["impl"]) == (shape.name, measure, "")]
        parts = [f"{float(r['p50_us']) / time.p50:.2f} x {r['contender']}" for r in rivals]
        return f"  faster: {', '.join(parts)}" if parts else ""

    def finish(self) -> int:
        """Exit status: 1 after a mismatch."""
        if self.save and self.rows:
            path = self.folder / "adapter.csv"
            append(path, ADAPTER_FIELDS, self.rows)
            print(f"\n{len(self.rows)} rows appended to {path}")
        return int(self.failed)
