"""Chat templates and tokens: exact text of the recipe, supervised spans, BOS, boundaries inside a token."""

import datetime
import subprocess
import sys

import pytest
from tokenizers import pre_tokenizers

from lowlevel.config.data import DataConfig
from lowlevel.data.rendering import APART, CHANGED, CROSSED, ChatTokenizer
from lowlevel.data.report import not_learned, tokenizer_report
from lowlevel.data.templates import RenderError
from lowlevel.data.tokenizer import chat_tokenizer, load_chat_tokenizer
from lowlevel.errors import ConfigError
from lowlevel.verification.masking import expected_sequences, truncated

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
TALK = [USER, REPLY, {"role": "user", "content": "more"}, {"role": "assistant", "content": "ok"}]


def encode_conversation(tokenizer, messages):
    return or_raise(tokenizer.encode_conversations([messages])[0])


def encode_pair(tokenizer, prompt, supervise) -> tuple[list[int], list[int]]:
    """Prompt ids and completion ids of REPLY."""
    reply = REPLY["content"]
    pair = or_raise(tokenizer.encode_pairs([(prompt, reply, reply)], supervise)[0])
    return pair.prompt_ids, pair.chosen_ids


def or_raise(result):
    if isinstance(result, RenderError):
        raise result
    return result


def supervised_text(tokenizer, encoded) -> list[str]:
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.replies]


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize(("supervise", "end"), [("assistant", "</s>"), ("all", "</s>\n")])
def test_the_recipes_prompt_and_completion_character_for_character(tinyllama, system, supervise, end):
    prompt = [{"role": "system", "content": system}, USER]
    prompt_ids, completion_ids = encode_pair(tinyllama, prompt, supervise)
    assert tinyllama.decode(prompt_ids) == f"<s><|system|>\n{system}</s>\n<|user|>\nhi</s>\n<|assistant|>\n"
    assert tinyllama.decode(completion_ids) == f"yo{end}"
    assert tinyllama.encode_prompt(prompt) == prompt_ids


def test_replies_end_with_the_end_of_turn_token_and_not_with_the_newline(tinyllama, chatml, monkeypatch):
    """Found by the offsets of their tokens: no prompt is tokenised apart."""
    monkeypatch.delattr(ChatTokenizer, "_by_prefixes")
    for tokenizer, end in ((tinyllama, "</s>"), (chatml, "<|im_end|>")):
        encoded = encode_conversation(tokenizer, TALK)
        assert supervised_text(tokenizer, encoded) == [f"yo{end}", f"ok{end}"]
        assert tokenizer.end_of_turn_id == tokenizer.tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize(
    ("inside", "rest"),
    [
        ("m['content'] + '<|im_end|>'", "\n"),
        ("m['content'] + '<|im_end|>\n'", ""),
        ("m['content']", "<|im_end|>\n"),
    ],
    ids=["whole reply", "with the newline", "content alone"],
)
def test_generation_markers_give_the_same_spans_as_turn_by_turn_rendering(chatml, inside, rest):
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ " + inside + " }}{% endgeneration %}{{ '" + rest + "' }}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    other = chat_tokenizer(chatml.tokenizer, marked)
    assert encode_conversation(other, TALK) == encode_conversation(chatml, TALK)


def test_a_batch_gives_what_single_calls_give_and_keeps_errors_in_place(chatml, kit):
    refusing = kit.CHATML + "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not like this') }}{% endif %}"
    tokenizer = chat_tokenizer(chatml.tokenizer, refusing)
    first, bad, last = tokenizer.encode_conversations([TALK, [{**USER, "content": "no"}, REPLY], [USER, REPLY]])
    assert (first, last) == (encode_conversation(chatml, TALK), encode_conversation(chatml, [USER, REPLY]))
    assert isinstance(bad, RenderError)
    assert str(bad) == "the chat template refuses the row: not like this"


