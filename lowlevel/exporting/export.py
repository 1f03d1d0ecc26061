"""`lowlevel export`: from a run or a merged model to the files that another program loads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from transformers import AutoConfig

from lowlevel.data.tokenizer import load_chat_tokenizer
from lowlevel.durable import check_new, new_folder
from lowlevel.errors import ConfigError
from lowlevel.exporting.gguf_model import check_model, tokenizer_fields, write_gguf, write_gguf_adapter
from lowlevel.exporting.ollama import modelfile
from lowlevel.heartbeat import working
from lowlevel.model.adapters import read_adapter_config
from lowlevel.model.base import base_location, load_model_config
from lowlevel.running.merge import merge_run
from lowlevel.running.reopening import check_gives_text
from lowlevel.running.run_folder import RunFolder

GGUF, GGUF_ADAPTER = "model.gguf", "adapter.gguf"
# vllm/config/lora.py: --max-lora-rank is one of these, 16 by default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def export(source: Path, to: str, out: Path, console: Console) -> None:
    """Write `source`, a run folder or the folder of a whole model, for another program into the new folder `out`.

    Args:
        source: a finished run; its adapters are merged into the weights that they were trained on, in 16 bits.
        to: gguf, ollama (the same with a Modelfile); or the run's adapter, not merged: gguf-adapter, vllm.
        out: a new folder.
        console: prints what was written, and how to load it.

    Raises:
        ConfigError: `out` exists, or the model, tokenizer or template is of a kind that is not written here.
        CheckpointError: as `merge_run`.
    """
    check_new(out)
    run = RunFolder(source) if (source / "config.toml").exists() else None
    result = _result(source, run)
    if to in ("vllm", "gguf-adapter"):
        if run is None or result == run.whole:
            use = f"vllm serve {result}, or --to gguf"
            raise ConfigError(f"--to {to} writes an adapter, and {result} is a whole model: {use}")
        return (_write_adapter if to == "vllm" else _write_gguf_adapter)(result, run, out, console)
    _check_first(result, run, to)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _whole_model(result, run, out, console) as folder, new_folder(out) as target:
        with working("writing GGUF"):
            write_gguf(folder, target / GGUF)
        if to == "ollama":
            text = modelfile(load_chat_tokenizer(str(folder), None, None), GGUF)
            (target / "Modelfile").write_text(text, encoding="utf-8")
    how = f"ollama create NAME -f {out / 'Modelfile'}" if to == "ollama" else f"llama-cli -m {out / GGUF}"
    console.print(f"written: {out}, matrices in fp16\nload it: {how}", markup=False, soft_wrap=True)


def _result(source: Path, run: RunFolder | None) -> Path:
    """The folder with trained weights and tokenizer. Raises ConfigError if there is none."""
    if run is None:
        if not (source / "config.json").exists():
            raise ConfigError(f"{source} is neither a run folder nor the folder of a whole model (config.json)")
        return source
    check_gives_text(run.read_config(), source)
    return run.stacked if run.stacked.exists() else run.final_adapter()


def _check_first(result: Path, run: RunFolder | None, to: str) -> None:
    """Raise ConfigError for what cannot be written, before weights are loaded or merged."""
    config = load_model_config(run.read_config().model) if run else AutoConfig.from_pretrained(result)
    check_model(config)
    tokenizer = load_chat_tokenizer(str(result), None, None)
    tokenizer_fields(tokenizer, config.vocab_size)
    if to == "ollama":
        modelfile(tokenizer, GGUF)


@contextmanager
def _whole_model(result: Path, run: RunFolder | None, out: Path, console: Console) -> Iterator[Path]:
    """The folder itself, or a run's adapters merged in a folder beside `out` that goes away."""
    if run is None or result == run.whole:
        yield result
        return
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        merge_run(run.path, "dequantized", Path(scratch) / "merged", console)
        yield Path(scratch) / "merged"


def _write_gguf_adapter(result: Path, run: RunFolder, out: Path, console: Console) -> None:
    """The run's adapter, or both of a stacked run as one."""
    model = run.read_config().model
    config = load_model_config(model)
    check_model(config)
    with new_folder(out) as target:
        write_gguf_adapter(result, config, target / GGUF_ADAPTER)
    lines = f"""written: {out / GGUF_ADAPTER}, fp32, for a GGUF file of {base_location(model.name)}
load it: llama-cli -m BASE.gguf --lora {out / GGUF_ADAPTER}
Ollama: a Modelfile with the lines "FROM BASE.gguf" and "ADAPTER {out / GGUF_ADAPTER}\""""
    console.print(lines, markup=False, soft_wrap=True)


def _write_adapter(result: Path, run: RunFolder, out: Path, console: Console) -> None:
    adapter = read_adapter_config(result)
    rank = next((size for size in VLLM_RANKS if size >= adapter.r), None)
    if rank is None:
        more = " (that of both adapters)" if result == run.stacked else ""
        raise ConfigError(f"--to vllm: rank {adapter.r}{more} is above {VLLM_RANKS[-1]}: merge it (lowlevel merge)")
    with new_folder(out) as target:
        for file in filter(Path.is_file, result.iterdir()):
            shutil.copyfile(file, target / file.name)
    model = run.read_config().model
    bits = " --quantization bitsandbytes" if model.load_in_4bit else ""
    flags = f"--enable-lora --max-lora-rank {rank} --lora-modules {out.name}={out}"
    lines = f"written: {out}, rank {adapter.r}\nload it: vllm serve {base_location(model.name)}{bits} {flags}"
    console.print(lines, markup=False, soft_wrap=True)
