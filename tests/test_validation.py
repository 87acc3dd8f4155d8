"""Every argument rule: one clear sentence that names the argument, before anything runs."""

import pytest
import torch

import mtlora_kernels as mk
from mtlora_kernels.memo import MOST, Memo
from mtlora_kernels.testing import random_inputs

T, D_IN, D_OUT, R, N, G = 6, 12, 16, 3, 4, 2


def arguments(**changes) -> dict:
    return random_inputs(T, D_IN, D_OUT, R, N, G).kwargs() | {"return_load": False} | changes


def weights(*shape: int) -> dict:
    return {"router": None, "route_weights": torch.ones(shape)}


VALUE_ERRORS = {
    "x: no dimensions": ("x", {"x": torch.tensor(1.0)}, "at least 1"),
    "x: no features": ("x", {"x": torch.ones(T, 0), "lora_a": torch.ones(R, 0)}, "d_in must be positive"),
    "x: sparse": ("x", {"x": torch.ones(T, D_IN).to_sparse()}, "dense"),
    "x: nested": ("x", {"x": torch.nested.nested_tensor([torch.ones(T, D_IN)], layout=torch.jagged)}, "dense"),
    "x: dtype": ("x", {"x": torch.ones(T, D_IN, dtype=torch.int64)}, "dtype torch.int64"),
    "lora_a: dimensions": ("lora_a", {"lora_a": torch.ones(D_IN)}, "must have 2"),
    "lora_a: rank": ("lora_a", {"lora_a": torch.ones(R + 1, D_IN)}, r"\(3, 12\)"),
    "lora_a: width": ("lora_a", {"lora_a": torch.ones(R, D_IN + 1)}, r"\(3, 12\)"),
    "lora_b: dimensions": ("lora_b", {"lora_b": torch.ones(D_OUT, R)}, "must have 3"),
    "lora_b: empty": ("lora_b", {"lora_b": torch.ones(0, D_OUT, R)}, "positive"),
    "lora_b: experts": ("lora_b", {"lora_b": torch.ones(129, D_OUT, R)}, "at most 128"),
    "lora_b: rank": ("lora_b", {"lora_b": torch.ones(N, D_OUT, 129)}, "at most 128"),
    "lora_b: empty list": ("lora_b", {"lora_b": []}, "empty sequence"),
    "lora_b: unequal list": (r"lora_b\[1\]", {"lora_b": [torch.ones(D_OUT, R), torch.ones(D_OUT, R + 1)]}, "shape"),
    "lora_b: two devices": (
        r"lora_b\[1\]",
        {"lora_b": [torch.ones(D_OUT, R), torch.ones(D_OUT, R, device="meta")]},
        r"lora_b\[0\]'s device cpu",
    ),
    "lora_b: list of stacks": (r"lora_b\[0\]", {"lora_b": [torch.ones(N, D_OUT, R)]}, "must have 2"),
    "router: missing": ("router", {"router": None}, "unless N = 1"),
    "router: rows": ("router", {"router": torch.ones(N, D_IN)}, r"\(8, 12\)"),
    "router: columns": ("router", {"router": torch.ones(G * N, D_OUT)}, r"\(8, 12\)"),
    "router: twice": ("router", {"route_weights": torch.ones(T, G, N)}, "give one of them"),
    "residual: width": ("residual", {"residual": torch.ones(T, D_IN)}, r"\(6, 16\)"),
    "residual: tokens": ("residual", {"residual": torch.ones(1, D_OUT)}, r"\(6, 16\)"),
    "residual: dtype": ("residual", {"residual": torch.ones(T, D_OUT, dtype=torch.int32)}, "dtype torch.int32"),
    "num_groups: zero": ("num_groups", {"num_groups": 0}, "divisor of d_out = 16"),
    "num_groups: not a divisor": ("num_groups", {"num_groups": 3}, "divisor of d_out = 16"),
    "numerics": ("numerics", {"numerics": "fp64"}, "must be one of"),
    "activation": ("activation", {"activation": "gelu"}, "must be one of"),
    "expert_scale: shape": ("expert_scale", {"expert_scale": torch.ones(N + 1)}, r"\[N\] = \(4,\)"),
    "expert_scale: dimensions": ("expert_scale", {"expert_scale": torch.ones(N, 1)}, "must have 1"),
    "dropout_p: negative": ("dropout_p", {"dropout_p": -0.1}, r"\[0, 1\)"),
    "dropout_p: one": ("dropout_p", {"dropout_p": 1.0}, r"\[0, 1\)"),
    "dropout_p: nan": ("dropout_p", {"dropout_p": float("nan")}, r"\[0, 1\)"),
    "dropout_seed: negative": ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": -1}, r"2\*\*63"),
    "dropout_seed: large": ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": 2**63}, r"2\*\*63"),
    "dropout_seed: dtype": ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": torch.ones(1)}, "one int64"),
    "dropout_seed: size": ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": torch.ones(2).long()}, "one int64"),
    "route_weights: dimensions": ("route_weights", weights(N), "at least 2"),
    "route_weights: groups": ("route_weights", weights(T, N, G), r"\(2, 4\)"),
    "route_weights: tokens": ("route_weights", weights(T + 1, G, N), "leading dimensions"),
    "route_weights: too many": ("route_weights", weights(1, T, G, N), "leading dimensions"),
    "compute_dtype": ("compute_dtype", {"compute_dtype": torch.int8}, "must be one of"),
    "accumulate: numerics": ("accumulate_into_residual", {"accumulate_into_residual": True}, "numerics='eager'"),
    "accumulate: residual": (
        "accumulate_into_residual",
        {"accumulate_into_residual": True, "numerics": "eager", "residual": None},
        "a residual",
    ),
    "impl: unknown": ("impl", {"impl": "fast"}, "must be None or one of"),
    "impl: elsewhere": ("impl", {"impl": "cuda" if "cuda" in mk.dispatch.IMPLS else "triton"}, "for tensors on cpu"),
    "impl: float64": ("impl", {"impl": "cpu", "compute_dtype": torch.float64}, "'reference'"),
}
TYPE_ERRORS = {
    "x": ("x", {"x": [[1.0]]}, "list"),
    "lora_a": ("lora_a", {"lora_a": 1.0}, "float"),
    "lora_b": (r"lora_b\[0\]", {"lora_b": [1.0]}, "float"),
    "router": ("router", {"router": "linear"}, "str"),
    "route_weights": ("route_weights", {"router": None, "route_weights": 1.0}, "float"),
    "residual": ("residual", {"residual": 0}, "int"),
    "expert_scale": ("expert_scale", {"expert_scale": 1.0}, "float"),
    "scaling: tensor": ("scaling", {"scaling": torch.tensor(2.0)}, "Python number"),
    "scaling: bool": ("scaling", {"scaling": True}, "Python number"),
    "lora_b: missing": ("lora_b", {"lora_b": None}, "a tensor or a sequence of tensors"),
    "lora_b: generator": ("lora_b", {"lora_b": (torch.ones(D_OUT, R) for _ in range(N))}, "a sequence of tensors"),
    "num_groups: float": ("num_groups", {"num_groups": 2.0}, "an int"),
    "dropout_p: tensor": ("dropout_p", {"dropout_p": torch.tensor(0.5)}, "Python number"),
    "dropout_seed: float": ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": 1.0}, "int or an int64 tensor"),
    "dropout_seed: bool": ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": True}, "int or an int64 tensor"),
}
CASES = [(ValueError, *case) for case in VALUE_ERRORS.values()] + [(TypeError, *case) for case in TYPE_ERRORS.values()]


