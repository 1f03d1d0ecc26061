"""Inspected completions: every column and number by hand, and all of them on the page and in the terminal."""

import io
import math
import re
from dataclasses import replace

import helpers
import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from rollouts_by_hand import groups_of, logps_alone, on_policy, rollouts
from transformers import AutoTokenizer

from lowlevel.config.online import GRPOConfig, OnlineDPOConfig, PPOConfig, RLOOConfig
from lowlevel.data.tokenizer import chat_tokenizer
from lowlevel.inspection.example import Inspection
from lowlevel.inspection.opening import METHODS
from lowlevel.inspection.page import render_page
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.sampled import with_groups
from lowlevel.inspection.terminal import print_inspection
from lowlevel.methods import GRPO, PPO, RLOO
from lowlevel.online.rollouts import pairs_of

CASES = {
    "dapo": (GRPO, GRPOConfig(max_completion_length=16, epsilon_high=0.28)),
    "grpo": (GRPO, GRPOConfig(max_completion_length=16, loss_type="grpo", beta=0.3, scale_rewards="group")),
    "rloo": (RLOO, RLOOConfig(max_completion_length=16, beta=0.05)),
    "ppo": (PPO, PPOConfig(max_completion_length=16, num_generations=4, beta=0.05, temperature=0.7)),
}


@pytest.fixture(scope="module")
def policy(tiny_base):
    return helpers.make_policy(tiny_base, dropout=0.3, value_head=True)


def inspected(policy, tiny_base, case, found=None):
    """Of one prompt twice: three groups of four completions that are not all the policy's own any more."""
    kind, config = CASES[case]
    method = kind(config, 5, 64, packing=False)
    found = found or on_policy(policy, rollouts(), temperature=config.temperature, shift=0.3)
    found = [replace(x, row=7) for x in found]
    kept = method.credit(policy, groups_of(found))
    inspect, view = METHODS[method.name]
    pieces = TokenPieces(chat_tokenizer(AutoTokenizer.from_pretrained(tiny_base), helpers.ZEPHYR))
    examples = tuple(inspect(policy, method, kept))
    return Inspection("run", "step 2", "final adapter", None, pieces, method, view(method), examples), kept


@pytest.mark.parametrize("case", CASES)
def test_columns_and_numbers_by_hand(policy, tiny_base, case):
    found, kept = inspected(policy, tiny_base, case)
    method, config = found.method, CASES[case][1]
    assert found.loss == pytest.approx(helpers.step(policy, method, kept).loss, abs=1e-5)
    texts = [text for one in found.examples for text in one.texts]
    assert len(texts) == len(kept) and found.headline.startswith(f"run, step 2: {len(kept)} completions, ")
    clipped = 0
    for x, text in zip(kept, texts, strict=True):
        assert text.ids.tolist() == x.completion_ids.tolist() and text.start == len(x.prompt_ids)
        new, reference = (logps_alone(policy, x, temperature=config.temperature, reference=r) for r in (False, True))
        columns = {name: column.numpy() for name, column in text.columns.items()}
        assert columns["policy"] == pytest.approx(new, abs=1e-4) and (columns["sampler"] == x.logps).all()
        assert columns["ratio"] == pytest.approx(np.exp(new - x.logps), rel=1e-4)
        if config.beta:
            d = new - reference
            kl = (np.exp(-d) + d - 1) * columns["ratio"] if case == "grpo" else x.logps - reference
            assert columns["kl"] == pytest.approx(kl, abs=1e-4)
        r, low, high = columns["ratio"], 0.2, 0.28 if case == "dapo" else 0.2
        r = np.full(len(r), math.exp((new - x.logps).sum())) if case == "rloo" else r
        cut = ((r > 1 + high) & (x.advantages > 0)) | ((r < 1 - low) & (x.advantages < 0))
        assert (columns["clipped"] == cut).all()
        clipped += cut.sum()
        weight = np.where(cut, 0.0, r * x.advantages) / (len(r) if case == "grpo" else 1)
        if case == "grpo":  # of k3 times the ratio: its slope is r (k3 + 1 - exp(-d)) = r d
            weight = weight - 0.3 * columns["ratio"] * d / len(r)
        assert columns["weight"] == pytest.approx(weight, abs=1e-4)
        assert text.numbers["loss"] == pytest.approx(columns["loss"].sum(), abs=1e-4)
        assert text.numbers["advantage"] == pytest.approx(x.advantages.mean(), abs=1e-5)
    assert clipped > 0


def test_rewards_lead_to_advantages(policy, tiny_base):
    for case in ("dapo", "grpo", "rloo"):
        found, kept = inspected(policy, tiny_base, case)
        for one, group in zip(found.examples, groups_of(kept), strict=True):
            rewards = np.array([x.reward for x in group])
            assert one.values("reward") == one.values("reward/own") == rewards.tolist()
            if case == "rloo":
                penalties = [0.05 * float(text.columns["kl"].sum()) for text in one.texts]
                assert one.values("R") == pytest.approx(rewards - penalties, abs=1e-5)
                advantages = np.array(one.values("R")) - one.values("mean of others")
            else:
                advantages = rewards - one.numbers["group mean"]
                advantages /= one.numbers["deviation"] + 1e-4 if case == "grpo" else 1
                assert case == "dapo" or one.numbers["deviation"] == pytest.approx(rewards.std(ddof=1))
            assert one.values("advantage") == pytest.approx(advantages, abs=1e-5)
            assert one.numbers["loss of the group"] == pytest.approx(one.loss, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_page_and_terminal_show_all_of_them(policy, tiny_base, case):
    found, kept = inspected(policy, tiny_base, case)
    page, stream = render_page(found), io.StringIO()
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and {"row-7", "row-7-again-1", "row-7-text-3"} <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert page.count('class="tok') == sum(len(x.completion_ids) for x in kept)
    assert page.count('class="unit') == len(kept) and "cut at its maximal length" in page
    assert page.count("tok marked") == sum(int(t.columns["clipped"].sum()) for x in found.examples for t in x.texts)
    print_inspection(found, Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80
    for name in ("reward/own", "advantage", "sampler", "ratio", "clipped", "weight"):
        assert name in page and any(name in line for line in lines), name


def test_a_reward_that_failed_and_equal_advantages_can_be_shown(policy, tiny_base):
    found = on_policy(policy, rollouts())  # every ratio is 1
    found = [replace(x, reward=math.nan if x.sample == 0 else 1.0) for x in found]
    for case in CASES:
        made, kept = inspected(policy, tiny_base, case, found)
        assert "not in the loss" in render_page(made) and not any(x.counted for x in kept if x.sample == 0)


def test_pairs_of_online_dpo_have_the_scores_of_their_group(policy):
    found = on_policy(policy, rollouts(), shift=0.1)
    method, pairs = helpers.dpo(), pairs_of(found)
    examples = with_groups(METHODS["dpo"][0](policy, method, pairs), pairs, found, OnlineDPOConfig())
    for one, group in zip(examples, groups_of(found), strict=True):
        best, worst = (choose(group, key=lambda x: x.reward) for choose in (max, min))
        assert one.values("score") == one.values("reward/own") == [best.reward, worst.reward]
        for text, x in zip(one.texts, (best, worst), strict=True):
            assert (text.columns["sampler"].numpy() == x.logps).all() and f"sample {x.sample}" in text.note
        assert ("all scores are equal" in one.texts[0].note) == (best.reward == worst.reward)
        assert [other.name for other in one.others] == [f"sample {x.sample}" for x in group if x not in (best, worst)]
        assert all(other.numbers["score"] == group[int(other.name[-1])].reward for other in one.others)
