"""The spectral benchmarks: rivals compute what they are compared with, rows have every field."""

import csv

import pytest
import torch

import benchmarks.spectral as bench
import mtlora_kernels as mk
from benchmarks import spectral_contenders
from benchmarks.__main__ import parse
from benchmarks.results import load
from benchmarks.timing import BUDGET_S
from mtlora_kernels.testing import float64_penalty, make_adapters, trap_matrices

CPU = torch.device("cpu")


@pytest.mark.parametrize("contender", spectral_contenders.decompositions(CPU, ("reference",)), ids=lambda c: c.name)
def test_decompositions_agree(contender):
    a = trap_matrices(2, 60, 8)["random"]
    u, s, vh = contender.call(a, 8)
    torch.testing.assert_close((u * s[:, None]) @ vh, a, rtol=1e-4, atol=1e-4)
    assert (s.diff() <= 0).all()


@pytest.mark.parametrize("kind", ["pairwise", "gram"])
def test_penalties_agree(kind):
    lora_b = make_adapters(2, 3, 40, 8, dtype=torch.float32, device=CPU).lora_b
    expected, gradient = float64_penalty(lora_b, kind)
    for contender in spectral_contenders.penalties(kind, CPU, ("reference",)):
        loss, grad = contender.call(lora_b)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(grad.double(), gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


@pytest.fixture
def tiny_tasks(monkeypatch):
    given = bench.tasks(CPU, True)
    tiny = {3: (8, 40, 4), 4: (1, 3, 40, 4)}
    shapes = [type(t)(t.name, tiny[len(t.shape)], t.dtype, t.contenders, min(t.rank, 4), t.passes) for t in given]
    monkeypatch.setattr(bench, "tasks", lambda device, quick: shapes)
    monkeypatch.setattr(bench, "measure_rates", lambda device, dtype: type("Rates", (), {"copy": 1e11}))
    monkeypatch.setitem(BUDGET_S, "cpu", 0.001)


def test_rows_have_every_field(tiny_tasks, tmp_path, capsys):
    assert bench.run(CPU, impls=("reference",), folder=tmp_path) == 0
    for name, fields in (("spectral", bench.SPEED_FIELDS), ("spectral_accuracy", bench.ACCURACY_FIELDS)):
        with (tmp_path / f"{name}.csv").open() as file:
            assert tuple(next(csv.reader(file))) == fields
        rows = load(tmp_path / f"{name}.csv")
        assert rows and {row["impl"] for row in rows} == {"", "reference"}
        assert all(value != "" for row in rows for key, value in row.items() if key not in ("impl", "triton"))
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    assert plots.draw_all(tmp_path) == 0 and len(list(tmp_path.glob("spectral_*.png"))) == 1


def test_a_mismatch_prints_no_time_and_fails(tiny_tasks, monkeypatch, capsys):
    exact = mk.batched_rsvd

    def wrong(a, rank, impl=None):
        u, s, vh = exact(a, rank, impl="reference")
        return (u, s * (1 + 2**-20), vh) if impl == "cpu" else (u, s, vh)

    monkeypatch.setattr(mk, "batched_rsvd", wrong)
    monkeypatch.setattr(bench, "accuracy", lambda *args: [])
    assert bench.run(CPU, impls=("cpu",), save=False) == 1
    assert "DIFFERS FROM THE REFERENCE" in capsys.readouterr().out


def test_report_draws(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from benchmarks import spectral_report, vit

    monkeypatch.setattr(spectral_report, "QUICK_STEPS", 2)
    monkeypatch.setattr(vit, "PRETRAIN_STEPS", 2)
    assert spectral_report.run(CPU, quick=True, folder=tmp_path) == 0
    assert (tmp_path / "spectral_report.png").exists()


def test_train_with_the_penalty_keeps_losses_equal(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn")
    from benchmarks import train, vit

    monkeypatch.setattr(vit, "PRETRAIN_STEPS", 2)
    assert train.run(CPU, steps=3, spectral=0.1, folder=tmp_path) == 0
    losses = load(tmp_path / "train_loss.csv")
    reference, kernels, without = (losses[i : i + 3] for i in (0, 3, 6))
    assert [row["loss"] for row in reference] == [row["loss"] for row in kernels]
    assert [row["loss"] for row in without] != [row["loss"] for row in kernels]
    assert ["spectral penalty" in row["impl"] for row in losses] == 6 * [True] + 3 * [False]
    assert "more than" in capsys.readouterr().out


def test_command_line():
    assert parse(["spectral", "--report"]).report and not parse(["spectral", "--quick"]).report
    assert parse(["train", "--spectral", "0.1"]).spectral == 0.1 and parse(["train"]).spectral == 0
