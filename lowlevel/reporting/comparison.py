"""`lowlevel compare`: scores and replies of each stage of a run, on rows that no stage was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lowlevel.data.examples import PreferenceExample
from lowlevel.durable import write_json
from lowlevel.errors import ConfigError
from lowlevel.heartbeat import counted
from lowlevel.labels import IGNORED
from lowlevel.losses.reward import ranked
from lowlevel.perplexity import PERPLEXITIES, perplexities
from lowlevel.running.assembly import prepare_data
from lowlevel.running.progress import lines_to
from lowlevel.running.reopening import LoadedRun, load_run, reopen
from lowlevel.running.replies import Reply, generate_replies
from lowlevel.sampling import Sampling, build_sampler
from lowlevel.table import TextTable

SAMPLES = 5  # in the report
COLUMNS = {
    "eval_loss": ("held-out loss", "{:.4f}"),
    **{name: (name.replace("/", ", tokens "), "{:.2f}") for name in PERPLEXITIES},
    "chosen_nll": ("chosen NLL", "{:.4f}"),
    **{f"{label}_nll": (f"{label} NLL", "{:.4f}") for label in ("desirable", "undesirable")},
    **{f"{label}_logratio": (f"{label} log-ratio", "{:+.4f}") for label in ("desirable", "undesirable")},
    "pair_accuracy": ("pair accuracy", "{:.1%}"),
    "reward_accuracy": ("reward accuracy", "{:.1%}"),
    "reply_tokens": ("reply tokens", "{:.1f}"),
    "ended_rate": ("ended with EOS", "{:.1%}"),
}


@dataclass(frozen=True)
class HeldOutScores:
    """Log-probabilities of held-out sequences under one stage, (S,) each; for pairs all chosen come first."""

    logps: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor  # kto: 1 for desirable, 0 for undesirable; else empty


def compare_run(
    run_dir: Path, console: Console, *, prompts: int, max_new_tokens: int, show: int, **given: Any
) -> dict[str, Any]:
    """Compare the stages of a run, print a table and replies, and write compare.json into the run folder.

    `given`: as in `load_held_out`.

    Raises:
        ConfigError: the run has no held-out rows.
        DataError: they changed since the run.
    """
    rows, texts = load_held_out(run_dir, **given)
    texts = texts[:prompts]
    run = load_run(run_dir, lines_to(console))
    sampling = Sampling(max_new_tokens=max_new_tokens)
    result = compare_stages(run, rows, texts, sampling, console=console)
    print_replies(run, texts[:show], result, console)
    write_json(run_dir / "compare.json", result)
    console.print(f"held-out rows {len(rows)}, replies per stage {len(texts)}; written to {run_dir / 'compare.json'}")
    return result


def load_held_out(run_dir: Path, **given: Any) -> tuple[Sequence[Any], list[list[int]]]:
    """The held-out rows that the run's configuration names, and their prompts; `given`: data, eval_data of `reopen`.

    Raises:
        ConfigError: there are none.
        DataError: they changed since the run.
    """
    opened = reopen(run_dir, **given)
    config = opened.config
    if config.method == "reward":
        use = f"lowlevel score {run_dir} --data PAIRS; for two runs lowlevel report {run_dir} --compare OTHER_RUN"
        raise ConfigError(f"{run_dir} is a reward model, and the stages before it give no rewards: use {use}")
    if config.sampled:
        logged = "logs the rewards of held-out prompts: eval_reward in metrics.jsonl"
        raise ConfigError(f"{run_dir}: compare scores given replies, and a run of {config.method} {logged}")
    if config.data.eval_source is None:
        raise ConfigError(
            f"{run_dir}: compare needs held-out rows, and the run has no data.eval_source; train with "
            "--data.eval_source holdout --data.eval_limit 100"
        )
    marked = rows = opened.held_out()
    if config.method == "sft" and config.data.supervise == "all":  # the labels do not show where the first reply starts
        marked = prepare_data(config.changed(data={"supervise": "assistant"}))[1].evaluation
    return rows, [prompt_ids(row) for row in marked]


def compare_stages(
    run: LoadedRun,
    rows: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    console: Console,
    judges: Mapping[str, Callable[[int, str], float]] = {},
) -> dict[str, Any]:
    """Score held-out rows and reply to prompts with every stage; the means of `judges` over replies become columns."""
    score = {"sft": sft_scores, "dpo": pair_scores, "kto": label_scores}[run.config.method]
    scores: dict[str, dict[str, float]] = {}
    replies: dict[str, list[Reply]] = {}
    reference: HeldOutScores | None = None
    sampler = build_sampler(run.policy.model, run.policy.placement, run.tokenizer.stop_ids, console.print)
    for stage in run.stages:
        run.activate(stage)
        scored = score_rows(run, rows)
        made = generate_replies(sampler, run.tokenizer, prompts, sampling)
        scores[stage.name] = {
            **score(scored, reference),
            "reply_tokens": sum(reply.num_tokens for reply in made) / len(made),
            "ended_rate": sum(reply.ended for reply in made) / len(made),
            **{name: sum(judge(i, r.text) for i, r in enumerate(made)) / len(made) for name, judge in judges.items()},
        }
        replies[stage.name] = made
        reference = scored if not stage.trained else reference  # the stage before the trained one is DPO's reference
    run.activate(run.stages[-1])
    score_table(scores).show(console)
    return {
        "scores": scores,
        "prompts": [run.tokenizer.decode(prompt).strip() for prompt in prompts],
        "replies": {name: [asdict(reply) for reply in made] for name, made in replies.items()},
        "sampling": asdict(sampling),
    }


@torch.no_grad()
def score_rows(run: LoadedRun, rows: Sequence[Any]) -> HeldOutScores:
    """Summed log-probability and number of scored tokens of every held-out sequence, dropout off."""
    run.policy.dropout.disable()
    size, branches = run.config.rows_per_step, 2 if run.config.method == "dpo" else 1
    logps: list[torch.Tensor] = []
    lengths: list[torch.Tensor] = []
    labels: list[torch.Tensor] = [torch.zeros(0)]
    for start in counted("scoring held-out rows", range(0, len(rows), size), "micro-batches"):
        for batch in run.method.micro_batches(rows[start : start + size]):
            moved = batch.to(run.policy.placement.device)
            sums = moved.sequence_sums(run.policy.token_logps(moved)).cpu()
            real = len(batch.data_rows)  # dummy examples come after them
            logps.append(sums.view(branches, -1)[:, :real])
            lengths.append(batch.lengths.view(branches, -1)[:, :real])
            labels += [batch.values(run.method.columns)["label"][:real]] if run.config.method == "kto" else []
    return HeldOutScores(torch.cat(logps, 1).flatten(), torch.cat(lengths, 1).flatten(), torch.cat(labels))


def sft_scores(scored: HeldOutScores, reference: HeldOutScores | None = None) -> dict[str, float]:
    """Cross-entropy in nats per supervised token, and perplexities."""
    loss = float(-scored.logps.double().sum() / scored.lengths.sum())
    return {"eval_loss": loss, **perplexities(scored.logps.tolist(), scored.lengths.tolist())}


def pair_scores(scored: HeldOutScores, reference: HeldOutScores | None) -> dict[str, float]:
    """Cross-entropy of the chosen completions, and the share of pairs whose chosen one is preferred.

    chosen_nll: nats per token of the chosen completions, without a reference. It is not the DPO loss.
    pair_accuracy: log pi(y+) > log pi(y-). reward_accuracy: the same for log-ratios to the reference; a tie counts one
        half.
    """
    chosen, rejected = scored.logps.chunk(2)
    scores = {
        "chosen_nll": float(-chosen.double().sum() / scored.lengths.chunk(2)[0].sum()),
        "pair_accuracy": float(ranked(chosen - rejected).double().mean()),
    }
    if reference is not None:
        chosen_ratio, rejected_ratio = (scored.logps - reference.logps).chunk(2)
        scores["reward_accuracy"] = float(ranked(chosen_ratio - rejected_ratio).double().mean())
    return scores


def label_scores(scored: HeldOutScores, reference: HeldOutScores | None) -> dict[str, float]:
    """Cross-entropy of each label's completions, nats per token, and their mean log-ratio to the reference."""
    scores = {}
    for label, belongs in (("desirable", scored.labels > 0), ("undesirable", scored.labels == 0)):
        if bool(belongs.any()):
            scores[f"{label}_nll"] = float(-scored.logps[belongs].double().sum() / scored.lengths[belongs].sum())
            ratios = scored.logps - reference.logps if reference else torch.zeros_like(scored.logps)
            scores[f"{label}_logratio"] = float(ratios[belongs].double().mean())
    return scores


