"""Whole runs of online methods: stopped and resumed, replayed, verified, inspected, and from Python."""

import json

import helpers
import pytest
from safetensors.torch import load_file
from workspace import PROMPTS, Workspace, make_workspace, metrics, run, stop_at, without

import lowlevel as ll
from lowlevel.online.rollouts import KeptRollouts

SECONDS = ("tokens_per_second", "sampling_seconds", "rewarding_seconds")
OWN = {
    "reward": ["rollouts_by_hand:evens", "exact_match"],
    "num_generations": 4,
    "max_completion_length": 12,
    "num_iterations": 2,
}


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Workspace:
    space = make_workspace(tmp_path_factory.mktemp("online"))
    helpers.write_jsonl(space.folder / "prompts.jsonl", [{"prompt": text, "hint": len(text)} for text in PROMPTS])
    return space


def written(space, name, method="grpo", own=OWN, **sections):
    data = {"source": str(space.sft_rows), "format": "auto", "eval_source": "holdout", "eval_limit": 4}
    train = {"logging_steps": 1, "save_steps": 2, **sections.pop("train", {})}
    trace = {"every": 2, "level": "token", "gradients": True}
    return space.write(
        name, method, **{method: own}, data={**data, **sections.pop("data", {})}, train=train, trace=trace, **sections
    )


@pytest.fixture(scope="module")
def whole(space):
    said = run("grpo", written(space, "whole"))
    assert said.code == 0, said.err
    return space.folder / "whole"


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_is_stopped_and_resumed_is_the_same_run(space, whole, step):
    """Step 3 samples for steps 3 and 4: the resumed run reads its completions again."""
    path = written(space, f"stopped{step}")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        assert run("grpo", path).code == 143
    assert run("grpo", path, "--resume").code == 0
    folder = space.folder / f"stopped{step}"
    assert without(folder, *SECONDS) == without(whole, *SECONDS)
    one, other = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (folder, whole))
    assert all((other[name] == tensor).all() for name, tensor in one.items())
    for number in (1, 3, 5):
        kept = [KeptRollouts(each).read(number) for each in (folder, whole)]
        assert [[x.completion_ids.tolist() for x in each] for each in kept][0] == [
            x.completion_ids.tolist() for x in kept[1]
        ]


def test_what_is_logged(whole):
    first, *rest = metrics(whole)
    assert first["step"] == 0 and first["eval_reward"] > 0 and first["eval_exact_match"] == 0
    step = rest[0]
    assert step["reward"] == pytest.approx(
        step["rewards/rollouts_by_hand:evens/mean"] + step["rewards/exact_match/mean"]
    )
    assert step["ratio"] == pytest.approx(1, abs=1e-5) and step["sampling/sampling_logp_difference/max"] < 1e-4
    assert rest[1]["sampling/sampling_logp_difference/max"] > 1e-4  # the second step on the same completions
    assert rest[1]["reward"] == step["reward"] != rest[2]["reward"]
    assert all(line["grad_norm"] > 0 for line in rest if "loss" in line)
    assert step["rewards/failed"] == 0 and 0 < step["completions/mean_length"] <= 12


def test_replay_verify_inspect_and_generate(whole):
    said = run("replay", whole, "--step", 6)
    assert said.code == 0 and "identical" in said.out.lower(), said.out + said.err
    dump = whole.parent / "dump"
    assert run("replay", whole, "--step", 6, "--dump", dump).code == 0
    losses = sum(float(load_file(file)["losses"].sum()) for file in dump.glob("micro-*"))
    count = json.loads((dump / "index.json").read_text())["count"]
    (loss,) = (line["loss"] for line in metrics(whole) if line["step"] == 6 and "loss" in line)
    assert losses / count == pytest.approx(loss, rel=1e-5)
    said = run("verify", whole, "--step", 4)
    assert said.code == 0 and "float64 autograd" in said.out, said.out + said.err
    said = run("inspect", whole, "--step", 3)
    assert said.code == 0 and "sampler" in said.out and "advantage" in said.out, said.err
    assert "give --step" in run("inspect", whole, "--example", 1).err
    assert run("generate", whole, "--prompt", "a", "--max-new-tokens", 3).code == 0
    assert run("report", whole).code == 0 and "dropout 0<" in (whole / "report.html").read_text()
    said = run("merge", whole, "--out", whole.parent / "merged", "--into", "dequantized")
    assert said.code == 0, said.err


def test_verify_reads_the_temperatures_of_sapo(space):
    """At its second step on the same completions the ratios are not 1."""
    own = {**OWN, "loss_type": "sapo", "loss_kwargs": {"sapo_temperature_pos": 5.0, "sapo_temperature_neg": 9.0}}
    train = {"max_steps": 2, "save_steps": 1, "learning_rate": 0.05}
    assert run("grpo", written(space, "sapo", own=own, train=train)).code == 0
    said = run("verify", space.folder / "sapo", "--step", 2)
    assert said.code == 0, said.out


def test_verify_holds_where_all_advantages_are_far_below_0(space):
    own = {"reward": ["length"], "reward_weights": [1e7], "max_completion_length": 12, "whiten_advantages": False}
    assert run("ppo", written(space, "far", "ppo", own, train={"max_steps": 1, "save_steps": 1})).code == 0
    said = run("verify", space.folder / "far")
    assert said.code == 0, said.out


