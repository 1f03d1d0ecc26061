"""Works out `losses.json`: every preference loss and its gradient, in Python floats, from the formulas on paper.

Nothing of the project is imported: `math` alone, and derivatives taken by hand. Run it to write the file anew::

    python tests/references/make_losses.py
"""

import json
from collections.abc import Callable
from math import exp, log, log1p
from pathlib import Path

PATH = Path(__file__).with_name("losses.json")

# Points Z (policy = reference), P (better than it), R (worse), and B, a batch whose order sorting changes.
POINTS: dict[str, dict[str, list[float]]] = {
    "Z": {"chosen": [-10], "rejected": [-12], "ref_chosen": [-10], "ref_rejected": [-12], "n": [4], "m": [5]},
    "P": {"chosen": [-10], "rejected": [-12], "ref_chosen": [-11], "ref_rejected": [-11.5], "n": [4], "m": [5]},
    "R": {"chosen": [-12], "rejected": [-10], "ref_chosen": [-11.5], "ref_rejected": [-11], "n": [4], "m": [5]},
    "B": {
        "chosen": [-10, -12, -9.25],
        "rejected": [-12, -10, -14.5],
        "ref_chosen": [-11, -11.5, -9],
        "ref_rejected": [-11.5, -11, -13],
        "n": [4, 4, 7],
        "m": [5, 5, 3],
    },
}

Triple = tuple[float, float, float]  # loss, dL/da, dL/db


def s(z: float) -> float:
    """Sigmoid."""
    return 1 / (1 + exp(-z)) if z >= 0 else exp(z) / (1 + exp(z))


def ls(z: float) -> float:
    """Log of the sigmoid; its derivative is s(-z)."""
    return -log1p(exp(-z)) if z >= 0 else z - log1p(exp(z))


def of_x(loss: float, slope: float, beta: float) -> Triple:
    """Loss that sees x = beta (a - b) alone: dL/da = beta L'(x) = -dL/db."""
    return loss, beta * slope, -beta * slope


def sigmoid(a: float, b: float, beta: float) -> Triple:
    """-ls(x)."""
    x = beta * (a - b)
    return of_x(-ls(x), -s(-x), beta)


def cdpo(a: float, b: float, beta: float, eps: float) -> Triple:
    """-(1-eps) ls(x) - eps ls(-x); slope eps - s(-x)."""
    x = beta * (a - b)
    return of_x(-(1 - eps) * ls(x) - eps * ls(-x), eps - s(-x), beta)


def robust(a: float, b: float, beta: float, eps: float) -> Triple:
    """(-(1-eps) ls(x) + eps ls(-x)) / (1 - 2 eps); slope -((1-eps) s(-x) + eps s(x)) / (1 - 2 eps)."""
    x = beta * (a - b)
    slope = -((1 - eps) * s(-x) + eps * s(x)) / (1 - 2 * eps)
    return of_x((-(1 - eps) * ls(x) + eps * ls(-x)) / (1 - 2 * eps), slope, beta)


def hinge(a: float, b: float, beta: float) -> Triple:
    """max(0, 1 - x); slope -1 below x = 1."""
    x = beta * (a - b)
    return of_x(max(0.0, 1 - x), -1.0 if x < 1 else 0.0, beta)


def ipo(a: float, b: float, beta: float, n: float, m: float) -> Triple:
    """(a/n - b/m - 1/(2 beta))^2."""
    gap = a / n - b / m - 1 / (2 * beta)
    return gap**2, 2 * gap / n, -2 * gap / m


def ipo_sum(a: float, b: float, beta: float) -> Triple:
    """(a - b - 1/(2 beta))^2."""
    return ipo(a, b, beta, 1, 1)


def exo_pair(a: float, b: float, beta: float, eps: float) -> Triple:
    """KL from (s(x), s(-x)) to (1-eps, eps); slope s(x) s(-x) (x - log((1-eps)/eps)), since ls(x) - ls(-x) = x."""
    x = beta * (a - b)
    loss = s(x) * (ls(x) - log(1 - eps)) + s(-x) * (ls(-x) - log(eps))
    return of_x(loss, s(x) * s(-x) * (x - log((1 - eps) / eps)), beta)


