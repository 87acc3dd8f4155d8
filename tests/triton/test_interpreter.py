"""The Triton kernels in Triton's interpreter: exact inputs, so that their arithmetic may be any device's."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_lattice_checks_agree_in_the_interpreter():
    command = [sys.executable, "-W", "ignore", "-m", "mtlora_kernels", "check", "--impl", "triton", "--quick"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "triton" in run.stdout
