"""The data report: counts of rows, token lengths, effect of truncation, warnings, and one example in colour."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from lowlevel.data.building import TOO_LONG, Built, TokenCounts
from lowlevel.data.examples import Example, PromptExample, SFTExample
from lowlevel.data.messages import Normalised
from lowlevel.data.rendering import APART, ChatTokenizer
from lowlevel.data.rows import SHOWN, RowProblem, SourceRows
from lowlevel.data.truncation import Truncation
from lowlevel.table import table_of

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
# Warnings that only describe the rows; with any other warning, a part of the rows is not learned.
DESCRIBING = (
    *("byte order mark", "turns not alternating", "empty user turn", "special tokens in text", "duplicate rows"),
    *("contradicting pairs", "contradicting labels", APART),
)
DOUBLE_END = "replies that end with an end-of-turn token in their text (the chat template adds one: the end is double)"
COUNTED = ("total", "prompt", "supervised", "chosen", "rejected")


@dataclass(frozen=True)
class Dropped:
    """Number of rows dropped for one reason, and the first five with place and message."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class PartReport:
    """One source of a mix: rows read, rows that gave an example, and their share of all examples."""

    source: str
    rows_read: int
    rows_kept: int
    share: float
    share_wanted: float | None  # by weight

    def __str__(self) -> str:
        wanted = "" if self.share_wanted is None else f", weight {self.share_wanted:.1%}"
        return f"{self.rows_kept:,} of {self.rows_read:,}: {self.share:.1%}{wanted}"


@dataclass(frozen=True)
class SplitReport:
    """One split. Rows are counted in the source, after filters, shuffle and limit, and as examples."""

    source: str
    rows_read: int
    rows_selected: int
    rows_kept: int
    filtered: dict[str, int]  # rows by the filter that dropped them
    dropped: dict[str, Dropped]  # selected rows without an example, by reason
    warnings: dict[str, int]  # number of rows (or replies, messages, pairs) by kind
    lengths: dict[str, dict[str, float]]  # quantiles and mean of tokens per row before truncation
    tokens: dict[str, int]  # sums after truncation: total, supervised
    truncated_rows: int
    tokens_lost: int  # supervised (or completion) tokens cut
    share_lost: float
    prompt_tokens_lost: int
    replies: int  # in the examples
    replies_ended: int  # with the end-of-turn token
    read_as: str  # format and columns, if it is not a plain one
    fingerprint: str  # sha256 of the digests in training order
    row_digests: tuple[str, ...]  # they say which row changed
    sources: tuple[PartReport, ...]  # of a mix
    truncation: Truncation | None = None


@dataclass(frozen=True)
class DataReport:
    """Content of data_report.json. `overlap` counts evaluation rows whose prompt is also in the training rows."""

    format: str
    supervise: str
    max_length: int
    train: SplitReport
    evaluation: SplitReport | None
    overlap: int | None
    tokenizer: dict[str, Any]

    @property
    def splits(self) -> dict[str, SplitReport]:
        """The one or two splits by name."""
        return {"train": self.train} | ({"evaluation": self.evaluation} if self.evaluation else {})

    def to_json(self) -> dict[str, Any]:
        """Plain tables for data_report.json, without the row digests."""
        tables = asdict(self)
        for name in self.splits:
            del tables[name]["row_digests"]
            if not tables[name]["sources"]:
                del tables[name]["sources"]
        return tables


def split_report(source: SourceRows, selected: int, built: Built) -> SplitReport:
    """Count what is in a split's examples, of which there must be at least one."""
    counts, digests = built.counts, tuple(row.digest for row in built.rows)
    supervised, lost = sum(c.supervised for c in counts), sum(c.lost for c in counts)
    kept = Counter(row.row.source for row in built.rows)
    return SplitReport(
        source=source.name,
        rows_read=source.read,
        rows_selected=selected,
        rows_kept=len(built.examples),
        filtered=dict(source.dropped),
        dropped=_by_reason(built.problems),
        warnings=dict(+built.warnings),
        lengths={key: summary for key in COUNTED if (summary := _quantiles(counts, key))["max"]},
        tokens={"total": sum(c.kept for c in counts), "supervised": supervised - lost},
        truncated_rows=sum(c.total > c.kept for c in counts),
        tokens_lost=lost,
        share_lost=lost / max(supervised, 1),
        prompt_tokens_lost=sum(c.prompt_lost for c in counts),
        replies=sum(c.replies for c in counts),
        replies_ended=int(sum(c.ended for c in counts)),
        read_as=source.read_as,
        fingerprint=hashlib.sha256("".join(digests).encode()).hexdigest(),
        row_digests=digests,
        sources=tuple(
            PartReport(part.name, part.read, kept[i], kept[i] / len(built.rows), part.share)
            for i, part in enumerate(source.parts)
        ),
    )


