"""What is said of a device: of this CPU, and of GPUs as torch would describe them."""

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
    assert answer.verdict == "note" and answer.found.startswith("CPU, 1 threads")
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
