"""The functions of `lowlevel.losses` against `token_losses.json` (by hand) and `trl.json` (what TRL 1.16 computed).

`losses.json` is checked in `test_preference_values.py`; here are the other two files, and what each says of itself.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import make_token_losses
import make_trl
import pytest
import torch
from torch import Tensor

import lowlevel.losses
from lowlevel.losses import LOSSES, dpo_loss, masked_cross_entropy, sequence_logps

REFERENCES = Path(__file__).parents[1] / "references"
FILES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(REFERENCES.glob("*.json"))}
POINTS = FILES["losses"]["points"]
WITHOUT_PEER = {"cdpo", "ipo_sum", "dpop"} | {  # by hand only
    *("f_forward_kl", "f_js", "f_alpha", "ld_dpo", "odpo", "wpo", "simpo", "orpo", "cpo", "cpo_sum", "nll"),
}


def close(actual: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def cases_of(function: str) -> list[Any]:
    found = [case for case in FILES["token_losses"]["cases"] if function in case["functions"]]
    return [pytest.param(case, id=case["case"]) for case in found]


def test_each_file_documents_its_format_and_each_case_says_how_it_was_obtained() -> None:
    assert set(FILES) == {"losses", "token_losses", "trl"}
    for document in FILES.values():
        assert next(iter(document)) == "format"  # at the top
        assert document["format"]["version"] >= 1
        described = " ".join(document["format"])
        for case in document["cases"]:
            assert case["how"].startswith(("by hand in Python floats, tests/references/make_", "TRL 1.16.0, "))
            for key in case:
                assert key in described or (key.startswith("grad_") and "grad_*_logps" in described), key


@pytest.mark.parametrize("case", cases_of("masked_cross_entropy"))
def test_masked_cross_entropy(case: dict[str, Any]) -> None:
    logits = double(case["logits"])
    loss_sum, count = masked_cross_entropy(logits, torch.tensor(case["labels"]))
    close(loss_sum, case["loss_sum"])
    assert count.item() == case["count"]
    close(torch.autograd.grad(loss_sum, logits)[0], case["grad_loss_sum_logits"])


@pytest.mark.parametrize("case", cases_of("sequence_logps"))
def test_sequence_logps(case: dict[str, Any]) -> None:
    logits = double(case["logits"])
    logps, lengths = sequence_logps(logits, torch.tensor(case["labels"]))
    close(logps, case["logps"])
    assert lengths.tolist() == case["lengths"]
    incoming = torch.tensor(case["incoming"], dtype=torch.float64)
    close(torch.autograd.grad(logps, logits, incoming)[0], case["grad_logps_logits"])


@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
@pytest.mark.parametrize("function", ["token_logps", "token_logps_reference"])
@pytest.mark.parametrize("case", cases_of("token_logps"))
def test_token_logps(case: dict[str, Any], function: str, chunk_size: int) -> None:
    assert function in case["functions"]
    hidden, weight = double(case["hidden"]), double(case["lm_head_weight"])
    logps = vars(lowlevel.losses)[function](hidden, weight, torch.tensor(case["targets"]), chunk_size=chunk_size)
    close(logps, case["logps"])
    incoming = torch.tensor(case["incoming"], dtype=torch.float64)
    grad_hidden, grad_weight = torch.autograd.grad(logps, (hidden, weight), incoming)
    close(grad_hidden, case["grad_hidden"])
    close(grad_weight, case["grad_lm_head_weight"])


def test_the_inputs_of_tokens_are_exact_in_half_precision() -> None:
    """So the file serves kernels in fp16 and bf16, too: the difference to it is theirs alone."""
    for case in FILES["token_losses"]["cases"]:
        for key in {"logits", "hidden", "lm_head_weight"} & set(case):
            for dtype in (torch.float16, torch.bfloat16):
                assert torch.equal(double(case[key]).to(dtype).double(), double(case[key]))


def test_every_function_has_a_case() -> None:
    named = {name for case in FILES["token_losses"]["cases"] for name in case["functions"]}
    assert named == {"masked_cross_entropy", "sequence_logps", "token_logps", "token_logps_reference"}
    functions = {name for name in lowlevel.losses.__all__ if inspect.isfunction(getattr(lowlevel.losses, name))}
    others = {"dpo_loss", "loss", "loss_spec"}  # losses.json; registering and finding a loss
    assert functions - named == others | {"token_scores", "token_scores_reference"}  # test_token_logps.py


@pytest.mark.parametrize("case", FILES["trl"]["cases"], ids=lambda case: f"{case['loss']}-{case['point']}")
def test_what_trl_computed(case: dict[str, Any]) -> None:
    point = POINTS[case["point"]]
    logps = [double(point[key]) for key in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    lengths = {"chosen_lengths": torch.tensor(point["n"]), "rejected_lengths": torch.tensor(point["m"])}
    loss = dpo_loss(*logps, loss_type=case["loss"], **case["parameters"], **lengths).losses.mean()
    tolerance = 1e-7 if case["loss"] == "exo_pair" else 1e-12
    close(loss, case["mean_loss"], tolerance)
    for gradient, key in zip(torch.autograd.grad(loss, logps[:2]), ("chosen", "rejected"), strict=True):
        close(gradient, case[f"grad_{key}_logps"], tolerance)


def test_every_loss_that_trl_has_is_in_its_file() -> None:
    assert {case["loss"] for case in FILES["trl"]["cases"]} == set(LOSSES) - WITHOUT_PEER
    for case in FILES["trl"]["cases"]:
        assert set(case["parameters"]) >= set(LOSSES[case["loss"]].parameters)


def same(new: Any, stored: Any) -> bool:
    """Equal, numbers to 1e-13: exp and log1p may differ in the last bits between C libraries and processors."""
    if isinstance(new, dict):
        return new.keys() == stored.keys() and all(same(value, stored[key]) for key, value in new.items())
    if isinstance(new, list):
        return len(new) == len(stored) and all(map(same, new, stored))
    return new == (pytest.approx(stored, rel=1e-13, abs=1e-13) if isinstance(stored, float) else stored)


def test_the_file_of_tokens_is_what_its_generator_writes() -> None:
    assert same(json.loads(make_token_losses.text()), FILES["token_losses"])


def test_the_file_of_trl_is_what_trl_computes_now() -> None:
    pytest.importorskip("trl.trainer.dpo_trainer")
    fresh = make_trl.cases()
    for new, stored in zip(fresh, FILES["trl"]["cases"], strict=True):
        assert same({**new, "how": ""}, {**stored, "how": ""})  # the installed torch may be another
