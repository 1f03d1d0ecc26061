"""`lowlevel generate`: runs, adapters and merged models reply alike, to prompts rendered as in training."""

import shutil

from workspace import PROMPTS, reply

import lowlevel.reporting.comparison
import lowlevel.running.replies
from lowlevel.config.file import load_config
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.running.reopening import load_run
from lowlevel.running.replies import generate_replies
from lowlevel.sampling import Sampling, build_sampler


def test_run_adapter_and_merged_model_reply_alike(runs, merged, cli):
    texts = [reply(cli, folder) for folder in (runs.dpo, runs.dpo / "adapter", merged)]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].strip()
    assert texts[0] != reply(cli, runs.sft)


def test_each_adapter_in_a_run_folder_replies_as_itself(runs, cli, tmp_path):
    assert reply(cli, runs.dpo / "parent") == reply(cli, runs.sft)
    for name in ("adapter", "stacked"):  # not on top of the parent once more
        assert reply(cli, runs.dpo / name) == reply(cli, runs.dpo) != reply(cli, runs.sft)
    copy = runs.space.copy("dpo", tmp_path)
    shutil.rmtree(copy / "adapter")
    shutil.copytree(copy / "step-00000003", copy / "adapter")
    earlier = reply(cli, copy)
    assert reply(cli, runs.dpo / "step-00000003") == earlier != reply(cli, runs.dpo)


def test_an_adapter_from_elsewhere_on_its_base(runs, cli, tmp_path, monkeypatch):
    """It names its base without a folder, so it is found where that name is one."""
    shutil.copytree(runs.sft / "adapter", tmp_path / "taken")
    monkeypatch.chdir(runs.space.folder)
    assert reply(cli, tmp_path / "taken") == reply(cli, runs.sft)


def test_the_same_seed_gives_the_same_text(runs, cli):
    first, again, other, greedy = (
        reply(cli, runs.dpo, "--temperature", heat, "--seed", seed) for heat, seed in ((1, 3), (1, 3), (1, 4), (0, 3))
    )
    assert first == again
    assert len({first, other, greedy}) == 3


def test_the_prompt_is_rendered_as_in_training(runs, cli, monkeypatch):
    from lowlevel.running.assembly import check_inputs

    seen, encoded, calls = [], [], []
    original, encode = lowlevel.running.replies.build_sampler, ChatTokenizer.encode_prompt
    monkeypatch.setattr(
        ChatTokenizer, "encode_prompt", lambda self, messages: encoded.append(encode(self, messages)) or encoded[-1]
    )

    class Spy:
        def __init__(self, *args):
            self.sampler = original(*args)

        def sample(self, prompts, *args, **kwargs):
            seen.extend(prompts)
            calls.append(encoded[-1] == prompts[0])
            assert (beat := lowlevel.heartbeat._active.get()) and beat.paused  # it would print into the reply
            return self.sampler.sample(prompts, *args, **kwargs)

    monkeypatch.setattr(lowlevel.running.replies, "build_sampler", Spy)
    reply(cli, runs.dpo)
    inputs = check_inputs(load_config(runs.dpo / "config.toml"))
    assert seen[0] == inputs.data.train[1].prompt_ids.tolist()  # row 1 of the file: not shuffled
    said = cli("generate", runs.sft, "--prompt", "hi", "--system", "short", "--max-new-tokens", 1)
    assert said.code == 0
    assert calls == [True, True]
    assert inputs.tokenizer.decode(seen[1]) == "<|system|>\nshort</s>\n<|user|>\nhi</s>\n<|assistant|>\n"


def test_a_run_trained_in_fp16_on_a_gpu_can_be_used_without_one(runs, cli, tmp_path):
    copy = runs.space.copy("dpo", tmp_path)
    config, manifest, environment = copy / "config.toml", copy / "manifest.json", copy / "environment.json"
    config.write_text(config.read_text().replace('precision = "auto"', 'precision = "fp16"'))
    manifest.write_text(manifest.read_text().replace('"float32"', '"float16"'))
    environment.write_text(environment.read_text().replace('"fp32"', '"fp16"'))
    assert reply(cli, copy) == reply(cli, runs.dpo)
    said = cli("compare", copy, "--prompts", 1, "--max-new-tokens", 2)
    assert said.code == 0, said.err


def test_settings_of_the_bases_own_generation_change_nothing(runs):
    """Qwen2.5's generation_config.json has a repetition penalty; temperature 0 takes the likeliest all the same."""
    run = load_run(runs.sft)
    prompts = [run.tokenizer.encode_prompt([{"role": "user", "content": prompt}]) for prompt in PROMPTS[:4]]
    sampler = build_sampler(run.policy.model, run.policy.placement, run.tokenizer.stop_ids, print)

    def replies():
        return [reply.text for reply in generate_replies(sampler, run.tokenizer, prompts, Sampling(16))]

    plain, own = replies(), run.policy.causal_lm.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 5.0, 1, 12
    assert replies() == plain
    assert run.policy.causal_lm.generation_config is own