@pytest.mark.parametrize(("error", "name", "changes", "says"), CASES, ids=[*VALUE_ERRORS, *TYPE_ERRORS])
def test_rule(error, name, changes, says):
    if changes.get("impl") in ("triton", "cpu"):
        available = changes["impl"] in mk.available_impls("cpu")
        if available != (changes["impl"] == "cpu"):
            pytest.skip("needs the C++ kernels built and Triton's interpreter off")
    with pytest.raises(error, match=f"^{name}.*{says}") as raised:
        mk.routed_lora(**arguments(**changes))
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 250


CHANGES = {
    "scaling": True, "dropout_p": False, "num_groups": 2.0, "lora_a": torch.ones(R, D_IN).long(), "numerics": "fp64",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_call_that_went_well_lets_no_other_pass(name):
    mk.routed_lora(**arguments(scaling=1.0))
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        mk.routed_lora(**arguments(scaling=1.0) | {name: CHANGES[name]})


def test_memo_is_bounded():
    memo = Memo()
    for i in range(MOST + 1):
        assert memo.keep(i, -i) == -i
    assert memo == {MOST: -MOST}


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "router", "residual", "expert_scale"])
def test_other_device(name):
    given = arguments(expert_scale=torch.ones(N))
    with pytest.raises(ValueError, match=f"^{name} is on meta, it must be on x's device cpu"):
        mk.routed_lora(**given | {name: given[name].to("meta")})


def test_route_weights_are_named_by_the_shape_that_was_given():
    x = {"x": torch.ones(2, 3, D_IN), "residual": None}
    with pytest.raises(ValueError, match=r"^route_weights has shape \(3, 2, 4\), .* those of x, \(2, 3\)"):
        mk.routed_lora(**arguments(**x, **weights(3, G, N)))


@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_balance_loss_shape(shape):
    if len(shape) == 1:
        assert mk.balance_loss(torch.ones(shape)) == 0
        return
    with pytest.raises(ValueError, match=r"^load has shape \(2, 2\), it must be \[N\]"):
        mk.balance_loss(torch.ones(shape))


def test_balance_loss_of_no_tensor():
    with pytest.raises(TypeError, match=r"^load is list, it must be a tensor"):
        mk.balance_loss([0.5, 0.5])


def test_balance_loss_values():
    load = torch.tensor([0.1, 0.2, 0.7], requires_grad=True)
    loss = mk.balance_loss(load)
    assert loss.detach() == load.detach().var() / (load.detach().mean() ** 2 + 1e-10)
    loss.backward()
    assert load.grad.isfinite().all()
    one = torch.ones(1, requires_grad=True)
    mk.balance_loss(one).backward()
    assert one.grad == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"router": torch.ones(G * N, D_IN), "numerics": "eager", "accumulate_into_residual": True},
        {"lora_b": torch.ones(1, D_OUT, R), "router": None},
        {"lora_b": [torch.ones(D_OUT, R)] * N},
        {"num_groups": D_OUT, "router": torch.ones(D_OUT * N, D_IN)},
        {"scaling": 2},
        weights(T, G, N),
        weights(1, G, N),
        weights(G, N),
    ],
)
def test_what_fits_is_accepted(changes):
    assert mk.routed_lora(**arguments(**changes)).shape == (T, D_OUT)