@pytest.mark.parametrize("words", [("data",), ("plan", "--gpus", 2)])
def test_commands_on_a_run_file(space, words):
    said = run(*words[:1], written(space, f"for {words[0]}"), *words[1:])
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("time",), "lowlevel time does not sample"),
        (("verify",), "give its run folder"),
    ],
)
def test_commands_that_refuse_a_run_file(space, words, reason):
    said = run(*words, written(space, "refused"))
    assert said.code == 2 and reason in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(("reward", "dora"), [("same", False), ("evens", True)])
def test_verify_of_unusual_runs(space, reward, dora):
    """All rewards are equal: B stays 0, and verify leaves it so. DoRA's lengths are detached on purpose."""
    given = {"eval_source": None, "eval_limit": None}
    own = {**OWN, "reward": [f"rollouts_by_hand:{reward}"], "beta": 0.04}
    path = written(space, f"unusual-{reward}", own=own, data=given, train={"max_steps": 1}, lora={"use_dora": dora})
    said = run("grpo", path)
    assert said.code == 0 and "dropout off: completions are sampled without" in said.out, said.err
    said = run("verify", space.folder / f"unusual-{reward}")
    assert said.code == 0 and dora == ("detaches" in said.out), said.err


def test_compare_names_the_held_out_rewards(whole):
    assert "eval_reward" in run("compare", whole).err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "own"), [("rloo", {"beta": 0.05}), ("ppo", {"beta": 0.05}), ("online_dpo", {"num_iterations": 1})]
)
def test_the_other_methods(space, method, own):
    """A resumed run of ppo has its value head again."""
    path = written(space, method, method, {**OWN, "reward": ["rollouts_by_hand:evens"], **own}, train={"max_steps": 4})
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        assert run(method, path).code == 143
    said = run(method, path, "--resume")
    assert said.code == 0, said.err
    said = run("replay", space.folder / method, "--step", 4, "--from", 0)
    assert said.code == 0 and "identical" in said.out.lower(), said.out + said.err
    said = run("verify", space.folder / method, "--step", 3)
    assert said.code == 0, said.out + said.err
    assert run("inspect", space.folder / method, "--step", 3).code == 0


def test_from_python_with_rows_and_functions(space):
    seen = []

    def hinted(completions, hint, prompts):
        seen.append((hint, prompts[0][-1]["content"]))
        return [float(len(text) % 3) for text in completions]

    made = ll.grpo(
        str(space.base), [{"prompt": text, "hint": i} for i, text in enumerate(PROMPTS)], reward=[hinted, "length"],
        reward_weights=[1.0, 0.5], output_dir=str(space.folder / "python"), num_generations=2, max_completion_length=8,
        max_steps=2, r=4, max_length=64, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
    )  # fmt: skip
    assert made.metrics[-1]["step"] == 2 and len(seen) == 4
    assert all(PROMPTS[hint[0]] == prompt and len(hint) == 2 for hint, prompt in seen)
    assert sum(len(one.texts) for one in made.inspect(step=1).examples) == 4


def test_rows_steps_and_samples_have_their_own_random_numbers(space):
    rows = [{"prompt": PROMPTS[0]}] * 2  # one prompt in both rows, and both in each step
    ll.grpo(
        str(space.base), rows, reward="rollouts_by_hand:evens", output_dir=str(space.folder / "same"), max_steps=2,
        num_generations=2, max_completion_length=8, r=4, max_length=64, per_device_train_batch_size=4,
        gradient_accumulation_steps=1, learning_rate=1e-9,
    )  # fmt: skip
    kept = [x for step in (1, 2) for x in KeptRollouts(space.folder / "same").read(step)]
    assert len(kept) == len({tuple(x.completion_ids.tolist()) for x in kept}) == 8


def test_a_reward_run_is_a_reward_function(space):
    """Its rewards are those of `lowlevel score`; an empty completion has none."""
    folder = space.folder / "judge"
    assert run("reward", space.write("judge", "reward", train={"max_steps": 1})).code == 0
    path = written(space, "judged", own={**OWN, "reward": [str(folder)]}, train={"max_steps": 1})
    said = run("grpo", path)
    assert said.code == 0, said.err
    kept = [x for x in KeptRollouts(space.folder / "judged").read(1) if x.text.strip()]
    asked = {row: text for row, text in enumerate(PROMPTS)}
    rows = [{"prompt": asked[x.row], "completion": x.text} for x in kept]
    assert [x.reward for x in kept] == pytest.approx([one["reward"] for one in ll.Run(folder).score(rows)], abs=1e-5)


def broken(completions):
    raise ValueError("no")


def test_a_step_without_a_reward_ends_the_run_in_one_line(space, monkeypatch):
    from lowlevel.online import rewards

    monkeypatch.setitem(rewards.OWN, "broken", broken)
    said = run(
        "grpo",
        written(space, "broken", own={**OWN, "reward": ["broken"]}, data={"eval_source": None, "eval_limit": None}),
    )
    assert said.code == 2 and "step 1: no completion has a reward: chats.jsonl:" in said.err, said.err
    assert "broken: ValueError: no" in said.err and said.err.count("\n") == 1
