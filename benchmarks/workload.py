"""What every tool is measured on: a Llama with random weights, and rows with the length profile of the recipe's data.

    python -m benchmarks.workload --out out/workload [--shape tinyllama] [--length 512] [--rows 192]

Speed and memory depend on shapes alone. A word-level tokenizer splits at blanks, so the text that the peers are given
becomes the same tokens in every tool. The folder then holds

    model/ adapter/         the base; a frozen adapter for DPO, as SFT would leave it
    sft.jsonl dpo.jsonl     conversations and rated pairs, for lowlevel
    sft_text.jsonl ...      the same rows after lowlevel's template and truncation, for the peers
    workload.json           shape, length and tokens by row
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import ROWS_PER_STEP, Case

if TYPE_CHECKING:
    from lowlevel.config.schema import RunConfig

RUNS = Path(__file__).parent.parent / "runs"
WORDS = 32000
MARKERS = ("<unk>", "<s>", "</s>", "<PAD>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512, False),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "smollm2-360m": (960, 2560, 32, 15, 5, 49152, True),
    "tinyllama": (2048, 5632, 22, 32, 4, 32000, False),
    "llama-3b": (3072, 8192, 28, 24, 8, 128256, True),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000, False),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000, False),
}
LENGTHS = {"tiny": 64}  # the others: 512
MAX_LENGTH = 8192  # positions of the models


def llama_config(shape: str, positions: int = MAX_LENGTH) -> Any:
    """transformers' configuration of a shape."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )


def make_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of words that are split at blanks; it adds no tokens of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*MARKERS, *(f"w{i}" for i in range(len(MARKERS), min(vocabulary, WORDS)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<PAD>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder: Path, shape: str, positions: int, *, weights: bool = True) -> None:
    """A Llama folder with random fp16 weights and its tokenizer; without `weights` only what counting needs."""
    import torch
    from transformers import AutoModelForCausalLM

    config = llama_config(shape, positions)
    config.save_pretrained(folder)
    make_tokenizer(folder, config.vocab_size)
    if weights:
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)


def make_adapter(folder: Path, shape: str, rank: int) -> None:
    """A PEFT adapter on all projections, with an update as SFT leaves it: a few per cent of the weight."""
    import torch
    from torch import nn

    from lowlevel.config.schema import ALL_PROJECTIONS
    from lowlevel.model.adapters import write_adapter
    from lowlevel.model.base import empty_model

    torch.manual_seed(1)
    tensors = {}
    for name, module in empty_model(llama_config(shape)).named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ALL_PROJECTIONS:
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, module.in_features) / module.in_features**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, rank) * 1e-3
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32, "lora_dropout": 0.1,
                "bias": "none", "target_modules": list(ALL_PROJECTIONS)}  # fmt: skip
    write_adapter(folder, tensors, settings)


def text(rng: random.Random, words: int, vocabulary: int) -> str:
    """Words whose frequencies fall as a power law."""
    last = min(vocabulary, WORDS) - 1
    return " ".join(f"w{min(last, len(MARKERS) + int(rng.paretovariate(0.6)))}" for _ in range(words))


def sft_rows(n: int, length: int, vocabulary: int) -> list[dict[str, Any]]:
    """UltraChat's profile: 85 % of the conversations reach the limit of 512 tokens, the others lie evenly below."""
    rng, rows = random.Random(0), []
    for _ in range(n):  # row by row, so that the first ones are the same however many there are
        size = length if rng.random() < 0.85 else rng.randint(length // 5, length - 1)
        asked, answered = text(rng, size // 4, vocabulary), text(rng, size - size // 4, vocabulary)
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]})
    return rows


def pair_rows(n: int, length: int, vocabulary: int) -> list[dict[str, Any]]:
    """The preference data's profile: log-normal prompts and completions, none of which the limit cuts."""
    rng, scale, rows = random.Random(0), length / 512, []
    for _ in range(n):
        prompt = int(scale * min(400, rng.lognormvariate(4.9, 0.8) + 30))
        room = length - 12 - prompt
        chosen, rejected = (max(2, min(room, int(scale * rng.lognormvariate(4.8, 0.9)))) for _ in range(2))
        rows.append({"system": "w9", "input": text(rng, prompt, vocabulary), "chosen": text(rng, chosen, vocabulary),
                     "rejected": text(rng, rejected, vocabulary) + " w8", "chosen_score": 9, "status": "unchanged",
                     "in_gsm8k_train": False})  # fmt: skip
    return rows