def nca_pair(a: float, b: float, beta: float) -> Triple:
    """-ls(beta a) - ls(-beta a)/2 - ls(-beta b)/2."""
    loss = -ls(beta * a) - ls(-beta * a) / 2 - ls(-beta * b) / 2
    return loss, beta * (-s(-beta * a) + s(beta * a) / 2), beta * s(beta * b) / 2


def bco_pair(a: float, b: float, beta: float) -> Triple:
    """-ls(beta a) - ls(-beta b)."""
    return -ls(beta * a) - ls(-beta * b), -beta * s(-beta * a), beta * s(beta * b)


def sppo_hard(a: float, b: float, beta: float) -> Triple:
    """(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2."""
    c = 1 / (2 * beta)
    return (a - c) ** 2 + (b + c) ** 2, 2 * (a - c), 2 * (b + c)


def apo_zero(a: float, b: float, beta: float) -> Triple:
    """1 - s(beta a) + s(beta b)."""
    u, v = s(beta * a), s(beta * b)
    return 1 - u + v, -beta * u * (1 - u), beta * v * (1 - v)


def apo_down(a: float, b: float, beta: float) -> Triple:
    """s(beta a) + 1 - s(x)."""
    u, w = s(beta * a), s(beta * (a - b))
    return u + 1 - w, beta * (u * (1 - u) - w * (1 - w)), beta * w * (1 - w)


def discopop(a: float, b: float, beta: float, tau: float) -> Triple:
    """-(1-m) ls(x) + m e^-x, m = s(x/tau), m' = m (1-m) / tau; slope m' (ls(x) + e^-x) - (1-m) s(-x) - m e^-x."""
    x = beta * (a - b)
    m, e = s(x / tau), exp(-x)
    slope = m * (1 - m) / tau * (ls(x) + e) - (1 - m) * s(-x) - m * e
    return of_x(-(1 - m) * ls(x) + m * e, slope, beta)


def sigmoid_norm(a: float, b: float, beta: float, n: float, m: float) -> Triple:
    """-ls(beta (a/n - b/m))."""
    x = beta * (a / n - b / m)
    return -ls(x), -beta * s(-x) / n, beta * s(-x) / m


def dpop(a: float, b: float, beta: float, lam: float) -> Triple:
    """-ls(u), u = beta (a - b - lam max(0, -a)); du/da = beta (1 + lam) for a < 0, beta for a >= 0."""
    u = beta * (a - b - lam * max(0.0, -a))
    return -ls(u), -beta * (1 + (lam if a < 0 else 0)) * s(-u), beta * s(-u)


def rpo(a: float, b: float, beta: float, alpha: float, chosen: float, n: float) -> Triple:
    """-ls(x) - alpha logpi(y+) / n."""
    loss, da, db = sigmoid(a, b, beta)
    return loss - alpha * chosen / n, da - alpha / n, db


def order(values: list[float]) -> list[int]:
    """Which element comes first, second, ... in ascending order."""
    return sorted(range(len(values)), key=values.__getitem__)


def sorted_logistic(kind: str, point: dict[str, list[float]], beta: float, eps: float) -> list[list[float]]:
    """AOT: cDPO of matched quantiles. A quantile's slope goes to the pair that holds it: a swap of places, no more."""
    chosen, rejected, ref_chosen, ref_rejected = (
        point[key] for key in ("chosen", "rejected", "ref_chosen", "ref_rejected")
    )
    pairs = range(len(chosen))
    if kind == "aot":
        upper, lower = [chosen[i] - rejected[i] for i in pairs], [ref_chosen[i] - ref_rejected[i] for i in pairs]
    else:
        upper, lower = [chosen[i] - ref_chosen[i] for i in pairs], [rejected[i] - ref_rejected[i] for i in pairs]
    losses, grad_chosen, grad_rejected = [], [0.0 for _ in pairs], [0.0 for _ in pairs]
    for i, j in zip(order(upper), order(lower), strict=True):
        loss, da, db = cdpo(upper[i], lower[j], beta, eps)
        losses.append(loss)
        grad_chosen[i] = da
        grad_rejected[i if kind == "aot" else j] = db  # paired: both policy terms sit in `upper`
    return [losses, grad_chosen, grad_rejected]


