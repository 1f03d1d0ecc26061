"""Works out `losses.json`: every preference loss and its gradient, in Python floats, from the formulas on paper.

Nothing of the project is imported: `math` alone, and derivatives taken by hand. Run it to write the file anew::

    python tests/references/make_losses.py
"""

from collections.abc import Callable
from math import exp, expm1, log, log1p
from pathlib import Path

from reference_file import as_text

PATH = Path(__file__).with_name("losses.json")

# Points Z (policy = reference), P (better than it), R (worse), B, a batch whose order sorting changes, and E, extremes:
# at beta = 0.1 its margins are 1000, -1000 and 2.
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
    "E": {
        "chosen": [-100, -6200, -100],
        "rejected": [-5200, -100, -200],
        "ref_chosen": [-5100, -200, -4100],
        "ref_rejected": [-200, -4100, -4180],
        "n": [40, 40, 40],
        "m": [50, 50, 50],
    },
}
LOGPS = ("chosen", "rejected", "ref_chosen", "ref_rejected")

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
    return s(-beta * a) + v, -beta * u * s(-beta * a), beta * v * s(-beta * b)


def apo_down(a: float, b: float, beta: float) -> Triple:
    """s(beta a) + 1 - s(x)."""
    x = beta * (a - b)
    bend_a, bend_x = s(beta * a) * s(-beta * a), s(x) * s(-x)
    return s(beta * a) + s(-x), beta * (bend_a - bend_x), beta * bend_x


def discopop(a: float, b: float, beta: float, tau: float) -> Triple:
    """-(1-m) ls(x) + m e^-x, m = s(x/tau), m' = m (1-m) / tau; slope m' (ls(x) + e^-x) - (1-m) s(-x) - m e^-x."""
    x = beta * (a - b)
    m, rest = s(x / tau), s(-x / tau)  # rest = 1 - m
    me = exp(ls(x / tau) - x)  # m e^-x as one exponential: e^1000 is above what a float holds
    slope = rest / tau * (m * ls(x) + me) - rest * s(-x) - me
    return of_x(-rest * ls(x) + me, slope, beta)


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


def f_divergence(a: float, b: float, beta: float, g: Callable[[float], float], dg: Callable[[float], float]) -> Triple:
    """-ls(beta (g(a) - g(b))) with g = f': arXiv 2309.16240; dL/da = -beta s(-u) g'(a)."""
    u = beta * (g(a) - g(b))
    return -ls(u), -beta * s(-u) * dg(a), beta * s(-u) * dg(b)


def f_forward_kl(a: float, b: float, beta: float) -> Triple:
    """f-DPO, forward KL: g(r) = -exp(-r), g'(r) = exp(-r)."""
    return f_divergence(a, b, beta, lambda r: -exp(-r), lambda r: exp(-r))


def f_js(a: float, b: float, beta: float) -> Triple:
    """f-DPO, Jensen-Shannon: g(r) = ls(r), g'(r) = s(-r)."""
    return f_divergence(a, b, beta, ls, lambda r: s(-r))


def f_alpha(a: float, b: float, beta: float, alpha: float) -> Triple:
    """f-DPO, alpha divergence: g(r) = (exp((alpha-1) r) - 1) / (alpha-1), g'(r) = exp((alpha-1) r)."""
    k = alpha - 1
    return f_divergence(a, b, beta, lambda r: (exp(k * r) - 1) / k, lambda r: exp(k * r))


def simpo(p: float, q: float, beta: float, gamma: float, n: float, m: float) -> Triple:
    """-ls(u), u = beta p/n - beta q/m - gamma; p, q: log-probabilities under the policy."""
    u = beta * (p / n - q / m) - gamma
    return -ls(u), -beta * s(-u) / n, beta * s(-u) / m


def cpo(p: float, q: float, beta: float, alpha: float, n: float) -> Triple:
    """-ls(beta (p - q)) - alpha p/n."""
    loss, dp, dq = sigmoid(p, q, beta)
    return loss - alpha * p / n, dp - alpha / n, dq


