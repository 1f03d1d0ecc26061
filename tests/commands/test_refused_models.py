"""Damaged or foreign adapters and bases: exit code 4, one line that names what is wrong, nothing opened or written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file


def change(folder: Path, file: str, edit) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def first(tensors: dict) -> str:
    return min(tensors)


ADAPTERS = {
    "not finite": lambda t: t[first(t)].view(-1)[0].fill_(float("nan")),
    "infinite": lambda t: t[first(t)].view(-1)[0].fill_(float("inf")),
    "missing": lambda t: t.pop(first(t)),
    "left over": lambda t: t.update({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}),
    "of another shape": lambda t: t.update({first(t): torch.zeros(5, 128)}),
}


@pytest.mark.parametrize("key", ["model.adapter", "lora.init_from"])
@pytest.mark.parametrize("problem", ADAPTERS)
def test_damaged_adapters(cli, runs, tmp_path, key, problem):
    adapter = Path(shutil.copytree(runs.sft / "adapter", tmp_path / "adapter"))
    name = first(load_file(adapter / "adapter_model.safetensors"))
    change(adapter, "adapter_model.safetensors", ADAPTERS[problem])
    lora = {"r": None, "lora_alpha": None} if key == "lora.init_from" else {}
    config = runs.space.write("run", "dpo", folder=tmp_path, lora=lora, train={"max_steps": 1})
    expected = "not finite" if problem == "infinite" else problem
    tensor = "layers.7.mlp.up_proj.lora_A" if problem == "left over" else name
    refused(cli("dpo", config, f"--{key}", adapter), 4, expected, tensor, "1 " if problem != "not finite" else "")
    written = {path.name for path in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert written <= {"run.lock"}
    if problem == "missing":  # the mistake mended, the same command runs
        assert cli("dpo", config, f"--{key}", runs.sft).code == 0


def test_adapters_of_other_kinds(cli, runs, tmp_path):
    config = runs.space.write("run", "dpo", folder=tmp_path, train={"max_steps": 1})
    for edit, text in (
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"bias": "all"}, "bias"),
        ({"r": 10**9}, "out of bounds"),
        ({"r": 8}, "of another shape"),
        ({"target_modules": ["q_proj"]}, "left over"),
    ):
        adapter = Path(shutil.copytree(runs.sft / "adapter", tmp_path / f"a{len(text)}", dirs_exist_ok=True))
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
        refused(cli("dpo", config, "--model.adapter", adapter), 4, text)


def damaged_base(space, folder: Path, edit) -> Path:
    base = Path(shutil.copytree(space.base, folder / "base"))
    change(base, "model.safetensors", edit)
    return base


BASES = {
    "missing": lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
    "left over": lambda t: t.update({"model.layers.1.mlp.other.weight": torch.zeros(2)}),
    "of another shape": lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 64)}),
}


@pytest.mark.parametrize("problem", BASES)  # unquantised: tests/config/test_unsafe_files.py
def test_damaged_bases(cli, space, tmp_path, problem):
    base = damaged_base(space, tmp_path, BASES[problem])
    config = space.write("run", "sft", folder=tmp_path, train={"max_steps": 1})
    said = cli("sft", config, "--model.name", base)
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert (said.code, len(lines)) == (4, 1), said.err
    assert "Traceback" not in said.err
    assert re.search(rf"tensors? {problem}: model\.layers\.1\.mlp\.", lines[0])
    assert not (tmp_path / "run" / "config.toml").exists()


def test_pickles_are_refused_by_name_and_not_opened(cli, runs, tmp_path, monkeypatch):
    """The payload would make a file when it is unpickled."""
    payload = b"cposix\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR."
    base = Path(shutil.copytree(runs.space.base, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(payload)
    adapter = Path(shutil.copytree(runs.sft / "adapter", tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(payload)
    config = runs.space.write("run", "dpo", folder=tmp_path)
    refused(cli("dpo", config, "--model.name", base), 4, "pytorch_model.bin is a pickle")
    refused(cli("dpo", config, "--model.adapter", adapter), 4, "adapter_model.bin is a pickle")
    monkeypatch.chdir(runs.space.folder)  # where the adapter's base is found by its name
    refused(cli("generate", adapter, "--prompt", "a"), 4, "adapter_model.bin is a pickle")
    refused(cli("generate", base, "--prompt", "a"), 4, "pytorch_model.bin is a pickle")
    assert not (tmp_path / "opened").exists()