def count_warnings(rows: Sequence[Normalised], tokenizer: ChatTokenizer) -> Counter[str]:
    """Number of rows by kind of warning."""
    warnings = Counter(kind for row in rows for kind in row.warnings)
    special = re.compile("|".join(re.escape(token) for token in tokenizer.special_tokens) or "(?!)")
    warnings["special tokens in text"] = sum(any(special.search(text) for text in row.texts) for row in rows)
    ends = tuple(tokenizer.decode([i]) for i in tokenizer.stop_ids)
    warnings[DOUBLE_END] = sum(any(text.rstrip().endswith(ends) for text in row.replies) for row in rows)
    warnings["duplicate rows"] = len(rows) - len({row.digest for row in rows})
    said = {(row.prompt_digest, row.texts[-1], row.values[0]) for row in rows if row.row.format.labelled}
    warnings["contradicting labels"] = sum((prompt, text, 1 - label) in said for prompt, text, label in said) // 2
    pairs = {(row.prompt_digest, *map(str, row.completions)) for row in rows if row.completions}
    warnings["contradicting pairs"] = sum((prompt, b, a) in pairs for prompt, a, b in pairs) // 2
    return +warnings


def tokenizer_report(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Special token ids, and hash, peculiarities and date of the chat template."""
    return {
        "chat_template_sha256": tokenizer.chat_template.sha256,
        "vocab_size": len(tokenizer.tokenizer),
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "end_of_turn_id": tokenizer.end_of_turn_id,
        "template_warnings": tokenizer.chat_template.warnings,
        "template_notes": tokenizer.chat_template.notes,
        "template_date": str(tokenizer.chat_template.date) if tokenizer.chat_template.asks_for_date else None,
    }


def render_report(report: DataReport, console: Console) -> None:
    """Print the report as tables of rows and token lengths."""
    splits = report.splits
    facts = [_facts(split) for split in splits.values()]
    labels = dict.fromkeys(label for fact in facts for label in fact)
    rows = [(label, *(fact.get(label, "") for fact in facts)) for label in labels]
    lengths = [(f"{name} {key}", one) for name, split in splits.items() for key, one in split.lengths.items()]
    tokens = [(name, *(f"{value:,.0f}" for value in one.values())) for name, one in lengths]
    title, style = f"Rows (format {report.format}, max_length {report.max_length})", {"title_justify": "left"}
    console.print(table_of(("<", *splits), rows, title=title, **style))
    console.print(table_of(("<", *QUANTILES, "mean"), tokens, title="Tokens per row, before truncation", **style))
    for line in (line for split in splits.values() for dropped in split.dropped.values() for line in dropped.first):
        console.print(f"dropped {line}", markup=False, highlight=False)
    for line in [*template_lines(report), *truncated(report)]:
        console.print(line, markup=False, highlight=False)
    ids = ", ".join(f"{name} {report.tokenizer[name + '_id']}" for name in ("bos", "eos", "pad", "end_of_turn"))
    shared = "" if report.overlap is None else f"; {report.overlap} evaluation prompts are also trained on"
    last = f"ids: {ids} (padding is masked by length){shared}; rows {report.train.fingerprint[:12]}"
    console.print(last, markup=False, highlight=False)


def truncated(report: DataReport) -> list[str]:
    """One line for each split with rows that max_length cuts, with the lengths that would keep more."""
    splits = ((name, split.truncation) for name, split in report.splits.items())
    return [f"{name}: {found}" for name, found in splits if found and found.rows_cut]


def template_lines(report: DataReport) -> list[str]:
    """What the chat template does differently from most: a line for each warning, and one for all notes."""
    found = report.tokenizer
    lines = [f"warning    chat template: {warning}" for warning in found["template_warnings"]]
    return lines + ([f"template   {'; '.join(found['template_notes'])}"] if found["template_notes"] else [])


def not_learned(report: DataReport) -> list[str]:
    """One line for each kind of skipped rows, and for each warning that a part of the rows is not learned."""
    splits = report.splits.items()
    skips = [(name, one) for name, split in splits for why, one in split.dropped.items() if why != TOO_LONG]
    skipped = [f"skipped: {one.count:,} {name}, the first {one.first[0]}" for name, one in skips]
    kinds = list(dict.fromkeys(kind for _, split in splits for kind in split.warnings if kind not in DESCRIBING))
    counts = [", ".join(f"{split.warnings.get(kind, 0):,} {name}" for name, split in splits) for kind in kinds]
    lines = skipped + [f"{kind}: {count}" for kind, count in zip(kinds[:SHOWN], counts, strict=False)]
    more = len(kinds) - SHOWN
    return lines + ([f"and {more:,} more kinds, which `lowlevel data` lists"] if more > 0 else [])


def show_example(example: Example, tokenizer: ChatTokenizer, console: Console) -> None:
    """Print one example: learned tokens and the chosen completion in green, the rejected completion in red.

    Without colours, they are put between » and «.
    """
    how = "green" if console.is_terminal and not console.no_color else "between » and «"
    what = "a prompt" if isinstance(example, PromptExample) else f"learned tokens are {how}"
    console.print(f"{example.where} (row {example.row}); {what}", markup=False, highlight=False)
    if isinstance(example, SFTExample):
        learned = example.labels >= 0
        console.print(_coloured(example.input_ids, np.where(learned, "green", "dim"), tokenizer, console))
        return
    if isinstance(example, PromptExample):
        console.print(_coloured(example.prompt_ids, np.full(len(example.prompt_ids), "dim"), tokenizer, console))
        return
    for name, style, ids in (("chosen", "green", example.chosen_ids), ("rejected", "red", example.rejected_ids)):
        whole = np.concatenate([example.prompt_ids, ids])
        styles = np.where(np.arange(len(whole)) < len(example.prompt_ids), "dim", style)
        console.print(f"[bold]{name}[/bold]")
        console.print(_coloured(whole, styles, tokenizer, console))


def _coloured(ids: np.ndarray, styles: np.ndarray, tokenizer: ChatTokenizer, console: Console) -> Text:
    text = Text()
    edges = [0, *(np.flatnonzero(styles[1:] != styles[:-1]) + 1).tolist(), len(ids)]
    for start, end in zip(edges, edges[1:], strict=False):
        part = tokenizer.decode(ids[start:end].tolist())
        marked = styles[start] != "dim" and (console.no_color or not console.is_terminal)
        text.append(f"»{part}«" if marked else part, style=str(styles[start]))
    return text


def _facts(split: SplitReport) -> dict[str, str]:
    ended = f"{split.replies_ended:,} of {split.replies:,} ({split.replies_ended / max(split.replies, 1):.0%})"
    learned = {
        "supervised tokens": f"{split.tokens['supervised']:,}",
        "truncated rows": f"{split.truncated_rows:,}",
        "supervised tokens lost": f"{split.tokens_lost:,} ({split.share_lost:.1%})",
        "prompt tokens lost": f"{split.prompt_tokens_lost:,}",
        "replies ending their turn": ended,
    }
    return {
        "source": split.source,
        **({"read as": split.read_as} if split.read_as else {}),
        "rows read": f"{split.rows_read:,}",
        **{f"  filtered out: not {condition}": f"{count:,}" for condition, count in split.filtered.items()},
        "rows selected": f"{split.rows_selected:,}",
        **{f"  dropped: {reason}": f"{dropped.count:,}" for reason, dropped in split.dropped.items()},
        "rows kept": f"{split.rows_kept:,}",
        **{f"  {i}. {part.source}": str(part) for i, part in enumerate(split.sources, 1)},
        "tokens (after truncation)": f"{split.tokens['total']:,}",
        **(learned if split.tokens["supervised"] else {}),  # prompts have no tokens to learn
        **{f"warning: {kind}": f"{count:,}" for kind, count in split.warnings.items()},
    }


def _by_reason(problems: Sequence[RowProblem]) -> dict[str, Dropped]:
    grouped: dict[str, list[str]] = {}
    for problem in problems:
        grouped.setdefault(problem.reason, []).append(f"{problem.where}: {problem.message}")
    return {reason: Dropped(len(lines), tuple(lines[:SHOWN])) for reason, lines in grouped.items()}


def _quantiles(counts: Sequence[TokenCounts], key: str) -> dict[str, float]:
    values = np.array([getattr(count, key) for count in counts])
    summary = {name: float(np.quantile(values, q, method="nearest")) for name, q in QUANTILES.items()}
    return summary | {"mean": round(float(values.mean()), 1)}
