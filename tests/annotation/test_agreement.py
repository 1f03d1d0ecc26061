"""Agreement and intervals against published examples and values worked out by hand."""

import pytest

from lowlevel.annotation.agreement import cohens_kappa, krippendorffs_alpha, report, wilson
from lowlevel.annotation.pairs import reply_on_left


def test_cohens_kappa_of_50_grant_proposals():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5, so 0.2 / 0.5."""
    labels = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohens_kappa(labels) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("labels", "kappa"),
    [([("a", "b"), ("b", "a")], -1.0), ([("a", "a"), ("b", "b")], 1.0), ([("a", "a")] * 3, None), ([], None)],
)
def test_kappa_at_its_ends(labels, kappa):
    assert cohens_kappa(labels) == kappa


@pytest.mark.parametrize(
    ("observers", "alpha"),
    [
        (["123321412---", "1233224125-3", "-3332342251-", "12332441251-"], 0.743),
        (["-----34121133-3", "1-213343-------", "--21344-21133-4"], 0.691),
    ],
    ids=["Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), C", "Wikipedia, Krippendorff's alpha"],
)
def test_published_examples_with_missing_labels(observers, alpha):
    units = [[label for label in unit if label != "-"] for unit in zip(*observers, strict=True)]
    assert krippendorffs_alpha(units) == pytest.approx(alpha, abs=5e-4)


def test_alpha_by_hand():
    """aa, ab, bb: of 6 labels 3 a, so by chance 1 - 0.4 = 3/5 are unequal; observed 1/3: 1 - 5/9."""
    assert krippendorffs_alpha(["aa", "ab", "bb", "a", ""]) == pytest.approx(4 / 9)
    assert krippendorffs_alpha(["aa", "aaa"]) is None
    assert krippendorffs_alpha(["a", "b"]) is None


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(5, 10, 0.23659, 0.76341), (0, 10, 0, 0.27753), (10, 10, 0.72247, 1), (81, 263, 0.25525, 0.36619), (0, 0, 0, 1)],
)
def test_wilsons_interval(successes, trials, low, high):
    """81 of 263: Newcombe, Statistics in Medicine 17 (1998), table I, 0.2553 to 0.3662."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_sides_are_drawn_for_each_annotator_and_reproducible():
    sides = [[reply_on_left(3, pair, name) for pair in range(2000)] for name in ("ada", "bo", "ada")]
    assert sides[0] == sides[2]
    for name in sides[:2]:
        assert sum(name) == pytest.approx(1000, abs=100)  # 4.5 standard deviations
    assert sum(a == b for a, b in zip(*sides[:2], strict=True)) == pytest.approx(1000, abs=100)
    assert [reply_on_left(4, pair, "ada") for pair in range(2000)] != sides[0]


def side(journal, name: str, pair: int, reply: int) -> str:
    return "left" if journal.left(name, pair) == reply else "right"


def test_the_report_of_two_annotators(journal_of):
    """Of 4 pairs both prefer the same reply once (0 and 0), differ once (1 and 0), agree on a tie, differ on bad.

    Labels: 00, 10, tt, 0b: observed 2/4, by chance (2 * 2 + 1 * 0 + 1 * 1) / 16 = 5/16, so (8 - 5) / (16 - 5) = 3/11.
    Pairs with decisions: 0 (1), 1 (1/2), 3 (1): 2.5 of 3.
    """
    with journal_of() as journal:
        for name, choices in (("ada", [0, 1, "tie", 0]), ("bo", [0, 0, "tie", "bad"])):
            for pair, choice in enumerate(choices):
                chosen = choice if isinstance(choice, str) else side(journal, name, pair, choice)
                journal.judge(name, pair, chosen, "better" if pair == 2 else None)
        text = report(journal)
    assert "4 pairs, 8 judgements by ada (4), bo (4)" in text
    assert "ties 2, both bad 1; 2 better replies written" in text
    assert "Cohen's kappa 0.273; 2 of 4 pairs" in text
    assert "win rate: out/a over out/b 83.3% of 3 pairs" in text
    left = sum(one.choice == "left" for one in journal.judgements.values())
    low, high = wilson(left, 5)
    assert f"left chosen {left / 5:.1%} of 5 decisions (95 % interval {low:.1%} to {high:.1%})" in text


def test_the_report_of_three_annotators_and_of_none(journal_of):
    with journal_of() as journal:
        assert report(journal) == "4 pairs, 0 judgements"
        for name, choices in (("a", "tt"), ("b", "tb"), ("c", "bb")):
            for pair, choice in enumerate(choices):
                journal.judge(name, pair, {"t": "tie", "b": "bad"}[choice], None)
        text = report(journal)
    assert "Krippendorff's alpha -0.111; 0 of 2 pairs" in text  # ttb, tbb: observed 4/6, by chance 18/30
    assert "left chosen never of 0 decisions" in text
