"""Tokens are counted alike for all tools, and the peers' text becomes the tokens that lowlevel trains on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.cases import Case, select
from benchmarks.peers.common import tokens_of
from benchmarks.workload import by_step, case_config, make_workload, pair_rows, peer_tokens, sft_rows


def test_tokens_by_hand():
    chats = [SimpleNamespace(input_ids=np.arange(n)) for n in (5, 7)]
    assert peer_tokens(chats, "sft") == [5, 7]
    pair = SimpleNamespace(prompt_ids=np.arange(10), chosen_ids=np.arange(3), rejected_ids=np.arange(4))
    assert peer_tokens([pair], "dpo") == [(10 + 3) + (10 + 4)]
    assert by_step([1, 2, 3, 4, 5], 2) == [3, 7, 5]


class Rows(dict):
    """As much of a Dataset as the count needs."""

    @property
    def column_names(self):
        return list(self)


@pytest.mark.parametrize("name", ["{}_ids", "{}_input_ids"])  # TRL 1.16, TRL 1.15
def test_tokens_of_a_trainers_dataset(name):
    columns = {"prompt": [[1] * 10], "chosen": [[1] * 3], "rejected": [[1] * 9]}
    rows = Rows({name.format(part): ids for part, ids in columns.items()})
    assert tokens_of(rows, "dpo", 512) == [13 + 19]
    assert tokens_of(rows, "dpo", 16) == [13 + 16]
    assert tokens_of(Rows(input_ids=[[1] * 5, [1] * 20]), "sft", 16) == [5, 16]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_peers_get_the_same_tokens(out, method):
    from lowlevel.running.assembly import prepare_data

    folder = out / "workload"
    tokenizer, data = prepare_data(case_config(Case("x", "lowlevel", method), folder, folder / "unused", 24))
    lines = [json.loads(line) for line in (folder / f"{method}_text.jsonl").read_text().splitlines()]
    assert len(lines) == len(data.train) == 192
    for line, example in zip(lines, data.train, strict=True):
        names = {"text": "input_ids"} if method == "sft" else {n: f"{n}_ids" for n in ("prompt", "chosen", "rejected")}
        for column, attribute in names.items():
            assert tokenizer.tokenizer(line[column])["input_ids"] == getattr(example, attribute).tolist()
    counted = json.loads((folder / "workload.json").read_text())["tokens"][method]
    assert counted == peer_tokens(data.train, method)


def test_a_folder_with_more_rows_is_used_as_it_is(tmp_path):
    folder = tmp_path / "workload"

    def lines():
        return (folder / "sft.jsonl").read_text().splitlines()

    make_workload(folder, "tiny", 64, 24, weights=False)
    first = lines()
    make_workload(folder, "tiny", 64, 16, weights=False)
    assert lines() == first and len(first) == 24
    make_workload(folder, "tiny", 64, 32, weights=False)
    assert len(lines()) == 32 and lines()[:24] == first  # the first rows are the same
    make_workload(folder, "tiny", 32, 16, weights=False)
    assert len(lines()) == 16


def test_profiles():
    sizes = [sum(len(m["content"].split()) for m in row["messages"]) for row in sft_rows(400, 512, 32000)]
    assert 0.8 < np.mean(np.array(sizes) == 512) < 0.9 and min(sizes) >= 102
    for row in pair_rows(400, 512, 32000):
        words = {name: len(row[name].split()) for name in ("input", "chosen", "rejected")}
        assert words["input"] + max(words["chosen"], words["rejected"]) <= 501, "nothing is cut"
        assert row["chosen"] != row["rejected"]


def test_settings_reach_the_run(out):
    folder = out / "workload"
    case = Case("x", "lowlevel", "dpo", 4, 2, False, "compiled", stacked=True, rank=16)
    config = case_config(case, folder, folder / "unused", 5)
    train = config.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps, train.max_steps) == (4, 2, 5)
    assert (train.gradient_checkpointing, train.execution, config.lora.r) == (False, "compiled", 16)
    assert config.model.adapter == str(folder / "adapter") and config.data.max_length == 64
    fast = case_config(select(["lowlevel_sft_fast"])[0], folder, folder / "unused", 5)
    assert (fast.train.per_device_train_batch_size, fast.data.packing, fast.data.max_length) == (4, True, 512)
