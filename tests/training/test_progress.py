"""The line that a run prints for a logged step."""

import io

import pytest
from rich.console import Console

from lowlevel.config.schema import RunConfig
from lowlevel.running.progress import EQUAL_REWARDS, TrainingProgress, describe
from lowlevel.running.run_record import equal_rewards

RECORD = {"step": 3, "loss": 1.25, "grad_norm": 0.5, "learning_rate": 2e-4, "tokens_per_second": 12345.6}
LINE = "loss 1.2500  grad_norm 0.500  lr 2.00e-04  12,346 tokens/s"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"peak_allocated_gib": 0.0, "skipped_steps": 0}, LINE),  # on a CPU, without an overflow
        ({"frac_reward_zero_std": 0.0}, LINE),
        ({"loss": -1e-9}, LINE.replace("1.2500", "0.0000")),  # of rloo: not -0.0000
        ({"peak_allocated_gib": 1.5, "skipped_steps": 2}, f"{LINE}  1.50 GiB  2 skipped"),
    ],
)
def test_memory_and_skipped_steps_are_shown_if_there_are_any(more, expected):
    assert describe({**RECORD, **more}) == expected


def test_a_narrow_terminal_keeps_each_record_above_the_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False, color_system=None)
    with TrainingProgress(console, "sft", 8, 2) as bar:
        for step in (3, 4):
            bar.step(step)
            bar.record({**RECORD, "step": step})
    said = console.file.getvalue()
    assert all(f"step {step}/8  loss 1.2500" in said for step in (3, 4)) and "4/8 0:00:0" in said


@pytest.mark.parametrize(("method", "shown"), [("grpo", True), ("online_dpo", True), ("ppo", False)])
def test_equal_rewards_are_shown_where_rewards_are_compared(method, shown):
    assert ("equal rewards in 75% of prompts" in describe({"frac_reward_zero_std": 0.75}, method)) == shown


@pytest.mark.parametrize(
    ("method", "shares", "adapter", "line"),
    [
        ("grpo", (0.9, 0.2), None, "equal rewards in 76% of prompts: nothing is learned from them; begin from an SFT"),
        ("rloo", (0.9, 0.2), "out/sft", "equal rewards in 76% of prompts: nothing is learned from them; take prompts"),
        ("grpo", (0.5, 0.5), None, None),
        ("ppo", (1.0, 1.0), None, None),
    ],
)
def test_the_end_of_a_run_says_if_most_prompts_taught_nothing(method, shares, adapter, line):
    """Logged after 8 and after 10 steps: 0.8 * 0.9 + 0.2 * 0.2 = 0.76."""
    records = [
        {"step": 0, "eval_reward": 0.0},
        *({"step": s, EQUAL_REWARDS: x} for s, x in zip((8, 10), shares, strict=True)),
    ]
    found = list(equal_rewards(records, RunConfig(method=method, model={"adapter": adapter})))
    assert [text.startswith(line or "") for text in found] == [True] * (line is not None)
