"""An adapter to stand on; for the tests of the reference cache, a count of reference passes and a filled folder; for
those of resuming, a copy of a stopped run."""

import sys
from contextlib import contextmanager
from pathlib import Path

import helpers
import pytest
from workspace import Said, run

from lowlevel.config.offline import DPOConfig
from lowlevel.hashing import key32
from lowlevel.methods.dpo import DPO
from lowlevel.model.policy import Policy

sys.path.append(str(Path(__file__).parent))

from reference_caching import PAIRS, SHAPE, SPANS, recording  # noqa: E402


@pytest.fixture(scope="session")
def parent_adapter(tiny_base, tmp_path_factory) -> Path:
    return helpers.save_random_adapter(tiny_base, tmp_path_factory.mktemp("parent") / "adapter")


@pytest.fixture
def passes(monkeypatch):
    """Counts reference passes from here on."""
    counted, original = [], Policy.reference

    @contextmanager
    def reference(self):
        counted.append(1)
        with original(self):
            yield

    monkeypatch.setattr(Policy, "reference", reference)
    return counted


@pytest.fixture
def filled(tiny_base, tmp_path):
    """A policy, a method, and a folder with a shard of its micro-batches."""
    policy, method = helpers.make_policy(tiny_base, attention=SPANS), DPO(DPOConfig(), 2, 64, True, SHAPE)
    cache, _ = recording(policy, tmp_path)
    for batch in method.micro_batches(PAIRS):
        cache.run(batch, 1.0, key32(1, 0))
    cache.flush()
    return policy, method, tmp_path


@pytest.fixture
def copied(space, tmp_path) -> Path:
    """A copy of the stopped run in the module's `space`."""
    return space.copy("stopped", tmp_path)


@pytest.fixture
def resume(space, copied):
    """`lowlevel sft stopped.toml --resume ARGUMENTS` on that copy."""

    def go(*arguments: object) -> Said:
        return run("sft", space.folder / "stopped.toml", "--train.output_dir", copied, "--resume", *arguments)

    return go
