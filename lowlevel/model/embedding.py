"""An input embedding whose table stays in host memory (`model.embeddings_on_host`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowlevel.errors import ConfigError
from lowlevel.kernels.host_rows import host_rows

TIED = "model.embeddings_on_host: this model's input embedding is its LM head too; leave it out"


class HostEmbedding(nn.Module):
    """Takes the place of a frozen nn.Embedding; the same numbers, read from pinned host memory."""

    def __init__(self, table: Tensor) -> None:
        """`table` (V, D), on any device; it is copied to the host."""
        super().__init__()
        host = table.detach().cpu()
        self.weight = nn.Parameter(host.pin_memory() if table.is_cuda else host, requires_grad=False)
        self.num_embeddings, self.embedding_dim = table.shape

    def forward(self, input_ids: Tensor) -> Tensor:
        """(rows, T) int64 -> (rows, T, D)."""
        return host_rows(self.weight, input_ids)


def move_embeddings_to_host(model: Any) -> None:
    """Free the GPU memory of a model's input embedding.

    Raises:
        ConfigError: the table is the LM head as well (tied), which every step multiplies with; or an embedding that
            does more than look up a row, as Gemma 3's does.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding:
        raise ConfigError(f"model.embeddings_on_host: {type(embedding).__name__} does more than look up; leave it out")
    if embedding.weight is head.weight or embedding.weight.data_ptr() == head.weight.data_ptr():
        raise ConfigError(TIED)
    model.set_input_embeddings(HostEmbedding(embedding.weight))
    if embedding.weight.is_cuda:
        torch.cuda.empty_cache()
