"""Settings that exclude each other are refused, a line each that names the keys; those at the edge are fine."""

from functools import partial

import pytest
from config_keys import PREFERENCES, merged, refused

from lowlevel.config import contradictions as module
from lowlevel.config.contradictions import parse_size
from lowlevel.config.file import config_from_tables, load_config
from lowlevel.errors import ConfigError

# Method and flags | texts of the one line that they give.
CASES = """
sft dpo.beta=0.1 | [dpo] | method = "sft"
dpo sft.loss_type=cross_entropy | [sft] | method = "dpo"
sft model.adapter=a | model.adapter is not for sft | lora.init_from
reward kto.beta=0.1 | [kto] | method = "reward"
reward data.format=messages | data.format = "messages" | reward takes "preference"
reward trace.every=1 trace.level=token | trace.level = "token" | one token
sft kto.beta=0.1 | [kto] | method = "sft"
kto data.columns=a | data.columns is for sft, dpo and reward
reward data.supervise=all | data.supervise = "all" is for sft and dpo
sft data.format=orca | data.format = "orca" | "messages"
sft data.format=preference | data.format = "preference" | "messages"
sft data.max_prompt_length=10 | data.max_prompt_length is for dpo
dpo data.weight_column=w | data.weight_column is for sft
kto data.weight_column=w | data.weight_column is for sft
reward data.weight_column=w | data.weight_column is for sft
dpo data.format=messages | data.format = "messages" | "preference"
dpo model.adapter=a model.adapter_mode=none | model.adapter is set | model.adapter_mode = "none"
dpo model.adapter_mode=stack | model.adapter_mode = "stack" needs model.adapter
dpo data.max_prompt_length=65 data.max_length=64 | data.max_prompt_length 65 > data.max_length 64
sft data.eval_limit=5 | data.eval_limit needs data.eval_source
sft data.eval_source=holdout | data.eval_source = "holdout" needs data.eval_limit
sft train.eval_steps=5 | train.eval_steps needs data.eval_source
sft train.early_stopping_patience=2 | train.early_stopping_patience needs train.eval_steps
sft train.gradient_checkpointing=false train.recomputed_layers=2 | train.recomputed_layers | gradient_checkpointing
sft train.gradient_checkpointing=false train.offload_activations=true | train.offload_activations | = true
sft train.recomputed_layers=0 train.offload_activations=true | train.offload_activations | recomputed_layers = 0
sft data.packing=false train.micro_batch_positions=2048 | train.micro_batch_positions needs data.packing = true
sft data.max_length=256 train.micro_batch_positions=255 | train.micro_batch_positions 255 | (256)
dpo data.max_length=256 train.micro_batch_positions=511 | train.micro_batch_positions 511 | (512)
sft train.memory_budget=15GiB train.recomputed_layers=2 | train.recomputed_layers is set by train.memory_budget
sft train.memory_budget=15GiB train.micro_batch_positions=2048 | train.micro_batch_positions is set by
sft train.memory_budget=15GiB train.dequantize_once=true | train.dequantize_once is set by
sft train.memory_budget=15GiB train.gradient_checkpointing=false | train.memory_budget | gradient_checkpointing = false
sft train.memory_budget=15apples | train.memory_budget: | "15GiB" | '15apples'
sft train.memory_budget=15GiB data.packing=false | train.memory_budget needs data.packing = true
sft train.per_device_train_batch_size=2048 train.gradient_accumulation_steps=1024 | 2,097,152 | at most 1,048,576
sft train.warmup_steps=11 train.max_steps=10 | train.warmup_steps 11 > max_steps 10
sft lora.init_from=a lora.r=8 | lora.r comes from lora.init_from
sft lora.init_from=a lora.lora_alpha=8 | lora.lora_alpha comes from
sft lora.init_from=a lora.init_lora_weights=loftq | lora.init_lora_weights comes from
sft lora.init_lora_weights=loftq model.load_in_4bit=false | lora.init_lora_weights = "loftq" needs model.load_in_4bit
dpo lora.init_lora_weights=loftq | lora.init_lora_weights = "loftq" is for sft and reward
sft lora.init_from=a lora.use_rslora=true | lora.use_rslora comes from
sft lora.init_from=a lora.use_dora=true | lora.use_dora comes from
sft lora.init_lora_weights=loftq lora.use_dora=true | lora.init_lora_weights = "loftq" is not for lora.use_dora
dpo model.adapter=a lora.use_dora=true | lora.use_dora cannot stand on model.adapter | model.adapter_mode = "original"
sft lora.init_from=a lora.target_modules=q_proj | lora.target_modules comes from
sft model.load_in_4bit=false model.bnb_4bit_quant_type=nf4 | model.bnb_4bit_* | model.load_in_4bit = true
sft model.load_in_4bit=false model.bnb_4bit_use_double_quant=true | model.bnb_4bit_* | model.load_in_4bit = true
sft trace.level=pair | trace.level needs trace.every or trace.steps
sft trace.gradients=true | trace.gradients needs trace.every or trace.steps
dpo train.data_order=shuffled_pairs | "shuffled_pairs" is for kto
grpo data.columns=a | data.columns is for sft | reward functions receive all columns
grpo grpo.num_generations=3 | = 8 completions are not a multiple of grpo.num_generations 3
grpo grpo.max_completion_length=256 | leaves no prompt: data.max_length is 256
grpo grpo.loss_type=cispo grpo.delta=2.0 | grpo.delta is not read by loss_type = "cispo"
grpo grpo.loss_type=GSPO | grpo.loss_type: GSPO is set by | grpo.importance_sampling_level = "sequence"
grpo grpo.kl_estimator=k2 | grpo.kl_estimator needs grpo.beta above 0
rloo rloo.reward=none | rloo.reward is empty
rloo rloo.reward=length,length | rloo.reward has a name twice: rename it, or set reward_weights
ppo ppo.reward_weights=[1.0,2.0] | ppo.reward_weights has 2 numbers for 1 functions
grpo grpo.reward=format | "format" and reward_pattern belong together
online_dpo train.memory_budget=15GiB | train.memory_budget does not know what sampling (online_dpo) needs
dpo dpo.ref_model_mixup_alpha=0.5 | dpo.ref_model_mixup_alpha needs ref_model_sync_steps
dpo dpo.ref_model_sync_steps=4 dpo.reference_cache=a | dpo.reference_cache is for a reference that stays
dpo dpo.reference_cache=a trace.every=1 trace.level=token | trace.level = "token" | dpo.reference_cache
""".strip().splitlines()


