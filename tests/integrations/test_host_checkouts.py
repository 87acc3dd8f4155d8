"""The official code itself, where a checkout is at hand; nothing of it is in this repository.

MTLORA_PUBLISHED_REPO=... python -m pytest tests/integrations/test_host_checkouts.py   # transformers 4.36.2
HYDRALORA_REPO=...        python -m pytest tests/integrations/test_host_checkouts.py   # tokenizers 0.13.3
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HOSTS = {  # variable -> (script, folder of the code, package that the host pins, version)
    "MTLORA_PUBLISHED_REPO": ("published_checkout.py", ".", "transformers", "4.36.2"),
    "HYDRALORA_REPO": ("hydralora_checkout.py", "HydraLoRA", "tokenizers", "0.13.3"),
}


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("variable", HOSTS)
def test_the_official_code_is_served(variable):
    script, folder, package, version = HOSTS[variable]
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a checkout of the official code")
    if installed(package) != version:
        pytest.skip(f"{package} is {installed(package)}, the official code needs {version}")
    code = Path(os.environ[variable], folder)
    paths = [code, HERE, HERE.parents[1], HERE.parents[1] / "python", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, HERE / script], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "equal:" in done.stdout
