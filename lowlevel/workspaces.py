"""cuBLAS' workspaces: scratch memory of matrix products, as an environment variable asks for it."""

from __future__ import annotations

ENVIRONMENT = "CUBLAS_WORKSPACE_CONFIG"  # read once, before a process first multiplies on a GPU
SMALL = ":4096:2:16:8"  # torch's default before Hopper; Hopper's is four times as large
FIXED = (":4096:8", ":16:8")  # the two that NVIDIA documents as deterministic


def workspace_bytes(setting: str) -> int:
    """Size of one workspace; each stream and thread has one. ":4096:2:16:8" is 2 x 4,096 KiB and 8 x 16 KiB."""
    sizes = [int(number) for number in setting.strip(":").split(":")]
    return 1024 * sum(size * count for size, count in zip(sizes[::2], sizes[1::2], strict=True))
