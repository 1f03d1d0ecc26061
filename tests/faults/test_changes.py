"""Going on with another setting: every key of the configuration is either refused by name, or known to be free.

The keys come from the configuration's own list of examples, which must be complete (tests/config_keys.py): a new
key is refused on a resume until somebody adds it here to the free ones, with a reason.
"""

import pytest
from config_keys import KEYS, merged

from benchmarks.faulting.comparison import differences as run_differences
from benchmarks.faulting.comparison import fingerprint
from lowlevel.config.file import config_from_tables
from lowlevel.config.schema import RunConfig
from lowlevel.running.resuming import differences

FREE = {
    "data.format": "only how rows are read: the hash of the rows is compared",
    "model.embeddings_on_host": "the same numbers from another memory",
    "train.offload_activations": "the same numbers from another memory",
    "train.output_dir": "where, not what",
    "train.logging_steps": "only what is said",
    "train.save_steps": "only what is kept",
    "train.save_total_limit": "only what is kept",
    "train.ddp_timeout": "only when it gives up",
    "train.shard_base": "the same weights, in parts on several GPUs",
    "train.report_to": "only where the numbers also go",
    "dpo.reference_cache": "the same numbers, computed once",
    "trace.every": "only what is kept",
    "trace.steps": "only what is kept",
    "trace.level": "only what is kept",
    "trace.gradients": "only what is kept",
}
SEALED = {"identity": {}, "versions": {}}


def changed(key: str) -> tuple[RunConfig, RunConfig]:
    """Two configurations that differ in one key."""
    value, needs = KEYS[key]
    section, name = key.split(".")
    return config_from_tables(needs, "before"), config_from_tables(merged(needs, {section: {name: value}}), "after")


def test_the_free_keys_exist():
    assert FREE.keys() <= KEYS.keys() and len(KEYS) > 50


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_free_or_refused_by_name(key):
    before, after = changed(key)
    found = {difference.key: str(difference) for difference in differences(before, SEALED, after, {}, {})}
    if key in FREE:
        assert found == {}
        return
    value = "[{'source': 'a.jsonl'," if key == "data.sources" else f"{KEYS[key][0]!r} (now)"
    assert key in found
    assert found[key].startswith(f"{key}: ") and f"!= {value}" in found[key]


def test_refused_keys_in_a_run(play):
    """A line for each, and not a byte of the folder changes."""
    folder = play.stopped_at(2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}
    flags = {"train.learning_rate": "0.5", "lora.lora_dropout": "0.2", "train.max_grad_norm": "0.25"}
    typed = [word for key, value in flags.items() for word in (f"--{key}", value)]
    ended = play.run(folder, more=("--resume", *typed))
    assert ended.code == 2
    for key, value in flags.items():
        assert f"{key}: " in ended.err and f"!= {value} (now)" in ended.err
    assert ended.err.count("!=") == len(flags)
    assert before == {path: path.read_bytes() for path in before}
    assert play.resumed(folder) == []


def test_free_keys_in_a_run(play):
    """Other lines are logged and other checkpoints kept; what was learned is the same."""
    folder = play.stopped_at(2)
    typed = ("--train.logging_steps", "2", "--train.save_steps", "3", "--train.save_total_limit", "9")
    ended = play.run(folder, more=("--resume", *typed, "--trace.every", "1"))
    assert ended.code == 0, ended.said
    assert (folder / "trace").exists()
    expected = play.whole.print
    learned = {name for name in expected if name.startswith(("step-", "adapter", "stacked", "parent"))}
    assert len(learned) > 20
    assert not learned & set(run_differences(folder, expected))
    assert fingerprint(folder)["state"]["total"] == expected["state"]["total"]
