"""Our own operators: attention over spans, and Triton kernels for memory-bound work, each with a torch twin.

Matrix products stay with cuBLAS: for compute capability 7.5 (T4), Triton turns `tl.dot` into scalar multiplications,
at most 8 TFLOP/s, while the tensor cores reach 65. A softmax over a vocabulary is bound by memory traffic instead.

Triton is optional. It is imported at the first call with a CUDA tensor; if it is missing or does not support the GPU,
one warning says so, and plain torch computes the same numbers.
"""

from lowlevel.kernels.token_logps import chunk_rows, token_logps, token_scores

__all__ = ["chunk_rows", "token_logps", "token_scores"]
