"""The contents of the page as texts and percentages; the template only arranges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowlevel.inspection.charts import Stair, stair
from lowlevel.inspection.figures import percent, plain, signed, typographic
from lowlevel.inspection.labelled import LabelledRecord, labelled_path
from lowlevel.inspection.lines import (
    FallLine,
    PathStep,
    TokenLine,
    completion_lines,
    fall_line,
    loss_path,
    sequence_lines,
)
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import sum_name
from lowlevel.inspection.records import PairRecord, SequenceRecord, TokenRecord
from lowlevel.methods import KTO, Method

CLIPPED = 0.98  # quantile at which a colour scale ends, so that one outlier does not make all others pale


@dataclass(frozen=True)
class TokenView:
    """One token of a heat map."""

    text: str
    tip: str = ""  # lines of "label, tab, value"
    sign: str = ""  # "up" or "down": effect of its contribution on the margin
    strengths: str = ""  # CSS: strength of each colour in [0, 1]; empty if the token is not scored
    height: float = 0.0  # the chart's y after the token


@dataclass(frozen=True)
class HeatMap:
    """The tokens of a sequence, and the lines of a table of their numbers."""

    name: str
    summary: str
    tokens: Sequence[TokenView]
    lines: Sequence[TokenLine]


@dataclass(frozen=True)
class Article:
    """One example: a pair, or a conversation."""

    row: int
    where: str
    facts: Sequence[tuple[str, str]]
    chart: Stair
    chart_name: str
    maps: Sequence[HeatMap]
    prompt: str = ""
    steps: Sequence[PathStep] = ()
    split: float | None = None  # percent: start of the rejected completion
    fall: FallLine | None = None  # of a displaced pair


def scales(tokens: Sequence[TokenRecord], contributions: Sequence[Tensor]) -> dict[str, float]:
    """The value with the full colour, for each way to colour; the same for all tokens of the page."""
    columns = {
        "contribution": [values.abs() for values in contributions],
        "loss": [-record.logps for record in tokens],
        "entropy": [record.predicted.entropies for record in tokens],
    }
    return {name: _high([value for part in parts for value in part.tolist()]) or 1.0 for name, parts in columns.items()}


def sequence_article(record: SequenceRecord, pieces: TokenPieces, scale: Mapping[str, float], total: float) -> Article:
    """An SFT example; `total` is the loss of the whole batch."""
    tokens, loss = record.tokens, float(record.loss)
    chart = stair(record.token_losses.double().cumsum(0).tolist())
    lines = sequence_lines(record, pieces)
    views = _token_views(tokens, lines, scale, [0.0] * len(tokens), chart.heights)
    learned = dict(zip(tokens.positions.tolist(), views, strict=True))
    texts = pieces.texts(record.input_ids)
    whole = [learned.get(i) or TokenView(text) for i, text in enumerate(texts)]
    summary = f"{len(tokens)} of {len(record.input_ids)} tokens learned"
    each, share = plain(loss / max(1, len(tokens))), percent(loss / (total or 1.0))
    facts = [("loss", plain(loss)), ("per token", each), ("of the step", share)]
    facts += [(name, f"{value:g}") for name, value in record.values.items()]
    return Article(
        row=record.row,
        where=record.where,
        facts=facts,
        chart=chart,
        chart_name="cumulative loss of the learned tokens",
        maps=[HeatMap("conversation", summary, whole, lines)],
    )


def pair_article(record: PairRecord, method: Method, pieces: TokenPieces, scale: Mapping[str, float]) -> Article:
    """A pair."""
    sums = sum_name(method.spec.name)
    running = record.running_sums.tolist()
    chart, maps = stair(running), []
    for name, side, part in record.sides:
        lines = completion_lines(side, running[part], pieces)
        views = _token_views(side.tokens, lines, scale, side.contributions.tolist(), chart.heights[part])
        summary = f"{len(side.tokens)} tokens, reward {typographic(signed(float(side.reward)))}"
        maps.append(HeatMap(name, summary, views, lines))
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
        facts=facts,
        chart=chart,
        chart_name=f"cumulative {sums} along the tokens",
        maps=maps,
        prompt=pieces.decode(record.prompt_ids).strip(),
        steps=loss_path(record, method),
        split=100 * len(record.chosen.tokens) / max(1, len(running)),
        fall=fall_line(record, pieces),
    )


def labelled_article(record: LabelledRecord, method: KTO, pieces: TokenPieces, scale: Mapping[str, float]) -> Article:
    """A labelled completion."""
    one, label = record.completion, "desirable" if record.desirable else "undesirable"
    running = one.contributions.double().cumsum(0).tolist()
    chart, lines = stair(running), completion_lines(one, running, pieces)
    views = _token_views(one.tokens, lines, scale, one.contributions.tolist(), chart.heights)
    reward, weight = signed(float(one.reward)), signed(float(one.weight))
    summary = f"{len(one.tokens)} tokens, reward {typographic(reward)}"
    return Article(
        row=record.row,
        where=record.where,
        facts=(("label", label), ("reward", reward), ("weight", weight), ("loss", plain(float(record.loss)))),
        chart=chart,
        chart_name="cumulative reward along the tokens",
        maps=[HeatMap(label, summary, views, lines)],
        prompt=pieces.decode(record.prompt_ids).strip(),
        steps=labelled_path(record, method),
    )


def _token_views(
    tokens: TokenRecord,
    lines: Sequence[TokenLine],
    scale: Mapping[str, float],
    contributions: Sequence[float],
    heights: Sequence[float],
) -> list[TokenView]:
    views = []
    columns = (lines, tokens.logps.tolist(), tokens.predicted.entropies.tolist(), contributions, heights)
    for line, logp, entropy, adds, height in zip(*columns, strict=True):
        values = {"contribution": abs(adds), "loss": -logp, "entropy": entropy}
        strengths = {name[0]: round(min(1.0, max(0.0, value / scale[name])), 3) for name, value in values.items()}
        css = ";".join(f"--{letter}:{strength}" for letter, strength in strengths.items())
        views.append(TokenView(line.token, _tip(line), "up" if adds > 0 else "down" if adds < 0 else "", css, height))
    return views


def _tip(line: TokenLine) -> str:
    numbers = [f"{name}\t{typographic(number)}" for name, number in line.numbers.items()]
    others = [f"{'instead' if i == 0 else ''}\t{other}" for i, other in enumerate(line.others)]
    return "\n".join([line.token, *numbers, *others])


def _high(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(CLIPPED * len(ordered)))] if ordered else 0.0
