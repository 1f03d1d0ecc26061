"""How tokens are shown: each alone, on one line, with nothing hidden."""

import helpers
import pytest
from samples import FIRST_HOSTILE, HOSTILE
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lowlevel.data.tokenizer import chat_tokenizer, load_chat_tokenizer
from lowlevel.inspection.pieces import TokenPieces, breaks_line, visible


def sentencepiece() -> TokenPieces:
    """As Llama 2: "▁" for a space, bytes as <0x..> tokens."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *(f"<0x{i:02X}>" for i in range(256)), "▁the", "▁▁", "a", "é"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return TokenPieces(chat_tokenizer(fast, helpers.ZEPHYR))


def test_byte_level_pieces_are_text(pieces):
    ids = pieces.tokenizer.tokenizer("a b\n\tZ\r", add_special_tokens=False).input_ids
    assert pieces.texts(ids) == ["a", "·", "b", "⏎", "⇥", "Z", "␍"]
    assert [breaks_line(text) for text in pieces.texts(ids)] == [False, False, False, True, False, False, False]


def test_half_a_character_is_bytes(pieces):
    ids = pieces.tokenizer.tokenizer("é", add_special_tokens=False).input_ids
    assert pieces.texts(ids) == ["<0xC3>", "<0xA9>"]
    assert pieces.decode(ids) == "é"


def test_special_tokens_are_shown_as_they_are(pieces):
    assert pieces.texts([0, 1, 2]) == ["<unk>", "<s>", "</s>"]


def test_added_tokens_are_text_and_ids_beyond_the_tokenizer_are_named(pieces):
    assert pieces.text(FIRST_HOSTILE) == HOSTILE[0]
    assert pieces.text(FIRST_HOSTILE + 2) == "[red]{{·7·*·7·}}[/red]"
    assert pieces.text(310) == "<id=310>"


def test_an_added_token_with_a_line_break_stays_on_its_line():
    tokenizer = helpers.byte_tokenizer(HOSTILE)
    tokenizer.add_tokens([AddedToken("<x>\n\u202e", special=False, normalized=False)])
    assert TokenPieces(chat_tokenizer(tokenizer, helpers.ZEPHYR)).text(FIRST_HOSTILE + 3) == "<x>⏎<U+202E>"


def test_sentencepiece_pieces():
    pieces = sentencepiece()
    find = pieces.tokenizer.tokenizer.convert_tokens_to_ids
    shown = pieces.texts(find([token]).pop() for token in ("▁the", "▁▁", "▁", "a", "é", "<0x0A>", "<0xE2>", "</s>"))
    assert shown == ["·the", "··", "·", "a", "é", "<0x0A>", "<0xE2>", "</s>"]
    assert breaks_line("<0x0A>") and not breaks_line("<0xE2>")


def test_the_demo_tokenizer():
    pieces = TokenPieces(load_chat_tokenizer("demo", None, None))
    ids = pieces.tokenizer.encode_prompt([{"role": "user", "content": "Sure, that is first."}])
    assert "".join(pieces.texts(ids)) == "<|user|>⏎Sure,·that·is·first.</s>⏎<|assistant|>⏎"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("", "∅"),
        ("\u200b", "<U+200B>"),  # zero width
        ("a\u202eb", "a<U+202E>b"),  # right-to-left override
        ("\u00a0", "<U+00A0>"),
        ("\x1b[31m", "<U+001B>[31m"),  # a terminal's escape
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\u2028", "<U+2028>"),
        ("\udcff", "<0xFF>"),
        ("日本 語", "日本·語"),
    ],
)
def test_what_would_not_be_seen_is_named(text, shown):
    assert visible(text) == shown
