"""Rows of a pinned table on a GPU, captured and not."""

import pytest
import torch

from lowlevel.kernels.host_rows import host_rows
from lowlevel.model.offload import HostEmbedding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("width", [8, 100, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_gpu_reads_the_hosts_rows(width, dtype):
    table = torch.randn(1000, width, device="cuda", dtype=dtype)
    embedding = HostEmbedding(table)
    assert embedding.weight.is_pinned() and not embedding.weight.is_cuda
    index = torch.randint(0, 1000, (3, 77), device="cuda")
    assert torch.equal(embedding(index), torch.nn.functional.embedding(index, table))


def test_it_can_be_captured_and_replayed_with_other_rows():
    table = torch.randn(64, 128).pin_memory()
    index = torch.zeros(5, dtype=torch.int64, device="cuda")
    host_rows(table, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = host_rows(table, index)
    index.copy_(torch.arange(5))
    graph.replay()
    assert torch.equal(found.cpu(), table[:5])