def prompt_ids(row: Any) -> list[int]:
    """The tokens before the first reply of a held-out row."""
    if isinstance(row, PreferenceExample):
        return row.prompt_ids.tolist()
    first = int((row.labels != IGNORED).argmax())
    return row.input_ids[: max(1, first)].tolist()


def score_table(scores: Mapping[str, Mapping[str, float]]) -> TextTable:
    """Stages as rows, scores as columns."""
    keys = list(dict.fromkeys(key for row in scores.values() for key in row))
    rewards = "reward accuracy: log-ratios to the row above, which is the reference of dpo"
    names = [COLUMNS.get(key, (key.replace("_", " "), ""))[0] for key in keys]
    rows = [
        [name, *(COLUMNS.get(key, ("", "{:.1%}"))[1].format(row[key]) if key in row else "-" for key in keys)]
        for name, row in scores.items()
    ]
    return TextTable("Stages", ["stage", *names], rows, rewards if "reward_accuracy" in keys else "", names=1)


def sample_table(result: Mapping[str, Any]) -> TextTable:
    """The first prompts of a comparison with the reply of each stage."""
    replies, prompts = result["replies"], result.get("prompts") or []  # older files have no prompts
    rows = [[prompt, *(made[i]["text"].strip() for made in replies.values())]
            for i, prompt in enumerate(prompts[:SAMPLES])]  # fmt: skip
    note = f"the first {len(rows)} held-out prompts and the greedy reply of each stage"
    return TextTable("Samples", ["prompt", *replies], rows, note, names=1 + len(replies))


def print_replies(
    run: LoadedRun, prompts: Sequence[Sequence[int]], result: Mapping[str, Any], console: Console
) -> None:
    """The replies of every stage to the same prompts."""
    for i, prompt in enumerate(prompts):
        console.print(f"\n{run.tokenizer.decode(prompt[-200:]).strip()}", style="dim", markup=False)
        for name, replies in result["replies"].items():
            console.print(f"{name:>5}: {replies[i]['text'].strip()}", markup=False)
    console.print()
