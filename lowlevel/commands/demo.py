"""SFT, DPO and comparison of a built-in small model: offline, CPU or GPU"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowlevel.commands.common import Options, Overrides, Parser, quiet_console
from lowlevel.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from lowlevel.config.schema import RunConfig

Tables = dict[str, Any]
CHECK_ITEMS = 120
SHOWN_REPLIES = 4
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
BATCH = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "warmup_ratio": 0.05,
    "dequantize_once": True,  # the same numbers; the base is small
    "seed": 0,
}


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/demo"), help="folder for the demo's runs (default: out/demo)")
    add("--resume", action="store_true", help="continue the demo in the folder")
    add("--restart", action="store_true", help="discard the demo in the folder")


def run(options: Options, overrides: Overrides) -> None:
    run_demo(options.out, quiet_console(), resume=options.resume, restart=options.restart)


def demo_configs(out: Path) -> tuple[RunConfig, RunConfig]:
    """The demo's SFT run, and the DPO run that starts from its adapter."""
    from lowlevel.config.file import config_from_tables

    rows = {"source": "demo", "max_length": 128, "eval_source": "demo", "eval_limit": 100}

    def config(method: str, model: Tables, data: Tables, train: Tables, **more: Tables) -> RunConfig:
        own = {"output_dir": str(out / method), **BATCH, **train}
        tables: Tables = {"method": method, "lora": LORA, "data": {**rows, **data}, "train": own, **more}
        return config_from_tables({**tables, "model": {"name": "demo", **model}}, "demo")

    steps = {"learning_rate": 2.5e-4, "max_steps": 60, "save_steps": 20, "save_total_limit": 3}
    parent = {"adapter": str(out / "sft")}
    return (
        config("sft", {}, {"format": "messages", "limit": 2400}, {"learning_rate": 2e-3, "save_steps": 50}),
        config("dpo", parent, {"format": "preference", "limit": 640}, steps, trace={"every": 10}),
    )


def run_demo(out: Path, console: Console, *, resume: bool = False, restart: bool = False) -> dict[str, Any]:
    """Train both stages into `out`, compare them on held-out questions, and write demo.json.

    Raises ConfigError: `out` holds runs, and neither `resume` nor `restart` is set.
    """
    from lowlevel.demo import world
    from lowlevel.durable import write_json
    from lowlevel.model.dequantised import dequantize_once
    from lowlevel.reporting.comparison import compare_stages, load_held_out, print_replies
    from lowlevel.running.progress import lines_to
    from lowlevel.running.reopening import load_run
    from lowlevel.running.run_folder import RunFolder
    from lowlevel.running.training import run_training
    from lowlevel.sampling import Sampling

    started = time.perf_counter()
    sft, dpo = demo_configs(out)
    if any(RunFolder(Path(c.train.output_dir)).holds_run() for c in (sft, dpo)) and not (resume or restart):
        raise ConfigError(f"{out} holds a demo: add --resume to continue, --restart to discard it, or set --out")
    console.print("A 4-bit base that knows a small world, but has never seen a chat.\n")
    for config in (sft, dpo):
        run_training(config, console, resume=resume, restart=restart)
        console.print()
    run = load_run(Path(dpo.train.output_dir), lines_to(console))
    dequantize_once(run.policy)
    items = world.rows("check")[:CHECK_ITEMS]
    prompts = [run.tokenizer.encode_prompt(item["prompt"]) for item in items]
    judges = {
        "exact_match": lambda i, text: float(world.exact_match(text, items[i]["answer"])),
        "preferred_style": lambda i, text: float(world.preferred_style(text)),
    }
    rows, _ = load_held_out(run.folder.path)
    result = compare_stages(run, rows, prompts, Sampling(max_new_tokens=48), console=console, judges=judges)
    print_replies(run, prompts[:SHOWN_REPLIES], result, console)
    seconds = time.perf_counter() - started
    write_json(out / "demo.json", {"seconds": seconds, **result})
    console.print(f"{CHECK_ITEMS} held-out questions; {seconds:.0f} s in all; runs in {out}/sft and {out}/dpo")
    console.print(f"next: lowlevel generate {out}/dpo --prompt 'What is 7 plus 5?'")
    return result