def cpo_sum(p: float, q: float, beta: float, alpha: float) -> Triple:
    """-ls(beta (p - q)) - alpha p."""
    return cpo(p, q, beta, alpha, 1)


def nll(p: float, n: float) -> Triple:
    """-p/n."""
    return -p / n, -1 / n, 0.0


def orpo(p: float, q: float, lam: float, n: float, m: float) -> Triple:
    """-p/n - lam ls(u), u = o(p/n) - o(q/m), o(z) = z - log(1 - e^z), o'(z) = 1 / (1 - e^z)."""

    def o(z: float) -> float:
        return z - log(-expm1(z))

    u = o(p / n) - o(q / m)
    slope = lam * s(-u)
    return -p / n - lam * ls(u), -1 / n + slope / (n * expm1(p / n)), -slope / (m * expm1(q / m))


def order(values: list[float]) -> list[int]:
    """Which element comes first, second, ... in ascending order."""
    return sorted(range(len(values)), key=values.__getitem__)


Result = dict[str, list[float]]  # "losses" and the four "grad_*_logps", each one number a pair


def four_gradients(name: str, parameters: dict[str, float], triples: list[Triple], lengths: list[float]) -> Result:
    """From (loss, dL/da, dL/db) a pair: a = chosen - ref_chosen, so the reference's slope is minus the policy's.

    Not for RPO: its NLL term -alpha log pi(y+) / n is in dL/da here, and the reference is not in it.
    """
    nll = [parameters["rpo_alpha"] / n if name == "rpo" else 0.0 for n in lengths]
    free = name in REFERENCE_FREE
    return {
        "losses": [loss for loss, _, _ in triples],
        "grad_chosen_logps": [da for _, da, _ in triples],
        "grad_rejected_logps": [db for _, _, db in triples],
        "grad_ref_chosen_logps": [
            0.0 if free else -(da + share) for (_, da, _), share in zip(triples, nll, strict=True)
        ],
        "grad_ref_rejected_logps": [0.0 if free else -db for _, _, db in triples],
    }


def sorted_logistic(kind: str, point: dict[str, list[float]], beta: float, eps: float) -> Result:
    """AOT: cDPO of matched quantiles. A quantile's slope goes to the pair that holds it: a swap of places, no more."""
    chosen, rejected, ref_chosen, ref_rejected = (point[key] for key in LOGPS)
    pairs = range(len(chosen))
    if kind == "aot":
        upper, lower = [chosen[i] - rejected[i] for i in pairs], [ref_chosen[i] - ref_rejected[i] for i in pairs]
    else:
        upper, lower = [chosen[i] - ref_chosen[i] for i in pairs], [rejected[i] - ref_rejected[i] for i in pairs]
    losses, grads = [], {key: [0.0 for _ in pairs] for key in LOGPS}
    for i, j in zip(order(upper), order(lower), strict=True):
        loss, da, db = cdpo(upper[i], lower[j], beta, eps)
        losses.append(loss)
        # paired: upper is chosen - rejected, lower ref_chosen - ref_rejected; unpaired: chosen - ref_chosen and so on
        second, third = ("rejected", "ref_chosen") if kind == "aot" else ("ref_chosen", "rejected")
        grads["chosen"][i], grads[second][i] = da, -da
        grads[third][j], grads["ref_rejected"][j] = db, -db
    return {"losses": losses, **{f"grad_{key}_logps": grads[key] for key in LOGPS}}


