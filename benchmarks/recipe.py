"""The recipe's run files on the TinyLlama-1.1B shape, through the same code as `lowlevel sft` and `lowlevel dpo`.

    python benchmarks/recipe.py --out out/recipe [--steps 24] [--cap-gib 15] [--cases tinyllama_sft tinyllama_dpo]

Weights are random and text is made here, with the length profile of the recipe's data: speed and memory depend on
shapes alone. Writes recipe.csv: a row a run file, medians over the steps after the warm-up. Tokens are counted as TRL
and Unsloth count them (both completions with their prompt), padding left out.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from lowlevel.assembly import check_inputs
from lowlevel.config import RunConfig, load_config
from lowlevel.order import DataOrder
from lowlevel.progress import make_console
from lowlevel.run import run_training
from lowlevel.run_folder import RunFolder

RUNS = Path(__file__).parent.parent / "runs"
VOCABULARY = 32000
WARMUP_STEPS = 4
MARKERS = ("<unk>", "<s>", "</s>", "<PAD>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SHAPES = {
    "tinyllama": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                  "num_key_value_heads": 4},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2},
}  # fmt: skip


def make_model(folder: Path, shape: str) -> None:
    """A Llama of the given shape with random fp16 weights, and a word-level tokenizer with its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=1,
                         eos_token_id=2, tie_word_embeddings=False, **SHAPES[shape])  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).half().save_pretrained(folder)
    words = [*MARKERS, *(f"w{i}" for i in range(len(MARKERS), VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def text(rng: random.Random, words: int) -> str:
    """Words whose frequencies fall as a power law."""
    return " ".join(f"w{min(VOCABULARY - 1, len(MARKERS) + int(rng.paretovariate(0.6)))}" for _ in range(words))


def sft_rows(n: int) -> list[dict]:
    """UltraChat's profile: 85 % of the conversations reach 512 tokens, the others lie evenly between 100 and 511."""
    rng = random.Random(0)
    sizes = [512 if rng.random() < 0.85 else rng.randint(100, 511) for _ in range(n)]
    turns = [[("user", text(rng, size // 4)), ("assistant", text(rng, size - size // 4))] for size in sizes]
    return [{"messages": [{"role": role, "content": content} for role, content in pair]} for pair in turns]


def orca_rows(n: int) -> list[dict]:
    """The preference data's profile: log-normal prompts and completions."""
    rng = random.Random(0)
    rows = []
    for _ in range(n):
        prompt = min(400, int(rng.lognormvariate(4.9, 0.8)) + 30)
        sizes = [max(4, min(500 - prompt, int(rng.lognormvariate(4.8, 0.9)))) for _ in range(2)]
        chosen, rejected = (text(rng, size) for size in sizes)
        rows.append({"system": "w9", "input": text(rng, prompt), "chosen": chosen, "rejected": rejected + " w8",
                     "chosen_score": 9, "status": "unchanged", "in_gsm8k_train": False})  # fmt: skip
    return rows


def case_config(name: str, folder: Path, out: Path, steps: int) -> RunConfig:
    """A run file with the model, the data and the number of steps replaced."""
    method = "sft" if "_sft" in name else "dpo"
    overrides = {
        "model.name": str(folder / "model"),
        "data.source": str(folder / f"{method}.jsonl"),
        "data.chat_template_from": str(folder / "model"),
        "train.output_dir": str(out / name),
        "train.max_steps": str(steps),
        "train.logging_steps": "1",
        "train.save_steps": str(steps),
    }
    if method == "dpo":
        overrides["model.adapter"] = str(out / name.replace("_dpo", "_sft"))
    if not torch.cuda.is_available():
        overrides["train.precision"] = "fp32"
    return load_config(RUNS / f"{name}.toml", overrides)


def peer_tokens(config: RunConfig, steps: int) -> list[int]:
    """Tokens of each step as the peers count them: whole sequences, a prompt once for each of its completions."""
    examples = check_inputs(config).data.train
    train = config.train
    order = DataOrder(len(examples), train.per_device_train_batch_size * train.gradient_accumulation_steps, train.seed,
                      train.data_order == "shuffled")  # fmt: skip
    if config.method == "sft":
        sizes = [len(x.input_ids) for x in examples]
    else:
        sizes = [2 * len(x.prompt_ids) + len(x.chosen_ids) + len(x.rejected_ids) for x in examples]
    return [sum(sizes[i] for i in order.step_rows(step)) for step in range(steps)]


def measure(name: str, folder: Path, out: Path, steps: int) -> dict:
    """Run one case and return its row of the table."""
    config = case_config(name, folder, out, steps)
    gc.collect()  # PEFT's model is full of reference cycles: the last case would still be on the device
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run_training(config, make_console(), restart=True)
    records = [r for r in RunFolder(out / name).read_metrics() if "loss" in r]
    tokens = [b["num_tokens"] - a["num_tokens"] for a, b in zip([{"num_tokens": 0}, *records], records, strict=False)]
    seconds = [count / record["tokens_per_second"] for count, record in zip(tokens, records, strict=True)]
    timed = range(WARMUP_STEPS, len(records))
    counted = peer_tokens(config, len(records))
    manifest = RunFolder(out / name).read_manifest()
    return {
        "case": name,
        "tokens_per_second": round(statistics.median(counted[i] / seconds[i] for i in timed)),
        "seconds_per_step": round(statistics.median(seconds[i] for i in timed), 4),
        "peak_allocated_gib": round(records[-1]["peak_allocated_gib"], 3),
        "peak_reserved_gib": round(records[-1]["peak_reserved_gib"], 3),
        "trainable_parameters": manifest["trainable_parameters"],
        "loss_first": round(records[0]["loss"], 4),
        "loss_last": round(records[-1]["loss"], 4),
        "skipped_steps": records[-1]["skipped_steps"],
        "timed_steps": len(timed),
        "attention": manifest["attention"],
    }


def provenance(cap_gib: float) -> dict:
    """Machine, versions and commit, for every row."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RUNS, check=False
    )
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "cap_gib": cap_gib,
        **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    """Parse, run every case in one process, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/recipe"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--cap-gib", type=float, default=15.0, help="limit of the CUDA allocator")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--cases", nargs="+", default=["tinyllama_sft", "tinyllama_dpo"], help="run files by name")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gib * 2**30 / total))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model", options.shape)
        for method, rows in (("sft", sft_rows(8 * options.steps)), ("dpo", orca_rows(8 * options.steps))):
            (folder / f"{method}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = []
        for name in options.cases:
            table.append({**measure(name, folder, options.out, options.steps), **provenance(options.cap_gib)})
            with open(options.out / "recipe.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, table[0].keys())
                writer.writeheader()
                writer.writerows(table)
    for row in table:
        print({key: row[key] for key in list(row)[:9]}, file=sys.stderr)


if __name__ == "__main__":
    main()
