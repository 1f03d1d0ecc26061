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
from lowlevel.inspection.figures import percent, plain, signed, typographic
from lowlevel.inspection.inspection import Inspection
from lowlevel.inspection.pieces import VISIBLE, breaks_line
from lowlevel.inspection.reading import formula, source, sum_name, weight_name
from lowlevel.inspection.view import labelled_article, pair_article, scales, sequence_article
from lowlevel.methods import KTO

Mode = tuple[str, str, str, str, str]  # a way to colour the tokens: key, label, meaning, and both ends of its scale

NO_PAGE = "--html: a page shows tokens, and a reward model reads one of each completion: leave it out"


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page. A file is replaced atomically; the target of a link is replaced; a pipe is written to.

    Raises:
        ConfigError: the file cannot be written.
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
    view = _sequences_view if inspection.sequences else _pairs_view if inspection.pairs else _labelled_view
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


def _pairs_view(inspection: Inspection) -> Mapping[str, Any]:
    pairs, loss_type = inspection.pairs, inspection.method.spec.name
    sides = [side for record in pairs for side in (record.chosen, record.rejected)]
    scale = scales([side.tokens for side in sides], [side.contributions for side in sides])
    sums = sum_name(loss_type)
    adds = f"β · log-ratio{'' if sums == 'margin' else ' / n'} of each token, negated for the rejected"
    end = typographic(f"{scale['contribution']:.2g}")
    contribution = ("contribution", f"adds to the {sums}", adds, f"≤ −{end}", f"≥ +{end}")
    margins = [float(record.margin) for record in pairs]
    return {
        "modes": [contribution, *_modes(scale)],
        "articles": [pair_article(r, inspection.method, inspection.pieces, scale) for r in pairs],
        "histogram": histogram(margins),
        "batch": [
            {"row": record.row, "margin": margin, "width": abs(margin) / (max(map(abs, margins)) or 1.0),
             "weight": plain(float(record.chosen.weight)), "loss": plain(float(record.loss))}
            for record, margin in zip(pairs, margins, strict=True)
        ],
        "weight_name": weight_name(loss_type),
        "measure": "margin",
        "caption": f"Margins of {len(pairs)} pairs, one square per pair. Blue: the policy prefers the chosen "
                   "completion more than the reference does; orange: less.",
        "bands": [],
    }  # fmt: skip


def _labelled_view(inspection: Inspection) -> Mapping[str, Any]:
    records, method = inspection.labelled, inspection.method
    assert isinstance(method, KTO)
    scale = scales([r.completion.tokens for r in records], [r.completion.contributions for r in records])
    end = typographic(f"{scale['contribution']:.2g}")
    adds = "β · log-ratio of each token"
    rewards = [float(record.completion.reward) for record in records]
    return {
        "modes": [("contribution", "adds to the reward", adds, f"≤ −{end}", f"≥ +{end}"), *_modes(scale)],
        "articles": [labelled_article(record, method, inspection.pieces, scale) for record in records],
        "histogram": histogram(rewards),
        "batch": [
            {"row": record.row, "margin": reward, "width": abs(reward) / (max(map(abs, rewards)) or 1.0),
             "weight": signed(float(record.completion.weight)), "loss": plain(float(record.loss))}
            for record, reward in zip(records, rewards, strict=True)
        ],
        "weight_name": "weight, below 0 if undesirable",
        "measure": "reward",
        "caption": f"Rewards of {len(records)} completions, one square each. Blue: likelier than under the reference; "
                   "orange: less likely.",
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
