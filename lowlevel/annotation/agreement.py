"""What the judgements say together: agreement of annotators, influence of the side, and win rates.

Everything here counts replies by number, not by side, except the influence of the side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from lowlevel.annotation.journal import Journal
from lowlevel.annotation.pairs import Judgement
from lowlevel.errors import how_many

Label = str | int


def cohens_kappa(labels: Sequence[tuple[Label, Label]]) -> float | None:
    """Cohen's kappa (1960) of two annotators, from both labels of each unit; None if chance alone gives agreement 1."""
    n = len(labels)
    first, second = (Counter(side) for side in zip(*labels, strict=True)) if labels else (Counter(), Counter())
    expected = sum(first[label] * second[label] for label in first)  # times n squared
    if expected == n * n:
        return None
    observed = sum(a == b for a, b in labels)
    return (n * observed - expected) / (n * n - expected)


def krippendorffs_alpha(units: Iterable[Sequence[Label]]) -> float | None:
    """Krippendorff's alpha for nominal labels, of any number of annotators who may each lack some units.

    A unit with one label counts nothing. None if all labels are equal, or no unit has two.
    Source: Krippendorff, Content Analysis; alpha = 1 - observed / expected disagreement.
    """
    paired = [unit for unit in units if len(unit) > 1]
    n = sum(map(len, paired))
    # ordered pairs of different labels, inside units and among all labels
    expected = _unequal(list(chain.from_iterable(paired)))
    observed = sum(_unequal(unit) / (len(unit) - 1) for unit in paired)
    return 1 - (n - 1) * observed / expected if expected else None


def _unequal(labels: Sequence[Label]) -> int:
    return len(labels) ** 2 - sum(count**2 for count in Counter(labels).values())


def wilson(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) for a share, with 95 % by default; (0, 1) without trials.

    `successes` may be a sum of shares of units in [0, 1]: their variance is at most that of a yes or no.
    """
    if not trials:
        return 0.0, 1.0
    p, spread = successes / trials, z * z / trials
    centre = p + spread / 2
    half = math.sqrt(spread * p * (1 - p) + spread * spread / 4)
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def report(journal: Journal) -> str:
    """The lines that `lowlevel annotate` prints at its end."""
    judged = list(journal.judgements.values())
    names = Counter(one.annotator for one in judged)
    counts = Counter(one.choice for one in judged)
    by = f" by {', '.join(f'{name} ({count})' for name, count in names.items())}" if names else ""
    lines = [f"{how_many(len(journal.pairs), 'pairs')}, {how_many(len(judged), 'judgements')}{by}"]
    if not judged:
        return lines[0]
    written = sum(one.written is not None for one in judged)
    lines.append(
        f"left {counts['left']}, right {counts['right']}, ties {counts['tie']}, both bad {counts['bad']}; "
        f"{how_many(written, 'better replies')} written"
    )
    if len(names) > 1:
        lines.append(_agreement(judged, list(names)))
    decided = counts["left"] + counts["right"]
    share = _share(counts["left"], decided, f"of {decided} decisions")
    lines.append(f"position bias: left chosen {share}; 50 % if the side has no influence")
    runs = [run["run"] for run in journal.header["runs"]]
    if len(runs) == 2:
        shares = _wins(judged)
        won = _share(sum(shares), len(shares), f"of {len(shares)} pairs, ties and both bad left out")
        lines.append(f"win rate: {runs[0]} over {runs[1]} {won}")
    return "\n".join(lines)


def _agreement(judged: Sequence[Judgement], names: Sequence[str]) -> str:
    """Cohen's kappa of two annotators, Krippendorff's alpha of more, on the pairs that at least two have judged."""
    labels: dict[int, dict[str, Label]] = {}
    for one in judged:
        labels.setdefault(one.pair, {})[one.annotator] = one.choice if one.preferred is None else one.preferred
    shared = [unit for unit in labels.values() if len(unit) > 1]
    if len(names) == 2:
        name, value = "Cohen's kappa", cohens_kappa([(unit[names[0]], unit[names[1]]) for unit in shared])
    else:
        name, value = "Krippendorff's alpha", krippendorffs_alpha([list(unit.values()) for unit in shared])
    same = sum(len(set(unit.values())) == 1 for unit in shared)
    shown = "not defined (too few pairs, or one label only)" if value is None else f"{value:.3f}"
    return f"agreement: {name} {shown}; {same} of {len(shared)} pairs that several judged have one label"


def _wins(judged: Sequence[Judgement]) -> list[float]:
    """The first reply's share of the decisions on each pair: a pair counts once, whoever judged it."""
    decisions: dict[int, list[bool]] = {}
    for one in judged:
        if one.preferred is not None:
            decisions.setdefault(one.pair, []).append(one.preferred == 0)
    return [sum(found) / len(found) for found in decisions.values()]


def _share(successes: float, trials: int, what: str) -> str:
    low, high = wilson(successes, trials)
    share = f"{successes / trials:.1%}" if trials else "never"
    return f"{share} {what} (95 % interval {low:.1%} to {high:.1%})"
