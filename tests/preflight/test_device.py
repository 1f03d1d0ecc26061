"""What is said of a device: of this CPU, and of GPUs as torch would describe them."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from lowlevel.preflight import device

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """Torch, as it answers for one T4 with 14 of 15 GiB free; the returned values may be changed."""
    card = SimpleNamespace(capability=(7, 5), free=14 * GIB, total=15 * GIB, count=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: card.count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card.capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (card.free, card.total))
    monkeypatch.setattr(device, "_adds_right", lambda: True)
    return card


def test_a_t4(gpu):
    answer = device.device()
    assert answer.verdict == "ok"
    assert "Tesla T4, compute capability 7.5, 14.0 of 15.0 GiB free" in answer.found and "visible" not in answer.found
    precision = device.precision().found
    assert precision.startswith("fp16 (") and "bf16 needs compute capability 8.0; this GPU has 7.5" in precision
    chosen = device.attention()
    assert chosen.verdict == "ok" and "memory-efficient kernel: FlashAttention 2 needs" in chosen.found
    assert device.execution().found.startswith("graphed: ")


def test_an_ampere_gpu_has_bf16_and_flash(gpu):
    gpu.capability = (8, 0)
    assert "bf16 is possible" in device.precision().found
    assert "flash kernel" in device.attention().found


def test_a_gpu_that_others_use_and_a_second_one(gpu):
    gpu.free, gpu.count = 9 * GIB, 2
    answer = device.device()
    assert answer.verdict == "note"
    assert "others hold 6.0 GiB" in answer.found and "2 GPUs visible, one is used: cuda:0" in answer.found
    gpu.free = 14 * GIB
    assert device.device().verdict == "note" and "add --gpus 2" in str(device.device())


def test_a_gpu_that_computes_wrongly(gpu, monkeypatch):
    monkeypatch.setattr(device, "_adds_right", lambda: False)
    assert device.device().verdict == "FAIL"


def test_this_cpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answer = device.device()
    assert answer.verdict == "note" and answer.found.startswith("CPU, threads: 1;")
    assert device.precision().found.startswith("fp32 (")
    assert "sdpa with an explicit mask" in device.attention().found
    assert device.execution().found.startswith("eager: ")


def test_why_no_gpu_is_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in device.device().found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in device.device().found

    def old_driver():
        device.warnings.warn("CUDA initialization: The NVIDIA driver is too old\nmore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    answer = device.device()
    assert answer.verdict == "note" and answer.found.endswith("CUDA initialization: The NVIDIA driver is too old")
    for cuda, oldest in (("13.2", 580), ("12.8", 525)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert f"CUDA {cuda} of this torch needs driver {oldest} or newer; " in device.device().advice


def test_the_compiler_here():
    answer = device.compiler()
    assert answer.verdict == "ok", answer
    assert "compiled and ran a function on cpu" in answer.found


def test_without_a_compiler_runs_go_on_eager(monkeypatch):
    def no_compiler(function, **_):
        def broken(x):
            raise RuntimeError("Failed to find C compiler\nlong")

        return broken

    monkeypatch.setattr(torch, "compile", no_compiler)
    answer = device.compiler()
    assert answer.verdict == "note" and "RuntimeError: Failed to find C compiler" in answer.found
    assert "eager" in answer.advice and "gcc" in answer.advice


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_a_compiler_that_computes_wrongly(monkeypatch, error):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: function(x) + error)
    answer = device.compiler()
    assert answer.verdict == "FAIL" and "eager" in answer.advice


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    answer = device.run_folder(tmp_path)
    assert answer.verdict == "ok" and str(tmp_path) in answer.found and "GiB free" in answer.found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_yet(tmp_path):
    answer = device.run_folder(tmp_path / "out" / "run")
    assert answer.verdict == "ok" and f"{tmp_path} can be" in answer.found
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "out").write_text("")
    assert device.run_folder(tmp_path / "out").verdict == "FAIL"


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir"])
def test_a_disk_that_refuses(tmp_path, monkeypatch, call):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, call, refuse)
    answer = device.run_folder(tmp_path)
    monkeypatch.undo()
    assert answer.verdict == "FAIL" and "Read-only file system" in answer.found
    assert list(tmp_path.iterdir()) == []


def test_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=device.LITTLE_ROOM - 1))
    answer = device.run_folder(tmp_path)
    assert answer.verdict == "note" and "2.0 GiB free" in answer.found


@pytest.mark.parametrize(("offline", "models", "verdict"), [
    (False, 0, "ok"), (False, 2, "ok"), (True, 2, "ok"), (True, 0, "note"),
])  # fmt: skip
def test_the_hub(tmp_path, monkeypatch, offline, models, verdict):
    cache = tmp_path / "hub"
    for number in range(models):
        (cache / f"models--org--name{number}").mkdir(parents=True)
    monkeypatch.setattr(device.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(device.constants, "HF_HUB_OFFLINE", offline)
    answer = device.hub()
    assert answer.verdict == verdict
    assert f"{cache}, {models} models in it, offline mode {'on' if offline else 'off'}" in answer.found


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(device.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(device.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    answer = device.hub()
    assert answer.verdict == "note" and "HF_HOME" in answer.advice
