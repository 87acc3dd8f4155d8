"""DDP and FSDP2 on two processes: losses, gradients and parameters of one process that accumulates their batches.

Equal bit for bit: of two gradients the sum does not depend on the order, and the mean halves exactly. One batch of
all sequences adds tokens in another order, and its load, that of the balance term, is another: it is compared without
that term and with a tolerance.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
KINDS = ("attached", "peft")


def launch(command: str, folder: Path) -> list[int]:
    """Exit codes of both processes."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    worker = str(Path(__file__).parent / "worker.py")
    arguments = [[sys.executable, worker, command, str(folder), str(rank)] for rank in range(2)]
    logs = [(folder / f"{command}{rank}.log").open("w") for rank in range(2)]
    running = [
        subprocess.Popen(a, env=environment, stdout=log, stderr=log) for a, log in zip(arguments, logs, strict=True)
    ]
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    if command == "train" and any(codes):
        pytest.fail("\n".join((folder / f"{command}{rank}.log").read_text()[-3000:] for rank in range(2)))
    return codes


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """By adapter kind and run; the two processes hold the same."""
    folder = tmp_path_factory.mktemp("distributed")
    assert launch("killed", folder) == [-signal.SIGKILL] * 2
    launch("train", folder)
    first, second = (torch.load(folder / f"results{rank}.pt") for rank in range(2))
    for run, values in first.items():
        assert values["losses"] == second[run]["losses"]
        assert equal(values["parameters"], second[run]["parameters"])
    return first


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process_bit_for_bit(results, kind, wrapper):
    expected, got = results[kind, "one process"], results[kind, wrapper]
    assert got["losses"] == expected["losses"] and len(set(map(tuple, got["losses"].values()))) == 4
    assert got["penalties"] == expected["penalties"] and all(value > 0 for value in got["penalties"].values())
    assert equal(got["gradients"], expected["gradients"])
    assert all(gradient.any() for gradient in got["gradients"].values())
    assert equal(got["parameters"], expected["parameters"])


@pytest.mark.parametrize("kind", KINDS)
def test_is_close_to_one_batch_of_all_sequences(results, kind):
    expected, got = results[kind, "one batch"], results[kind, "two batches"]
    assert sum(got["losses"][1]) / 2 == pytest.approx(expected["losses"][1][0], rel=1e-6)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(got["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_after_a_killed_step(results, kind):
    whole, resumed = results[kind, "fsdp2"], results[kind, "resumed"]
    assert list(resumed["losses"]) == [3, 4]
    assert all(resumed[what][step] == whole[what][step] for what in ("losses", "penalties") for step in (3, 4))
    assert equal(resumed["parameters"], whole["parameters"])
