"""`lowlevel data`: what it shows is what will be trained on."""

import json

import pytest
from workspace import CHATS, PROMPTS

import lowlevel.model.attention_choice
from lowlevel.batch.order import DataOrder
from lowlevel.config.file import load_config
from lowlevel.errors import how_many
from lowlevel.methods.choice import build_method
from lowlevel.model.attention_choice import MASKED, NAMES, Attention
from lowlevel.running.assembly import prepare_data


def test_data_shows_what_will_be_trained_on(runs, tmp_path, cli):
    rows = tmp_path / "rows.jsonl"
    long = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    rows.write_text("".join(json.dumps({**row, "n": i}) + "\n" for i, row in enumerate([*CHATS, long])))
    config = runs.space.write("shown", "sft", folder=tmp_path, data={"source": str(rows)})
    text = config.read_text() + '\n[[data.filters]]\ncolumn = "n"\nop = ">="\nvalue = 4\n'
    config.write_text(text)
    said = cli("data", config)
    assert said.code == 0, said.err
    facts = {line.strip(" │┃").split("│")[0].strip(): line for line in said.out.splitlines()}
    for label, number in (("rows read", 25), ("filtered out: not n >= 4", 4), ("dropped: longer than max_length", 1),
                          ("rows kept", 20)):  # fmt: skip
        assert str(number) in facts[label].replace(label, ""), label
    assert "rows.jsonl:25: prompt has " in said.out
    reply = CHATS[4]["messages"][1]["content"]
    assert f"<|user|>\n{PROMPTS[4]}</s>\n<|assistant|>\n»{reply}</s>«" in said.out, "no colours here: marked by signs"
    assert "learned tokens are between » and «" in said.out
    assert not (tmp_path / "shown").exists()


@pytest.mark.parametrize("attention", [MASKED, Attention(NAMES["math"], "spans, as on a GPU")], ids=["masked", "spans"])
def test_rows_fill_batches_as_they_will_in_the_run_on_this_machine(runs, tmp_path, cli, monkeypatch, attention):
    """A GPU with attention over spans packs a step into one row of a few fixed lengths."""
    monkeypatch.setattr(lowlevel.model.attention_choice, "choose_attention", lambda *arguments: attention)
    path = runs.space.write("shown", "sft", folder=tmp_path)
    config = load_config(path)
    train = prepare_data(config)[1].train
    rows = [train[i] for i in DataOrder.of(config, train).step_rows(0)]
    batches = build_method(config, attention, train).micro_batches(rows)
    said = cli("data", path)
    assert said.code == 0, said.err
    positions = sum(batch.input_ids.numel() for batch in batches)
    assert f"4 examples in {how_many(len(batches), 'micro-batches')}, {positions:,} positions" in " ".join(
        said.out.split()
    )
    assert f"laid out as on this machine: {attention.reason}" in said.out


def test_what_a_run_for_a_gpu_learns_from_is_shown_without_one(runs, tmp_path, cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for section in ({"train": {"precision": "fp16"}}, {"model": {"attn_implementation": "flash"}}):
        said = cli("data", runs.space.write("shown", "sft", folder=tmp_path, **section))
        assert said.code == 0, said.err
        assert "laid out as on a CPU; this machine cannot make the run: " in " ".join(said.out.split())


def test_what_the_model_does_not_learn_is_named_by_the_report_and_at_the_runs_start(runs, tmp_path, cli):
    """A system prompt in a column of its own would be left out, and the model would learn the replies without it."""
    rows = tmp_path / "rows.jsonl"
    system = [{"system": "Be brief."} if i % 4 == 0 else {} for i in range(len(CHATS))]
    rows.write_text("".join(json.dumps({**row, **more}) + "\n" for row, more in zip(CHATS, system, strict=True)))
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}")
    data = {"source": str(rows), "chat_template_from": str(template)}
    config = runs.space.write("unread", "sft", folder=tmp_path, data=data, train={"max_steps": 1, "logging_steps": 1})
    shown, trained = cli("data", config), cli("sft", config)
    for warning in (
        "no special token ends a reply",
        'ignores add_generation_prompt: "assistant:" is learned as a part',
    ):
        assert f"warning    chat template: {warning}" in shown.out
        assert f"\n  warning    chat template: {warning}" in trained.out
    assert trained.code == 0, trained.err
    assert 'warning: column "system" ignored' in shown.out
    assert '  warning    column "system" ignored (make it the first message): 6 train\n' in trained.out
    assert "warning  " not in runs.said["sft"].out, "nothing is left out of those rows"


def test_truncation_is_said_with_the_lengths_that_keep_more(runs, tmp_path, cli):
    """By the report, at the start of a run, and in data_report.json."""
    config = runs.space.write("cut", "sft", folder=tmp_path, data={"max_length": 58}, train={"max_steps": 1})
    shown, trained = cli("data", config), cli("sft", config)
    found = json.loads((tmp_path / "cut" / "data_report.json").read_text())["train"]["truncation"]
    share = found["tokens_cut"] / found["tokens"]
    line = f"train: max_length 58 cuts {found['rows_cut']} of 24 rows ({share:.1%} of tokens); "
    assert 0 < share < 1 and line in shown.out and f"  truncation {line}" in trained.out
    assert f"{found['keeping']['90']} keeps 90 %" in shown.out and "truncation" not in runs.said["sft"].out
