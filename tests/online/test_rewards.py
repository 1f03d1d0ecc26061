"""Reward functions: the built-in ones by hand, and what becomes of their failures."""

import math
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lowlevel.config.file import config_from_tables
from lowlevel.data.examples import PromptExample
from lowlevel.errors import ConfigError
from lowlevel.online import rewards
from lowlevel.online.rewards import Rewards, exact_match, final_answer, gsm8k, name_of, sources_sha256

EXAMPLE = PromptExample(4, "data:4", np.arange(3), [{"role": "user", "content": "2 + 3?"}], "5", {"hint": "five"})


def configured(**own):
    return config_from_tables({"method": "grpo", "grpo": own}, "test").grpo


def scores(*functions, weights=(), timeout=5.0, texts=("5", "6")):
    own = Rewards({f.__name__: f for f in functions}, weights or (1.0,) * len(functions), timeout)
    found = own(EXAMPLE, texts, [[1, 2]] * len(texts))
    return own.total(found.by_function).tolist(), found.failures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 3 + 4 = 7\n#### 1,234", "1234"),
        ("#### $1,200.00", "1200"),
        ("#### -7.50 apples of 9", "-7.5"),
        ("#### 5\nno: #### 6", "6"),
        ("first 3, then 4.0.", "4"),
        ("no number", None),
        ("#### none", None),
    ],
)
def test_final_answer(text, expected):
    found = final_answer(text)
    assert (found is None) == (expected is None) and (found is None or found == pytest.approx(float(expected)))


def test_built_in_functions():
    assert gsm8k(["#### 72", "#### 72.0", "it is 71", ""], ["a 7\n#### 72"] * 4) == [1, 1, 0, 0]
    assert exact_match([" a b\n", "ab"], ["a b", "a b"]) == [1, 0]
    for function, reference, why in ((exact_match, [None], "no reply"), (gsm8k, ["none"], "has no number")):
        with pytest.raises(ValueError, match=why):
            function(["7"], reference)
    own = configured(reward="format,length", reward_pattern="<a>.*</a>", max_completion_length=8)
    found = Rewards.of(own, lambda folder: exact_match)(EXAMPLE, ["<a>\n</a> ", "<a>"], [[1, 2], [1] * 8])
    assert found.by_function.tolist() == [[1, 0], [-0.25, -1]]


def test_a_function_gets_what_it_has_parameters_for():
    def own(prompts, completions, completion_ids, reference, hint):
        assert prompts == [EXAMPLE.messages] * 2 and completion_ids == [[1, 2]] * 2
        assert reference == ["5", "5"] and hint == ["five", "five"]
        return [len(text) for text in completions]

    def every(**given):
        return [len(given)] * 2

    assert scores(own) == ([1, 1], ())
    assert scores(own, every, weights=(0.5, 2.0)) == ([10.5, 10.5], ())


def fails(completions):
    raise ValueError("a line\nand more")


def short(completions):
    return [1.0]


def odd(completions):
    return [math.inf, 0.5]


def slow(completions):
    time.sleep(0.3)
    return [1.0, 1.0]


def nothing(completions):
    return None


def leaves(completions):
    sys.exit(3)


@pytest.mark.parametrize(
    ("function", "kept", "reason"),
    [
        (fails, [False, False], "ValueError: a line"),
        (short, [False, False], "1 rewards for 2 completions"),
        (nothing, [False, False], "TypeError: returned NoneType, expected 2 numbers"),
        (leaves, [False, False], "RuntimeError: SystemExit: 3"),
        (odd, [False, True], "a reward is inf"),
        (slow, [False, False], "TimeoutError: took longer than 0.05 s (reward_timeout)"),
    ],
)
def test_failures_are_named_and_never_a_reward_of_0(function, kept, reason):
    found, failures = scores(function, exact_match, timeout=0.05)
    assert [math.isfinite(value) for value in found] == kept
    assert failures[0] == f"data:4 (row 4), {function.__name__}: {reason}"
    assert len(failures) == 1  # a call or a number


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"reward": "exact_mach"}, "unknown reward 'exact_mach': did you mean 'exact_match'?"),
        ({"reward": "nowhere:at_all"}, "cannot be imported: ModuleNotFoundError"),
        ({"reward": "format", "reward_pattern": "("}, "reward_pattern is not a regular expression"),
        ({"reward": "pathlib:Path"}, "'pathlib:Path' is a class: give a function"),
        ({"reward": "math:pi"}, "'math:pi' is no function: give a function"),
        ({"reward": "asyncio:sleep"}, "'asyncio:sleep' is an async function: give a function"),
        ({"reward": "length,length"}, "reward has a name twice: rename it, or set reward_weights"),
        ({"top_p": 0.9}, "grpo.top_p: is not supported"),
        ({"beta": 0.1, "kl_estimator": "k1"}, "expected 'k2', 'k3' or 'k3_ratio'"),
    ],
)
def test_refusals(own, message):
    with pytest.raises(ConfigError) as error:
        rewards.check(configured(**own))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reward", "why"),
    [
        ("gsm8k", 'reward gsm8k: 1 of 2 rows, the first data:5, have neither a reply nor a column "answer"'),
        ("judges:level", 'reward judges:level: 1 of 2 rows, the first data:5, have no column "hint"'),
        ("judges:free", None),
    ],
)
def test_rows_that_lack_what_a_function_needs(monkeypatch, tmp_path, reward, why):
    monkeypatch.chdir(tmp_path)
    Path("judges.py").write_text("def level(completions, hint): ...\ndef free(completions, hint=None, **more): ...\n")
    monkeypatch.delitem(sys.modules, "judges", raising=False)
    rows = [EXAMPLE, replace(EXAMPLE, where="data:5", reference=None, columns={})]
    with pytest.raises(ConfigError, match=re.escape(why)) if why else nullcontext():
        rewards.check_rows(configured(reward=reward), rows)


@pytest.mark.parametrize(
    ("given", "weights"), [("1,0.5", (1.0, 0.5)), ("2", (2.0,)), (3, (3.0,)), ([1, 2], (1.0, 2.0))]
)
def test_weights_as_a_list_a_number_or_a_text(given, weights):
    functions = "length,exact_match" if len(weights) == 2 else "length"
    assert configured(reward=functions, reward_weights=given).reward_weights == weights


def test_names_and_sources_of_functions(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("judges.py").write_text("def one(completions):\n    return [1.0 for _ in completions]\n")
    assert sources_sha256(configured(reward="judges:one")) != sources_sha256(configured(reward="json:loads"))
    assert sources_sha256(configured()) is None
    local = lambda completions: [0.0]  # noqa: E731
    assert name_of(exact_match) == "lowlevel.online.rewards:exact_match"
    assert rewards.OWN[name_of(local)] is local


def test_callables_without_a_name_of_their_own():
    """The hash of an object's source does not hold its address: another process can resume the run."""

    class Judge:
        def __call__(self, completions):
            return [1.0] * len(completions)

    judge, part = Judge(), partial(slow)
    assert (name_of(judge), name_of(part)) == ("Judge", "partial") and rewards.OWN["partial"] is part
    first = sources_sha256(configured(reward="Judge,partial"))
    rewards.OWN["Judge"] = Judge()
    assert sources_sha256(configured(reward="Judge,partial")) == first

    def length(completions):
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match="'length': rename it"):
        name_of(length)
