"""Labels, truncation, holdout, and the numbers of the report."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lowlevel.config.data import DataConfig
from lowlevel.config.schema import RunConfig
from lowlevel.data.building import truncate_pair
from lowlevel.data.messages import normalise
from lowlevel.data.prepare import ModelLimits, prepare
from lowlevel.data.report import render_report, show_example
from lowlevel.data.tokenizer import chat_tokenizer
from lowlevel.data.truncation import kept_tokens, truncation
from lowlevel.errors import ConfigError


def orca(i, **keys):
    return {"system": "", "input": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}", **keys}


def test_sft_labels_are_the_replies_and_truncation_keeps_the_first_tokens(run, write, kit, chatml):
    path = write(kit.chat("hi", "yo", "more", "okay"))
    whole = run(path, max_length=512).train[0]
    learned = chatml.decode(whole.labels[whole.labels >= 0].tolist())
    assert learned == "yo<|im_end|>okay<|im_end|>"
    assert (whole.row, whole.where) == (0, "train.jsonl:1")
    assert whole.input_ids.dtype == whole.labels.dtype == np.int32
    cut = run(path, max_length=len(whole.input_ids) - 4)
    assert (cut.train[0].input_ids == whole.input_ids[:-4]).all()
    assert (cut.train[0].labels == whole.labels[:-4]).all()
    report = cut.report.train
    assert (report.truncated_rows, report.tokens_lost, report.share_lost) == (1, 3, 3 / 8)  # "ay<|im_end|>" of 8
    assert (report.replies, report.replies_ended) == (2, 1)


def test_supervise_all_learns_everything_but_the_first_token(run, write, kit):
    data = run(write(kit.chat("hi", "yo")), supervise="all", max_length=12)
    assert data.train[0].labels.tolist() == [-100, *data.train[0].input_ids[1:].tolist()]
    assert data.report.train.tokens == {"total": 12, "supervised": 11}


def test_a_row_whose_only_supervised_tokens_are_cut_is_dropped_exactly_at_the_limit(run, write, kit):
    rows = [kit.chat("hi", "yo"), kit.chat("h", "yo")]  # 21 and 20 tokens before the reply
    assert [e.row for e in run(write(*rows), max_length=21).train] == [1]
    assert [e.row for e in run(write(*rows), max_length=22).train] == [0, 1]


@pytest.mark.parametrize(
    ("lengths", "max_length", "max_prompt", "expected"),
    [
        ((10, 5, 3), 20, None, (10, 5, 3)),  # fits
        ((10, 5, 3), 12, None, (7, 5, 3)),  # the longer completion has first claim
        ((10, 9, 3), 12, None, (6, 6, 3)),  # but on no more than half
        ((2, 30, 3), 12, None, (2, 10, 3)),  # completions get the room that the prompt leaves
        ((10, 5, 3), 20, 4, (4, 5, 3)),  # max_prompt_length
        ((1, 1, 2), 2, None, (1, 1, 1)),
    ],
)
def test_truncation_of_a_pair_by_hand(lengths, max_length, max_prompt, expected):
    prompt, chosen, rejected = (list(range(100 * k, 100 * k + n)) for k, n in enumerate(lengths))
    kept = truncate_pair(prompt, chosen, rejected, max_length, max_prompt, None)
    assert tuple(map(len, kept)) == expected
    assert kept[0] == prompt[len(prompt) - expected[0] :]
    assert kept[1:] == (chosen[: expected[1]], rejected[: expected[2]])


ids = st.lists(st.integers(5, 9), min_size=1, max_size=40)


@given(ids, ids, ids, st.integers(2, 30), st.none() | st.integers(1, 30), st.booleans())
def test_a_truncated_pair_fits_and_keeps_bos(prompt, chosen, rejected, max_length, max_prompt, with_bos):
    prompt = [1, *prompt] if with_bos else prompt
    kept = truncate_pair(prompt, chosen, rejected, max_length, max_prompt, 1)
    assert len(kept[0]) + max(len(kept[1]), len(kept[2])) <= max_length
    assert len(kept[0]) <= (max_prompt or max_length)
    assert min(map(len, kept)) >= 1
    assert (kept[0][0] == 1) == with_bos
    tail = kept[0][with_bos:]
    assert tail == prompt[len(prompt) - len(tail) :]
    if len(prompt) + max(len(chosen), len(rejected)) <= max_length and len(prompt) <= (max_prompt or max_length):
        assert kept == (prompt, chosen, rejected)


def test_preference_examples_of_strings_messages_and_whole_conversations_are_the_same(run, write):
    ask, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "g"), ("assistant", "b")))
    path = write(
        {"prompt": "q", "chosen": "g", "rejected": "b"},
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"prompt": "q", "chosen": [ask, good], "rejected": [ask, bad]},
    )
    data = run(path, "preference")
    arrays = [(e.prompt_ids.tolist(), e.chosen_ids.tolist(), e.rejected_ids.tolist()) for e in data.train]
    assert arrays[0] == arrays[1] == arrays[2]
    assert data.train[0].chosen_ids.dtype == np.int32
    assert data.report.train.warnings == {"duplicate rows": 2}


def test_prompt_and_completion_become_one_user_and_one_assistant_turn(run, write, kit):
    as_text = run(write({"prompt": "q", "completion": "a"})).train[0]
    as_chat = run(write(kit.chat("q", "a"), name="chat.jsonl")).train[0]
    assert as_text.input_ids.tolist() == as_chat.input_ids.tolist()
    assert as_text.labels.tolist() == as_chat.labels.tolist()


def test_supervise_all_keeps_the_newline_after_a_completion(run, write, chatml):
    path = write(orca(1))
    assert chatml.decode(run(path, "orca", supervise="all").train[0].chosen_ids) == "yes 1<|im_end|>\n"
    assert chatml.decode(run(path, "orca").train[0].chosen_ids) == "yes 1<|im_end|>"
    assert run(path, "orca", supervise="all").report.train.replies_ended == 2


def test_holdout_is_the_end_of_the_shuffled_rows_and_never_trained_on(run, write):
    path = write(*[orca(i, score=i % 2) for i in range(40)])
    keys = {"filters": ({"column": "score", "op": "==", "value": 1},), "shuffle_seed": 3}
    order = [e.row for e in run(path, "orca", **keys).train]
    assert sorted(order) == list(range(1, 40, 2)) != order
    data = run(path, "orca", eval_source="holdout", eval_limit=5, limit=7, **keys)
    assert [e.row for e in data.train] == order[:7]
    assert [e.row for e in data.evaluation] == order[-5:]
    assert data.report.overlap == 0
    unlimited = run(path, "orca", eval_source="holdout", eval_limit=5, **keys)
    assert [e.row for e in unlimited.train] == order[:-5]


def test_a_holdout_keeps_its_prompts_out_of_training(run, write):
    path = write(*[{**orca(i), "input": f"question {i // 4}"} for i in range(40)])
    data = run(path, "orca", eval_source="holdout", eval_limit=5, shuffle_seed=1)
    asked = {e.row // 4 for e in data.evaluation}
    assert len(data.evaluation) == 5 and len(asked) > 1
    assert sorted(e.row for e in data.train) == [i for i in range(40) if i // 4 not in asked]
    assert data.report.overlap == 0


def test_each_row_is_normalised_once_and_rows_beyond_the_limit_never(run, write, monkeypatch):
    path = write(*[orca(i) for i in range(9)], orca(9, chosen=""), orca(10, chosen=""), orca(11))
    seen = []

    def count(row, *args):
        seen.append(row.id)
        return normalise(row, *args)

    monkeypatch.setattr("lowlevel.data.prepare.normalise", count)
    data = run(path, "orca", eval_source="holdout", eval_limit=1, limit=9)
    assert [e.row for e in [*data.train, *data.evaluation]] == list(range(9)) + [11]
    assert sorted(seen) == list(range(9)) + [11]


def test_a_holdout_that_leaves_nothing(run, write):
    with pytest.raises(ConfigError, match="data.eval_limit 3 leaves no training rows: train.jsonl has 3"):
        run(write(*[orca(i) for i in range(3)]), "orca", eval_source="holdout", eval_limit=3)


def test_another_evaluation_source_is_read_alike_and_its_overlap_counted(run, write):
    train = write(*[orca(i) for i in range(6)])
    other = write(orca(2, chosen="else"), orca(50), orca(51), name="other.jsonl")
    data = run(train, "orca", eval_source=other, eval_limit=2)
    assert [e.where for e in data.evaluation] == ["other.jsonl:1", "other.jsonl:2"]
    assert data.report.overlap == 1
    assert run(train, "orca").evaluation == []
    assert run(train, "orca").report.overlap is None


@pytest.mark.parametrize(("data_format", "rows"), [("messages", 2400), ("preference", 2400)])
def test_the_demo(run, data_format, rows):
    data = run("demo", data_format, eval_source="demo", eval_limit=100)
    assert (len(data.train), len(data.evaluation)) == (rows, 100)
    assert data.report.evaluation.source == "demo[heldout]"


def test_report_numbers_by_hand(run, write):
    data = run(write(orca(1), orca(22)), "orca", max_length=512)
    # <|im_start|>user\nq1<|im_end|>\n, <|im_start|>assistant\n: one token a character; an empty system text is none
    prompts = [10 + 11, 11 + 11]
    report = data.report.to_json()
    lengths = report["train"]["lengths"]
    assert (lengths["prompt"]["min"], lengths["prompt"]["max"]) == tuple(prompts)
    assert (lengths["chosen"]["min"], lengths["chosen"]["max"], lengths["chosen"]["mean"]) == (6, 7, 6.5)
    assert (lengths["rejected"]["min"], lengths["rejected"]["max"]) == (5, 6)
    assert report["train"]["tokens"] == {"total": sum(prompts) + 13 + 11, "supervised": 24}
    assert (report["train"]["rows_read"], report["train"]["rows_kept"], report["train"]["truncated_rows"]) == (2, 2, 0)
    assert report["tokenizer"]["bos_id"] is None
    assert report["tokenizer"]["end_of_turn_id"] == report["tokenizer"]["eos_id"]
    assert len(report["tokenizer"]["chat_template_sha256"]) == 64


def test_fingerprint_follows_content_and_order_alone(run, write):
    rows = [orca(i) for i in range(4)]
    first = run(write(*rows), "orca").report.train
    again = run(write(*[{**r, "unused": 1} for r in rows], name="again.jsonl"), "orca").report.train
    assert first.fingerprint == again.fingerprint
    changed = run(write(*rows[:2], orca(2, chosen="yes 3"), rows[3]), "orca").report.train
    assert changed.fingerprint != first.fingerprint
    assert [a == b for a, b in zip(first.row_digests, changed.row_digests, strict=True)] == [True, True, False, True]
    assert run(write(*rows[::-1]), "orca").report.train.fingerprint != first.fingerprint


def test_report_and_example_on_a_terminal(run, write, kit, chatml):
    data = run(write(kit.chat("hi", "yo [b]"), kit.chat("x" * 99, "y")), max_length=40, eval_source="demo")
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True, color_system="standard", legacy_windows=False)
    render_report(data.report, console)
    show_example(data.train[0], chatml, console)
    shown = text.getvalue()
    assert "dropped train.jsonl:2: prompt has 118 tokens, max_length 40 leaves no completion token" in shown
    assert "\x1b[32myo [b]<|im_end|>\x1b[0m" in shown


def test_preference_example_on_a_terminal(run, write, chatml):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True, color_system="standard", legacy_windows=False)
    show_example(run(write(orca(1)), "orca").train[0], chatml, console)
    assert "\x1b[32myes 1<|im_end|>\x1b[0m" in text.getvalue()
    assert "\x1b[31mno 1<|im_end|>\x1b[0m" in text.getvalue()


@pytest.mark.parametrize("eval_source", ["same", "hub/set"])
def test_rows_that_are_trained_on_are_not_held_out(run, write, kit, eval_source):
    source = write(kit.chat("q", "a")) if eval_source == "same" else "hub/set"
    with pytest.raises(
        ConfigError, match=r'^data.eval_source .* is also the training source: name other rows, or "holdout"$'
    ):
        run(source, split="test", eval_source=source)


def test_a_sequence_longer_than_the_attention_window_is_refused(write, kit, chatml):
    config = RunConfig(data=DataConfig(source=write(kit.chat("q", "a")), max_length=64))
    assert prepare(config, chatml, ModelLimits(1000, 4096, 64)).train
    with pytest.raises(ConfigError, match="data.max_length 64 > 63, the model's attention window"):
        prepare(config, chatml, ModelLimits(1000, 4096, 63))


def test_a_sequence_that_would_change_the_rotary_factors_of_its_batch_is_refused(write, kit, chatml):
    config = RunConfig(data=DataConfig(source=write(kit.chat("q", "a")), max_length=64))
    assert prepare(config, chatml, ModelLimits(1000, 4096, short=64)).train
    with pytest.raises(ConfigError, match="data.max_length 64 > 63, .*: set data.max_length = 63"):
        prepare(config, chatml, ModelLimits(1000, 4096, short=63))


def test_messages_that_the_template_leaves_out_are_counted(run, write, kit, chatml):
    """TinyLlama's template leaves out tool turns, so the model would learn replies without their source."""
    tool = {"role": "tool", "content": "it rains in Kalmar"}
    row = {
        "messages": [*kit.chat("weather?", "let me look")["messages"], tool, {"role": "assistant", "content": "rain"}]
    }
    silent = kit.CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    assert silent != kit.CHATML
    kind = "messages left out or changed by the chat template"
    rows = write(row, kit.chat("q", "a"))
    assert kind not in run(rows).report.train.warnings
    report = run(rows, tokenizer=chat_tokenizer(chatml.tokenizer, silent)).report
    assert report.train.warnings[kind] == 1
    pair = {"prompt": row["messages"][:3], "chosen": "rain", "rejected": "sun"}
    for template, count in ((kit.CHATML, 0), (silent, 1)):
        tokenizer = chat_tokenizer(chatml.tokenizer, template)
        assert run(write(pair), "preference", tokenizer=tokenizer).report.train.warnings.get(kind, 0) == count


