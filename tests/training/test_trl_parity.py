"""Ten steps of SFT and of DPO, step by step against TRL 1.16 on a tiny fp32 Llama.

What is made equal, and how:
- weights: one folder with the base, one PEFT folder with the adapter to start from (A random, B zero); TRL loads both
  with plain transformers and PEFT. The base is not quantised, because TRL casts LoRA weights to bf16 on a 4-bit model.
- tokens: SFT gets the ids themselves with TRL's `completion_mask`, from which TRL makes its labels
  (completion_only_loss). TRL's DPO tokenises text itself, so a word-level tokenizer splits "w17 w4 </s>" at blanks:
  token i is the word "wi", and completions end in "</s>", which TRL would otherwise append.
- order: sequential; 44 rows in steps of 2 x 4, so step 6 ends the first epoch with half a step.
- optimizer: torch's AdamW, betas (0.9, 0.999), eps 1e-8, no weight decay, cosine with 3 warm-up steps, clipping at 1.
- dropout 0; TRL pads each micro-batch to its longest row, here pairs and examples are packed.
"""

import helpers
import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lowlevel.batch.order import DataOrder
from lowlevel.config.schema import TrainConfig
from lowlevel.model.adapters import save_adapter
from lowlevel.model.policy import TRAINED
from lowlevel.optim.optimizer import build_optimizer, learning_rate, set_learning_rate

STEPS, ROWS, WARMUP, RATE, CLIP = 10, 44, 3, 5e-3, 1.0
EOS = 2


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(helpers.VOCABULARY)}
    words = {"</s>" if i == EOS else word: i for word, i in words.items()}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", eos_token="</s>", pad_token="w0")


def text_of(ids) -> str:
    return " ".join("</s>" if i == EOS else f"w{i}" for i in ids)


def ended(ids) -> np.ndarray:
    return np.append(ids, EOS)


def our_steps(policy, method, examples) -> list[tuple[float, float, float]]:
    """(loss, grad_norm, learning rate) of each step."""
    config = TrainConfig(
        optim="adamw", learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=WARMUP, max_grad_norm=CLIP
    )
    optimizer = build_optimizer(policy.flat.weights, config)
    order = DataOrder(ROWS, 8, 0, shuffled=False)
    results = []
    for number in range(STEPS):
        rate = learning_rate(number, STEPS, config)
        set_learning_rate(optimizer, rate)
        rows = [examples[i] for i in order.step_rows(number)]
        result = helpers.step(policy, method, rows, optimizer, number=number, max_grad_norm=CLIP)
        results.append((result.metrics["loss"], result.grad_norm, rate))
    return results


def trl_settings(tmp_path) -> dict:
    return {
        "output_dir": str(tmp_path / "trl"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
    }


def their_model(base, adapter) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def their_steps(trainer) -> list[tuple[float, float, float]]:
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return [(log["loss"], log["grad_norm"], log["learning_rate"]) for log in logs]


def assert_equal_steps(ours, theirs) -> None:
    assert len(ours) == len(theirs) == STEPS
    for number, (own, their) in enumerate(zip(ours, theirs, strict=True)):
        assert own == pytest.approx(their, rel=1e-5), f"step {number}: (loss, grad_norm, rate)"


@pytest.fixture
def start(tiny_base, tmp_path):
    """A policy with the adapter's fresh initialisation, and that adapter as a PEFT folder."""
    policy = helpers.make_policy(tiny_base, randomize=False)
    save_adapter(policy.model, TRAINED, tmp_path / "adapter", str(tiny_base))
    return policy, tmp_path / "adapter"


def test_sft(tiny_base, start, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    policy, adapter = start
    examples = helpers.ragged_examples(ROWS, longest=24)
    ours = our_steps(policy, helpers.sft(2, packing=True, row_length=48), examples)
    rows = [{"input_ids": e.input_ids.tolist(), "completion_mask": (e.labels != -100).astype(int).tolist()}
            for e in examples]  # fmt: skip
    trainer = trl.SFTTrainer(
        model=their_model(tiny_base, adapter),
        args=trl.SFTConfig(completion_only_loss=True, packing=False, **trl_settings(tmp_path)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    assert_equal_steps(ours, their_steps(trainer))
    assert ours[-1][0] < ours[0][0] - 0.3, "ten steps that went somewhere"


def test_dpo(tiny_base, start, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    policy, adapter = start
    pairs = [
        helpers.Pair(p.row, p.prompt_ids, ended(p.chosen_ids), ended(p.rejected_ids))
        for p in helpers.ragged_pairs(ROWS, longest=12)
    ]
    ours = our_steps(policy, helpers.dpo(2, packing=True, row_length=48), pairs)
    texts = [[text_of(ids) for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in pairs]
    rows = [{"prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in texts]
    trainer = trl.DPOTrainer(
        model=their_model(tiny_base, adapter),
        args=trl.DPOConfig(loss_type="sigmoid", beta=0.1, disable_dropout=True, **trl_settings(tmp_path)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    tokens = [[row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in trainer.train_dataset]
    assert tokens == [[ids.tolist() for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in pairs]
    assert_equal_steps(ours, their_steps(trainer))
    assert ours[0][0] == pytest.approx(np.log(2), rel=1e-7) and ours[-1][0] < 0.6, "ten steps that went somewhere"
