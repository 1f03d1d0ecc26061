"""Tiny tokenizers built in memory, and files of rows."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowlevel.config.data import DataConfig
from lowlevel.config.schema import RunConfig
from lowlevel.data.prepare import ModelLimits, prepare
from lowlevel.data.tokenizer import chat_tokenizer

# as published with TinyLlama/TinyLlama-1.1B-Chat-v1.0
TINYLLAMA = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(*, bos: str | None = None, eos: str | None = "</s>", special=(), merges=(("Ċ", "Ċ"),)):
    """Byte-level BPE whose only merge joins two newlines; with `bos` it is added to every sequence."""
    special = [token for token in ("<unk>", bos, eos, *special) if token]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token=bos, eos_token=eos)


def sentencepiece_tokenizer():
    """As Llama 2: "▁" for a space and before a text, newline as a byte token, BOS added."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127))]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tinyllama():
    return chat_tokenizer(byte_tokenizer(bos="<s>"), TINYLLAMA)


@pytest.fixture
def chatml():
    return chat_tokenizer(byte_tokenizer(eos="<|im_end|>", special=("<|im_start|>",)), CHATML)


@pytest.fixture
def write(tmp_path):
    """Write rows (objects, or raw bytes of a line) to a file of JSON lines; returns its path."""

    def _write(*rows, name: str = "train.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]
        path: Path = tmp_path / name
        data = b"".join(lines)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return _write


@pytest.fixture
def run(chatml):
    """Prepare a file: run(path, format, **DataConfig keys)."""

    def _run(
        source: str,
        data_format: str = "messages",
        tokenizer=chatml,
        vocab: int = 1000,
        positions: int = 4096,
        method: str | None = None,
        **keys,
    ):
        data = DataConfig(source=source, format=data_format, **keys)
        sft = data_format == "messages" if method is None else method == "sft"
        config = RunConfig(method="sft" if sft else "dpo", data=data)
        return prepare(config, tokenizer, ModelLimits(vocab, positions))

    return _run


def chat(*turns: str, first: str = "user") -> dict:
    """{"messages": ...} of alternating turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


@pytest.fixture
def kit():
    """The builders of this file, for tests that make their own tokenizer or rows."""
    return SimpleNamespace(
        TINYLLAMA=TINYLLAMA,
        CHATML=CHATML,
        byte_tokenizer=byte_tokenizer,
        sentencepiece=sentencepiece_tokenizer,
        chat=chat,
    )
