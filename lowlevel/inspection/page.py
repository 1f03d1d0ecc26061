"""An inspection as one HTML file that needs no network: heat maps, cumulative sums, and an overview of the batch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from lowlevel.durable import given_file
from lowlevel.errors import ConfigError
from lowlevel.inspection.charts import histogram, loss_bands
from lowlevel.inspection.inspection import Inspection
from lowlevel.inspection.kto_and_reward import LabelledRecord
from lowlevel.inspection.pieces import VISIBLE, breaks_line
from lowlevel.inspection.reading import formula, percent, plain, signed, source, sum_name, typographic, weight_name
from lowlevel.inspection.records import PairRecord
from lowlevel.inspection.view import compared_article, scales, sequence_article

Mode = tuple[str, str, str, str, str]  # a way to colour the tokens: key, label, meaning, and both ends of its scale

NO_PAGE = "--html: a page shows tokens, and a reward model reads one of each completion: leave it out"
PAIRS_CAPTION = (
    "Margins of {} pairs, one square per pair. Blue: the policy prefers the chosen completion more than the reference "
    "does; orange: less."
)
LABELLED_CAPTION = (
    "Rewards of {} completions, one square each. Blue: likelier than under the reference; orange: less likely."
)


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page. A file is replaced atomically; the target of a link is replaced; a pipe is written to.

    Raises ConfigError: the file cannot be written.
    """
    page = render_page(inspection)
    try:
        with given_file(path) as target:
            target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: {error.strerror}") from None


def render_page(inspection: Inspection) -> str:
    """The page as HTML; its policy forbids all scripts but its own."""
    if inspection.rewards:
        raise ConfigError(NO_PAGE)
    script, spec = read_part("inspection/page.js"), inspection.method.spec
    view = _sequences_view if inspection.sequences else _compared_view
    return render_template(
        "inspection/page.html",
        ["inspection/page.css"],
        inspection=inspection,
        script=script,
        formula=f"Σ {formula(spec)}" if inspection.sequences and not spec.own else formula(spec),
        paper=source(spec),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **view(inspection),
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


def _compared_view(inspection: Inspection) -> Mapping[str, Any]:
    """Of pairs, or of labelled completions."""
    records: Sequence[PairRecord | LabelledRecord] = inspection.pairs or inspection.labelled
    name = inspection.method.spec.name
    sides = [side for record in records for _, side, _ in record.sides]
    scale = scales([side.tokens for side in sides], [side.contributions for side in sides])
    sums, measure, weight, caption, of_pairs = sum_name(name), "reward", signed, LABELLED_CAPTION, ""
    if inspection.pairs:
        measure, weight, caption, of_pairs = "margin", plain, PAIRS_CAPTION, ", negated for the rejected"
    adds = f"β · log-ratio{' / n' * (sums == 'averaged margin')} of each token{of_pairs}"
    end = typographic(f"{scale['contribution']:.2g}")
    values = [float(record.margin) for record in inspection.pairs]
    values += [float(record.completion.reward) for record in inspection.labelled]
    return {
        "modes": [("contribution", f"adds to the {sums}", adds, f"≤ −{end}", f"≥ +{end}"), *_modes(scale)],
        "articles": [compared_article(r, inspection.method, inspection.pieces, scale) for r in records],
        "histogram": histogram(values),
        "batch": [
            {"row": record.row, "margin": value, "width": abs(value) / (max(map(abs, values)) or 1.0),
             "weight": typographic(weight(float(record.sides[0][1].weight))), "loss": plain(float(record.loss))}
            for record, value in zip(records, values, strict=True)
        ],
        "weight_name": weight_name(name),
        "measure": measure,
        "caption": caption.format(len(records)),
        "bands": [],
    }  # fmt: skip


def _sequences_view(inspection: Inspection) -> Mapping[str, Any]:
    records = inspection.sequences
    scale = scales([record.tokens for record in records], [])
    total = inspection.loss * inspection.count
    largest = max(abs(float(record.loss)) for record in records) or 1.0
    return {
        "modes": _modes(scale),
        "articles": [sequence_article(r, inspection.pieces, scale, total) for r in records],
        "histogram": None,
        "batch": [
            {"row": r.row, "tokens": len(r.tokens), "loss": plain(float(r.loss)), "width": abs(float(r.loss)) / largest,
             "mean": plain(float(r.loss) / max(1, len(r.tokens))), "share": percent(float(r.loss) / (total or 1.0))}
            for r in records
        ],
        "bands": loss_bands([loss for record in records for loss in record.token_losses.tolist()]),
    }  # fmt: skip


def _modes(scale: Mapping[str, float]) -> list[Mode]:
    return [
        ("loss", "surprise", "−log-probability of the token, in nats", "0", f"≥ {scale['loss']:.2g}"),
        ("entropy", "entropy", "entropy of the prediction, in nats", "0", f"≥ {scale['entropy']:.2g}"),
    ]


def inked(text: str) -> Markup:
    """Escaped text of a token, with its signs for whitespace greyed out."""
    marked = escape(text)
    for sign in VISIBLE.values():
        marked = marked.replace(sign, Markup("<i>{}</i>").format(sign))
    return marked
