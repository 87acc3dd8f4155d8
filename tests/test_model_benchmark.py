"""`benchmarks model` at sizes that say nothing about speed."""

import csv
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
from benchmarks import model, model_contenders, model_report
from benchmarks.__main__ import parse
from benchmarks.model_contenders import BASE, PUBLISHED
from benchmarks.results import MODEL_FIELDS, load

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    layouts = tuple(replace(layout, rank=4, experts=4) for layout in model.SMALL.layouts)
    shape = replace(model.SMALL, config=model.SMALL.config | SIZES, length=8, layouts=layouts)
    monkeypatch.setattr(model, "SMALL", shape)
    monkeypatch.setattr(model, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(model, "STEP_REPEATS", 1)
    monkeypatch.setattr(model, "DECODE_REPEATS", 1)


def test_writes_rows_of_every_field(tmp_path):
    for _ in range(2):
        assert model.run(CPU, impls=("reference", "cpu"), folder=tmp_path) == 0
    with (tmp_path / "model.csv").open() as file:
        assert tuple(next(csv.reader(file))) == MODEL_FIELDS
    rows = load(tmp_path / "model.csv")
    assert len(rows) == 2 * 3 * 2 * (1 + 2 + 2 * 3)  # runs, measures, places, base, rivals and ours twice
    assert {row["impl"] for row in rows} == {"", "reference", "cpu"}
    assert {row["placement"] for row in rows} == {"", "block ffn", "q, v"}
    assert all((row["over_base"] == "") == (row["contender"] == BASE.name) for row in rows)
    losses = {float(row["loss"]) for row in rows if row["placement"] == "block ffn" and row["loss"]}
    assert max(losses) - min(losses) < 1e-5 and not any(row["note"] for row in rows)


@pytest.mark.parametrize("index", [0, 1])
def test_contenders_compute_the_same_and_leave_the_model_as_it_was(index):
    llama, layout = model.build(model.SMALL, CPU), model.SMALL.layouts[index]
    ids = torch.randint(64, (2, 8))
    names, base, found = list(llama.state_dict()), llama(ids).logits, {}
    for contender in model_contenders.model_contenders(["cpu"]):
        adapted, detach = contender.attach(llama, layout, contender.impl)
        found[contender] = adapted(ids).logits
        detach()
        assert list(llama.state_dict()) == names and torch.equal(llama(ids).logits, base)
        assert not any(m._forward_hooks for n, m in llama.named_modules() if n.endswith(layout.targets))
    assert len(found) == 5 and not torch.allclose(found[PUBLISHED], base, atol=1e-4)
    for out in found.values():
        torch.testing.assert_close(out, found[PUBLISHED])


def test_running_out_of_memory_is_a_row(monkeypatch, capsys):
    def attach(llama, layout, impl):
        def fail(*args, **kwargs):
            raise torch.OutOfMemoryError("GPU 0 has a total capacity of 1 GiB")

        handle = llama.lm_head.register_forward_pre_hook(fail)
        return llama, handle.remove

    big = model_contenders.ModelContender("big", attach)
    monkeypatch.setattr(model, "model_contenders", lambda impls: [big])
    assert model.run(CPU, save=False) == 0
    assert capsys.readouterr().out.count("does not fit") == 3 * 2  # every measure in both places


def test_unequal_losses_fail(capsys):
    report = model_report.ModelReport(model.SMALL, CPU, None)
    for loss in ("1.0", "1.5"):
        report.rows.append({"placement": "block ffn", "exact": True, "loss": loss})
    assert report.finish() == 1
    assert "LOSSES DIFFER" in capsys.readouterr().out


def test_command_line():
    assert parse(["model", "--quick", "--device", "cpu"]).quick
