"""The kernels on another instruction set, which a process chooses once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def digest_with(isa: str, module: str) -> str:
    """What `digest()` of a test module gives where MTLORA_CPU_ISA names isa; skips where the machine has not got it."""
    script = f"import {module} as t; print(t._C.cpu_isa(), t.digest())"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "MTLORA_CPU_ISA": isa, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    if "not an instruction set of this machine" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    used, digest = done.stdout.split() or ("", done.stderr)
    assert used == isa, digest
    return digest
