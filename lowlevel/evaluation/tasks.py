"""`lowlevel eval`: tasks of the LM Evaluation Harness for every stage of a run, and paired differences between stages.

The base is loaded once. All stages get the same prompts, which is checked, and the same stop rules.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lowlevel.durable import write_given_json, write_text
from lowlevel.errors import ConfigError, one_line
from lowlevel.evaluation.results import Results, eval_tables, item_lines, result_rows
from lowlevel.heartbeat import working
from lowlevel.hub import offline_without_network
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.running.progress import lines_to
from lowlevel.running.reopening import check_gives_text, reopen

SEED = 1234  # of few-shot examples: lm-eval's default
SUFFIXES = (".yaml", ".yml")


def evaluate_run(
    run_dir: Path,
    console: Console,
    *,
    tasks: Sequence[str],
    stages: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = True,
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate the stages of a run, print a table, and write it to `out`, with the items beside it as JSON lines.

    Args:
        run_dir: the run folder.
        console: receives the table.
        tasks: names of lm-eval's tasks and groups, or task files (YAML).
        stages: names of stages; empty: all.
        num_fewshot: examples in a prompt; None: as the task says. A task that sets 0 keeps it, as in lm-eval.
        limit: items of each task; None: all.
        chat_template: write prompts with the run's chat template, few-shot examples as turns; else as plain text.
        out: file for the result; None: eval.json in the run folder.

    Raises:
        ConfigError: lm-eval is missing; an unknown task or stage; a run without text or adapter.
    """
    opened = reopen(run_dir, lines_to(console))
    check_gives_text(opened.config, run_dir)
    names = [stage.name for stage in opened.stages]
    if unknown := sorted(set(stages) - set(names)):
        raise ConfigError(f"--stages {','.join(unknown)}: the run's stages are {', '.join(names)}")
    adapter = opened.folder.newest_adapter(opened.note) or opened.folder.final_adapter()
    loaded = load_tasks(tasks, num_fewshot)

    from lowlevel.evaluation.harness import RunLM

    run = opened.load(adapter)
    dequantize_as_set(run.policy, run.config.train.dequantize_once)
    model, results = RunLM(run), dict[str, Results]()
    for stage in run.stages:
        if not stages or stage.name in stages:
            run.activate(stage)
            with working(f"evaluating {stage.name}"):
                results[stage.name] = evaluate_stage(model, loaded, limit, chat_template)
    template = run.tokenizer.chat_template.sha256 if chat_template else None
    settings = {"lm_eval": version("lm_eval"), "chat_template_sha256": template, "limit": limit, "seed": SEED}
    summary = {"settings": settings, "rows": (rows := result_rows(results, loaded))}
    for table in eval_tables(rows):
        table.show(console)
    target = out or run_dir / "eval.json"
    write_given_json(target, summary)
    items = target.with_name(f"{target.stem}_items.jsonl")
    write_text(items, "".join(json.dumps(line, default=str) + "\n" for line in item_lines(results)))
    console.print(f"written to {target}, item by item to {items}", markup=False)
    return summary


def load_tasks(names: Sequence[str], num_fewshot: int | None) -> dict[str, Any]:
    """Tasks and groups by name or file, with their data. Raises ConfigError, also for settings of generation."""
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        hint = "pip install 'lowlevel[eval]' (lm-eval 0.4.13)"
        raise ConfigError(f"lowlevel eval needs the LM Evaluation Harness ({one_line(error)}): {hint}") from None
    from lowlevel.evaluation.harness import generation_settings

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    files = {name: Path(name).resolve() for name in names if name.endswith(SUFFIXES)}
    if missing := [name for name, path in files.items() if not path.is_file()]:
        raise ConfigError(f"--tasks {missing[0]}: no such file")
    folders = sorted({path.parent for path in files.values()})
    with working("listing tasks"):
        index = (manager := TaskManager(include_defaults=len(files) < len(names), include_path=folders)).task_index
    by_path = {entry.yaml_path: name for name, entry in index.items()}  # lm-eval 0.4.13 cannot load a group by its path
    chosen = [by_path.get(files[name], name) if name in files else name for name in names]
    if unknown := [name for name in chosen if name not in index and name not in files]:
        raise ConfigError(f'--tasks {unknown[0]}: lm-eval has no such task; "lm-eval ls tasks" lists them')
    offline_without_network()
    try:
        with working("loading tasks"):
            loaded: dict[str, Any] = dict(manager.load(chosen))
    except Exception as error:  # of data sets, the hub, or a task's own code
        raise ConfigError(f"--tasks {','.join(names)}: {type(error).__name__}: {one_line(error)}") from None
    for name, task in loaded["tasks"].items():
        if task.get_config("output_type") == "generate_until":
            try:
                generation_settings(task.get_config("generation_kwargs") or {})
            except ConfigError as error:
                raise ConfigError(f"--tasks {name}: {error}") from None
        given = task.get_config("num_fewshot")
        if given != 0:
            task.set_config(key="num_fewshot", value=(given or 0) if num_fewshot is None else num_fewshot)
    return loaded


def evaluate_stage(model: Any, loaded: Mapping[str, Any], limit: int | None, chat_template: bool) -> Results:
    """lm-eval's result with the active adapters. Seeds are set anew, so that each stage gets the same prompts."""
    from lm_eval.evaluator import evaluate

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(SEED)
    try:
        found = evaluate(
            model,
            dict(loaded),
            limit=limit,
            bootstrap_iters=1000,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    except (ValueError, AssertionError) as error:  # unsafe code, images, too few examples for num_fewshot
        raise ConfigError(f"lm-eval: {one_line(error)}") from None
    assert found is not None  # None on the other ranks of several processes
    return found