@pytest.mark.parametrize("template_writes_bos", [False, True])
@pytest.mark.parametrize("tokenizer_adds_bos", [False, True])
def test_never_two_bos(kit, template_writes_bos, tokenizer_adds_bos):
    raw = kit.byte_tokenizer(bos="<s>") if tokenizer_adds_bos else kit.byte_tokenizer(special=("<s>",))
    template = ("{{ '<s>' }}" if template_writes_bos else "") + kit.TINYLLAMA
    tokenizer = chat_tokenizer(raw, template)
    bos = raw.convert_tokens_to_ids("<s>")
    pair = encode_pair(tokenizer, [USER], "all")
    for ids in (encode_conversation(tokenizer, TALK).input_ids, tokenizer.encode_prompt([USER]), pair[0] + pair[1]):
        assert ids.count(bos) == (template_writes_bos or tokenizer_adds_bos)
        assert (ids[0] == bos) == (template_writes_bos or tokenizer_adds_bos)


def test_a_reply_that_merges_with_the_prompts_newline_is_tokenised_apart(chatml):
    """The byte tokenizer merges two newlines into one token, so no token starts where this reply starts."""
    reply = {"role": "assistant", "content": "\nhm"}
    (pair,) = chatml.encode_pairs([([USER], "\nhm", "plain")], "assistant")
    assert pair.prompt_ids == chatml.encode_prompt([USER])
    assert chatml.decode(pair.chosen_ids) == "\nhm<|im_end|>"
    assert pair.warnings[APART] == 1
    encoded = encode_conversation(chatml, [USER, reply])
    assert encoded.input_ids[: encoded.replies[0][0]] == pair.prompt_ids
    assert supervised_text(chatml, encoded) == ["\nhm<|im_end|>"]
    assert encoded.warnings[APART] == 1
    assert encode_conversation(chatml, TALK).warnings[APART] == 0


def test_sentencepiece_puts_no_space_before_a_completion(kit):
    tokenizer = chat_tokenizer(kit.sentencepiece(), kit.TINYLLAMA)
    (pair,) = tokenizer.encode_pairs([([USER], "yo", " yo")], "assistant")
    texts = [tokenizer.tokenizer.convert_ids_to_tokens(ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
    assert texts == [["y", "o", "</s>"], ["▁", "y", "o", "</s>"]]
    assert tokenizer.tokenizer.convert_ids_to_tokens(pair.prompt_ids[-2:]) == [">", "<0x0A>"]
    assert tokenizer._continue("yo") == pair.chosen_ids[:2]
    encoded = encode_conversation(tokenizer, TALK)
    assert supervised_text(tokenizer, encoded) == ["yo</s>", "ok</s>"]


def test_emoji_and_eos_in_the_text_keep_spans_exact(chatml):
    talk = [{**USER, "content": "é<|im_end|>😀"}, {**REPLY, "content": "😀 <|im_end|> é"}]
    encoded = encode_conversation(chatml, talk)
    assert supervised_text(chatml, encoded) == ["😀 <|im_end|> é<|im_end|>"]


def test_a_prompt_that_is_no_prefix_is_refused(chatml, kit):
    thinking = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    template = kit.CHATML.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", thinking)
    tokenizer = chat_tokenizer(chatml.tokenizer, template)
    with pytest.raises(RenderError, match="prompt tokens are not a prefix of prompt.answer tokens"):
        encode_conversation(tokenizer, TALK)
    with pytest.raises(RenderError, match="not a prefix"):
        encode_pair(tokenizer, [USER], "all")


@pytest.mark.parametrize("form", ["plain", "marked", "marked late", "marked with the header"])
def test_a_prompt_ends_in_the_tokens_that_generation_starts_from(run, write, kit, form):
    """Before a word, GPT-2's pattern splits two newlines; at the end of a prompt they are one token."""
    raw = kit.byte_tokenizer(eos="<|im_end|>", special=("<|im_start|>",))
    raw.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    header, content = "'<|im_start|>' + m['role'] + '\n\n'", "m['content'] + '<|im_end|>\n'"
    written = {
        "plain": f"{{{{ {header} + {content} }}}}",
        "marked": f"{{{{ {header} }}}}{{% generation %}}{{{{ {content} }}}}{{% endgeneration %}}",
        "marked late": f"{{{{ {header} + '>' }}}}{{% generation %}}{{{{ {content} }}}}{{% endgeneration %}}",
        "marked with the header": f"{{% generation %}}{{{{ {header} + {content} }}}}{{% endgeneration %}}",
    }[form]
    template = (
        f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}{{{{ {header} + {content} }}}}{{% else %}}{written}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
    )
    rows = [kit.chat("q", "yo"), kit.chat("q", "\nyo"), kit.chat("q", "ok", "more", "a")]
    tokenizer = chat_tokenizer(raw, template)
    data = run(write(*rows), tokenizer=tokenizer)
    assert data.report.train.warnings == {APART: 3 if form == "marked late" else 2, CROSSED: 1}
    assert not_learned(data.report) == [f"{CROSSED}: 1 train"]
    for example, row in zip(data.train, rows, strict=True):
        start = int((example.labels >= 0).argmax())
        assert example.input_ids[:start].tolist() == tokenizer.encode_prompt(row["messages"][:-1])
    assert run(write(rows[2]), tokenizer=tokenizer, supervise="all").report.train.warnings == {APART: 1}


FORGETFUL = (  # as Qwen 3: removes a reply's <think> part once another question follows
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSED = (  # as Phi 3: the conversation ends with another token than a reply
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '</s>' }}"
)