REFERENCE_FREE = ("simpo", "cpo", "cpo_sum", "nll", "orpo")
WITHOUT_EXTREMES = ("f_forward_kl", "f_alpha")  # exponentials: at E they are above what a float holds
# name, parameters, function of (a, b, beta, chosen, n, m); a and b of a reference-free loss are log-probabilities p, q
FORMULAS: list[tuple[str, dict[str, float], Callable[..., Triple]]] = [
    ("sigmoid", {}, lambda a, b, beta, c, n, m: sigmoid(a, b, beta)),
    ("cdpo", {"label_smoothing": 0.1}, lambda a, b, beta, c, n, m: cdpo(a, b, beta, 0.1)),
    ("cdpo", {"label_smoothing": 0.2}, lambda a, b, beta, c, n, m: cdpo(a, b, beta, 0.2)),
    ("robust", {"label_smoothing": 0.1}, lambda a, b, beta, c, n, m: robust(a, b, beta, 0.1)),
    ("robust", {"label_smoothing": 0.3}, lambda a, b, beta, c, n, m: robust(a, b, beta, 0.3)),
    ("hinge", {}, lambda a, b, beta, c, n, m: hinge(a, b, beta)),
    ("ipo", {}, lambda a, b, beta, c, n, m: ipo(a, b, beta, n, m)),
    ("ipo_sum", {}, lambda a, b, beta, c, n, m: ipo_sum(a, b, beta)),
    ("exo_pair", {"label_smoothing": 0.001}, lambda a, b, beta, c, n, m: exo_pair(a, b, beta, 0.001)),
    ("exo_pair", {"label_smoothing": 0.1}, lambda a, b, beta, c, n, m: exo_pair(a, b, beta, 0.1)),
    ("nca_pair", {}, lambda a, b, beta, c, n, m: nca_pair(a, b, beta)),
    ("bco_pair", {}, lambda a, b, beta, c, n, m: bco_pair(a, b, beta)),
    ("sppo_hard", {}, lambda a, b, beta, c, n, m: sppo_hard(a, b, beta)),
    ("apo_zero", {}, lambda a, b, beta, c, n, m: apo_zero(a, b, beta)),
    ("apo_down", {}, lambda a, b, beta, c, n, m: apo_down(a, b, beta)),
    ("discopop", {"discopop_tau": 0.05}, lambda a, b, beta, c, n, m: discopop(a, b, beta, 0.05)),
    ("discopop", {"discopop_tau": 0.5}, lambda a, b, beta, c, n, m: discopop(a, b, beta, 0.5)),
    ("sigmoid_norm", {}, lambda a, b, beta, c, n, m: sigmoid_norm(a, b, beta, n, m)),
    ("dpop", {"dpop_lambda": 50.0}, lambda a, b, beta, c, n, m: dpop(a, b, beta, 50.0)),
    ("dpop", {"dpop_lambda": 5.0}, lambda a, b, beta, c, n, m: dpop(a, b, beta, 5.0)),
    ("rpo", {"rpo_alpha": 1.0}, lambda a, b, beta, c, n, m: rpo(a, b, beta, 1.0, c, n)),
    ("rpo", {"rpo_alpha": 0.3}, lambda a, b, beta, c, n, m: rpo(a, b, beta, 0.3, c, n)),
    ("f_forward_kl", {}, lambda a, b, beta, c, n, m: f_forward_kl(a, b, beta)),
    ("f_js", {}, lambda a, b, beta, c, n, m: f_js(a, b, beta)),
    ("f_alpha", {"f_alpha": 0.5}, lambda a, b, beta, c, n, m: f_alpha(a, b, beta, 0.5)),
    ("f_alpha", {"f_alpha": 0.0}, lambda a, b, beta, c, n, m: f_alpha(a, b, beta, 0.0)),
    ("simpo", {"simpo_gamma": 1.0}, lambda p, q, beta, c, n, m: simpo(p, q, beta, 1.0, n, m)),
    ("simpo", {"simpo_gamma": 0.3}, lambda p, q, beta, c, n, m: simpo(p, q, beta, 0.3, n, m)),
    ("orpo", {"orpo_lambda": 0.1}, lambda p, q, beta, c, n, m: orpo(p, q, 0.1, n, m)),
    ("orpo", {"orpo_lambda": 1.0}, lambda p, q, beta, c, n, m: orpo(p, q, 1.0, n, m)),
    ("cpo", {"cpo_alpha": 1.0}, lambda p, q, beta, c, n, m: cpo(p, q, beta, 1.0, n)),
    ("cpo", {"cpo_alpha": 0.2}, lambda p, q, beta, c, n, m: cpo(p, q, beta, 0.2, n)),
    ("cpo_sum", {"cpo_alpha": 1.0}, lambda p, q, beta, c, n, m: cpo_sum(p, q, beta, 1.0)),
    ("cpo_sum", {"cpo_alpha": 0.2}, lambda p, q, beta, c, n, m: cpo_sum(p, q, beta, 0.2)),
    ("nll", {}, lambda p, q, beta, c, n, m: nll(p, n)),
]
PLACES = [*((name, 0.1) for name in POINTS), ("B", 0.5)]  # points and betas at which every loss is worked out