def case_config(case: Case, folder: Path, output: Path, steps: int) -> RunConfig:
    """The recipe's run file with the model, the data, the number of steps and the case's settings put in."""
    from lowlevel.config.file import config_from_tables

    path = RUNS / f"tinyllama_{case.method}{'_' * bool(case.variant)}{case.variant}.toml"
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    tables["model"]["name"] = tables["data"]["chat_template_from"] = str(folder / "model")
    tables["data"]["source"] = str(folder / f"{case.method}.jsonl")
    tables["train"] |= {
        "output_dir": str(output),
        "execution": case.execution,
        "precision": case.precision,
        "max_steps": steps,
        "logging_steps": 1,
        "save_steps": steps,
        "data_order": "sequential",  # as the peers are told to go, so that each step has the same rows in every tool
    }
    if not case.variant:
        length = json.loads((folder / "workload.json").read_text())["length"]
        tables["data"] |= {"max_length": length} | ({"max_prompt_length": length} if case.method == "dpo" else {})
        tables["lora"] |= {"lora_dropout": case.dropout, "r": case.rank}
        tables["train"] |= {
            "per_device_train_batch_size": case.batch,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_checkpointing": case.checkpointing,
        } | ({"memory_budget": case.budget} if case.budget else {})
        tables["model"] |= {"embeddings_on_host": True} if case.on_host else {}
        tables["train"] |= {"offload_activations": True} if case.offload else {}
        tables["train"] |= {"deterministic": True} if case.deterministic else {}
    if case.stacked:
        tables["model"]["adapter"] = str(folder / "adapter")
    elif case.method == "dpo":
        del tables["model"]["adapter"], tables["model"]["adapter_mode"]
    return config_from_tables(tables, str(path))


def peer_tokens(examples: Iterable[Any], method: str) -> list[int]:
    """Tokens of each row as TRL and Unsloth are fed them: whole sequences, a prompt once for each completion."""
    if method == "sft":
        return [len(x.input_ids) for x in examples]
    return [2 * len(x.prompt_ids) + len(x.chosen_ids) + len(x.rejected_ids) for x in examples]


def by_step(rows: list[int], rows_per_step: int = ROWS_PER_STEP) -> list[int]:
    """Sums over the rows of each step, in sequential order."""
    return [sum(rows[start : start + rows_per_step]) for start in range(0, len(rows), rows_per_step)]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_peer_text(folder: Path, method: str, rows: int) -> list[int]:
    """Write rows as lowlevel trains on them, as text that splits into the same tokens; return their token counts."""
    from lowlevel.running.assembly import prepare_data

    case = Case("text", "lowlevel", method)
    tokenizer, prepared = prepare_data(case_config(case, folder, folder / "unused", max(1, rows // ROWS_PER_STEP)))

    examples: list[Any] = list(prepared.train)

    def words(ids: Iterable[int]) -> str:
        return " ".join(tokenizer.tokenizer.convert_ids_to_tokens([int(i) for i in ids]))

    if method == "sft":
        lines = [{"text": words(x.input_ids)} for x in examples]
    else:
        lines = [
            {"prompt": words(x.prompt_ids) + " ", "chosen": words(x.chosen_ids), "rejected": words(x.rejected_ids)}
            for x in examples
        ]
    write_lines(folder / f"{method}_text.jsonl", lines)
    return peer_tokens(examples, method)


def make_workload(
    folder: Path, shape: str, length: int, rows: int, *, weights: bool = True, model: Path | None = None
) -> None:
    """Write a workload, unless the folder holds it already.

    A folder with more rows will do: the first ones are the same. Without `weights` it holds what counting needs. With a
    `model` folder it uses that one, and has rows for SFT alone.
    """
    wanted = {"shape": shape, "length": length, "weights": weights, "model": str(model or "")}
    record = folder / "workload.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    if found.items() >= wanted.items() and found["rows"] >= rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = SHAPES[shape][5]
    if model is None:
        make_model(folder / "model", shape, max(MAX_LENGTH, length), weights=weights)
    else:
        (folder / "model").unlink(missing_ok=True)
        (folder / "model").symlink_to(model.resolve())
    if weights and model is None:
        make_adapter(folder / "adapter", shape, 64)
    made = {"sft": sft_rows, "dpo": pair_rows}
    record.write_text(json.dumps({"length": length}))
    tokens = {}
    for method in ("sft", "dpo") if model is None else ("sft",):
        write_lines(folder / f"{method}.jsonl", made[method](rows, length, vocabulary))
        tokens[method] = write_peer_text(folder, method, rows)
    record.write_text(json.dumps({**wanted, "rows": rows, "tokens": tokens}))


def workload_process(folder: Path, shape: str, length: int, rows: int, timeout: float) -> None:
    """`make_workload` in a process of its own: what it holds of the GPU's memory goes with it."""
    command = [sys.executable, "-m", "benchmarks.workload", "--out", str(folder.resolve()), "--shape", shape]
    command += ["--length", str(length), "--rows", str(rows)]
    subprocess.run(command, check=True, timeout=timeout, cwd=RUNS.parent)


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--length", type=int, help="tokens of a sequence")
    parser.add_argument("--rows", type=int, default=24 * ROWS_PER_STEP)
    options = parser.parse_args()
    make_workload(options.out, options.shape, options.length or LENGTHS.get(options.shape, 512), options.rows)


if __name__ == "__main__":
    main()