def test_a_reply_that_later_turns_change_is_context_alone(run, write, chatml, kit):
    """The changed form lacks the reply's <think> part, so it is not what the model should generate."""
    tokenizer = chat_tokenizer(chatml.tokenizer, FORGETFUL)
    encoded = encode_conversation(tokenizer, TALK)
    assert supervised_text(tokenizer, encoded) == ["<think></think>ok<|im_end|>"]
    assert encoded.input_ids[: encoded.replies[0][0]] == tokenizer.encode_prompt(TALK[:3])
    rows = write({"messages": TALK}, kit.chat("a", "b"))
    report = run(rows, tokenizer=tokenizer).report
    assert (report.train.warnings, report.train.replies) == ({CHANGED: 1}, 2)
    assert not_learned(report) == [f"{CHANGED}: 1 train"]
    assert run(rows, tokenizer=tokenizer, supervise="all").report.train.warnings == {}


def test_the_token_that_ends_a_reply_is_not_the_one_that_ends_the_whole(kit):
    raw = kit.byte_tokenizer(special=("<|end|>", "<|user|>", "<|assistant|>"))
    tokenizer = chat_tokenizer(raw, CLOSED)
    assert tokenizer.end_of_turn_id == raw.convert_tokens_to_ids("<|end|>")
    encoded = encode_conversation(tokenizer, TALK)
    assert supervised_text(tokenizer, encoded) == ["yo<|end|>", "ok<|end|>"]
    assert tokenizer.decode(encoded.input_ids).endswith("ok<|end|>\n</s>")
    for supervise, completion in (("assistant", "yo<|end|>"), ("all", "yo<|end|>\n</s>")):
        assert tokenizer.decode(encode_pair(tokenizer, [USER], supervise)[1]) == completion


@pytest.mark.parametrize("template", [FORGETFUL, CLOSED])
def test_verify_derives_the_same_targets_from_such_templates(run, write, kit, template):
    raw = kit.byte_tokenizer(special=("<|end|>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>"))
    tokenizer, path = chat_tokenizer(raw, template), write({"messages": TALK}, {"messages": TALK[:2]})
    for example in run(path, tokenizer=tokenizer).train:
        expected = expected_sequences(DataConfig(source=path), "sft", tokenizer, (example,))[example.row]
        ((inputs, targets),) = truncated(example, expected, False) or []
        assert inputs.tolist() == example.input_ids[:-1].tolist()
        assert targets.tolist() == example.labels[1:].tolist()
        assert all(example.input_ids[end] == tokenizer.end_of_turn_id for end in expected[0].ends)


def test_a_template_without_end_of_turn_token(chatml):
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = chat_tokenizer(chatml.tokenizer, plain)
    assert tokenizer.end_of_turn_id is None
    assert supervised_text(tokenizer, encode_conversation(tokenizer, TALK)) == ["yo\n", "ok\n"]


