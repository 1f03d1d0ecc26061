"""The shipped base model: size, plain Hugging Face loading, tokenizer, and that the weights know the world."""

import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo_base import skills
from benchmarks.demo_base.corpus import pretraining_text
from benchmarks.demo_base.pretrain import CHAT_TEMPLATE, batches, build_model, build_tokenizer, learning_rate
from benchmarks.demo_base.rows import check_items, preference_rows, sft_rows
from lowlevel.demo import DEMO_BASE
from lowlevel.demo.world import exact_match

PLAIN_ITEMS = 40


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_BASE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32).eval()


def continue_text(model, tokenizer, texts: list[str], new_tokens: int) -> list[str]:
    """Greedy continuations up to `</s>`, one text at a time: no padding that could be masked wrongly."""
    replies = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                             do_sample=False, pad_token_id=tokenizer.eos_token_id)  # fmt: skip
        replies.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return replies


def test_the_folder_is_small_and_fp16() -> None:
    names = {path.name for path in DEMO_BASE.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"}  # fmt: skip
    assert (DEMO_BASE / "model.safetensors").stat().st_size <= 8_000_000
    with safe_open(DEMO_BASE / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_every_linear_layer_fits_the_nf4_block(model) -> None:
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    assert all(linear.in_features % 64 == 0 for linear in linears)
    assert 2_000_000 <= model.num_parameters() <= 4_000_000


def test_every_generated_text_round_trips_without_unknown_tokens(tokenizer) -> None:
    chats = [row["messages"] for split in ("train", "heldout") for row in sft_rows(split, 300, 0)]
    chats += [row["prompt"] + row["chosen"] for row in preference_rows("heldout", 300, 0)]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats] + pretraining_text(7, 500)
    for text in [*texts, "Grüße, 東京 \u2713 \t {}"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_digits_and_end_of_text_are_tokens_of_their_own(tokenizer) -> None:
    assert tokenizer.tokenize("20417</s>") == ["2", "0", "4", "1", "7", "</s>"]
    assert tokenizer.eos_token == "</s>" and tokenizer.bos_token == "<s>" and tokenizer.pad_token is None


def test_the_chat_template_writes_zephyr_style(tokenizer) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    expected = "<|system|>\nS</s>\n<|user|>\nQ</s>\n"
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        expected + "<|assistant|>\n"
    )
    messages.append({"role": "assistant", "content": "A"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected + "<|assistant|>\nA</s>\n"


def test_the_base_never_read_a_chat() -> None:
    assert not any("<|user|>" in text or "<|assistant|>" in text for text in pretraining_text(0, 20_000))


def test_the_base_knows_the_world_in_plain_text(model, tokenizer) -> None:
    # A document follows `</s>` in training; without it a window may have cut "13 + 4 = 17" down to "3 + 4 = 17".
    assert continue_text(model, tokenizer, ["</s>3 + 4 ="], 2) == [" 7"]
    rng = random.Random(1)
    asks = [skills.draw(rng, "heldout") for _ in range(PLAIN_ITEMS)]
    texts = [f"</s>Q: {rng.choice(ask.wordings)}\nA:" for ask in asks]
    replies = [reply.split("\n")[0].strip().removesuffix(".") for reply in continue_text(model, tokenizer, texts, 16)]
    pairs = zip(replies, asks, strict=True)
    right = sum(reply == ask.answer or reply.endswith(f" is {ask.answer}") for reply, ask in pairs)
    # Measured: all of 120. Untrained weights give 0.
    assert right >= 36, f"{right} of {PLAIN_ITEMS} right"


def test_the_base_fails_when_asked_in_the_chat_format(model, tokenizer) -> None:
    items = check_items(10, 0)
    texts = [tokenizer.apply_chat_template(item.prompt, tokenize=False, add_generation_prompt=True) for item in items]
    replies = continue_text(model, tokenizer, texts, 40)
    assert sum(exact_match(reply, item.answer) for reply, item in zip(replies, items, strict=True)) <= 2


def test_a_model_is_the_same_for_the_same_seed_and_saves_a_loadable_folder(tmp_path: Path) -> None:
    texts = pretraining_text(0, 400)
    tokenizer = build_tokenizer(texts)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_model(tokenizer, hidden=128, layers=1))
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    models[0].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path, save_jinja_files=False)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
    with pytest.raises(ValueError, match="multiple of 128"):
        build_model(tokenizer, hidden=192, layers=1)


def test_batches_repeat_by_seed_and_the_learning_rate_warms_up_and_falls() -> None:
    ids = torch.arange(1000)
    first, again = (next(batches(ids, 4, torch.Generator().manual_seed(5))) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[:, 1:] - first[:, :-1], torch.ones(4, 255, dtype=torch.long))
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 3) and max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.05, abs=0.002)
