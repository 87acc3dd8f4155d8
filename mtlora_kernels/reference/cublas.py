"""PyTorch's matrix products on CUDA with one accumulator along K."""

from contextlib import contextmanager

import torch


@contextmanager
def one_accumulator():
    """cuBLASLt, no split-K, no reduced-precision reductions, no TF32; the caller's settings come back."""
    flags = torch.backends.cuda.matmul
    library = torch.backends.cuda.preferred_blas_library()
    tf32 = flags.allow_tf32
    bf16 = (flags.allow_bf16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction_split_k)
    fp16 = (flags.allow_fp16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction_split_k)
    try:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        flags.allow_tf32 = False
        flags.allow_bf16_reduced_precision_reduction = (False, False)
        flags.allow_fp16_reduced_precision_reduction = (False, False)
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(library)
        flags.allow_tf32 = tf32
        flags.allow_bf16_reduced_precision_reduction = bf16
        flags.allow_fp16_reduced_precision_reduction = fp16
