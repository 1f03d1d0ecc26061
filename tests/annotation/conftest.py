"""An annotation without a model: its pairs are texts that a page could get wrong."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from hostile import HEADER, PAIRS, served  # noqa: E402

from lowlevel.annotation.journal import open_journal  # noqa: E402


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "prefs.jsonl"


@pytest.fixture
def journal_of(out):
    """The journal of `out`, begun or resumed."""

    def opened(*, resume: bool = False, header=HEADER, pairs=PAIRS):
        return open_journal(out, header, lambda: (list(pairs), {}), resume=resume)

    return opened


@pytest.fixture
def server(journal_of):
    with journal_of() as journal, served(journal) as server:
        yield server


@pytest.fixture
def rows(out):
    """The rows of the preference file."""
    return lambda: [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