def line_of(case: str) -> tuple[str, list[str]]:
    """What a case says, and the texts that must be in it."""
    words, *texts = (part.strip() for part in case.split(" | "))
    method, *flags = words.split()
    with pytest.raises(ConfigError) as caught:
        load_config(None, dict(flag.split("=") for flag in flags), method=method)
    return str(caught.value), texts


@pytest.mark.parametrize("case", CASES)
def test_settings_that_exclude_each_other(case):
    line, texts = line_of(case)
    assert line.startswith("flags: ") and "\n" not in line
    assert all(text in line for text in texts), line


def test_every_contradiction_is_in_the_list_above(monkeypatch):
    wrong: dict[tuple[str, int], bool] = {}

    def recorded(name, plain, *given):
        checks = plain(*given)
        wrong.update({(name, i): found or wrong.get((name, i), False) for i, (found, _) in enumerate(checks)})
        return checks

    for name in ("_method_and_model", "_data", "_train", "_trace", "_online"):
        monkeypatch.setattr(module, name, partial(recorded, name, getattr(module, name)))
    for case in CASES:
        line_of(case)
    assert len(wrong) > 30 and all(wrong.values()), [place for place, found in wrong.items() if not found]


def test_a_section_without_keys_counts_as_given():
    assert refused({"dpo": {}}) == ['run.toml: [dpo] is not used when method = "sft"']


@pytest.mark.parametrize(
    "tables",
    [
        merged(PREFERENCES, {"data": {"max_prompt_length": 64, "max_length": 64}}),
        {"train": {"warmup_steps": 10, "max_steps": 10}},
        merged(PREFERENCES, {"model": {"adapter_mode": "none"}}),
        {"model": {"load_in_4bit": False}},
    ],
)
def test_settings_at_the_edge_are_fine(tables):
    config_from_tables(tables, "run.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [("15GiB", 15 * 2**30), ("1.5 GB", 1_500_000_000), ("800MiB", 800 * 2**20), ("7MB", 7_000_000), ("15", None),
     ("-1GiB", None), ("GiB", None), ("1e3GiB", None), ("0GiB", 0)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size
