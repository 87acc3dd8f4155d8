"""What may import what, seen from fresh processes and from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtlora_kernels

PACKAGE = Path(mtlora_kernels.__file__).parent
BACKENDS = {"reference", "native", "triton"}

BLOCK = """
import sys
sys.modules["triton"] = sys.modules["mtlora_kernels._C"] = None  # as if not installed
"""


def run(code: str) -> str:
    root = str(PACKAGE.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_runs_on_torch_alone():
    code = """
import mtlora_kernels as mk
from mtlora_kernels.testing import random_inputs, run_case
results = run_case(None, random_inputs(5, 24, 32, 4, 5, 2))
assert mk.available_impls("cpu") == ("reference",), mk.available_impls("cpu")
print(sorted(results))
"""
    assert "dlora_a" in run(BLOCK + code)


def test_reference_loads_nothing_but_torch():
    code = """
import sys, types
package = types.ModuleType("mtlora_kernels")  # without running mtlora_kernels/__init__.py
package.__path__ = ["mtlora_kernels"]
sys.modules["mtlora_kernels"] = package
import torch
before = set(sys.modules)
import mtlora_kernels.reference.routed_lora, mtlora_kernels.reference.routed_lora_bwd
import mtlora_kernels.reference.spectral
print(sorted(name for name in set(sys.modules) - before if not name.startswith(("mtlora_kernels", "torch"))))
own = {name for name, module in sys.modules.items() if module and name.startswith("mtlora_kernels")}
print(sorted(name for name in own if ".reference" not in name))
"""
    outside, own = run(BLOCK + code).splitlines()
    assert outside == "[]"
    assert own == "['mtlora_kernels']"


def test_import_is_light():
    """Importing the package loads no backend, no compiler and no driver."""
    loaded = run("import sys, mtlora_kernels; print([m for m in sys.modules if m.split('.')[0] == 'triton'])")
    assert loaded.strip() == "[]"
    loaded = run(
        "import sys, torch, mtlora_kernels; print(torch.cuda.is_initialized(), 'mtlora_kernels._C' in sys.modules)"
    )
    # A CUDA build of torch asks the extension, which loads no driver, what it was compiled for.
    assert loaded.split() == ["False", str(torch.version.cuda is not None)]


def imports(path: Path) -> set[str]:
    """Absolute names of every module that a file of the package imports."""
    package = ("mtlora_kernels", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_backends_do_not_import_each_other(backend):
    # The reference is the specification: backends may take its shape rules and constants, never the reverse.
    others = BACKENDS - {backend, "reference"}
    above = {"functional", "ops", "dispatch", "nn", "testing"}
    for path in (PACKAGE / backend).rglob("*.py"):
        for name in imports(path):
            part = name.removeprefix("mtlora_kernels.").split(".")[0]
            assert not (name.startswith("mtlora_kernels.") and part in others | above), f"{path.name} imports {name}"


def test_reference_imports_torch_only():
    allowed = ("torch", "mtlora_kernels.reference", "collections", "contextlib", "math")
    for path in (PACKAGE / "reference").rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] in allowed or name.startswith("mtlora_kernels.reference"), f"{path.name}: {name}"


def test_modules_use_the_public_functions():
    for path in (PACKAGE / "nn").rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] != "mtlora_kernels" or parts[1] not in BACKENDS | {"ops"}, f"{path.name} imports {name}"


def test_integrations_use_the_public_api():
    public = {"mtlora_kernels"} | {f"mtlora_kernels.{name}" for name in ("testing", *mtlora_kernels.__all__)}
    paths = list((PACKAGE.parent / "python" / "mtlora_integrations").rglob("*.py"))
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            deep = {name for name in names if name.startswith("mtlora_kernels.")} - public
            assert not deep, f"{path.name} imports {deep}"
    assert len(paths) > 1


def test_swapping_imports_no_host():
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent / "python")!r})
import mtlora_integrations
print(sorted(set(sys.modules) & {{"peft", "transformers", "accelerate", "triton"}}))
"""
    assert run(code).strip() == "[]"