def test_the_lengths_of_rows_of_1_to_100_tokens():
    """5,050 tokens; at length L, 100 L - L (L - 1) / 2 stay: 4,545 need 69, 4,797.5 need 79, 4,999.5 need 91."""
    rows = [(n, 0, 0, 0) for n in range(1, 101)]
    found = truncation(rows, DataConfig(max_length=50), limit=80)
    assert (found.rows, found.rows_cut, found.rows_dropped, found.tokens, found.tokens_cut) == (100, 50, 0, 5050, 1275)
    assert found.keeping == {"90": 69, "95": 79, "99": 91}
    line = "max_length 50 cuts 50 of 100 rows (25.2% of tokens); 69 keeps 90 %, 79 keeps 95 %, 91 keeps 99 %"
    assert str(found) == f"{line} (the model takes at most 80)"
    assert str(truncation(rows, DataConfig(max_length=50), limit=91)) == line
    assert str(truncation([(3, 0, 0, 0)], DataConfig(max_length=2), limit=3)).endswith("tokens); 3 keeps 99 %")


def test_a_row_whose_reply_begins_later_is_dropped_and_keeps_nothing():
    rows = [(10, 0, 0, 5), (1000, 0, 0, 999)]
    found = truncation(rows, DataConfig(max_length=512), limit=2048)
    assert (found.rows_cut, found.rows_dropped, found.tokens_cut, found.keeping["90"]) == (1, 1, 1000, 1000)
    assert " rows and drops 1 of these (" in str(found)


@pytest.mark.parametrize("max_prompt", [None, 7])
def test_a_pair_is_cut_by_the_rule_of_the_examples(max_prompt):
    rng = np.random.default_rng(0)
    sizes = np.array([*rng.integers(1, 30, (3, 200)), [-1] * 200])
    for length in (2, 9, 16, 31, 60):
        cut = [truncate_pair([7] * p, [8] * c, [9] * r, length, max_prompt, None) for p, c, r, _ in sizes.T]
        assert kept_tokens(sizes, length, max_prompt).tolist() == [sum(map(len, kept)) for kept in cut]
