"""Embeddings in host memory: the twin, the run that uses them, and what has none to move."""

import helpers
import pytest
import torch
from workspace import metrics, run

from lowlevel.kernels.host_rows import host_rows, host_rows_reference
from lowlevel.model.offload import HostEmbedding, move_embeddings_to_host


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5)])
def test_rows_are_the_tables(shape):
    table = torch.randn(7, 12)
    index = torch.randint(0, 7, shape)
    expected = torch.nn.functional.embedding(index, table)
    assert torch.equal(host_rows(table, index), expected) and torch.equal(host_rows_reference(table, index), expected)
    torch.library.opcheck(
        torch.ops.lowlevel.host_rows.default, (table, index), test_utils=("test_schema", "test_faketensor")
    )


def test_the_embedding_is_replaced_and_gives_the_same_numbers(tiny_base):
    policy = helpers.make_policy(tiny_base)
    model = policy.causal_lm
    ids = torch.arange(10)[None]
    expected = model.get_input_embeddings()(ids)
    move_embeddings_to_host(model)
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert torch.equal(model.get_input_embeddings()(ids), expected)
    assert not model.get_input_embeddings().weight.requires_grad


def test_a_run_with_embeddings_on_the_host_is_the_same_run(space):
    logged = []
    for on_host in (False, True):
        file = space.write(f"host_{on_host}", "sft", model={"name": str(space.base), "embeddings_on_host": on_host})
        said = run("sft", file)
        assert said.code == 0, said.err
        logged.append([(r["loss"], r["grad_norm"]) for r in metrics(space.folder / f"host_{on_host}") if "loss" in r])
    assert logged[0] == logged[1]
    assert run("verify", space.folder / "host_True").code == 0  # the base's hash is that of its manifest


def test_tied_embeddings_cannot_move(space, tmp_path):
    helpers.write_tiny_base(tmp_path / "tied", tie_word_embeddings=True)
    said = run("sft", space.write("tied", "sft", model={"name": str(tmp_path / "tied"), "embeddings_on_host": True}))
    assert said.code == 2 and "embeddings_on_host: this model's input embedding is its LM head too" in said.err
