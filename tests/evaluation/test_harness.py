"""Agreement with lm-eval's own `hf` model, item by item: log-likelihoods, rolling ones, and greedy replies."""

import pytest

from lowlevel.demo import DEMO_BASE
from lowlevel.running.reopening import load_run

pytest.importorskip("lm_eval", reason="no lm-eval here: pip install lowlevel[eval]")

TOLERANCE = 1e-4  # nats, of a sum over up to 1,000 tokens


def compared(own: dict, other: dict) -> dict[str, tuple[int, float]]:
    """By task the number of compared responses, and the largest difference of a log-likelihood; texts must be equal."""
    found = {}
    for name, samples in own["samples"].items():
        largest, count = 0.0, 0
        for one, two in zip(samples, other["samples"][name], strict=True):
            assert one["prompt_hash"] == two["prompt_hash"]
            for (mine,), (theirs,) in zip(one["resps"], two["resps"], strict=True):
                count += 1
                if isinstance(mine, float):
                    mine, theirs = (mine, None), (theirs, None)
                if isinstance(mine, str):
                    assert mine == theirs
                else:
                    assert mine[1] == theirs[1]
                    largest = max(largest, abs(mine[0] - theirs[0]))
        found[name] = count, largest
    return found


@pytest.mark.parametrize(("stage", "chat", "shots"), [("base", False, 2), ("dpo", True, 2)])
def test_same_as_hf(dpo_run, tasks, stage, chat, shots):
    from lm_eval.models.huggingface import HFLM

    from lowlevel.evaluation.harness import RunLM
    from lowlevel.evaluation.tasks import evaluate_stage, load_tasks

    loaded = load_tasks(list(tasks.values()), shots)
    run = load_run(dpo_run)
    run.activate(next(one for one in run.stages if one.name == stage))
    own = evaluate_stage(RunLM(run), loaded, None, chat)
    peft = str(dpo_run / "stacked") if stage == "dpo" else None
    hf = HFLM(pretrained=str(DEMO_BASE), peft=peft, device="cpu", dtype="float32", batch_size=8)
    found = compared(own, evaluate_stage(hf, loaded, None, chat))
    assert found["world_choices"][0] > 80 and found["world_texts"][0] == 6 and found["world_replies"][0] == 24
    assert max(largest for _, largest in found.values()) < TOLERANCE
    replies = {sample["resps"][0][0] for sample in own["samples"]["world_replies"]}
    assert (all(replies) and len(replies) > 3) or not chat  # the base ends at once after a plain question
