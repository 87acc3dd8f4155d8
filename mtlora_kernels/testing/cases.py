"""Every shape and option that `check` runs, in one place.

Shapes are (T, d_in, d_out, r, N, G); dtypes are letters, b = bfloat16, h = float16, f = float32.
"""

import torch

DTYPES = {"b": torch.bfloat16, "h": torch.float16, "f": torch.float32}

# Random inputs against the reference on the same device. The last column says which dtypes.
CPU_SHAPES = (
    (1, 96, 96, 16, 16, 1, "bhf"),
    (17, 96, 96, 16, 16, 2, "bhf"),
    (64, 96, 96, 8, 15, 6, "bhf"),
    (65, 100, 84, 5, 7, 7, "bhf"),
    (33, 48, 48, 4, 2, 48, "bhf"),
    (19, 24, 40, 3, 3, 8, "bhf"),
    (300, 32, 32, 4, 3, 2, "bhf"),
    (7, 768, 768, 16, 25, 32, "bf"),
    (5, 128, 96, 64, 16, 1, "bf"),
    (9, 64, 352, 16, 16, 2, "bh"),
    (9, 352, 64, 16, 16, 2, "bf"),
    (3, 64, 64, 16, 100, 2, "bf"),
    (4, 64, 64, 8, 100, 64, "bf"),
    (2, 1, 1, 1, 1, 1, "bf"),
    (3, 5, 3, 1, 2, 3, "bf"),
)

CUDA_SHAPES = (
    (1, 4096, 4096, 16, 16, 1, "b"),
    (1, 4096, 4096, 16, 16, 2, "bhf"),
    (1, 4096, 4096, 16, 16, 32, "b"),
    (17, 4096, 4096, 16, 16, 1, "b"),
    (17, 4096, 4096, 16, 16, 2, "bhf"),
    (17, 4096, 4096, 16, 16, 32, "h"),
    (64, 4096, 4096, 16, 16, 1, "h"),
    (64, 4096, 4096, 16, 16, 2, "bf"),
    (64, 4096, 4096, 16, 16, 32, "b"),
    (777, 4096, 4096, 16, 16, 1, "b"),
    (777, 4096, 4096, 16, 16, 2, "bhf"),
    (777, 4096, 4096, 16, 16, 32, "b"),
    (8192, 4096, 4096, 16, 16, 1, "b"),
    (8192, 4096, 4096, 16, 16, 2, "b"),
    (8192, 4096, 4096, 16, 16, 32, "b"),
    (1, 768, 768, 16, 16, 1, "bhf"),
    (17, 768, 768, 16, 16, 2, "bhf"),
    (64, 768, 768, 16, 16, 32, "bhf"),
    (777, 768, 768, 16, 16, 1, "b"),
    (8192, 768, 768, 16, 16, 2, "hf"),
    (8192, 768, 768, 16, 25, 32, "b"),
    (1, 768, 768, 16, 25, 1, "b"),
    (17, 768, 768, 16, 25, 32, "bh"),
    (64, 768, 768, 16, 25, 2, "b"),
    (777, 768, 768, 16, 25, 1, "f"),
    (1, 768, 768, 16, 15, 768, "b"),
    (17, 768, 768, 16, 15, 768, "bhf"),
    (64, 768, 768, 16, 15, 768, "b"),
    (777, 768, 768, 16, 15, 768, "b"),
    (17, 768, 768, 16, 25, 768, "b"),
    (64, 768, 768, 4, 2, 768, "h"),
    (17, 768, 768, 16, 15, 96, "b"),
    (1, 5120, 5120, 16, 16, 1, "b"),
    (17, 5120, 5120, 16, 16, 2, "b"),
    (64, 5120, 5120, 16, 15, 32, "b"),
    (777, 5120, 5120, 16, 16, 2, "h"),
    (1, 4096, 11008, 16, 16, 1, "b"),
    (17, 4096, 11008, 16, 16, 2, "b"),
    (64, 4096, 11008, 16, 16, 32, "b"),
    (777, 4096, 11008, 16, 16, 2, "b"),
    (1, 11008, 4096, 16, 16, 1, "b"),
    (17, 11008, 4096, 16, 16, 2, "bf"),
    (64, 11008, 4096, 16, 16, 32, "h"),
    (777, 11008, 4096, 16, 16, 2, "b"),
    (1, 896, 896, 16, 16, 7, "bhf"),
    (17, 896, 896, 16, 2, 7, "b"),
    (64, 896, 896, 16, 15, 7, "b"),
    (777, 3584, 3584, 16, 16, 7, "b"),
    (17, 3584, 3584, 8, 25, 7, "h"),
    (1, 4096, 4096, 16, 2, 1, "b"),
    (64, 4096, 4096, 16, 2, 2, "b"),
    (777, 4096, 4096, 8, 2, 32, "b"),
    (17, 4096, 4096, 16, 15, 2, "b"),
    (777, 4096, 4096, 16, 15, 1, "h"),
    (64, 4096, 4096, 16, 25, 2, "b"),
    (777, 4096, 4096, 16, 25, 32, "b"),
    (17, 4096, 4096, 16, 100, 1, "b"),
    (64, 768, 768, 16, 100, 2, "bf"),
    (777, 768, 768, 4, 100, 32, "b"),
    (17, 768, 768, 4, 100, 768, "b"),
    (17, 4096, 4096, 4, 16, 2, "bf"),
    (777, 4096, 4096, 4, 16, 1, "h"),
    (64, 4096, 4096, 8, 16, 2, "b"),
    (8192, 4096, 4096, 8, 16, 1, "b"),
    (1, 4096, 4096, 64, 16, 2, "b"),
    (64, 4096, 4096, 64, 16, 32, "b"),
    (777, 4096, 4096, 64, 16, 1, "bf"),
    (17, 768, 768, 64, 25, 2, "h"),
    (64, 768, 768, 64, 2, 768, "b"),
    (33, 24, 40, 3, 3, 8, "bhf"),
    (5, 1, 1, 1, 1, 1, "bf"),
)

