"""Deterministic mode: what it switches, and that it switches it back."""

import os

import helpers
import pytest
import torch
from workspace import make_workspace, run

from lowlevel.determinism import ENVIRONMENT, FIXED, compiler_options, deterministic_mode
from lowlevel.model.policy import Policy


def modes():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), fill


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "unset")
    monkeypatch.delenv(ENVIRONMENT)


def test_it_is_on_within_the_block_and_as_before_after_it():
    before = modes()
    with pytest.raises(RuntimeError, match="stop"), deterministic_mode(True):
        assert modes() == (True, False, False)
        assert os.environ[ENVIRONMENT] in FIXED
        raise RuntimeError("stop")
    assert modes() == before


def test_a_callers_own_mode_is_given_back():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_mode(True):
            assert modes()[:2] == (True, False)
        assert modes()[:2] == (True, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_not_wanted_it_does_nothing():
    before = modes()
    with deterministic_mode(False):
        assert modes() == before and ENVIRONMENT not in os.environ and compiler_options() == {}


def test_a_workspace_that_is_deterministic_is_kept(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, ":16:8")
    with deterministic_mode(True):
        assert os.environ[ENVIRONMENT] == ":16:8"


def test_the_compiler_chooses_nothing_by_timing():
    with deterministic_mode(True):
        options = compiler_options()
    assert options == {"deterministic": True}
    torch.compile(lambda x: x + 1, options=dict(options))  # an unknown option would raise


def test_the_layers_are_compiled_with_it(tiny_base, monkeypatch):
    options = []
    monkeypatch.setattr(torch, "compile", lambda forward, **keys: options.append(keys["options"]) or forward)
    layers = helpers.make_policy(tiny_base, attention="lowlevel_math").layers
    for wanted in (True, False):
        with deterministic_mode(wanted):
            layers.use(compiled=True)
        assert options and all(one.get("deterministic", False) is wanted for one in options)
        options.clear()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_its_replay_and_its_verification_compute_in_the_mode(tmp_path, monkeypatch, wanted):
    space, seen, scored = make_workspace(tmp_path), [], Policy.scored_hidden_states

    def spy(self, batch):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return scored(self, batch)

    monkeypatch.setattr(Policy, "scored_hidden_states", spy)
    file = space.write("run", "sft", train={"deterministic": wanted, "max_steps": 1})
    for command in (("sft", file), ("replay", tmp_path / "run", "--step", 1), ("verify", tmp_path / "run")):
        said = run(*command)
        assert said.code == 0 and set(seen) == {wanted}, (command, said.err)
        seen.clear()
    assert not torch.are_deterministic_algorithms_enabled()
