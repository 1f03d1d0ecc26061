"""How often A was preferred to B: win rate with ties and both orders, and the same at equal lengths.

A judge tends to prefer longer replies. As in AlpacaEval 2 (Dubois et al., arXiv 2404.04475), the length-controlled win
rate is what a logistic regression predicts for replies of equal length:

    P(A wins) = sigmoid(theta + phi x)      x = tanh(d / std(d)), d = characters of A - of B      rate = sigmoid(theta)

Their regression also has a term for the difficulty of each instruction, fitted over many models; this one has not. As
there, phi has a penalty (phi^2 / 2), or a single long loser would decide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowlevel.evaluation.paired import Difference, mean_by_weight, resampled_items

PENALTY = (1e-3, 1.0)  # of theta, which keeps it finite if A always wins, and of phi
NEWTON_STEPS = 12
RESAMPLES = 1000


@dataclass(frozen=True)
class Verdict:
    """What was decided about a question: the score of A (1 won, 0.5 tie, 0 lost) when A was read first, and second."""

    a_first: float
    b_first: float
    a_characters: int
    b_characters: int


def preferences(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Win rate of A, the length-controlled one, agreement of the two orders and share of the first, with intervals."""
    orders = np.array([(one.a_first, one.b_first) for one in verdicts])
    scores = orders.mean(1)
    differences = np.array([one.a_characters - one.b_characters for one in verdicts], np.float64)
    first = np.stack([orders[:, 0], 1 - orders[:, 1]])  # score of the reply that was read first
    decided = (first != 0.5).astype(float).sum(0)
    rate = length_controlled(scores, differences)
    drawn = [length_controlled(scores[i], differences[i]) for i in resampled_items(len(scores), "judge", RESAMPLES)]
    return {
        "questions": len(scores),
        "won": int((scores > 0.5).sum()),
        "tied": int((scores == 0.5).sum()),
        "lost": int((scores < 0.5).sum()),
        "win_rate": mean_by_weight(scores, np.ones(len(scores)), "judge").as_json(),
        "length_controlled_win_rate": Difference(rate, np.array(drawn)).as_json(),
        "orders_agree": float((orders[:, 0] == orders[:, 1]).mean()),
        "first_wins": float((first * (first != 0.5)).sum() / decided.sum()) if decided.sum() else None,
        "characters": {"a": _mean(verdicts, "a_characters"), "b": _mean(verdicts, "b_characters")},
    }


def length_controlled(scores: np.ndarray, differences: np.ndarray) -> float:
    """sigmoid(theta) of the module's regression on scores (n,) and differences of length (n,), by Newton's method."""
    spread = differences.std()
    inputs = np.stack([np.ones(len(scores)), np.tanh(differences / spread) if spread > 0 else np.zeros(len(scores))])
    weights, penalty = np.zeros(2), np.array(PENALTY)
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(weights @ inputs)))
        slope = inputs @ (p - scores) + penalty * weights
        curvature = (inputs * (p * (1 - p))) @ inputs.T + np.diag(penalty)
        step = np.linalg.solve(curvature, slope)
        weights = weights - step / max(1.0, float(np.abs(step).max()))  # at most 1: far away the curvature vanishes
    return float(1 / (1 + np.exp(-weights[0])))


def _mean(verdicts: Sequence[Verdict], name: str) -> float:
    return sum(getattr(one, name) for one in verdicts) / len(verdicts)
