"""The page: complete, escaped, and alone; that it works is for test_browser.py."""

import base64
import errno
import hashlib
import os
import re
from html.parser import HTMLParser

import pytest
from samples import HOSTILE, hostile_pairs, inspection_of_chats, inspection_of_pairs

from lowlevel.inspection.page import render_page, write_page

VOID = {"meta", "link", "input", "br", "wbr", "path"}


class Page(HTMLParser):
    """Elements with their attributes and their text; open and close tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        assert len(attributes) == len(dict(attributes))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def of(self, tag: str, kind: str = "") -> list[dict]:
        return [e for e in self.elements if e["tag"] == tag and (not kind or kind in (e.get("class") or "").split())]


@pytest.fixture(params=["pairs", "averages", "both", "chats"])
def inspection(request, policy, pieces):
    if request.param == "chats":
        return inspection_of_chats(policy, pieces)
    names = {"pairs": "sigmoid", "averages": "sigmoid_norm", "both": "dpop"}
    return inspection_of_pairs(policy, pieces, loss_type=names[request.param])


@pytest.mark.parametrize(
    ("name", "weights", "formula"),
    [
        ("sigmoid", 1, "σ(−x)"),
        ("ipo", 1, "−dL/d(averaged margin)"),
        ("bco_pair", 2, "−dL/d(reward), its negative if rejected"),
    ],
)
def test_a_weight_says_what_it_is_of(policy, pieces, name, weights, formula):
    page = Page(render_page(inspection_of_pairs(policy, pieces, loss_type=name)))
    headings = [cell["text"] for cell in page.of("th") if cell["text"].startswith("weight")]
    assert headings[:weights] == (["weight"] if weights == 1 else ["weight+", "weight-"])
    assert headings[weights] == f"weight {formula}" and f"weight: {formula}" in page.of("figcaption")[0]["text"]


def test_every_text_is_escaped(inspection):
    text = render_page(inspection)
    page = Page(text)
    assert len(page.of("script")) == 1 and len(page.of("style")) == 1
    assert not page.of("img") and not page.of("red") and all(not e["text"] for e in page.of("b"))
    assert not [e for e in page.elements if any(key.startswith("on") for key in e)]
    assert HOSTILE[0] not in text and HOSTILE[1] not in text
    assert page.of("h1")[0]["text"].startswith("<i>run</i>")
    shown = "".join(e["text"] for e in page.of("p", "heat"))
    for token in HOSTILE:
        assert token.replace(" ", "·") in shown
    assert "49" not in re.sub(r"\d\.\d+", "", "".join(e["text"] for e in page.of("h2")))  # {{ 7 * 7 }}


def test_nothing_comes_from_elsewhere(inspection):
    text = render_page(inspection)
    page = Page(text)
    for element in page.elements:
        for key in ("href", "src", "srcset", "action", "poster", "data"):
            assert (element.get(key) or "#").startswith(("#", "data:,")), element
    assert not re.search(r"https?://|url\(|@import", text)
    (policy,) = (e["content"] for e in page.of("meta") if e.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.of("script")[0]["text"].encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:")


def test_links_lead_to_examples(inspection):
    page = Page(render_page(inspection))
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids))
    links = [e["href"].removeprefix("#") for e in page.of("a")]
    assert set(links) <= set(ids)
    records = inspection.examples
    assert [e["id"] for e in page.of("article")] == [f"row-{record.row}" for record in records]
    for record in records:
        assert links.count(f"row-{record.row}") >= 2


def test_every_token_has_its_values(policy, pieces):
    inspection = inspection_of_pairs(policy, pieces)
    page = Page(render_page(inspection))
    tokens = iter(page.of("span", "tok"))
    for record in inspection.examples:
        running = iter(record.running("adds").tolist())
        for side in record.texts:
            for i, token in enumerate(side.token_ids.tolist()):
                shown, adds = next(tokens), float(side.columns["adds"][i])
                title, *lines = shown["data-tip"].split("\n")
                values = dict(line.split("\t") for line in lines if not line.startswith("\t"))
                assert title == pieces.text(token) == shown["text"]
                read = {key: float(values[key].replace("−", "-")) for key in ("policy", "reference", "adds", "sum")}
                assert read["policy"] == pytest.approx(float(side.columns["policy"][i]), abs=6e-5)
                assert read["reference"] == pytest.approx(float(side.columns["reference"][i]), abs=6e-5)
                assert read["adds"] == pytest.approx(adds, abs=6e-5)
                assert read["sum"] == pytest.approx(next(running), abs=6e-5)
                assert values["rank"] == str(int(side.columns["rank"][i]))
                assert len([line for line in lines if line.startswith(("instead\t", "\t"))]) == 3
    assert next(tokens, None) is None


def test_colours_grow_with_the_contribution(policy, pieces):
    inspection = inspection_of_pairs(policy, pieces)
    page = Page(render_page(inspection))
    sides = [side for record in inspection.examples for side in record.texts]
    adds = [float(c) for side in sides for c in side.columns["adds"]]
    full = sorted(map(abs, adds))[int(0.98 * len(adds))]
    shown = [float(re.search(r"--m0:([-\d.e]+)", e["style"])[1]) for e in page.of("span", "tok")]
    assert shown == pytest.approx([max(-1.0, min(1.0, one / full)) for one in adds], abs=1e-3)


def test_a_conversation_is_shown_whole(policy, pieces):
    inspection = inspection_of_chats(policy, pieces)
    page = Page(render_page(inspection))
    for heat, record in zip(page.of("p", "heat"), inspection.examples, strict=True):
        assert heat["text"] == "".join(pieces.texts(record.texts[0].ids))
    assert len(page.of("span", "tok")) == inspection.count
    assert len(page.of("span", "context")) == sum(len(r.texts[0].ids) for r in inspection.examples) - inspection.count


def test_the_chart_ends_at_the_margin(policy, pieces):
    inspection = inspection_of_pairs(policy, pieces)
    last = [e for e in Page(render_page(inspection)).of("span", "last")]
    for element, record in zip(last, inspection.examples, strict=True):
        assert float(element["text"].replace("−", "-")) == pytest.approx(
            float(record.numbers["margin"]), rel=6e-3, abs=1e-6
        )


def test_the_histogram_holds_every_pair(policy, pieces):
    inspection = inspection_of_pairs(policy, pieces)
    units = Page(render_page(inspection)).of("a", "unit")
    assert len(units) == len(inspection.examples)
    for record in inspection.examples:
        (unit,) = (e for e in units if e["href"] == f"#row-{record.row}")
        assert ("up" in unit["class"]) == (float(record.numbers["margin"]) > 0)


def test_a_single_row_has_no_batch(policy, pieces):
    page = Page(render_page(inspection_of_pairs(policy, pieces, hostile_pairs()[:1])))
    assert not page.of("a", "unit") and not page.of("section", "batch") and len(page.of("article")) == 1


def test_a_page_is_replaced_whole_or_not_at_all(policy, pieces, tmp_path, monkeypatch):
    inspection, path = inspection_of_chats(policy, pieces), tmp_path / "page.html"
    path.write_text("old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write_page(inspection, path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "old")]
    write_page(inspection, path)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"] and path.read_text() == render_page(inspection)
