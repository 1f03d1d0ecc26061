"""Triton kernels for what moves bytes, each with a torch twin of the same arguments; matrix products stay with cuBLAS.

Why no product here: for compute capability 7.5 (T4) Triton turns `tl.dot` into scalar multiplications and leaves the
tensor cores idle, 8 TFLOP/s at best instead of 65. A softmax over a vocabulary, on the other hand, is bound by memory,
and plain torch reads and writes each logit several times in fp32 where one read in fp16 is enough.

Triton is no dependency: it is imported at the first call with a CUDA tensor, and where it is missing or refuses the
GPU, one warning says so and plain torch computes the same numbers.
"""

from lowlevel.kernels.token_logps import chunk_rows, token_logps

__all__ = ["chunk_rows", "token_logps"]
