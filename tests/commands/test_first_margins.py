"""Step 1 of DPO with a fresh adapter: the reference is the policy, or the run does not go on."""

import re

import pytest
from helpers import step_result
from workspace import metrics

import lowlevel.methods.dpo
from lowlevel.config.file import config_from_tables
from lowlevel.errors import ConfigError
from lowlevel.methods.sampled import DIFFERENCE
from lowlevel.running.observer import check_first_step, check_sampler, starts_as_reference


@pytest.fixture
def off(monkeypatch):
    """A reference whose tokens are off by `nats` each."""
    plain = lowlevel.methods.dpo.reference_token_logps

    def by(nats):
        monkeypatch.setattr(
            lowlevel.methods.dpo, "reference_token_logps", lambda policy, batch: plain(policy, batch) + nats
        )

    return by


def test_a_run_whose_reference_is_another_is_refused_at_step_1(cli, space, tmp_path, off):
    off(1e-3)
    config = space.write("run", "dpo", folder=tmp_path, train={"max_steps": 2})
    said = cli("dpo", config)
    assert said.code == 2 and said.err.count("\n") == 1
    assert re.search(r"step 1: a fresh adapter's margins are not 0: mean -?\d", said.err), said.err
    assert not (tmp_path / "run" / "adapter").exists() and not list((tmp_path / "run").glob("step-*"))


def test_a_difference_within_rounding_is_a_warning(cli, space, tmp_path, off):
    off(2e-6)
    said = cli("dpo", space.write("run", "dpo", folder=tmp_path, train={"max_steps": 2}))
    assert said.code == 0, said.err
    assert said.out.count("warning: step 1: a fresh adapter's margins are not 0") == 1


def test_a_run_as_it_should_be_says_nothing_of_it(cli, space, tmp_path):
    said = cli("dpo", space.write("run", "dpo", folder=tmp_path, train={"max_steps": 1, "logging_steps": 1}))
    assert said.code == 0 and "margins are not 0" not in said.out
    assert metrics(tmp_path / "run")[0]["rewards/margins"] == 0.0


@pytest.mark.parametrize(
    ("tables", "same"),
    [
        ({"method": "sft"}, False),
        ({"method": "dpo"}, True),
        ({"method": "dpo", "dpo": {"disable_dropout": False}}, False),
        ({"method": "dpo", "dpo": {"disable_dropout": False}, "lora": {"lora_dropout": 0.0}}, True),
        ({"method": "dpo", "lora": {"init_from": "a"}}, False),
    ],
)
def test_which_runs_start_as_their_reference(tables, same):
    assert starts_as_reference(config_from_tables(tables, "a test")) is same


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 1.6e-2)])
def test_the_bound_is_one_of_the_mean_log_probability(precision, apart):
    """-50 nats: 5e-4, 0.1 and 0.8."""

    def result(share):
        chosen = {"logps/chosen": -50.0, "logps/ref_chosen": -50.0 + 50.0 * share * apart}
        others = {"logps/rejected": -20.0, "logps/ref_rejected": -20.0}
        return step_result({"rewards/margins": 0.0, "rewards/accuracies": 0.25, **chosen, **others}, 4)

    config = config_from_tables({"method": "dpo"}, "a test")
    line = check_first_step(result(0.9), config, precision)
    assert line is not None and line.startswith("warning: step 1")
    with pytest.raises(ConfigError, match="the policy does not start as its reference; nothing was saved"):
        check_first_step(result(1.1), config, precision)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_a_sampler_with_another_policy_ends_the_run(precision, bound):
    def result(mean):
        return step_result({f"{DIFFERENCE}/mean": mean, f"{DIFFERENCE}/max": 1.0}, 4)

    config = config_from_tables({"method": "grpo", "grpo": {"reward": "length"}}, "a test")
    check_sampler(result(0.9 * bound), config, precision)
    check_sampler(result(1.1 * bound), config_from_tables({"method": "sft"}, "a test"), precision)
    with pytest.raises(ConfigError, match="sampler and trainer differ by .* nats in the mean .* two policies"):
        check_sampler(result(1.1 * bound), config, precision)
