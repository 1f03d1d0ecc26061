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
    (record,), text = inspection.pairs, said(inspection, width)
    chosen, rejected = text.split("rejected: each token adds -beta x log-ratio to the margin")
    running = record.running_sums.tolist()
    for part, side, sums in (
        (chosen, record.chosen, running[: len(record.chosen.tokens)]),
        (rejected, record.rejected, running[len(record.chosen.tokens) :]),
    ):
        rows = rows_of(part, len(side.tokens))
        assert len(rows) == len(side.tokens)
        for i, row in enumerate(rows):
            numbers = [float(cell) for cell in row[2:7]]
            exact = (side.tokens.logps, side.ref_token_logps, side.token_logratios, side.contributions)
            assert numbers == pytest.approx([*(float(values[i]) for values in exact), sums[i]], abs=6e-5)
            if width < 110:
                continue
            assert row[7] == f"{100 * float(side.tokens.logps[i].exp()):.1f}%" or float(row[7].strip("<%")) < 1
            assert row[8] == str(int(side.tokens.predicted.ranks[i]))
    assert "margin x" in text and f"{float(record.margin):.5f}" in text
    assert f"{float(record.loss):.5f}" in text and f"{float(record.chosen.weight):.5f}" in text


@pytest.mark.parametrize("width", [80, 200])
def test_the_columns_of_a_conversation(policy, pieces, width):
    inspection = inspection_of_chats(policy, pieces)
    text = said(inspection, width)
    assert text.splitlines()[0] == f"<i>run</i>, step 3: 3 examples, {inspection.count} learned tokens, cross_entropy"
    record = inspection.sequences[0]
    part = text.split(f"row {record.row}  ")[1]
    for i, row in enumerate(rows_of(part, len(record.tokens) - len(HOSTILE))):  # hostile ones hold spaces
        assert float(row[2]) == pytest.approx(float(record.tokens.logps[i]), abs=6e-5)
        assert row[4] == str(int(record.tokens.predicted.ranks[i]))
        assert float(row[5]) == pytest.approx(float(record.tokens.predicted.entropies[i]), abs=6e-3)
        assert float(row[6].strip("%")) == pytest.approx(100 * float(record.shares[i]), abs=6e-2)


def test_tokens_are_text_and_not_markup(policy, pieces):
    text = said(inspection_of_pairs(policy, pieces))
    for token in HOSTILE:
        assert re.search(rf"^ ?\d+ +{re.escape(token.replace(' ', '·'))} ", text, re.MULTILINE), token
    assert "<script>document.title='bad'</script>" in text
    assert "<b>3</b>" in text and "<i>run</i>, step 3" in text


def test_the_table_of_the_batch(policy, pieces):
    inspection = inspection_of_pairs(policy, pieces)
    text = said(inspection, details=False)
    assert "log-ratio" not in text
    for record in inspection.pairs:
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{record.row} "))
        row, plus, minus, chosen, rejected, margin, weight, loss = line.split()
        assert (int(plus), int(minus)) == (len(record.chosen.tokens), len(record.rejected.tokens))
        exact = (record.chosen.reward, record.rejected.reward, record.margin, record.chosen.weight, record.loss)
        assert [float(x) for x in (chosen, rejected, margin, weight, loss)] == pytest.approx(
            [float(value) for value in exact], abs=6e-5
        )


@pytest.mark.parametrize("name", ["bco_pair", "aot"])
def test_a_loss_that_reads_both_has_two_weights(policy, pieces, name):
    inspection = inspection_of_pairs(policy, pieces, loss_type=name)
    text = said(inspection, details=False)
    assert "weight+" in text and "weight-" in text
    for record in inspection.pairs:
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{record.row} "))
        weights = [float(cell) for cell in line.split()[6:8]]
        assert weights == pytest.approx([float(record.chosen.weight), float(record.rejected.weight)], abs=6e-5)


@pytest.mark.parametrize(("name", "says"), [("ipo", True), ("sigmoid", False), ("bco_pair", False)])
def test_the_table_of_the_batch_says_what_its_weight_is_of(policy, pieces, name, says):
    text = said(inspection_of_pairs(policy, pieces, loss_type=name), 80, details=False)
    assert ("weight: of the averaged margin" in text) == says


def test_a_loss_of_averages_says_so(policy, pieces):
    text = said(inspection_of_pairs(policy, pieces, loss_type="ipo", beta=0.3))
    assert "each token adds beta x log-ratio / n to the averaged margin" in text
    assert "(a/n₊ − b/n₋ − 1/(2 β))²" in text and "arXiv 2310.12036 eq 17" in text


def test_a_long_prompt_is_cut(policy, pieces):
    example = pairs()[1]
    long = example.__class__(1, "rows:1", [65] * 150 + [66] * 50, example.chosen_ids, example.rejected_ids)
    text = said(inspection_of_pairs(policy, pieces, [long]))
    assert "…" not in text  # 200 characters
    assert pieces.decode([66] * 50) in text.replace("\n", "")
