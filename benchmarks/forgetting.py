"""What the demo's base forgets when it learns two skills, and how much of that replay keeps.

    python -m benchmarks.forgetting --out out/forgetting.csv

Three SFT runs learn addition and opposites from the same 960 chats, in steps of 16. The second and the third replay:
a tenth and a fifth of their rows are documents like those that the base was trained on, as replies to "Write.". Each is
probed with other such documents (`lowlevel compare --probe`), and answers held-out questions of both skills.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.demo_base import corpus
from benchmarks.demo_base.rows import check_items, draw_items, draw_style, write_reply
from benchmarks.meter import machine
from benchmarks.runner import commit, write_table
from lowlevel.commands.demo import BATCH, LORA
from lowlevel.config.file import config_from_tables
from lowlevel.demo.world import exact_match
from lowlevel.evaluation.forgetting import probe_run
from lowlevel.running.progress import make_console, quiet_libraries
from lowlevel.running.reopening import load_run
from lowlevel.running.replies import generate_replies
from lowlevel.running.training import run_training
from lowlevel.sampling import Sampling, build_sampler

SKILLS = ("add", "opposite")
REPLAY = (0.0, 0.1, 0.2)
STEPS = 60
DOMAINS: dict[str, Callable[[random.Random], str]] = {
    "statements": corpus._statements,
    "profiles": corpus._profile,
    "questions": corpus._questions,
    "prose": corpus._prose,
}
FIELDS = ("replay", "skill_exact_match", "domain", "texts", "tokens", "base_loss", "loss_increase",
          "increase_low", "increase_high", "kl", "kl_low", "kl_high", "alarm", "gpu", "torch", "commit",
          "started")  # fmt: skip


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write JSON lines; returns the path as a text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def skill_rows(count: int) -> list[dict[str, Any]]:
    """Chats of the skills, of the training split."""
    items, rng = draw_items("train", 8 * count, 3, "skill")
    chosen = [item for item in items if item.task in SKILLS][:count]
    return [_chat(item.prompt, write_reply(item.answer, draw_style(rng), rng)) for item in chosen]


def replay_rows(count: int) -> list[dict[str, Any]]:
    """Documents in the manner of the base's own training, as replies."""
    return [_chat([{"role": "user", "content": "Write."}], text) for text in corpus.pretraining_text(7, count)]


def probe_rows(count: int) -> list[dict[str, str]]:
    """`count` documents of each kind."""
    rng = random.Random("probe")
    return [{"domain": name, "text": draw(rng)} for name, draw in DOMAINS.items() for _ in range(count)]


def _chat(prompt: list[dict[str, str]], reply: str) -> dict[str, Any]:
    return {"messages": [*prompt, {"role": "assistant", "content": reply}]}


def train(folder: Path, sources: list[dict[str, Any]], steps: int) -> Path:
    """An SFT run on the sources; returns its folder."""
    schedule = {"learning_rate": 2e-3, "warmup_ratio": 0.05, "max_steps": steps, "output_dir": str(folder)}
    tables = {
        "method": "sft",
        "model": {"name": "demo"},
        "lora": LORA,
        "data": {"max_length": 128, "sources": sources},
        "train": {**BATCH, **schedule},
    }
    run_training(config_from_tables(tables, "benchmark"), make_console())
    return folder


def skill_score(folder: Path, questions: int) -> float:
    """Share of held-out questions of the skills that are answered right."""
    run = load_run(folder)
    items = [item for item in check_items(6 * questions, seed=0) if item.task in SKILLS][:questions]
    sampler = build_sampler(run.policy.model, run.policy.placement, run.tokenizer.stop_ids, print)
    prompts = [run.tokenizer.encode_prompt(item.prompt) for item in items]
    replies = generate_replies(sampler, run.tokenizer, prompts, Sampling(max_new_tokens=48))
    return sum(exact_match(reply.text, item.answer) for reply, item in zip(replies, items, strict=True)) / len(items)


def compared(folder: Path, steps: int = STEPS, texts: int = 40, questions: int = 80) -> list[dict[str, Any]]:
    """A row for each run and domain."""
    skill = {"source": write_rows(folder / "skill.jsonl", skill_rows(16 * steps))}
    replay = {"source": write_rows(folder / "replay.jsonl", replay_rows(16 * steps))}
    probe = folder / "probe.jsonl"
    write_rows(probe, probe_rows(texts))
    rows = []
    for share in REPLAY:
        mixed = [{**skill, "weight": 1 - share}, {**replay, "weight": share}] if share else [skill]
        run_dir = train(folder / f"replay-{share}", mixed, round(steps / (1 - share)))
        score = skill_score(run_dir, questions)
        for row in probe_run(run_dir, probe, make_console())["rows"]:
            found = row["stages"]["sft"]
            ends = {f"{key}_{end}": found[of][end] for key, of in (("increase", "increase"), ("kl", "kl"))
                    for end in ("low", "high")}  # fmt: skip
            values = {"skill_exact_match": score, "base_loss": row["loss"]["base"], "kl": found["kl"]["value"],
                      "loss_increase": found["increase"]["value"], **ends}  # fmt: skip
            counts = {key: row[key] for key in ("domain", "texts", "tokens")}
            rounded = {key: f"{value:.4f}" for key, value in values.items()}
            rows.append({"replay": share, **counts, **rounded, "alarm": found["alarm"]})
    return rows


def main() -> None:
    """Train, probe, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/forgetting.csv"), metavar="FILE")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    own = machine()
    shared = {"gpu": own["gpu"], "torch": own["torch"], "commit": commit(),
              "started": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = [{**row, **shared} for row in compared(Path(folder), arguments.steps)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_table(arguments.out, rows, FIELDS)


if __name__ == "__main__":
    quiet_libraries()
    main()
