"""Works out `token_losses.json`: cross-entropy, sequence and token log-probabilities and their gradients, by hand.

Nothing of the project is imported, and no tensor library: `math` alone, one token at a time. For one token with scores
z and target y, with p = softmax(z)::

    log p_y = z_y - log sum_v exp(z_v)        d log p_y / d z_v = [v = y] - p_v

and everything below is sums of these. Run it to write the file anew::

    python tests/references/make_token_losses.py
"""

from math import exp, fsum, log
from pathlib import Path
from typing import Any

from reference_file import as_text

PATH = Path(__file__).with_name("token_losses.json")
IGNORED = -100

Matrix = list[list[float]]


def token_logp(scores: list[float], target: int) -> tuple[float, list[float]]:
    """log p_y and its gradient [v = y] - p_v in the scores. The maximum leaves the sum, so that 1000 is fine."""
    top = max(scores)
    weights = [exp(score - top) for score in scores]
    total = fsum(weights)
    slope = [(v == target) - weight / total for v, weight in enumerate(weights)]
    return scores[target] - top - log(total), slope


def grid(rows: int, columns: int, start: int) -> Matrix:
    """Numbers between -2.5 and 2.5 without a pattern, all multiples of 1/8: exact in every floating dtype."""
    return [[((start + 17 * r + 29 * c + 7 * r * c) % 41 - 20) / 8 for c in range(columns)] for r in range(rows)]


def logits_case(name: str, logits: list[Matrix], labels: list[list[int]], weights: list[float], why: str) -> Any:
    """One case of masked_cross_entropy and sequence_logps. `weights`: the gradient that comes in for each logp."""
    logps, lengths = [0.0 for _ in labels], [0 for _ in labels]
    grad_loss_sum = [[[0.0 for _ in scores] for scores in row] for row in logits]
    grad_logps = [[[0.0 for _ in scores] for scores in row] for row in logits]
    for b, row in enumerate(labels):
        for t, target in enumerate(row[1:]):  # logits at t are scored against the label at t + 1
            if target == IGNORED:
                continue
            logp, slope = token_logp(logits[b][t], target)
            logps[b] += logp
            lengths[b] += 1
            grad_loss_sum[b][t] = [0.0 - value for value in slope]
            grad_logps[b][t] = [weights[b] * value + 0.0 for value in slope]
    return {
        "functions": ["masked_cross_entropy", "sequence_logps"],
        "case": name,
        "logits": logits,
        "labels": labels,
        "loss_sum": -fsum(logps) + 0.0,
        "count": sum(lengths),
        "logps": logps,
        "lengths": lengths,
        "grad_loss_sum_logits": grad_loss_sum,
        "incoming": weights,
        "grad_logps_logits": grad_logps,
        "how": f"by hand in Python floats, tests/references/make_token_losses.py: {why}",
    }


def hidden_case(name: str, hidden: Matrix, weight: Matrix, targets: list[int], incoming: list[float], why: str) -> Any:
    """One case of token_logps: z = W h; dL/dh = sum_v dL/dz_v W_v; dL/dW_v = sum_n dL/dz_nv h_n."""
    logps = []
    grad_hidden = [[0.0 for _ in row] for row in hidden]
    grad_weight = [[0.0 for _ in row] for row in weight]
    for n, (h, target) in enumerate(zip(hidden, targets, strict=True)):
        scores = [fsum(w * x for w, x in zip(row, h, strict=True)) for row in weight]
        logp, slope = token_logp(scores, target)
        logps.append(logp)
        for v, row in enumerate(weight):
            for d in range(len(h)):
                grad_hidden[n][d] += incoming[n] * slope[v] * row[d]
                grad_weight[v][d] += incoming[n] * slope[v] * h[d]
    return {
        "functions": ["token_logps", "token_logps_reference"],
        "case": name,
        "hidden": hidden,
        "lm_head_weight": weight,
        "targets": targets,
        "logps": logps,
        "incoming": incoming,
        "grad_hidden": grad_hidden,
        "grad_lm_head_weight": grad_weight,
        "how": f"by hand in Python floats, tests/references/make_token_losses.py: {why}",
    }


def cases() -> list[Any]:
    """All cases."""
    scores = [2.0, 1.0, 0.0, -1.0]
    identity = [[float(v == d) for d in range(4)] for v in range(4)]
    ragged = [grid(4, 5, start) for start in (3, 11, 30)]
    masked = [[2, IGNORED, 4, 0], [IGNORED, IGNORED, IGNORED, IGNORED], [1, 3, 3, IGNORED]]
    extreme = [[1000.0, -1000.0, 0.0], [-1000.0, 1000.0, 0.0], [0.0, 0.0, 0.0]]
    return [
        logits_case("one token", [[scores, scores]], [[3, 0]], [1.0], "log(1 + e^-1 + e^-2 + e^-3) = 0.44018969856"),
        logits_case("uniform", [[[0.0] * 8] * 3], [[5, 7, 0]], [1.0], "log 8 a token, 7/8 and 1/8 in the gradient"),
        logits_case("ragged", ragged, masked, [1.0, -2.0, 0.5], "the sum of log p_y over tokens that are not masked"),
        logits_case("nothing to learn", ragged, [[IGNORED] * 4] * 3, [1.0] * 3, "no token, so 0 with gradient 0"),
        logits_case("extreme", [extreme], [[0, 0, 0]], [2.0], "scores of +-1000: 0, then -2000, and one-hot slopes"),
        hidden_case("identity head", [scores], identity, [0], [1.0], "the scores are the hidden state"),
        hidden_case("ragged", grid(6, 3, 5), grid(5, 3, 23), [0, 4, 2, 2, 1, 3], [1.0, -2.0, 0.5, 0.0, 3.0, 1.0],
                    "z = W h, then the chain rule"),
    ]  # fmt: skip


FORMAT = {
    "version": 1,
    "about": "Cross-entropy and log-probabilities of tokens in float64; the code that is tested had no part in them.",
    "cases[].case": "what is special about it",
    "cases[].functions": "functions of lowlevel.losses that the case is for",
    "cases[].logits, labels": "(B, T, V) and (B, T); -100: not learned. Not shifted: logits[:, t] is scored against "
    "labels[:, t + 1].",
    "cases[].loss_sum, count": "masked_cross_entropy: sum of -log p over learned tokens, and how many there are",
    "cases[].logps, lengths": "sequence_logps: sum of log p over each row's learned tokens, and how many (B,)",
    "cases[].grad_loss_sum_logits": "derivative of loss_sum in the logits (B, T, V)",
    "cases[].grad_logps_logits": "derivative of sum_b incoming[b] * logps[b] in the logits (B, T, V)",
    "cases[].incoming": "gradient that comes in for each log-probability, (B,) or (N,)",
    "cases[].hidden, lm_head_weight, targets": "token_logps: (N, D), (V, D) and (N,), already shifted, nothing ignored",
    "cases[].grad_hidden, grad_lm_head_weight": "derivative of sum_n incoming[n] * logps[n]",
    "cases[].how": "how the case's numbers were obtained",
    "tolerance": "1e-12 relative and absolute in float64. Inputs are exact in fp16 and bf16 as well.",
}


def text() -> str:
    """The file as text, one case a line."""
    return as_text(format=FORMAT, cases=cases())


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
