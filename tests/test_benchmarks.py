"""The benchmarks' arithmetic, gate and files; small sizes on the CPU."""

import csv
import time
from dataclasses import replace

import pytest
import torch

import benchmarks.adapter
from benchmarks.__main__ import parse
from benchmarks.checks import mismatches
from benchmarks.floors import Rates, compulsory_bytes, floor_us, operations
from benchmarks.registry import EXPERT_LOOP, GROUP_PRODUCT, Contender, routed_lora
from benchmarks.results import ACCURACY_FIELDS, ADAPTER_FIELDS, LOSS_FIELDS, PROVENANCE, TRAIN_FIELDS, load
from benchmarks.shapes import CUDA_SHAPES, Shape, make_inputs
from benchmarks.timing import BUDGET_S, SLOW_CALL_S, SlowCall, peak_extra_bytes, quantiles, time_call

CPU = torch.device("cpu")
H200 = Rates(copy=4274e9, product=790e12)
TINY = Shape(12, 24, 4, 3, 2, torch.float32)


@pytest.fixture(autouse=True)
def one_thread():
    """At these sizes threads only wait for each other, for long where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("shape", "forward", "both"),
    [
        (Shape(8192, 4096, 16, 16, 1), 47, 96),
        (Shape(8192, 4096, 16, 16, 2), 47, 99),
        (Shape(8192, 4096, 16, 16, 32), 67, 200),
        (Shape(16384, 768, 16, 25, 32), 39, 116),
    ],
)
def test_floor_of_published_shapes(shape, forward, both):
    assert round(floor_us(shape, H200, "forward")) == forward
    assert round(floor_us(shape, H200, "forward+backward")) == both


def test_bytes_and_operations_by_hand():
    shape = Shape(tokens=10, d=8, rank=2, experts=3, groups=4, dtype=torch.bfloat16)
    # per token: A 8*2, router 8*(4*3), experts 8*(3*2) multiply-adds forward
    assert operations(shape)[0] == 10 * 2 * (16 + 96 + 48)
    # backward: dout B and dout^T z, 8*(3*2) each; two products each for A and for the router
    assert operations(shape)[1] == 10 * 2 * (2 * 48 + 2 * 16 + 2 * 96)
    # activations 3 * 10 * 8 = 240 elements; weights 8 * (2 + 12 + 6) = 160, and as many gradients in backward
    assert compulsory_bytes(shape) == (2 * 240, 2 * 320)


def test_one_token_is_bound_by_the_weights():
    shape = Shape(1, 4096, 16, 16, 2)
    assert compulsory_bytes(shape)[0] == 2 * 4096 * (16 + 32 + 256)


def test_shape_names_are_unique_and_match_patterns():
    names = [shape.name for shape in CUDA_SHAPES]
    assert len(set(names)) == len(names)
    assert names[1] == "T8192-d4096-r16-N16-G2-bf16"


@pytest.mark.parametrize("groups", [1, 2, 24])
@pytest.mark.parametrize("rival", [EXPERT_LOOP, GROUP_PRODUCT], ids=lambda rival: rival.name)
def test_rivals_compute_the_operator(rival, groups):
    inputs = make_inputs(Shape(12, 24, 4, 3, groups, torch.float32), CPU)
    out, *grads = rival.forward_backward(inputs)
    expected_out, *expected = routed_lora("reference", "fp32").forward_backward(inputs)
    if rival.by_expert:
        grads = [*grads[:2], torch.stack(grads[2:5]), *grads[5:]]
    torch.testing.assert_close(out, expected_out)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_group_product_uses_one_product_per_large_group():
    inputs = make_inputs(Shape(12, 64, 4, 3, 2, torch.float32), CPU)
    torch.testing.assert_close(GROUP_PRODUCT.forward(inputs), EXPERT_LOOP.forward(inputs))


def _wrong(inputs):
    return routed_lora("reference", "fp32").forward(inputs) * (1 + 2**-20)


def test_gate_names_what_differs():
    assert mismatches(routed_lora("reference", "fp32"), TINY, CPU) == []
    names = [text.split()[0] for text in mismatches(Contender("wrong", _wrong, "x", "fp32"), TINY, CPU)]
    assert "out" in names and "d(lora_b)" in names


@pytest.fixture
def tiny_suite(monkeypatch):
    """One tiny shape, given rates and few repeats."""
    monkeypatch.setattr(benchmarks.adapter, "shape_table", lambda device, quick: (TINY,))
    monkeypatch.setattr("benchmarks.report.measure_rates", lambda device, dtype: H200)
    monkeypatch.setitem(BUDGET_S, "cpu", 0.001)


def test_adapter_run_writes_rows_of_every_field(tiny_suite, tmp_path, capsys):
    path = tmp_path / "adapter.csv"
    for _ in range(2):
        assert benchmarks.adapter.run(CPU, impls=("reference",), numerics=("fp32",), folder=tmp_path) == 0
    with path.open() as file:
        assert tuple(next(csv.reader(file))) == ADAPTER_FIELDS
    rows = load(path)
    assert len(rows) == 2 * 3 * 2  # runs, contenders, measures
    for row in rows:
        assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert float(row["ratio_to_floor"]) > 0
        assert row["torch"] == torch.__version__ and row["commit"] and row["date"] and row["device"]
    assert "faster" in capsys.readouterr().out


def test_accuracy_rows_compare_with_float64(monkeypatch, tmp_path, capsys):
    from benchmarks import accuracy

    shape = replace(TINY, dtype=torch.bfloat16)
    monkeypatch.setattr(accuracy, "shape_table", lambda device, quick: (shape,))
    assert accuracy.run(CPU, impls=("reference",), folder=tmp_path) == 0
    rows = load(tmp_path / "accuracy.csv")
    assert tuple(rows[0]) == ACCURACY_FIELDS
    assert len(rows) == 3 * 5  # contenders, results
    assert all(1e-4 < float(row["relative_error"]) < 1e-2 for row in rows)
    monkeypatch.setattr(accuracy, "SAME_ERROR", 0.0)
    assert accuracy.run(CPU, impls=("reference",), save=False) == 1
    assert "errors are larger" in capsys.readouterr().out


def test_kernels_need_a_gpu_and_have_short_names():
    from benchmarks import kernels

    with pytest.raises(SystemExit, match="it must be cuda"):
        kernels.run(CPU)
    assert kernels.short_name("_project_kernel") == "_project_kernel"
    assert kernels.short_name("void mtlora::(anonymous namespace)::expand<128, 64>(Params)") == "expand"


def test_plot_draws_what_is_stored(tiny_suite, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    assert plots.draw_all(tmp_path) == 1
    benchmarks.adapter.run(CPU, impls=("reference",), numerics=("fp32",), folder=tmp_path)
    assert plots.draw_all(tmp_path) == 0
    assert len(list(tmp_path.glob("adapter_*.png"))) == 1


def test_small_batch_reports_host_times(tiny_suite, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.small_batch.small_batch_table", lambda device, quick: (TINY,))
    field = {"impls": ("reference",), "numerics": ("eager",), "shapes": "none"}
    assert benchmarks.adapter.run(CPU, **field, small_batch=True, folder=tmp_path) == 0
    rows = load(tmp_path / "adapter.csv")
    assert [row["measure"] for row in rows] == ["host, grad", "host, inference"] * 3
    assert all(row["ratio_to_floor"] == "" for row in rows)


def test_a_mismatch_prints_no_time_and_fails(tiny_suite, monkeypatch, capsys):
    wrong = [Contender("wrong", _wrong, "wrong", "fp32")]
    monkeypatch.setattr(benchmarks.adapter, "contenders", lambda *args: wrong)
    assert benchmarks.adapter.run(CPU, save=False) == 1
    printed = capsys.readouterr().out
    assert "DIFFERS" in printed and " us " not in printed


def test_quantiles_interpolate():
    timing = quantiles([float(v) for v in range(1, 12)])
    assert (timing.p20, timing.p50, timing.p80) == (3.0, 6.0, 9.0)


def test_slow_calls_are_not_repeated(monkeypatch):
    monkeypatch.setitem(SLOW_CALL_S, "cpu", 0.001)
    with pytest.raises(SlowCall):
        time_call(lambda: time.sleep(0.002), CPU)


def test_peak_memory_sees_temporaries():
    size = 64 << 20

    def allocate():
        return torch.ones(size, dtype=torch.uint8).max()

    allocate()
    peak = peak_extra_bytes(allocate, CPU)
    assert peak is None or 0.8 * size < peak < 1.5 * size


def test_command_line():
    args = parse(["adapter", "--quick", "--device", "cpu", "--numerics", "fp32", "--no-compile", "--shapes", "*G2*"])
    assert (args.compile, args.numerics, args.shapes) == (False, ["fp32"], "*G2*")
    assert parse(["train", "--steps", "3"]).steps == 3
    assert parse(["train"]).size is None and parse(["train", "--size", "base"]).size == "base"


def test_train_losses_are_equal(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from benchmarks import train, vit

    digits = train.load_digits()
    few = replace(digits, test_images=digits.test_images[:8], test_labels=digits.test_labels[:8])
    monkeypatch.setattr(train, "load_digits", lambda: few)
    monkeypatch.setattr(vit, "PRETRAIN_STEPS", 2)
    assert train.run(CPU, steps=3, folder=tmp_path) == 0
    rows, losses = load(tmp_path / "train.csv"), load(tmp_path / "train_loss.csv")
    assert tuple(rows[0]) == TRAIN_FIELDS and tuple(losses[0]) == LOSS_FIELDS
    assert set(PROVENANCE) < set(rows[0])
    assert len(losses) == 3 * len(rows) == 6
    assert [row["loss"] for row in losses[:3]] == [row["loss"] for row in losses[3:]]


def test_train_size(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from benchmarks import train, vit

    small = replace(vit.BASE, width=32, depth=3, heads=2, images_per_task=1)
    monkeypatch.setitem(vit.SIZES, "base", small)
    monkeypatch.setattr(vit, "PRETRAIN_STEPS", 2)
    assert train.run(CPU, steps=2, size="base", folder=tmp_path) == 0
    assert {row["model"] for row in load(tmp_path / "train.csv") + load(tmp_path / "train_loss.csv")} == {"base"}


def test_train_difference_names_the_step():
    pytest.importorskip("sklearn")
    from benchmarks.train_report import TrainRun, difference

    def trained(losses, value=1.0):
        return TrainRun("x", losses, {"a": torch.tensor(value)}, {}, quantiles([1.0]))

    assert difference(trained([2.0, 1.0]), trained([2.0, 1.0])) is None
    assert "step 2" in difference(trained([2.0, 1.0]), trained([2.0, 1.0000001]))
    assert "a differs" in difference(trained([2.0]), trained([2.0], value=1.5))
    assert difference(trained([float("nan")]), trained([float("nan")])) is not None


def test_every_task_keeps_the_images_apart():
    from benchmarks.digits import TASKS, all_tasks

    images = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    tasks = all_tasks(images)
    assert tasks.shape == (15, 2, 8, 8) and len(TASKS) == 15
    for i in range(15):
        assert not any(torch.equal(tasks[i], tasks[j]) for j in range(i))
