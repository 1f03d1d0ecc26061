"""An inspection as one HTML file that needs no network: heat maps, cumulative sums, and an overview of the batch."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from torch import Tensor

from lowlevel.durable import write_given
from lowlevel.inspection.charts import histogram, loss_bands, stair
from lowlevel.inspection.example import Example, Inspection, Text, View
from lowlevel.inspection.pairs import fall_line
from lowlevel.inspection.pieces import VISIBLE, breaks_line
from lowlevel.inspection.reading import plain, settings, signed, typographic
from lowlevel.inspection.tables import batch_table, caption, facts_of, steps_of, summary, token_lines

FULL = 0.98  # quantile at which a colour scale ends, so that one outlier does not make all others pale


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page. A file is replaced atomically; the target of a link is replaced; a pipe is written to."""
    write_given(path, render_page(inspection))


def render_page(inspection: Inspection) -> str:
    """The page as HTML; its policy forbids all scripts but its own."""
    script, modes, seen = read_part("inspection/page.js"), colour_modes(inspection), Counter[int]()
    anchors = []
    for x in inspection.examples:  # a prompt may come twice
        anchors.append(f"row-{x.row}" + (f"-again-{seen[x.row]}" if seen[x.row] else ""))
        seen[x.row] += 1
    columns = inspection.examples[0].texts[0].columns
    return render_template(
        "inspection/page.html",
        ["inspection/page.css"],
        inspection=inspection,
        view=inspection.view,
        script=script,
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        paper=f"{settings(inspection.method)}; {inspection.method.spec.paper}",
        modes=modes,
        articles=[_article(x, at, inspection, modes) for x, at in zip(inspection.examples, anchors, strict=True)],
        caption=caption(inspection),
        words={name: word for name, word in inspection.view.words.items() if name in columns},
        **_overview(inspection, anchors),
    )


