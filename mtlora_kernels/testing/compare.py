"""Equality of bits, with a message that says where and by how much two tensors differ."""

import torch
from torch import Tensor

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def _ordinal(t: Tensor) -> Tensor:
    """int64 that counts representable values: neighbours differ by 1, -0 and 0 by 0. Exact below 2**62."""
    bits = t.contiguous().view(_BITS[t.dtype]).to(torch.int64)
    sign = torch.iinfo(_BITS[t.dtype]).min
    return torch.where(bits < 0, sign - bits, bits)


def difference(actual: Tensor, expected: Tensor) -> str | None:
    """None if equal in shape, dtype and every value (NaN equals NaN); else what differs and by how much."""
    for what in ("shape", "dtype", "device"):
        a, e = getattr(actual, what), getattr(expected, what)
        if a != e:
            return f"{what} is {a}, expected {e}"
    unequal = (actual != expected) & ~(actual.isnan() & expected.isnan())
    count = int(unequal.sum())
    if count == 0:
        return None
    first = tuple(unequal.nonzero()[0].tolist())
    ulp = (_ordinal(actual) - _ordinal(expected)).abs()[unequal].max()
    gap = (actual.double() - expected.double()).abs()[unequal].max()
    return (
        f"{count} of {actual.numel()} differ, first at {first}: {actual[first].item()!r}, "
        f"expected {expected[first].item()!r}; max abs diff {gap:.3g}, max ulp {int(ulp)}"
    )


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """torch.equal with NaN equal to NaN; the error names the first difference, its size and the count."""
    found = difference(actual, expected)
    if found is not None:
        raise AssertionError(f"{name}: {found}")


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor], *, cast: bool = False) -> list[str]:
    """One message per output or gradient that differs. With cast, each expected value is first rounded to the
    dtype of what it is compared with: an answer in a wider dtype."""
    messages = [f"{name}: missing" for name in expected.keys() - actual.keys()]
    for name in actual.keys() & expected.keys():
        found = difference(actual[name], expected[name].to(actual[name]) if cast else expected[name])
        if found is not None:
            messages.append(f"{name}: {found}")
    return sorted(messages)
