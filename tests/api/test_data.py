"""Rows given in Python: the run of the same rows in a file; resumed, opened and looked into with the rows again."""

import re
from pathlib import Path

import datasets
import pytest
import torch

import lowlevel as ll
from lowlevel.cli import main
from lowlevel.errors import ConfigError, DataError, LowlevelError
from lowlevel.losses.registry import OWN
from lowlevel.running.run_folder import RunFolder
from lowlevel.running.run_record import next_commands


class MapStyle(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class IterableStyle(MapStyle, torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from self.rows


KINDS = {"datasets": datasets.Dataset.from_list, "map-style": MapStyle, "iterable": IterableStyle}


def test_rows_train_as_the_same_rows_in_a_file(api, dpo, sft, same, rows):
    assert same(api.dpo("file", api.write("pairs.jsonl", rows["dpo"])), dpo)
    assert same(api.sft("sft-file", str(api.write("chats.jsonl", rows["sft"]))), sft)
    assert dpo.summary["train_loss"] > 0 and dpo.metrics[-1]["step"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_trains(api, dpo, kind, rows):
    run = api.dpo(kind, KINDS[kind](rows["dpo"]), max_steps=1, eval_data="holdout", eval_limit=2)
    assert run.folder.read_manifest()["data_sha256"] != dpo.folder.read_manifest()["data_sha256"]  # two rows fewer
    assert [record["step"] for record in run.metrics if "eval_loss" in record] == [0, 1]
    assert run.config.data.eval_limit == 2


def test_resuming_with_other_rows_names_the_row(api, rows):
    next(iter(api.steps("changed", rows["dpo"], max_steps=2)))
    other = [*rows["dpo"][:4], {**rows["dpo"][4], "chosen": "At home."}, *rows["dpo"][5:]]
    with pytest.raises(DataError, match=r"cannot resume: .*row 4\b") as caught:
        api.dpo("changed", other, max_steps=2, resume=True)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("evaluated", "said"), [(slice(5, 8), 0), (slice(3, 6), 1)])
def test_evaluation_rows_that_are_trained_on_are_said(api, rows, evaluated, said, capsys):
    next(api.steps("overlap", rows["dpo"][:5], eval_data=rows["dpo"][evaluated], console=None, restart=True))
    assert capsys.readouterr().out.count("  warning    2 evaluation prompts are also trained on\n") == said


def test_a_run_of_rows_needs_them_to_be_looked_into(dpo, rows):
    bare = ll.Run(dpo.path)
    assert bare.metrics == dpo.metrics and bare.config.data.source == "rows given in Python"
    for look in (lambda: bare.inspect(step=1), lambda: bare.verify(), lambda: bare.replay(3)):
        with pytest.raises(ConfigError, match="given in Python: open it with lowlevel.Run"):
            look()
    other = ll.Run(dpo.path, data=rows["dpo"][1:])
    with pytest.raises(DataError, match="not the rows"):
        other.inspect(step=1)


def test_such_a_run_with_its_own_loss_can_be_merged_and_the_commands_shown_work(api, rows, tmp_path, capsys):
    """Nothing that a command needs is left of its rows and its loss."""
    settings = {"columns": ["score"], "eval_data": "holdout", "eval_limit": 2, "max_steps": 1, "console": None}
    run = api.dpo("own", rows["dpo"], loss=lambda pairs: -pairs.deltas * pairs.values["score"], **settings)
    shown = capsys.readouterr().out.split("next:\n")[1]
    assert re.findall(r"lowlevel (\w+)", shown) == ["generate", "merge"]
    OWN.clear()
    assert main(["merge", str(run.path), "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("data", "shown"),
    [("p.jsonl", ["lowlevel score r --data p.jsonl", "lowlevel inspect r --step 3 --html r/step-3.html"]),
     ([{}], ["lowlevel score r --data pairs.jsonl"])],
)  # fmt: skip
def test_what_to_do_with_a_reward_run(data, shown):
    config = ll.configure("reward", data=data, eval_data="holdout", eval_limit=2)
    assert next_commands(RunFolder(Path("r")), config, 3) == shown


def test_a_run_opened_with_its_rows(dpo, rows):
    run = ll.Run(str(dpo.path), data=rows["dpo"])
    assert repr(run) == repr(dpo) and "dpo, step 4" in repr(run) and "finished" in repr(run)
    found = run.inspect(step=3)  # with the weights of checkpoint 2
    assert found.loss == pytest.approx(run.metrics[2]["loss"], abs=1e-6)
    pair = found.examples[0]
    parts = torch.cat([text.columns["adds"] for text in pair.texts])
    assert float(parts.sum()) == pytest.approx(pair.numbers["margin"], abs=1e-6)
    assert run.inspect(example=5).examples[0].row == 5
    report = run.verify()
    assert report.ok
    replayed = run.replay(4, what_if={"beta": 4 * run.config.dpo.beta})
    actual, other = replayed.outcomes
    assert other.numbers["rewards/margins"] == pytest.approx(4 * actual.numbers["rewards/margins"], rel=1e-5)
    assert run.replay(4, what_if=f"beta={4 * run.config.dpo.beta}").outcomes == replayed.outcomes
    for wrong in ({"betta": 1}, "betta=1", ["betta=1"]):
        with pytest.raises(LowlevelError, match="^what_if: betta=1: expected NAME=VALUE"):
            run.replay(4, what_if=wrong)
    assert replayed.exact and replayed.first_difference is None and replayed.rows
    assert isinstance(run.generate(rows["dpo"][0]["prompt"], max_new_tokens=4), str)
    with pytest.raises(ConfigError, match="^prompt: got a list, expected a text$"):
        run.generate(["Hello"])
    assert run.policy.trainable_names()


def test_data_that_cannot_be_rows(api):
    for data in (7, [], [{"prompt": "a"}, "b"], {"prompt": ["a"]}):
        with pytest.raises(LowlevelError, match="^data: ") as caught:
            api.dpo("none", data)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="^data:2: "):
        api.dpo("none", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}])
    assert not (api.folder / "none").exists()


def test_a_dpo_run_starts_from_a_run(api, sft):
    run = api.dpo("stacked", adapter=sft, max_steps=1)
    assert run.config.model.adapter == str(sft.path)
    assert ll.configure("grpo", reward=[sft, "length"]).grpo.reward == (str(sft.path), "length")
    assert run.metrics[0]["rewards/margins"] == 0
    assert run.folder.read_manifest()["parent_adapter"]
