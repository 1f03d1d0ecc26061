"""Writes a model folder as one GGUF file in 16 bits, for llama.cpp and Ollama; or an adapter alone.

llama.cpp's own converter is a script of its repository and not a maintained package; its `gguf` package, used here,
writes the format. Only what could be checked by loading the file back is written: Llama and Mistral without biases or
scaled positions, and three kinds of tokenizers. Others are refused: llama.cpp's convert_hf_to_gguf.py takes the same
folder.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.tokenizer import load_chat_tokenizer
from lowlevel.errors import ConfigError
from lowlevel.model.adapters import adapter_start, read_adapter_config
from lowlevel.model.merging import PREFIX, scaled_pairs
from lowlevel.model.suitability import attention_window
from lowlevel.model.targets import head_size

MODELS = ("llama", "mistral")  # model_type; both are llama.cpp's "llama"
HINT = "llama.cpp's convert_hf_to_gguf.py takes the folder that lowlevel merge writes"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How text is split before byte-level BPE, as (type, pattern or flag) of each pre-tokenizer; llama.cpp's name for it.
SPLITS: Mapping[tuple[tuple[str, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", LLAMA_3), ("ByteLevel", False)): "llama-bpe",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of the format
F16 = 1  # general.file_type: matrices in fp16, norms in fp32


def write_gguf(folder: Path, target: Path) -> None:
    """Write the model and tokenizer of a Hugging Face folder that `check_model` and `tokenizer_fields` accept."""
    config = AutoConfig.from_pretrained(folder)
    words = tokenizer_fields(load_chat_tokenizer(str(folder), None, None), config.vocab_size)
    writer, names = _writer(target, config)
    writer.add_name(folder.resolve().name)
    writer.add_file_type(F16)
    positions = config.max_position_embeddings  # llama.cpp's "llama" has no attention window
    writer.add_context_length(min(positions, attention_window(config) or positions))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    size = head_size(config)
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(size)
    writer.add_vocab_size(config.vocab_size)
    for add, value in words.items():
        getattr(writer, add)(value)
    for name, values in tensors(folder, config):
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    _finish(writer)


def write_gguf_adapter(folder: Path, config: Any, target: Path) -> None:
    """Write a PEFT adapter alone, in fp32, for llama.cpp to add to a GGUF file of its base, whose `config` this is.

    llama.cpp computes W x + alpha / r B A x, where r is the size of B A. B has the scaling already, so alpha is r.
    Raises ConfigError: an adapter that is more than B A (DoRA), or one that the base in full precision does not fit.
    """
    read, start = read_adapter_config(folder), adapter_start(folder)
    if read.use_dora or start == "loftq":
        raise ConfigError(f"--to gguf-adapter: {'DoRA' if read.use_dora else 'LoftQ'} cannot be added to W; use gguf")
    writer, names = _writer(target, config)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(read.r))
    for stem, (a, b) in scaled_pairs(folder).items():
        name = f"{stem.removeprefix(PREFIX)}.weight"
        written = names.get_name(name, try_suffixes=(".weight",))
        for end, values in (("lora_a", a), ("lora_b", _rotated(name, b, config))):
            writer.add_tensor(f"{written}.{end}", values.contiguous().numpy())
    _finish(writer)


def _writer(target: Path, config: Any) -> tuple[Any, Any]:
    """A writer and its names of tensors."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    return gguf.GGUFWriter(target, "llama"), names


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_model(config: Any) -> None:
    """Raise ConfigError for a model that this file does not write, or without the gguf package."""
    kind = f"--to gguf: a {config.model_type} model"
    if config.model_type not in MODELS:
        raise ConfigError(f"{kind} is not written here, only {' and '.join(MODELS)}; {HINT}")
    scaling = config.rope_parameters.get("rope_type", "default")
    biased = any(config.to_dict().get(key) for key in ("attention_bias", "mlp_bias"))
    if scaling != "default" or biased:
        what = "biases" if biased else f"positions scaled by {scaling!r}"
        raise ConfigError(f"{kind} with {what} is not written here; {HINT}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError('GGUF needs the gguf package: pip install "lowlevel[export]"')


def tensors(folder: Path, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Each weight by its name in transformers: matrices in fp16, norms in fp32. Raises ConfigError beyond fp16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    for name, weight in model.named_parameters():  # names a tied weight once
        values = _rotated(name, weight.detach(), config)
        values = values.float() if values.ndim == 1 else values.half()
        if not bool(values.isfinite().all()):
            raise ConfigError(f"--to gguf: {name} has values beyond fp16")
        yield name, values.contiguous().numpy()


def _rotated(name: str, weight: Tensor, config: Any) -> Tensor:
    """The rows of a matrix as llama.cpp reads them: those of queries and keys are `interleaved`."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return weight if heads is None else interleaved(weight, heads)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads x size, D) in the order of llama.cpp's rotary embedding: a head's two halves take turns."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def tokenizer_fields(chat: ChatTokenizer, vocabulary: int) -> dict[str, Any]:
    """Methods of GGUFWriter and their arguments. Raises ConfigError for an unknown kind of tokenizer."""
    tokenizer: Any = chat.tokenizer
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    model, merges = saved["model"], [tuple(m) for m in saved["model"].get("merges", ())]
    split, pieces = split_of(saved), is_sentencepiece(saved)
    if model["type"] != "BPE" or not (split or pieces):
        raise ConfigError(f"--to gguf: this tokenizer's kind ({model['type']}) is not known here; {HINT}")
    ids: dict[str, int] = tokenizer.get_vocab()
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [UNUSED] * vocabulary
    added = {token["content"]: token["special"] for token in saved["added_tokens"]}
    for token, number in ids.items():
        tokens[number], types[number] = token, NORMAL
        if token in added:
            types[number] = CONTROL if added[token] else USER_DEFINED
        if token == model.get("unk_token"):
            types[number] = UNKNOWN
        elif pieces and token.startswith("<0x") and len(token) == 6:
            types[number] = BYTE
    rank = {"".join(merge): -float(i) for i, merge in reversed([*enumerate(merges)])}
    kind = {
        "add_tokenizer_model": "llama",
        "add_token_scores": [rank.get(token, -float(len(merges))) for token in tokens],
        "add_add_space_prefix": True,
    }
    byte_level: dict[str, Any] = {"add_tokenizer_model": "gpt2", "add_tokenizer_pre": split}
    byte_level |= {"add_token_merges": [" ".join(merge) for merge in merges]}
    fields = {"add_token_list": tokens, "add_token_types": types, **(kind if pieces else byte_level)}
    fields["add_add_bos_token"] = chat.bos_id is not None or writes_bos(chat)
    numbers = {"add_bos_token_id": tokenizer.bos_token_id, "add_eos_token_id": tokenizer.eos_token_id}
    fields |= {add: number for add, number in numbers.items() if number is not None}
    return fields | {"add_chat_template": chat.chat_template.text}


def writes_bos(chat: ChatTokenizer) -> bool:
    """Whether the chat template begins with the bos token, and not each of its messages (SmolLM 2)."""
    bos = chat.tokenizer.bos_token
    if bos is None:
        return False
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    text = chat.chat_template.render(turns, add_generation_prompt=True)
    return text.startswith(bos) and text.count(bos) == 1


def split_of(saved: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer.json splits text; None if it is another kind."""
    parts = (saved["pre_tokenizer"] or {}).get("pretokenizers", [saved["pre_tokenizer"] or {"type": "none"}])
    flags = {"ByteLevel": "use_regex", "Digits": "individual_digits"}
    values = (part.get("pattern", {}).get("Regex") or part.get(flags.get(part["type"], "")) for part in parts)
    found = SPLITS.get(tuple((part["type"], value) for part, value in zip(parts, values, strict=True)))
    whole_words_first = bool(saved["model"].get("ignore_merges")) == (found == "llama-bpe")
    plain = saved["normalizer"] is None and not any(part.get("add_prefix_space") for part in parts)
    return found if plain and whole_words_first and not _strips(saved) else None


def is_sentencepiece(saved: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a BPE of SentencePiece as in Llama 2: bytes as last resort, and a blank put before
    the text and after each control token.
    """
    prepends = '"Prepend"' in json.dumps(saved["normalizer"]) and saved["pre_tokenizer"] is None
    return bool(saved["model"].get("byte_fallback")) and prepends and not _strips(saved)


def _strips(saved: Mapping[str, Any]) -> bool:
    return any(token["lstrip"] or token["rstrip"] for token in saved["added_tokens"])