def test_padding_id_falls_back_and_never_decides(kit):
    raw = kit.byte_tokenizer()
    assert chat_tokenizer(raw, kit.TINYLLAMA).pad_id == raw.unk_token_id
    raw.pad_token = "</s>"
    tokenizer = chat_tokenizer(raw, kit.TINYLLAMA)
    assert tokenizer.pad_id == tokenizer.eos_id
    encoded = encode_conversation(tokenizer, [USER, REPLY])
    assert encoded.input_ids[encoded.replies[0][1] - 1] == tokenizer.pad_id  # it is still learned


def test_loading_a_folder_and_where_its_template_comes_from(tmp_path, kit):
    raw = kit.byte_tokenizer(eos="<|im_end|>", special=("<|im_start|>",))
    raw.save_pretrained(tmp_path / "bare")
    raw.chat_template = kit.CHATML
    raw.save_pretrained(tmp_path / "chat")
    (tmp_path / "t.jinja").write_text(kit.TINYLLAMA)
    bare, with_template = str(tmp_path / "bare"), str(tmp_path / "chat")
    assert load_chat_tokenizer(with_template, None, None).chat_template.text == kit.CHATML
    assert load_chat_tokenizer(bare, None, with_template).chat_template.text == kit.CHATML
    from_file = load_chat_tokenizer(with_template, None, str(tmp_path / "t.jinja"))
    assert from_file.chat_template.text == kit.TINYLLAMA
    assert from_file.chat_template.sha256 != load_chat_tokenizer(with_template, None, None).chat_template.sha256
    with pytest.raises(ConfigError, match="no chat template; set data.chat_template_from"):
        load_chat_tokenizer(bare, None, None)


@pytest.mark.parametrize(
    "text", ["{% for %}", "{{ raise_exception('no') }}", "{{ 1 // 0 }}", "{{ ''.__class__.mro() }}"]
)
def test_unusable_templates_are_config_errors(kit, text):
    with pytest.raises(ConfigError, match="unusable chat template"):
        chat_tokenizer(kit.byte_tokenizer(), text)


def test_no_eos_token(kit):
    with pytest.raises(ConfigError, match="has no eos token; completions would never end"):
        chat_tokenizer(kit.byte_tokenizer(eos=None), kit.TINYLLAMA)


@pytest.mark.parametrize("missing", ["folder", "file.jinja"])
def test_missing_files_are_config_errors(tmp_path, kit, missing):
    kit.byte_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=missing):
        load_chat_tokenizer(str(tmp_path / "bare"), None, str(tmp_path / missing))


def test_importing_the_package_is_light():
    heavy = "transformers datasets torch pyarrow pandas jinja2".split()
    code = f"import sys, lowlevel.data.prepare; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_first_token_is_never_a_target(run, write):
    example = run(write({"messages": TALK}), supervise="all").train[0]
    assert example.labels[0] == -100
    assert (example.labels[1:] == example.input_ids[1:]).all()


def test_a_template_that_asks_for_todays_date_gets_the_run_files(tmp_path, kit, chatml):
    """Otherwise the same rows would give other tokens tomorrow, and no hash would show it."""
    dated = "{{ strftime_now('%d %b %Y') + '\n' }}" + kit.CHATML
    (tmp_path / "dated.jinja").write_text(dated)
    plain, date = chatml.decode(encode_conversation(chatml, TALK).input_ids), datetime.date(2026, 11, 24)
    for tokenizer, printed in (
        (chat_tokenizer(chatml.tokenizer, dated), "26 Jul 2024"),
        (chat_tokenizer(chatml.tokenizer, dated, date=date), "24 Nov 2026"),
        (load_chat_tokenizer("demo", None, str(tmp_path / "dated.jinja"), date), "24 Nov 2026"),
    ):
        text = tokenizer.chat_template.render(TALK, add_generation_prompt=False)
        assert text == f"{printed}\n{plain}"
        assert tokenizer_report(tokenizer)["template_date"] == str(tokenizer.chat_template.date)
    assert tokenizer_report(chatml)["template_date"] is None