# name, parameters, function of (a, b, chosen, n, m); beta = 0.1 throughout, as in the table
BETA = 0.1
FORMULAS: list[tuple[str, dict[str, float], Callable[..., Triple]]] = [
    ("sigmoid", {}, lambda a, b, c, n, m: sigmoid(a, b, BETA)),
    ("cdpo", {"label_smoothing": 0.1}, lambda a, b, c, n, m: cdpo(a, b, BETA, 0.1)),
    ("cdpo", {"label_smoothing": 0.2}, lambda a, b, c, n, m: cdpo(a, b, BETA, 0.2)),
    ("robust", {"label_smoothing": 0.1}, lambda a, b, c, n, m: robust(a, b, BETA, 0.1)),
    ("hinge", {}, lambda a, b, c, n, m: hinge(a, b, BETA)),
    ("ipo", {}, lambda a, b, c, n, m: ipo(a, b, BETA, n, m)),
    ("ipo_sum", {}, lambda a, b, c, n, m: ipo_sum(a, b, BETA)),
    ("exo_pair", {"label_smoothing": 0.001}, lambda a, b, c, n, m: exo_pair(a, b, BETA, 0.001)),
    ("nca_pair", {}, lambda a, b, c, n, m: nca_pair(a, b, BETA)),
    ("bco_pair", {}, lambda a, b, c, n, m: bco_pair(a, b, BETA)),
    ("sppo_hard", {}, lambda a, b, c, n, m: sppo_hard(a, b, BETA)),
    ("apo_zero", {}, lambda a, b, c, n, m: apo_zero(a, b, BETA)),
    ("apo_down", {}, lambda a, b, c, n, m: apo_down(a, b, BETA)),
    ("discopop", {"discopop_tau": 0.05}, lambda a, b, c, n, m: discopop(a, b, BETA, 0.05)),
    ("sigmoid_norm", {}, lambda a, b, c, n, m: sigmoid_norm(a, b, BETA, n, m)),
    ("dpop", {"dpop_lambda": 50.0}, lambda a, b, c, n, m: dpop(a, b, BETA, 50.0)),
    ("rpo", {"rpo_alpha": 1.0}, lambda a, b, c, n, m: rpo(a, b, BETA, 1.0, c, n)),
    ("rpo", {"rpo_alpha": 0.3}, lambda a, b, c, n, m: rpo(a, b, BETA, 0.3, c, n)),
]


def cases() -> list[dict[str, object]]:
    """Every loss at every point."""
    rows: list[dict[str, object]] = []
    for point_name, point in POINTS.items():
        columns = list(zip(*point.values(), strict=True))
        for name, parameters, function in FORMULAS:
            triples = [function(c - rc, r - rr, c, n, m) for c, r, rc, rr, n, m in columns]
            expected = [list(column) for column in zip(*triples, strict=True)]
            rows.append(case(name, point_name, parameters, expected, str(globals()[name].__doc__)))
        for name in ("aot", "aot_unpaired"):
            for eps in (0.0, 0.1):
                expected = sorted_logistic(name, point, BETA, eps)
                rows.append(case(name, point_name, {"label_smoothing": eps}, expected, str(sorted_logistic.__doc__)))
    return rows


def case(
    name: str, point: str, parameters: dict[str, float], expected: list[list[float]], formula: str
) -> dict[str, object]:
    """One row of the file."""
    return {
        "loss": name,
        "point": point,
        "parameters": {"beta": BETA, **parameters},
        "losses": expected[0],
        "grad_chosen_logps": expected[1],
        "grad_rejected_logps": expected[2],
        "obtained_by": f"by hand in Python floats, tests/references/make_losses.py: {formula}",
    }


ABOUT = (
    "Preference losses in float64. n, m: chosen and rejected lengths. losses: one a pair (aot: one a quantile). "
    "grad_*: gradient of the sum of losses. tests/losses also holds points Z, P, R to an independent table and "
    "to TRL 1.16."
)


def text() -> str:
    """The file as text, one point or case a line."""
    points = ",\n".join(f"  {json.dumps(name)}: {json.dumps(point)}" for name, point in POINTS.items())
    rows = ",\n".join("  " + json.dumps(row) for row in cases())
    about = json.dumps(ABOUT)
    return f'{{\n "about": {about},\n "points": {{\n{points}\n }},\n "cases": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