def cases() -> list[dict[str, object]]:
    """Every loss at every place."""
    rows: list[dict[str, object]] = []
    for point_name, beta in PLACES:
        point = POINTS[point_name]
        columns = list(zip(*point.values(), strict=True))
        for name, parameters, function in FORMULAS:
            if point_name == "E" and name in WITHOUT_EXTREMES:
                continue
            free = name in REFERENCE_FREE
            triples = [
                function(c, r, beta, c, n, m) if free else function(c - rc, r - rr, beta, c, n, m)
                for c, r, rc, rr, n, m in columns
            ]
            result = four_gradients(name, parameters, triples, point["n"])
            with_beta = parameters if name in ("orpo", "nll") else {"beta": beta, **parameters}
            rows.append(case(name, point_name, with_beta, result, str(globals()[name].__doc__)))
        for name in ("aot", "aot_unpaired"):
            for eps in (0.0, 0.1):
                result = sorted_logistic(name, point, beta, eps)
                parameters = {"beta": beta, "label_smoothing": eps}
                rows.append(case(name, point_name, parameters, result, str(sorted_logistic.__doc__)))
    return rows


def case(name: str, point: str, parameters: dict[str, float], result: Result, formula: str) -> dict[str, object]:
    """One row of the file."""
    how = f"by hand in Python floats, tests/references/make_losses.py: {formula}"
    numbers = {key: [value + 0.0 for value in values] for key, values in result.items()}  # + 0.0 makes -0.0 plain 0
    return {"loss": name, "point": point, "parameters": parameters, **numbers, "how": how}


FORMAT = {
    "version": 2,
    "about": "Preference losses and their gradients in float64; the code that is tested had no part in them.",
    "points.NAME": "Inputs, each a list with one number a pair. chosen, rejected, ref_chosen, ref_rejected: "
    "log-probability (natural log, <= 0) of the chosen and rejected completion under policy and reference, summed over "
    "its tokens. n, m: tokens in the chosen and in the rejected completion.",
    "cases[].loss": "name, as in lowlevel.losses.LOSSES (lowlevel losses prints formulas and papers)",
    "cases[].point": "key of points: the inputs",
    "cases[].parameters": "every hyper-parameter that the loss reads, by the name that dpo_loss gives it",
    "cases[].losses": "one number a pair, not averaged (aot, aot_unpaired: one a quantile, ascending)",
    "cases[].grad_*_logps": "derivative of the SUM of losses in each pair's log-probability, one number a pair. "
    "At the kink of dpop (a = 0) the slope is that of a > 0.",
    "cases[].how": "how the case's numbers were obtained",
    "tolerance": "1e-12 relative and absolute in float64",
    "see also": "trl.json: what TRL computes at the same points. token_losses.json: cross-entropy and token_logps.",
}


def text() -> str:
    """The file as text, one point or case a line."""
    return as_text(format=FORMAT, points=POINTS, cases=cases())


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
