"""Rows of `lowlevel eval`: a metric of a task or group, its value by stage, and the paired differences of stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from lowlevel.errors import LowlevelError
from lowlevel.evaluation.paired import SLOW_RESAMPLES, Difference, paired_difference, weighted_difference
from lowlevel.table import TextTable, with_interval

Results = Mapping[str, Any]  # what lm-eval returns for one stage
Pair = tuple[str, str]  # of stages, the earlier one first
STAGES_NOTE = "value ± standard error; ↑ higher is better, ↓ lower is better"
DIFFERENCES_NOTE = "[95 % interval of the difference, items paired]; * it excludes 0"
TRANSLATION = ("bleu", "chrf", "chrf++", "ter")  # 100 resamples, as in lm-eval: one takes seconds


def result_rows(results: Mapping[str, Results], loaded: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of all tasks, then of all groups that have a metric. Raises LowlevelError if prompts differ.

    Args:
        results: by stage, in the order of the chain.
        loaded: lm-eval's tasks and groups.
    """
    from lm_eval.api.metrics import mean

    check_prompts(results)
    first, pairs = next(iter(results.values())), list(combinations(results, 2))
    found: dict[tuple[str, str], dict[Pair, Difference]] = {}
    for name, task in loaded["tasks"].items():
        for key in _metric_keys(first["results"][name]):
            metric = key.partition(",")[0]
            aggregate = task.aggregation().get(metric, mean)
            values = {stage: _values(result["samples"][name], key) for stage, result in results.items()}
            how = (None if aggregate is mean else aggregate, 100 if metric in TRANSLATION else SLOW_RESAMPLES)
            found[name, key] = {(a, b): paired_difference(values[a], values[b], name, *how) for a, b in pairs}
    for group in loaded.get("groups", {}).values():
        by_size = {one.metric: one.weight_by_size for one in group.aggregate_metric_list or ()}
        for key in _metric_keys(first["results"].get(group.name, {})):
            members = [task.task_name for task in group.get_all_tasks() if (task.task_name, key) in found]
            sizes = [first["results"][name]["sample_len"] for name in members]
            weights = sizes if by_size[key.partition(",")[0]] else [1] * len(members)
            parts = [found[name, key] for name in members]
            found[group.name, key] = {pair: weighted_difference([p[pair] for p in parts], weights) for pair in pairs}
    return [_row(name, key, results, differences) for (name, key), differences in found.items()]


def check_prompts(results: Mapping[str, Results]) -> None:
    """Raise LowlevelError unless all stages were asked the same."""
    asked: dict[str, list[tuple[Any, ...]]] = {}
    for stage, result in results.items():
        for name, samples in result["samples"].items():
            own = [(one["doc_id"], one["filter"], one["prompt_hash"], one["target_hash"]) for one in samples]
            if asked.setdefault(name, own) != own:
                why = "it draws them at random, without a seed"
                raise LowlevelError(f"task {name} has other prompts for {stage}: {why}")


def item_lines(results: Mapping[str, Results]) -> Iterator[dict[str, Any]]:
    """Each item and filter of each task: its metrics and responses by stage, in the order of the samples."""
    for name in next(iter(results.values()))["samples"]:
        for same in zip(*(result["samples"][name] for result in results.values()), strict=True):
            by_stage = dict(zip(results, same, strict=True))
            item = {key: same[0][key] for key in ("doc_id", "filter", "prompt_hash", "target")}
            metrics = {stage: {m: one[m] for m in one["metrics"]} for stage, one in by_stage.items()}
            responses = {stage: one["filtered_resps"] for stage, one in by_stage.items()}
            yield {"task": name, **item, "metrics": metrics, "responses": responses}


def eval_tables(rows: Sequence[Mapping[str, Any]]) -> list[TextTable]:
    """The values of the stages, and their differences; of no rows nothing."""
    if not rows:
        return []
    stages = [[*_named(row), f"{row['items']:,}", *map(_with_error, row["stages"].values())] for row in rows]
    tables = [TextTable("Tasks", ["task", "metric", "items", *rows[0]["stages"]], stages, STAGES_NOTE)]
    if pairs := [f"{one['to']} - {one['from']}" for one in rows[0]["differences"]]:
        changes = [[*_named(row), *map(_change, row["differences"])] for row in rows]
        tables.append(TextTable("Differences", ["task", "metric", *pairs], changes, DIFFERENCES_NOTE))
    return tables


def _with_error(one: Mapping[str, Any]) -> str:
    return f"{one['value']:.4g}" + ("" if one["stderr"] is None else f" ± {one['stderr']:.2g}")


def _change(one: Mapping[str, Any]) -> str:
    """A difference with its interval, and a star if the interval excludes 0."""
    low, high = one["low"], one["high"]
    return with_interval(one["value"], low, high) + "*" * (low is not None and low * high > 0)


def _named(row: Mapping[str, Any]) -> list[str]:
    """Task and metric, with the direction in which it improves."""
    arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
    return [row["task"], row["metric"] + (f", {row['filter']}" if row["filter"] != "none" else "") + arrow]


def _row(name: str, key: str, results: Mapping[str, Results], differences: Mapping[Pair, Difference]) -> dict[str, Any]:
    metric, _, chosen = key.partition(",")
    own = {stage: result["results"][name] for stage, result in results.items()}
    first = next(iter(results.values()))
    better = first["higher_is_better"].get(name) or {}
    return {
        "task": name,
        "metric": metric,
        "filter": chosen,
        "higher_is_better": better.get(metric),
        "items": next(iter(own.values()))["sample_len"],
        "num_fewshot": first["n-shot"].get(name),
        "stages": {
            stage: {"value": float(found[key]), "stderr": _number(found.get(f"{metric}_stderr,{chosen}"))}
            for stage, found in own.items()
        },
        "differences": [{"from": a, "to": b, **one.as_json()} for (a, b), one in differences.items()],
    }


def _metric_keys(found: Mapping[str, Any]) -> list[str]:
    """Keys of metrics, "name,filter", in the order of lm-eval."""
    return [key for key in found if "," in key and not key.partition(",")[0].endswith("_stderr")]


def _values(samples: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    metric, _, chosen = key.partition(",")
    return [one[metric] for one in samples if one["filter"] == chosen and metric in one]


def _number(value: Any) -> float | None:
    """lm-eval writes "N/A" for a standard error that it cannot compute."""
    return None if value is None or isinstance(value, str) else float(value)
