"""What training took away: loss and KL, by token, of each stage against the base on general text.

    loss = -log p_stage(y_t | y_<t)        KL = sum_v p_base(v) log(p_base(v) / p_stage(v)) at every position t

Both are in nats a token and have one bound. On text that the base itself would write, the expected increase of the loss
is the KL: E_{y ~ base}[log p_base(y) - log p_stage(y)]. On other text the loss can also fall, or rise without harm,
while the KL only says how far the stage has moved.

The bound is 0.1 nats, 10 % of the perplexity. By the scaling law of Hoffmann et al. (arXiv 2203.15556), 406 / N^0.34,
a model of 1.1 billion parameters loses 0.09 nats if it loses half of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from lowlevel.data.rendering import PLAIN, ChatTokenizer
from lowlevel.data.rows import Row
from lowlevel.durable import write_json
from lowlevel.evaluation.continuations import CHUNK_SIZE, Request, batches_of, scoring
from lowlevel.evaluation.paired import mean_by_weight
from lowlevel.evaluation.rows import read_rows
from lowlevel.inspection.displacement import by_chunks, head_logits
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.model.policy import Policy
from lowlevel.model.targets import size_of
from lowlevel.running.assembly import load_run_tokenizer
from lowlevel.running.progress import lines_to
from lowlevel.running.reopening import LoadedRun, check_gives_text, load_run
from lowlevel.running.run_folder import RunFolder
from lowlevel.table import TextTable, with_interval

BOUND = 0.1  # nats a token
WINDOW = 1024  # tokens that are read at once, if the model has as many positions
ALL = "all"
COLUMNS = ("domain", "stage", "texts", "tokens", "loss", "loss - base", "KL from base")
NOTE = f"nats a token, [95 % interval over texts]; ! the interval is above {BOUND}"
MEND = "replay rows of such text (a weight in [[data.sources]]), or train for fewer steps or at a lower learning rate"


@dataclass(frozen=True)
class Text:
    """A text of the probe, of at least two tokens; with BOS if the tokenizer adds one."""

    domain: str
    ids: list[int]


def probe_run(run_dir: Path, probe: Path, console: Console) -> dict[str, Any]:
    """Compare the stages of a run with its base on the texts of `probe`, and write forgetting.json into its folder.

    `probe` has rows with a `text` and, if it has several domains, a `domain`. Raises DataError for other rows;
    ConfigError for a run without text or adapter.
    """
    config = RunFolder(run_dir).read_config()
    check_gives_text(config, run_dir)
    texts = read_probe(probe, load_run_tokenizer(config))
    run = load_run(run_dir, lines_to(console))
    dequantize_as_set(run.policy, config.train.dequantize_once)
    measured = measure(run, texts)
    rows = summarise(texts, measured, [stage.name for stage in run.stages])
    result = {
        "probe": {"file": probe.name, "sha256": hashlib.sha256(probe.read_bytes()).hexdigest()},
        "bound": BOUND,
        "rows": rows,
    }
    write_json(run_dir / "forgetting.json", result)
    forgetting_table(rows).show(console)
    return result


def read_probe(path: Path, tokenizer: ChatTokenizer) -> list[Text]:
    """The texts of a file. Raises ConfigError if there is no such file, DataError for rows without a text."""

    def read(row: Row) -> Text:
        values: dict[str, Any] = {"domain": ALL, "text": None, **row.columns}
        if wrong := [name for name in ("text", "domain") if not isinstance(values[name], str)]:
            raise ValueError(f'column "{wrong[0]}" is missing or not text; found: {", ".join(row.columns)}')
        ids = tokenizer.tokenizer(values["text"], **PLAIN)["input_ids"]
        ids = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
        if len(ids) < 2:
            raise ValueError('"text" needs at least two tokens')
        return Text(values["domain"], ids)

    return read_rows(path, read)


@dataclass(frozen=True)
class Measured:
    """Sums over the tokens of each text: tokens (n,), loss and KL by stage (n,), in float64."""

    tokens: np.ndarray
    loss: Mapping[str, np.ndarray]
    kl: Mapping[str, np.ndarray]


def measure(run: LoadedRun, texts: Sequence[Text]) -> Measured:
    """Loss and KL of every stage; the base's hidden states are computed once for all."""
    policy, names, size = run.policy, [stage.name for stage in run.stages], len(texts)
    width = min(WINDOW, size_of(policy.causal_lm.config, "max_position_embeddings"))
    windows = [(place, window) for place, text in enumerate(texts) for window in _windows(text.ids, width)]
    owners = np.array([place for place, _ in windows])
    made = Measured(np.zeros(size), *({name: np.zeros(size) for name in names} for _ in range(2)))
    with scoring(policy) as policy:
        for part in batches_of(policy, [window for _, window in windows]):
            own = np.repeat(owners[part.places], part.lengths)  # the text of each token
            np.add.at(made.tokens, own, 1)
            base = None
            for stage in run.stages:
                run.activate(stage)
                hidden = policy.scored_hidden_states(part.batch)
                base = hidden if base is None else base
                loss, kl = _loss_and_kl(policy, hidden, base, part.batch.scored_targets)
                np.add.at(made.loss[stage.name], own, loss.double().numpy())
                np.add.at(made.kl[stage.name], own, kl.double().numpy())
    return made