# Options, each alone or in the pairs that interact, on one shape per form of the mixture.
OPTION_SHAPES = {
    "cpu": ((17, 96, 64, 8, 5, 2), (17, 40, 48, 8, 5, 24)),
    "cuda": ((77, 768, 768, 16, 15, 2), (77, 256, 768, 8, 16, 96)),
}
OPTIONS = (
    {"activation": "relu"},
    {"expert_scale": True},
    {"activation": "relu", "expert_scale": True, "load": True},
    {"dropout_p": 0.1},
    {"dropout_p": 0.5, "activation": "relu"},
    {"route_weights": True},
    {"route_weights": True, "expert_scale": True, "load": True},
    {"load": True},
    {"residual": False},
    {"scaling": 1.0},
    {"residual_dtype": torch.float32},
    {"weight_dtype": torch.float32},
    {"weight_dtype": torch.bfloat16, "residual_dtype": torch.bfloat16, "expert_scale": True},
    {"compute_dtype": torch.bfloat16, "dtype": torch.float32, "dropout_p": 0.1},
    {"compute_dtype": torch.float16, "dtype": torch.float32, "route_weights": True},
    {"numerics": "eager", "accumulate_into_residual": True},
    {"numerics": "eager", "accumulate_into_residual": True, "residual_dtype": torch.float32},
)

# Lattice inputs against float64 (loops over tokens, groups and experts: small) ...
LATTICE_SHAPES = {
    "cpu": (
        (1, 64, 64, 16, 16, 1),
        (17, 96, 96, 16, 16, 2),
        (8, 64, 96, 8, 15, 4),
        (33, 48, 32, 4, 3, 1),
        (4, 40, 48, 8, 5, 48),
        (5, 56, 56, 3, 2, 7),
        (4, 64, 64, 16, 100, 1),
        (4, 24, 24, 4, 1, 1),
        (3, 3, 5, 1, 4, 5),
    ),
    "cuda": ((17, 96, 96, 16, 16, 1), (8, 64, 96, 8, 15, 4), (4, 40, 48, 8, 5, 48)),
}
LATTICE_OPTIONS = (
    {},
    {"activation": "relu", "expert_scale": True},
    {"dropout_p": 0.5, "scaling": 0.5},
    {"route_weights": True},
    {"residual": False},
    {"residual_dtype": torch.float32},
    {"numerics": "eager"},
    {"numerics": "eager", "accumulate_into_residual": True, "expert_scale": True},
)
# ... and, at full width, against the published layer run in its own dtype.
PUBLISHED_SHAPES = {
    "cpu": ((17, 96, 96, 16, 16, 1), (64, 96, 96, 16, 16, 2), (33, 64, 64, 8, 15, 32), (5, 48, 96, 4, 3, 2)),
    "cuda": (
        (64, 4096, 4096, 16, 16, 1),
        (777, 4096, 4096, 16, 16, 2),
        (64, 4096, 4096, 16, 16, 32),
        (64, 768, 768, 16, 25, 32),
    ),
}
PUBLISHED_OPTIONS = (
    {},
    {"activation": "relu", "expert_scale": True},
    {"accumulate_into_residual": True},
)
# Random inputs against the published block layer on CUDA, where both take their products from cuBLASLt.
PUBLISHED_RANDOM_SHAPES = (
    (64, 4096, 4096, 16, 16, 1), (64, 4096, 4096, 16, 16, 2), (64, 4096, 4096, 16, 16, 32),
    (2048, 4096, 4096, 16, 16, 1), (2048, 4096, 4096, 16, 16, 2), (2048, 768, 768, 16, 16, 32),
)  # fmt: skip

REPEAT_SHAPES = {
    "cpu": ((65, 96, 96, 16, 16, 2), (65, 48, 48, 4, 2, 24)),
    "cuda": ((777, 4096, 4096, 16, 16, 2), (777, 768, 768, 16, 25, 96), (8192, 4096, 4096, 16, 16, 1)),
}
BATCH_SIZES = {"cpu": (1, 8, 64, 130), "cuda": (1, 8, 64, 2048, 8192)}
BATCH_SHAPES = {  # without T
    "cpu": ((96, 96, 16, 16, 2), (48, 48, 4, 5, 24)),
    "cuda": ((4096, 4096, 16, 16, 2), (768, 768, 16, 16, 96)),
}
LAYOUT_SHAPES = {
    "cpu": ((9, 48, 64, 8, 5, 2), (9, 48, 48, 8, 5, 24)),
    "cuda": ((77, 768, 768, 16, 15, 2), (77, 768, 768, 16, 15, 768)),
}
