"""What a terminal shows: every number once, in its column, whatever the tokens hold."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from samples import HOSTILE, inspection_of_chats, inspection_of_pairs, pairs

from lowlevel.inspection.terminal import print_inspection


def said(inspection, width: int = 200, **keys) -> str:
    stream = io.StringIO()
    print_inspection(inspection, Console(file=stream, width=width, highlight=False), **keys)
    return stream.getvalue()


def rows_of(text: str, tokens: int) -> list[list[str]]:
    """The first lines of the first table."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip(" ─") == "" and "─" in line)
    return [line.split() for line in lines[start + 1 : start + 1 + tokens]]


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(policy, pieces, width):
    for inspection in (inspection_of_chats(policy, pieces), inspection_of_pairs(policy, pieces)):
        for line in said(inspection, width).splitlines():
            assert cell_len(line) <= width
        assert "…" not in said(inspection, 200)


@pytest.mark.parametrize("width", [80, 200])
def test_the_columns_of_a_pair(policy, pieces, width):
    inspection = inspection_of_pairs(policy, pieces, [pairs()[2]])
    (record,), text = inspection.examples, said(inspection, width)
    chosen, rejected = text.split("rejected: ")
    running = record.running("adds").tolist()
    for part, side, sums in (
        (chosen, record.texts[0], running[: len(record.texts[0].scored)]),
        (rejected, record.texts[1], running[len(record.texts[0].scored) :]),
    ):
        rows = rows_of(part, len(side.scored))
        assert len(rows) == len(side.scored)
        for i, row in enumerate(rows):
            numbers = [float(cell) for cell in row[2:7]]
            exact = (side.columns["policy"], side.columns["reference"], side.columns["log-ratio"], side.columns["adds"])
            assert numbers == pytest.approx([*(float(values[i]) for values in exact), sums[i]], abs=6e-5)
            if width < 110:
                continue
            assert row[7] == f"{100 * float(side.columns['policy'][i].exp()):.1f}%" or float(row[7].strip("<%")) < 1
            assert row[8] == str(int(side.columns["rank"][i]))
    assert "x = chosen − rejected reward" in text and f"{float(record.numbers['margin']):.5f}" in text
    assert f"{float(record.loss):.5f}" in text and f"{float(record.values('weight')[0]):.5f}" in text


@pytest.mark.parametrize("width", [80, 200])
def test_the_columns_of_a_conversation(policy, pieces, width):
    inspection = inspection_of_chats(policy, pieces)
    text = said(inspection, width)
    assert text.splitlines()[0] == f"<i>run</i>, step 3: 3 examples, {inspection.count} learned tokens, cross_entropy"
    record = inspection.examples[0]
    part = text.split(f"row {record.row}  ")[1]
    for i, row in enumerate(rows_of(part, len(record.texts[0].scored) - len(HOSTILE))):  # hostile ones hold spaces
        assert float(row[2]) == pytest.approx(float(record.texts[0].columns["logp"][i]), abs=6e-5)
        assert float(row[3]) == pytest.approx(-float(row[2]))
        assert row[5] == str(int(record.texts[0].columns["rank"][i]))
        assert float(row[6]) == pytest.approx(float(record.texts[0].columns["entropy"][i]), abs=6e-3)
        assert float(row[7].strip("%")) == pytest.approx(100 * float(record.texts[0].columns["share"][i]), abs=6e-2)


def test_tokens_are_text_and_not_markup(policy, pieces):
    text = said(inspection_of_pairs(policy, pieces))
    for token in HOSTILE:
        assert re.search(rf"^ ?\d+ +{re.escape(token.replace(' ', '·'))} ", text, re.MULTILINE), token
    assert "<script>document.title='bad'</script>" in text
    assert "<b>3</b>" in text and "<i>run</i>, step 3" in text


def test_the_table_of_the_batch(policy, pieces):
    inspection = inspection_of_pairs(policy, pieces)
    text = said(inspection, details=False)
    assert "reference" not in text
    for record in inspection.examples:
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{record.row} "))
        row, plus, minus, chosen, rejected, margin, weight, loss, *_ = line.split()
        assert (int(plus), int(minus)) == (len(record.texts[0].scored), len(record.texts[1].scored))
        exact = (
            record.texts[0].numbers["reward"],
            record.texts[1].numbers["reward"],
            record.numbers["margin"],
            record.values("weight")[0],
            record.loss,
        )
        assert [float(x) for x in (chosen, rejected, margin, weight, loss)] == pytest.approx(
            [float(value) for value in exact], abs=6e-5
        )


@pytest.mark.parametrize("name", ["bco_pair", "aot"])
def test_a_loss_that_reads_both_has_two_weights(policy, pieces, name):
    inspection = inspection_of_pairs(policy, pieces, loss_type=name)
    text = said(inspection, details=False)
    assert "weight+" in text and "weight-" in text
    for record in inspection.examples:
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{record.row} "))
        weights = [float(cell) for cell in line.split()[6:8]]
        assert weights == pytest.approx(
            [float(record.values("weight")[0]), float(record.values("weight")[-1])], abs=6e-5
        )


@pytest.mark.parametrize(("name", "of"), [("ipo", "−dL/d(averaged margin)"), ("sigmoid", "σ(−x)")])
def test_the_table_of_the_batch_says_what_its_weight_is_of(policy, pieces, name, of):
    text = " ".join(said(inspection_of_pairs(policy, pieces, loss_type=name), 80, details=False).split())
    assert f"weight: {of}; loss: " in text


def test_a_loss_of_averages_says_so(policy, pieces):
    text = said(inspection_of_pairs(policy, pieces, loss_type="ipo", beta=0.3))
    assert "what it adds to the averaged margin: β · log-ratio / n; − for the rejected" in " ".join(text.split())
    assert "(a/n₊ − b/n₋ − 1/(2 β))²" in text and "arXiv 2310.12036 eq 17" in text


def test_a_long_prompt_is_cut(policy, pieces):
    example = pairs()[1]
    long = example.__class__(1, "rows:1", [65] * 150 + [66] * 50, example.chosen_ids, example.rejected_ids)
    text = said(inspection_of_pairs(policy, pieces, [long]))
    assert "…" not in text  # 200 characters
    assert pieces.decode([66] * 50) in text.replace("\n", "")
