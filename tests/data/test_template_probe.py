"""What a chat template does is found with test conversations: refused, a warning, or a note."""

import re

import pytest
from tokenizer_families import CHATML, FAMILIES, GEMMA, IM, LLAMA3_WORDS, byte_level, chat, split

from lowlevel.data.rendering import RenderError
from lowlevel.data.report import template_lines
from lowlevel.errors import ConfigError

WRITTEN, OPENING = "m['content']", "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OF_USER = "(m['content'] | {} if m['role'] == 'user' else m['content'])"
LOOP, THINKING = "for m in messages", "m['content'].split('</think>')[-1]"
SYSTEM_FIRST = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
CLOSING = "{{ '' if add_generation_prompt else eos_token }}"
BLANK_THOUGHT = "('<think></think>' if m['role'] == 'assistant' else '') + m['content']"
PARTS = "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
ALTERNATING = "{% if loop.index0 % 2 != (m['role'] == 'assistant') | int %}{{ raise_exception('roles') }}{% endif %}"
PAIR = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "a"}]


def changed(*replacements, before="") -> str:
    template = CHATML
    for old, new in replacements:
        assert old in template
        template = template.replace(old, new)
    return before + template


def built(template, core=None):
    return chat(core or byte_level([split(LLAMA3_WORDS)]), template, special=IM)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (changed((WRITTEN + " + ", "'' }}" + PARTS + "{{ ")), "of assistant messages (it takes content in parts only"),
        (changed((WRITTEN, OF_USER.format("replace(m['content'], '')"))), "of user messages; data.chat_template_from"),
        (changed((WRITTEN, "(m['content'] if m['role'] == 'user' else '')")), "of assistant messages; data."),
        (changed((WRITTEN, "m['content'] | upper")), "of assistant messages;"),
        (changed((WRITTEN, "m['content'] | replace('\n', ' ')")), "of assistant messages;"),
        (changed((WRITTEN, "m['content'] | e")), "of assistant messages;"),
        (changed((WRITTEN, "m['content'] | tojson")), "of assistant messages;"),
        (changed((LOOP, "for m in tools")), "unusable chat template: the chat template refuses the row"),
    ],
    ids=["parts", "no user", "no reply", "upper", "one line", "escaped", "json", "tools"],
)  # fmt: skip
def test_a_template_that_leaves_texts_out_is_refused(template, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        built(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "end", "warning"),
    [
        (CHATML, "<|im_end|>", ""),
        (CHATML.replace(OPENING, ""), "<|im_end|>", 'ignores add_generation_prompt: "<|im_start|>assistant\\n" is'),
        (CHATML.replace(OPENING, "{{ '<|im_start|>assistant\n' }}"), "<|im_end|>", ""),
        (changed(("<|im_end|>", "")), "", 'no special token ends a reply (after it: "\\n")'),
        (changed(("<|im_end|>", "[END]")), "", 'no special token ends a reply (after it: "[END]\\n")'),
        (changed(("<|im_end|>", "")).replace(OPENING, "{{ '<|im_start|>assistant\n' }}"), "", "no special token ends"),
        (changed(("<|im_end|>", "")) + CLOSING, "</s>", "</s> ends only the last"),
    ],
    ids=["usual", "no opening", "always opens", "no end", "end as text", "no end, always opens", "one end"],
)  # fmt: skip
def test_the_beginning_and_the_end_of_a_reply(template, end, warning):
    found = built(template).chat_template
    assert found.end_of_turn == end
    assert len(found.warnings) == bool(warning) and all(warning in line for line in found.warnings)


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (GEMMA.replace("<end_of_turn>", "<|im_end|>"), "refuses system messages; removes blanks around texts"),
        (changed((LOOP, LOOP + " if m['role'] != 'system'")), "leaves out system messages"),
        (changed((LOOP, LOOP + " if m['role'] != 'tool'")), "leaves out tool messages"),
        (changed((LOOP, "for m in messages[-2:]")), "leaves out system messages; leaves out earlier turns"),
        (changed((LOOP + " %}", LOOP + " %}" + ALTERNATING)), "refuses system messages; refuses two user messages"),
        (changed((WRITTEN, OF_USER.format("lower"))), "changes the text of user messages"),
        (changed((WRITTEN, THINKING)), "removes the <think> part of every reply"),
        (changed((WRITTEN, f"(m['content'] if loop.last else {THINKING})")), "removes the <think> part of earlier"),
        (changed((WRITTEN, BLANK_THOUGHT)), 'begins every reply with "<think></think>"'),
        (changed(before=DEFAULT), 'adds the system message "Be kind."'),
        (changed(before=SYSTEM_FIRST), "needs a system message"),
        (changed(before="{{ strftime_now('%d %b %Y') }}"), "prints the date 2024-07-26 (data.template_date)"),
    ],
)  # fmt: skip
def test_other_peculiarities_are_notes(template, note):
    found = built(template).chat_template
    assert "; ".join(found.notes).startswith(note) and not found.warnings


def test_usual_templates_have_nothing_to_say():
    for family in ("phi 3", "zephyr", "llama 2", "mistral 0.3", "qwen 2.5", "gpt2", "falcon"):
        found = FAMILIES[family]().chat_template
        assert not found.notes + found.warnings, family


@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_a_reply_without_its_text_makes_the_row_unusable(run, write, supervise):
    """Only the reply's own characters count: "a" is in <|im_start|>assistant, too."""
    template = changed((WRITTEN, "(m['content'] if m['content'] | length > 1 else '')"))
    rows = [{"messages": [PAIR[0], {**PAIR[1], "content": text}]} for text in (" There ", "a")]
    for tokenizer in (built(template), built(template.replace(OPENING, ""))):
        report = run(write(*rows), tokenizer=tokenizer, supervise=supervise, on_bad_row="skip").report.train
        (dropped,) = report.dropped.values()
        said = 'train.jsonl:2: the chat template leaves out or changes a part of the reply (turn 2): "a" became ""; '
        assert dropped.first[0].startswith(said)
        (bad,) = tokenizer.encode_pairs([(PAIR[:1], "a", "There")], supervise)
        assert isinstance(bad, RenderError) and "(turn 2)" in str(bad)


def test_thoughts_may_move_but_not_vanish():
    reply = {"role": "assistant", "content": "<think>so</think>yes"}
    moved = changed((WRITTEN, "m['content'] | replace('<think>', '<think>\n') | replace('</think>', '\n</think>\n\n')"))
    for template, kept in ((moved, True), (changed((WRITTEN, THINKING)), False)):
        (encoded,) = built(template).encode_conversations([[PAIR[0], reply]])
        assert isinstance(encoded, RenderError) != kept


def test_a_refused_system_message_says_what_to_do(run, write):
    system = {"role": "system", "content": "Be brief."}
    rows, tokenizer = write({"messages": PAIR}, {"messages": [system, *PAIR]}), FAMILIES["gemma"]()
    report = run(rows, tokenizer=tokenizer, on_bad_row="skip").report
    (line,) = report.train.dropped["chat template"].first
    assert "refuses the row: System role not supported (it takes no system messages: put their text into the" in line
    assert template_lines(report) == ["template   refuses system messages; removes blanks around texts"]