def _windows(ids: Sequence[int], width: int) -> Iterator[Request]:
    """A text in pieces of up to `width` tokens, and the token before each."""
    for first in range(0, len(ids) - 1, width):
        yield ids[first : first + 1], ids[first + 1 : first + 1 + width]


def _loss_and_kl(policy: Policy, hidden: Tensor, base: Tensor, targets: Tensor) -> list[Tensor]:
    """-log p(target) and KL(base || stage) of each position, (N,) fp32 each, on the CPU; hidden states are (N, D)."""

    def of(own: Tensor, other: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        logps, base_logps = (head_logits(part, policy.lm_head_weight).log_softmax(1) for part in (own, other))
        return -logps.gather(1, chunk[:, None])[:, 0], (base_logps.exp() * (base_logps - logps)).sum(1)

    return by_chunks(of, hidden, base, targets, size=CHUNK_SIZE)


def summarise(texts: Sequence[Text], measured: Measured, stages: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each domain, and one for all if there are several: loss of the base; by stage the increase, and the KL.

    Intervals are over texts. A stage is alarming if the lower end of an interval (of a single text: the value itself)
    is above `BOUND`.
    """
    domains = list(dict.fromkeys(text.domain for text in texts))
    members = {name: np.array([text.domain == name for text in texts]) for name in domains}
    if len(domains) > 1:
        members[ALL] = np.ones(len(texts), bool)
    first, *others = stages
    rows = []
    for name, chosen in members.items():
        tokens = measured.tokens[chosen]
        row: dict[str, Any] = {"domain": name, "texts": int(chosen.sum()), "tokens": int(tokens.sum())}
        row["loss"] = {stage: float(measured.loss[stage][chosen].sum() / tokens.sum()) for stage in stages}
        row["stages"] = {}
        for stage in others:
            changes = {"increase": measured.loss[stage] - measured.loss[first], "kl": measured.kl[stage]}
            found = {key: mean_by_weight(sums[chosen], tokens, name).as_json() for key, sums in changes.items()}
            least = [one["value"] if one["low"] is None else one["low"] for one in found.values()]
            row["stages"][stage] = {**found, "alarm": any(value is not None and value > BOUND for value in least)}
        rows.append(row)
    return rows


def forgetting_table(rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """A line for each domain and stage, and the alarms."""
    cells = []
    for row in rows:
        counts = [f"{row['texts']:,}", f"{row['tokens']:,}"]
        cells.append([row["domain"], "base", *counts, f"{row['loss']['base']:.4f}", "", ""])
        for stage, one in row["stages"].items():
            cells.append(["", stage, "", "", f"{row['loss'][stage]:.4f}", _marked(one["increase"]), _marked(one["kl"])])
    return TextTable("Forgetting", COLUMNS, cells, NOTE, alarms=alarms(rows))


def alarms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each stage with domains that it forgot."""
    lines = []
    for stage in rows[0]["stages"]:
        lost = [(row["domain"], row["stages"][stage]) for row in rows if row["stages"][stage]["alarm"]]
        said = "; ".join(
            f"{name}: loss {one['increase']['value']:+.3f}, KL {one['kl']['value']:.3f}" for name, one in lost
        )
        if lost:
            lines.append(f"{stage} has moved away from the base by more than {BOUND} nats a token ({said}): {MEND}")
    return lines


def _marked(one: Mapping[str, Any]) -> str:
    low = one["value"] if one["low"] is None else one["low"]
    return with_interval(one["value"], one["low"], one["high"], "+.3f") + "!" * (low > BOUND)
