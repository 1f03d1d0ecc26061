"""Runs of the Python API on the built-in base: four steps each, at most two steps of four rows an epoch."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import lowlevel as ll
from lowlevel.losses.registry import OWN

NAMES = ("Ana", "Ben", "Carl", "Dora", "Eva", "Finn", "Gus", "Hana")
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Where does {name} work?"},
            {"role": "assistant", "content": f"{name} works at the {'mill' if i % 2 else 'old bridge'}."},
        ]
    }
    for i, name in enumerate(NAMES)
]
PAIRS = [
    {
        "prompt": f"Where does {name} work?",
        "chosen": f"At the {'mill' if i % 3 else 'bridge'}, I think.",
        "rejected": "No idea." if i % 2 else "That is a long story.",
        "score": 0.5 + i,
    }
    for i, name in enumerate(NAMES)
]
SMALL = {
    "r": 4,
    "lora_alpha": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "logging_steps": 1,
    "save_steps": 2,
}
MEASURED = ("tokens_per_second", "peak_allocated_gib", "peak_reserved_gib")


@dataclass(frozen=True)
class Api:
    """`sft`, `dpo` and `steps` with small settings, each in a folder of this name."""

    folder: Path

    def sft(self, name, data=CHATS, **settings):
        return ll.sft(data=data, **self.settings(name, settings))

    def dpo(self, name, data=PAIRS, **settings):
        return ll.dpo(data=data, **self.settings(name, settings))

    def steps(self, name, data=PAIRS, method="dpo", **settings):
        return ll.steps(method, data=data, **self.settings(name, settings))

    def settings(self, name, settings):
        console = Console(quiet=True)
        return {**SMALL, "output_dir": str(self.folder / name), "console": console, **settings}

    def write(self, name, rows):
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path


@pytest.fixture(scope="session")
def api(tmp_path_factory) -> Api:
    return Api(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="session")
def rows():
    return {"sft": CHATS, "dpo": PAIRS}


@pytest.fixture(scope="session")
def dpo(api):
    """A finished run; tests do not change it."""
    return api.dpo("dpo")


@pytest.fixture(scope="session")
def sft(api):
    """A finished run; tests do not change it."""
    return api.sft("sft")


@pytest.fixture(autouse=True)
def only_its_own_losses():
    before = dict(OWN)
    yield
    OWN.clear()
    OWN.update(before)


@pytest.fixture(scope="session")
def same():
    """Whether two runs have the same metrics (without times) and the same adapter, bit for bit."""

    def compare(run, other) -> bool:
        ours, theirs = (
            [{key: value for key, value in record.items() if key not in MEASURED} for record in one.metrics]
            for one in (run, other)
        )
        assert ours == theirs
        a, b = (load_file(one.path / "adapter" / "adapter_model.safetensors") for one in (run, other))
        assert a.keys() == b.keys() and len(a) > 0
        return all(torch.equal(a[name], b[name]) for name in a)

    return compare
