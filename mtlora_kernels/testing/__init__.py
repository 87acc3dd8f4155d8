"""Tools to hold a backend, or your own module, to the arithmetic contract."""

from .adapters import assert_matches_reference
from .checks import run_case
from .compare import assert_bitwise_equal, differences
from .inputs import Inputs, random_inputs, with_layout
from .lattice import lattice_inputs, rounding_inputs
from .oracle import float64_penalty, float64_results, published_layer
from .rows import Row
from .run import run_checks
from .spectral_inputs import make_adapters, trap_matrices

__all__ = [
    "Inputs", "Row", "assert_bitwise_equal", "assert_matches_reference", "differences", "float64_penalty",
    "float64_results", "lattice_inputs", "make_adapters", "published_layer", "random_inputs", "rounding_inputs",
    "run_case", "run_checks", "trap_matrices", "with_layout",
]  # fmt: skip
