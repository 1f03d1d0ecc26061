"""The contents of the page as texts and percentages; the template only arranges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowlevel.inspection.charts import Stair, stair
from lowlevel.inspection.kto_and_reward import LabelledRecord
from lowlevel.inspection.lines import FallLine, TokenLine, completion_lines, fall_line, path_of, sequence_lines
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import percent, plain, signed, sum_name, typographic
from lowlevel.inspection.records import PairRecord, PathStep, SequenceRecord, TokenRecord
from lowlevel.methods import Method

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


def _high(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(CLIPPED * len(ordered)))] if ordered else 0.0


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


def compared_article(
    record: PairRecord | LabelledRecord, method: Method, pieces: TokenPieces, scale: Mapping[str, float]
) -> Article:
    """A pair, or a labelled completion."""
    sums, running = sum_name(method.spec.name), record.running_sums.tolist()
    chart, maps, pair = stair(running), [], record if isinstance(record, PairRecord) else None
    for name, side, part in record.sides:
        lines = completion_lines(side, running[part], pieces)
        views = _token_views(side.tokens, lines, scale, side.contributions.tolist(), chart.heights[part])
        summary = f"{len(side.tokens)} tokens, reward {typographic(signed(float(side.reward)))}"
        maps.append(HeatMap(name, summary, views, lines))
    return Article(
        row=record.row,
        where=record.where,
        facts=[*_facts(record, sums), ("loss", plain(float(record.loss)))],
        chart=chart,
        chart_name=f"cumulative {sums} along the tokens",
        maps=maps,
        prompt=pieces.decode(record.prompt_ids).strip(),
        steps=path_of(record, method),
        split=100 * len(pair.chosen.tokens) / max(1, len(running)) if pair else None,
        fall=fall_line(pair, pieces) if pair else None,
    )


def _facts(record: PairRecord | LabelledRecord, sums: str) -> list[tuple[str, str]]:
    if isinstance(record, LabelledRecord):
        reward, weight = (signed(float(value)) for value in (record.completion.reward, record.completion.weight))
        return [("label", record.label), ("reward", reward), ("weight", weight)]
    weights = dict.fromkeys(plain(float(side.weight)) for side in (record.chosen, record.rejected))
    argument = [(sums, signed(float(record.argument)))] if sums != "margin" else []
    weight_of = "weight" if sums == "margin" else f"weight of the {sums}"
    return [("margin", signed(float(record.margin))), *argument, (weight_of, " / ".join(weights))]


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
        numbers = [f"{name}\t{typographic(number)}" for name, number in line.numbers.items()]
        others = [f"{'instead' if i == 0 else ''}\t{other}" for i, other in enumerate(line.others)]
        sign, tip = "up" if adds > 0 else "down" if adds < 0 else "", "\n".join([line.token, *numbers, *others])
        views.append(TokenView(line.token, tip, sign, css, height))
    return views
