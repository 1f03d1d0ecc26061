"""The contents of the page as texts and percentages; the template only arranges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowlevel.inspection.charts import Stair, stair
from lowlevel.inspection.figures import percent, plain, signed, typographic
from lowlevel.inspection.lines import (
    FallLine,
    PathStep,
    TokenLine,
    completion_lines,
    fall_line,
    loss_path,
    sequence_lines,
)
from lowlevel.inspection.pieces import TokenPieces, breaks_line
from lowlevel.inspection.reading import sum_name
from lowlevel.inspection.records import PairRecord, SequenceRecord, TokenRecord
from lowlevel.methods import Method

CLIPPED = 0.98  # quantile at which a colour scale ends, so that one outlier does not make all others pale


@dataclass(frozen=True)
class Scales:
    """The value with the full colour, for each way to colour; the same for the whole page."""

    contribution: float
    loss: float
    entropy: float


@dataclass(frozen=True)
class TokenView:
    """One token of a heat map. The three strengths lie in [0, 1]; `height` is the chart's y after the token."""

    text: str
    breaks: bool
    scored: bool
    tip: str = ""  # lines of "label, tab, value"
    sign: str = ""  # "up" or "down": effect of its contribution on the margin
    contribution: float = 0.0
    loss: float = 0.0
    entropy: float = 0.0
    height: float = 0.0


@dataclass(frozen=True)
class HeatMap:
    """The tokens of a sequence, and a table of their numbers."""

    name: str
    summary: str
    tokens: tuple[TokenView, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Article:
    """One example: a pair, or a conversation."""

    row: int
    where: str
    facts: tuple[tuple[str, str], ...]
    prompt: str
    steps: tuple[PathStep, ...]
    chart: Stair
    chart_name: str
    split: float | None  # percent: start of the rejected completion
    maps: tuple[HeatMap, ...]
    fall: FallLine | None = None  # of a displaced pair


def scales(tokens: Sequence[TokenRecord], contributions: Sequence[Tensor]) -> Scales:
    """The ends of the colour scales, over all tokens of the page."""
    return Scales(
        contribution=_high([float(c) for values in contributions for c in values.abs()]) or 1.0,
        loss=_high([-float(logp) for record in tokens for logp in record.logps]) or 1.0,
        entropy=_high([float(value) for record in tokens for value in record.predicted.entropies]) or 1.0,
    )


def sequence_article(record: SequenceRecord, pieces: TokenPieces, scale: Scales, total: float) -> Article:
    """An SFT example; `total` is the loss of the whole batch."""
    tokens, loss = record.tokens, float(record.loss)
    chart = stair(record.token_losses.double().cumsum(0).tolist())
    lines = sequence_lines(record, pieces)
    views = _token_views(tokens, lines, scale, [0.0] * len(tokens), chart.heights)
    learned = dict(zip(tokens.positions.tolist(), views, strict=True))
    texts = pieces.texts(record.input_ids)
    whole = [learned.get(i) or TokenView(text, breaks_line(text), scored=False) for i, text in enumerate(texts)]
    summary = f"{len(tokens)} of {len(record.input_ids)} tokens learned"
    each, share = plain(loss / max(1, len(tokens))), percent(loss / (total or 1.0))
    facts = [("loss", plain(loss)), ("per token", each), ("of the step", share)]
    facts += [(name, f"{value:g}") for name, value in record.values.items()]
    return Article(
        row=record.row,
        where=record.where,
        facts=tuple((name, typographic(value)) for name, value in facts),
        prompt="",
        steps=(),
        chart=chart,
        chart_name="cumulative loss of the learned tokens",
        split=None,
        maps=(_heat_map("conversation", summary, whole, lines),),
    )


def pair_article(record: PairRecord, method: Method, pieces: TokenPieces, scale: Scales) -> Article:
    """A pair."""
    sums = sum_name(method.config.loss_type)
    running = record.running_sums.tolist()
    chart, split = stair(running), len(record.chosen.tokens)
    maps = []
    for name, side, part in (
        ("chosen", record.chosen, slice(0, split)),
        ("rejected", record.rejected, slice(split, None)),
    ):
        lines = completion_lines(side, running[part], pieces)
        views = _token_views(side.tokens, lines, scale, side.contributions.tolist(), chart.heights[part])
        summary = f"{len(side.tokens)} tokens, reward {typographic(signed(float(side.reward)))}"
        maps.append(_heat_map(name, summary, views, lines))
    weights = dict.fromkeys(plain(float(side.weight)) for side in (record.chosen, record.rejected))
    facts = (
        ("margin", signed(float(record.margin))),
        *([(sums, signed(float(record.argument)))] if sums != "margin" else []),
        ("weight" if sums == "margin" else f"weight of the {sums}", " / ".join(weights)),
        ("loss", plain(float(record.loss))),
    )
    return Article(
        row=record.row,
        where=record.where,
        facts=tuple((name, typographic(value)) for name, value in facts),
        prompt=pieces.decode(record.prompt_ids).strip(),
        steps=tuple(loss_path(record, method)),
        chart=chart,
        chart_name=f"cumulative {sums} along the tokens",
        split=100 * split / max(1, len(running)),
        maps=tuple(maps),
        fall=fall_line(record, pieces),
    )


def _heat_map(name: str, summary: str, tokens: Sequence[TokenView], lines: Sequence[TokenLine]) -> HeatMap:
    """Hyphens become minus signs in numbers, not in tokens."""
    columns = ("#", "token", *(lines[0].numbers if lines else ()), "others")
    rows = tuple(
        (line.position, line.token, *map(typographic, line.numbers.values()), ", ".join(line.others)) for line in lines
    )
    return HeatMap(name, summary, tuple(tokens), columns, rows)


def _token_views(
    tokens: TokenRecord,
    lines: Sequence[TokenLine],
    scale: Scales,
    contributions: Sequence[float],
    heights: Sequence[float],
) -> list[TokenView]:
    columns = (lines, tokens.logps.tolist(), tokens.predicted.entropies.tolist(), contributions, heights)
    return [
        TokenView(
            text=line.token,
            breaks=breaks_line(line.token),
            scored=True,
            tip=_tip(line),
            sign="up" if adds > 0 else "down" if adds < 0 else "",
            contribution=_strength(abs(adds), scale.contribution),
            loss=_strength(-logp, scale.loss),
            entropy=_strength(entropy, scale.entropy),
            height=height,
        )
        for line, logp, entropy, adds, height in zip(*columns, strict=True)
    ]


def _tip(line: TokenLine) -> str:
    numbers = [f"{name}\t{typographic(number)}" for name, number in line.numbers.items()]
    others = [f"{'instead' if i == 0 else ''}\t{other}" for i, other in enumerate(line.others)]
    return "\n".join([line.token, *numbers, *others])


def _strength(value: float, full: float) -> float:
    return round(min(1.0, max(0.0, value / full)), 3)


def _high(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(CLIPPED * len(ordered)))] if ordered else 0.0
