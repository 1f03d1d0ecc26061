"""Which attention kernels give NaN gradients for packed rows? Run on a GPU: python benchmarks/attention_nan.py

Two segments a row, fp16, head size 64; large scores are what a model with massive activations makes. Seen with torch
2.11 on an H100 (results/attention_nan_h100.log): cuDNN's backward gives NaN at lengths 448 and 960, which are no
multiple of 128, the memory-efficient and math kernels never.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


def gradients_are_nan(backend: SDPBackend, length: int, scale: float) -> list[bool]:
    """Whether the gradients of query, key and value hold a NaN."""
    torch.manual_seed(0)
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    mask[length // 2 :, : length // 2] = False  # the second segment does not see the first
    query, key, value = (
        (torch.randn(3, 9, length, 64, device="cuda", dtype=torch.float16) * scale).requires_grad_() for _ in range(3)
    )
    with sdpa_kernel(backend):
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None].expand(3, 1, -1, -1))
        output.backward(torch.randn_like(output))
    return [x.grad is None or bool(x.grad.isnan().any()) for x in (query, key, value)]


if __name__ == "__main__":
    for length in (448, 512, 960, 992, 1024):
        for scale in (1.0, 20.0):
            for backend in BACKENDS:
                print(length, scale, backend.name, gradients_are_nan(backend, length, scale))