def render_template(name: str, styles: Sequence[str], **values: Any) -> str:
    """A page of this package as HTML. Every text is escaped; numbers have minus signs instead of hyphens."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "inked": inked,
        "breaks_line": breaks_line,
        "typographic": typographic,
        "plain": lambda *number: typographic(plain(*number)),
        "signed": lambda *number: typographic(signed(*number)),
    }
    return environment.from_string(read_part(name)).render(style=Markup().join(map(read_part, styles)), **values)


def read_part(name: str) -> Markup:
    """A template, style or script, by its path in the package; its text is not escaped."""
    return Markup((files("lowlevel") / name).read_text(encoding="utf-8"))  # noqa: S704 - a file of this package


@dataclass(frozen=True)
class Mode:
    """A way to colour the tokens; `scale` is the value with the full colour."""

    name: str
    label: str
    meaning: str
    kind: str  # "both", "up" or "down": the colours that it has
    scale: float


KINDS = {"surprise": "down", "entropy": "up"}
OWN_WORDS = {"surprise": "−log-probability of the token, in nats", "ratio": "logarithm of r = π / sampler"}


def shades(text: Text, view: View) -> dict[str, Tensor]:
    """What the tokens of a text are coloured by, (n,) each: above 0 blue, below 0 orange."""
    found = {name: text.columns[name] for name in view.colours if name in text.columns}
    found |= {"ratio": found["ratio"].log()} if "ratio" in found else {}
    if text.predicted is not None:
        found |= {"surprise": next(iter(text.columns.values())), "entropy": text.columns["entropy"]}
    return found


def colour_modes(inspection: Inspection) -> list[Mode]:
    """The ways to colour the tokens of a page; one scale for all of them."""
    view, modes = inspection.view, []
    parts = [shades(text, view) for x in inspection.examples for text in x.texts]
    words = {**view.words, **OWN_WORDS}
    for name in parts[0]:
        sizes = torch.cat([part[name].double().abs() for part in parts]).nan_to_num().sort().values
        scale = float(sizes[min(len(sizes) - 1, int(FULL * len(sizes)))]) if len(sizes) else 0.0
        label = f"adds to the {view.sums}" if name == "adds" else name
        modes.append(Mode(name, label, words[name], KINDS.get(name, "both"), scale or 1.0))
    return modes


@dataclass(frozen=True)
class TokenView:
    """One token of a heat map."""

    text: str
    tip: str = ""  # lines of "label, tab, value"
    style: str = ""  # CSS: its value in each mode, in [-1, 1]; empty if the token is not scored
    height: float = 0.0  # the chart's y after the token
    marked: bool = False


def _article(example: Example, anchor: str, inspection: Inspection, modes: Sequence[Mode]) -> Mapping[str, Any]:
    """What the page shows of an example; `spans`: name of each text, and its width and start in the chart."""
    pieces, view = inspection.pieces, inspection.view
    chart, sizes = stair(example.running(view.adds).tolist()), [len(text.scored) for text in example.texts]
    heights, total = iter(chart.heights), max(1, sum(sizes))
    return {
        "example": example,
        "anchor": anchor,
        "prompt": pieces.decode(example.prompt_ids).strip() * (example.texts[0].start > 0),
        "facts": facts_of(example, view),
        "chart": chart,
        "maps": [_heat_map(text, inspection, modes, list(islice(heights, n)))
                 for text, n in zip(example.texts, sizes, strict=True)],
        "others": [_heat_map(text, inspection, modes, [0.0] * len(text.scored)) for text in example.others],
        "steps": steps_of(example),
        "spans": [(text.name, 100 * n / total, 100 * sum(sizes[:i]) / total)
                  for i, (text, n) in enumerate(zip(example.texts, sizes, strict=True))],
        "fall": fall_line(example, pieces),
    }  # fmt: skip


def _heat_map(text: Text, inspection: Inspection, modes: Sequence[Mode], heights: Sequence[float]) -> Mapping[str, Any]:
    pieces, view = inspection.pieces, inspection.view
    lines, marks = token_lines(text, pieces), [c for c in text.columns.values() if c.dtype == torch.bool]
    colours = shades(text, view)
    strengths = [(colours[one.name] / one.scale).clamp(-1, 1).nan_to_num().tolist() for one in modes if colours]
    tokens = [TokenView(piece) for piece in pieces.texts(text.ids)]
    for i, (place, line) in enumerate(zip(text.scored.tolist(), lines, strict=True)):
        numbers = [f"{name}\t{typographic(number)}" for name, number in line.numbers.items() if number]
        others = [f"{'instead' if j == 0 else ''}\t{other}" for j, other in enumerate(line.others)]
        css = ";".join(f"--m{number}:{values[i]:.3g}" for number, values in enumerate(strengths))
        tip, marked = "\n".join([line.token, *numbers, *others]), any(bool(column[i]) for column in marks)
        tokens[place] = TokenView(line.token, tip, css, heights[i], marked)
    return {"text": text, "summary": summary(text), "tokens": tokens, "lines": lines}


def _overview(inspection: Inspection, anchors: Sequence[str]) -> Mapping[str, Any]:
    """The batch: a line for each example or text, and the histogram of what is drawn of them."""
    view = inspection.view
    headings, lines = batch_table(inspection, view.facts)
    largest = max(abs(line.measure) for line in lines) or 1.0
    losses = [loss for x in inspection.examples for text in x.texts for loss in text.columns[view.adds].tolist()]
    return {
        "headings": headings,
        "batch": [
            {"line": line, "width": abs(line.measure) / largest,
             "anchor": anchors[line.example] + (f"-text-{line.text}" if line.text else "")}
            for line in lines
        ],
        "histogram": histogram([line.measure for line in lines]) if view.caption else None,
        "bands": [] if view.caption else loss_bands(losses),
    }  # fmt: skip


def inked(text: str) -> Markup:
    """Escaped text of a token, with its signs for whitespace greyed out."""
    marked = escape(text)
    for sign in VISIBLE.values():
        marked = marked.replace(sign, Markup("<i>{}</i>").format(sign))
    return marked
