"""What the compiler made of the CUDA kernels, read from the built extension; no GPU needed."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_C = pytest.importorskip("mtlora_kernels._C")


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that Triton ships."""
    triton = importlib.util.find_spec("triton")
    shipped = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else Path("/none")
    return shutil.which("cuobjdump") or (str(shipped) if shipped.exists() else None)


pytestmark = [
    pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="built without the CUDA kernels"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump on this machine"),
]


def dump(*options: str) -> str:
    return subprocess.run([cuobjdump(), *options, _C.__file__], capture_output=True, text=True, check=True).stdout


def resources() -> dict[str, dict[str, int]]:
    """Mangled kernel name -> REG, STACK, LOCAL, ... of each compiled kernel."""
    pairs = re.findall(r"Function (\S+):\n\s*(REG:.*)", dump("--dump-resource-usage"))
    return {name: {key: int(n) for key, n in re.findall(r"([A-Z]+):(\d+)", usage)} for name, usage in pairs}


def test_routed_lora_kernels_do_not_spill():
    # nvcc names anonymous namespaces after their file.
    hot = {name: usage for name, usage in resources().items() if "routed_lora" in name}
    assert len(hot) > 20
    spilling = {name: usage for name, usage in hot.items() if usage["STACK"] or usage["LOCAL"]}
    assert not spilling


@pytest.mark.parametrize("kernel", ["project_kernel", "expand_kernel", "contract_kernel", "token_kernel"])
def test_products_are_wgmma(kernel):
    name = next(name for name in resources() if kernel in name and "bfloat16" in name)
    assert "HGMMA" in dump("--dump-sass", "--function", name)
