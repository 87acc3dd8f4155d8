"""`python -m mtlora_kernels`: exit status, table, JSON, and other people's modules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import mtlora_kernels

ROOT = Path(mtlora_kernels.__file__).parents[1]

ADAPTERS = '''
import torch
from torch import nn
from torch.nn import functional as F

import mtlora_kernels.nn


class Adapter(nn.Module):
    """A published block adapter, with the parts that tests replace as methods."""

    def __init__(self, activation=None, scales=False):
        super().__init__()
        torch.manual_seed(0)
        self.scaling = 2.0
        self.lora_A = nn.Linear(24, 8, bias=False, dtype=torch.bfloat16)
        self.lora_B = nn.ModuleList([nn.Linear(8, 24, bias=False, dtype=torch.bfloat16) for _ in range(5)])
        self.lora_route = nn.Linear(24, 10, bias=False, dtype=torch.bfloat16)
        if scales:
            self.expert_scales = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(5)])
        self.activation = activation or nn.Identity()

    def weights(self, logits, dtype):
        return F.softmax(logits, -1, dtype=torch.float32).to(dtype)

    def forward(self, x):
        h = self.activation(self.lora_A(x))
        pi = self.weights(self.lora_route(x).unflatten(-1, (2, 5)), x.dtype)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.lora_B):
            e = expert(h)
            e = self.expert_scales[i] * e if hasattr(self, "expert_scales") else e
            out = out + (pi[..., i].repeat_interleave(12, -1) * e * self.scaling).to(x.dtype)
        return out


class NumberedAdapter(Adapter):
    """lora_B0.weight, lora_B1.weight, ... as component layers name them."""

    def __init__(self):
        super().__init__()
        experts = list(self.lora_B)
        del self.lora_B
        for i, expert in enumerate(experts):
            setattr(self, f"lora_B{i}", expert)

    def __getattr__(self, name):
        if name == "lora_B" and "lora_B0" in self._modules:
            return [self._modules[f"lora_B{i}"] for i in range(5)]
        return super().__getattr__(name)


class UnroundedWeights(Adapter):
    def weights(self, logits, dtype):
        return F.softmax(logits, -1, dtype=torch.float32)


class LeakyReLU(nn.ReLU):
    def forward(self, x):
        return F.leaky_relu(x, 0.25)


class StopsRouterGradient(Adapter):
    def weights(self, logits, dtype):
        return super().weights(logits.detach() + 0 * logits, dtype)


def published(): return Adapter()
def adaptformer(): return Adapter(nn.ReLU(), scales=True)
def numbered(): return NumberedAdapter()
def own(): return mtlora_kernels.nn.RoutedLoRA(24, 8, 5, num_groups=2, style="adaptformer", dtype=torch.bfloat16)
def own_eager(): return mtlora_kernels.nn.RoutedLoRA(24, 8, 5, num_groups=2, numerics="eager", dtype=torch.float16)
def unrounded(): return UnroundedWeights()
def leaky(): return Adapter(LeakyReLU())
def no_router_gradient(): return StopsRouterGradient()
def no_adapter(): return nn.Linear(3, 3)
'''


def cli(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-m", "mtlora_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def test_info():
    done = cli("info")
    assert done.returncode == 0
    assert f"mtlora_kernels {mtlora_kernels.__version__}" in done.stdout
    assert "implementations on cpu: reference" in done.stdout


def test_check_passes_here():
    done = cli("check", "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stdout
    assert "checks agree" in done.stdout.splitlines()[-1]


def test_jobs_give_the_rows_of_one_process():
    def rows(*arguments: str) -> list[dict]:
        done = cli("check", "--quick", "--device", "cpu", "--impl", "reference", "--json", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return [{key: row[key] for key in ("kind", "case", "mismatches")} for row in json.loads(done.stdout)["rows"]]

    assert rows("--jobs", "2") == rows()
    done = cli("check", "--jobs", "0")
    assert done.returncode == 1
    assert "--jobs is 0, it must be at least 1" in done.stderr


def test_json():
    done = cli("check", "--quick", "--device", "cpu", "--impl", "reference", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 0
    assert answer["passed"]
    assert {"device", "impl", "kind", "case", "mismatches", "seconds"} == answer["rows"][0].keys()
    assert {row["impl"] for row in answer["rows"]} == {"reference"}


def module(tmp_path: Path, *factories: str) -> dict[str, subprocess.CompletedProcess]:
    (tmp_path / "adapters_under_test.py").write_text(ADAPTERS)
    return {name: cli("check", "--module", f"adapters_under_test:{name}", cwd=tmp_path) for name in factories}


def test_correct_modules_pass(tmp_path):
    for name, done in module(tmp_path, "published", "adaptformer", "numbered", "own", "own_eager").items():
        assert done.returncode == 0, (name, done.stdout, done.stderr)


def test_wrong_modules_fail_and_say_where(tmp_path):
    wrong = module(tmp_path, "unrounded", "leaky", "no_router_gradient")
    for name, done in wrong.items():
        assert done.returncode == 1, (name, done.stdout, done.stderr)
    assert "DIFFERS cpu module rounding UnroundedWeights" in wrong["unrounded"].stdout
    assert "out: " in wrong["unrounded"].stdout
    assert "max ulp" in wrong["unrounded"].stdout
    assert "DIFFERS cpu module lattice Adapter" in wrong["leaky"].stdout
    differing = wrong["no_router_gradient"].stdout
    assert "drouter: " in differing
    assert "out: " not in differing


def test_unusable_modules_say_why(tmp_path):
    done = module(tmp_path, "no_adapter")["no_adapter"]
    assert done.returncode == 1
    assert "Linear has no parameters for ['lora_a', 'lora_b']" in done.stderr
    done = cli("check", "--module", "nothing")
    assert done.returncode == 1
    assert "it must be package.module:factory" in done.stderr


def test_absent_devices_and_implementations_fail():
    if not torch.cuda.is_available():
        done = cli("check", "--device", "cuda")
        assert done.returncode == 1
        assert "--device is 'cuda', it must be one of ['cpu'] here" in done.stderr
    done = cli("check", "--impl", "triton", "--device", "cpu", TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert "nothing could be checked" in done.stdout
