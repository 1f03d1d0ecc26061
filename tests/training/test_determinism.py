"""Deterministic mode: what it switches, and that it switches it back."""

import os

import pytest
import torch

from lowlevel.determinism import FIXED_WORKSPACES, WORKSPACE, compiler_options, deterministic_mode


def modes():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), fill


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    monkeypatch.setenv(WORKSPACE, "unset")
    monkeypatch.delenv(WORKSPACE)


def test_it_is_on_within_the_block_and_as_before_after_it():
    before = modes()
    with pytest.raises(RuntimeError, match="stop"), deterministic_mode(True):
        assert modes() == (True, False, False)
        assert os.environ[WORKSPACE] in FIXED_WORKSPACES
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
        assert modes() == before and WORKSPACE not in os.environ and compiler_options() == {}


def test_a_workspace_that_is_deterministic_is_kept(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic_mode(True):
        assert os.environ[WORKSPACE] == ":16:8"


def test_the_compiler_chooses_nothing_by_timing():
    with deterministic_mode(True):
        options = compiler_options()
    assert options == {"deterministic": True}
    torch.compile(lambda x: x + 1, options=dict(options))  # an unknown option would raise
