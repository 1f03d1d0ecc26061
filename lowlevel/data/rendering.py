"""From messages to token ids, for training and generation: the only place that combines chat template and tokenizer.

A conversation is rendered to text and tokenised once. Character offsets say which tokens the assistant wrote.
"""

from __future__ import annotations

import os.path
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lowlevel.data.templates import ChatTemplate, Message, RenderError, Rendering, Reply, left_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], list[tuple[int, int]]]
# The index of a prompt's last special token (0: none) and the ids from there to its end. Tokens do not cross a special
# token, so these ids are independent of the text before it.
Opening = tuple[int, list[int]]
# messages of the prompt, chosen and rejected: each a text, or a message with tool calls
Pair = tuple[Sequence[Message], str | Message, str | Message]
Tools = Sequence[Message]
PLAIN: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}  # ids alone
OPENING = 200  # characters at the end of a prompt that are searched for its last special token
# Kinds of warnings about tokens. APART: a token of the whole text crosses the beginning of the last reply, so prompt
# and reply were tokenised on their own, as in generation. CROSSED: the same for an earlier reply, which is context:
# after a cut there, later replies would follow other tokens than in generation.
APART = "prompt and reply tokenised apart"
CROSSED = "replies not learned: a token crosses their beginning (split conversations to learn them)"
CHANGED = "replies not learned: the chat template changes them in later turns (split conversations to learn them)"
LEFT_OUT = "messages left out or changed by the chat template"
TOOLS_LEFT_OUT = 'column "tools" ignored (the chat template does not write it)'


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation, before labels and truncation."""

    input_ids: list[int]  # (L,)
    replies: list[tuple[int, int]]  # half-open token ranges of the assistant's replies, with end-of-turn tokens
    warnings: Counter[str]  # number of boundaries, messages or replies by kind
    context: tuple[tuple[int, int], ...] = ()  # replies that are not to be learned
    turns: tuple[int, ...] = ()  # index of the message of each of `replies`


@dataclass(frozen=True)
class EncodedPair:
    """A prompt, (P,) ids, and its two completions, (C,) and (R,); `warnings` as in Encoded."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    warnings: Counter[str]


@dataclass(frozen=True)
class ChatTokenizer:
    """A fast tokenizer with the chat template of this run."""

    tokenizer: PreTrainedTokenizerBase  # used for tokenizing only, without its template and padding
    chat_template: ChatTemplate
    bos_id: int | None  # first token of every sequence; None if the tokenizer adds none by default
    eos_id: int
    pad_id: int  # only fills tensors: padding is masked by length, never by id
    end_of_turn_id: int | None  # last special token of a reply; None if the template writes none
    special_tokens: tuple[str, ...]  # texts that the tokenizer turns into control tokens

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a reply: end of sequence, and the template's end of turn."""
        return sorted({i for i in (self.eos_id, self.end_of_turn_id) if i is not None})

    def encode_conversations(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Tools] | None = None,
        context: Sequence[frozenset[int]] | None = None,
    ) -> list[Encoded | RenderError]:
        """Tokenise a batch; a conversation that cannot be rendered gives its error instead.

        For each conversation, `tools` are given to the chat template, and `context` has the indices of assistant
        messages that are not to be learned.
        """
        tools, context = tools or [()] * len(conversations), context or [frozenset()] * len(conversations)
        templates = [self.chat_template.with_tools(given) for given in tools]
        rendered = [_or_error(t.text_and_replies, m) for t, m in zip(templates, conversations, strict=True)]
        usable = [item for item in rendered if not isinstance(item, RenderError)]
        tokens, openings = iter(self._tokenise([item.text for item in usable])), iter(self._openings(usable))
        encoded = [
            item if isinstance(item, RenderError) else self._encoded(item, next(tokens), next(openings), messages, said)
            for item, messages, said in zip(rendered, conversations, context, strict=True)
        ]
        return self._with_unread_tools(encoded, tools)

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Token ids that generation starts from: messages and the opening of a reply. Raises RenderError."""
        text = self.chat_template.with_tools(tools).render(messages, add_generation_prompt=True)
        return self._with_bos(self._ids([text])[0])

    def encode_pairs(
        self, pairs: Sequence[Pair], supervise: str, tools: Sequence[Tools] | None = None
    ) -> list[EncodedPair | RenderError]:
        """Tokenise prompts with their completions; a pair that cannot be rendered gives its error instead.

        With supervise "assistant", a completion ends with its end-of-turn token; with "all", with the template's text
        after it. Prompt ids are those of `encode_prompt`. A completion is cut from the tokens of prompt + completion;
        if a token crosses the boundary, it is tokenised separately, as in generation.
        """
        tools = tools or [()] * len(pairs)
        rendered = [_or_error(self._pair_texts, *given, supervise) for given in zip(pairs, tools, strict=True)]
        texts = [text for item in rendered if not isinstance(item, RenderError) for text in item]
        ids = iter(self._ids(texts))
        encoded = [
            item if isinstance(item, RenderError) else self._cut_pair(item, (next(ids), next(ids), next(ids)), pair)
            for item, pair in zip(rendered, pairs, strict=True)
        ]
        return self._with_unread_tools(encoded, tools)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _with_unread_tools(self, encoded: list[Any], tools: Sequence[Tools]) -> list[Any]:
        """Count the rows whose tools the template has no place for."""
        unread = re.search(r"\btools\b", self.chat_template.text) is None
        for item, given in zip(encoded, tools, strict=True):
            if given and unread and not isinstance(item, RenderError):
                item.warnings[TOOLS_LEFT_OUT] = 1
        return encoded

    def _pair_texts(self, pair: Pair, tools: Tools, supervise: str) -> tuple[str, str, str]:
        """Texts of prompt, prompt + chosen and prompt + rejected."""
        (prompt, chosen, rejected), template = pair, self.chat_template.with_tools(tools)
        with_chosen, cut = template.text_and_cut(prompt, chosen, supervise)
        return with_chosen[:cut], with_chosen, template.text_and_cut(prompt, rejected, supervise)[0]

    def _cut_pair(self, texts: Sequence[str], ids: Sequence[list[int]], pair: Pair) -> EncodedPair:
        """Cut completions from texts and ids of prompt, prompt + chosen and prompt + rejected."""
        prefix, prompt = texts[0], ids[0]
        straddles = [whole[: len(prompt)] != prompt for whole in ids[1:]]
        chosen, rejected = (
            self._continue(text[len(prefix) :]) if apart else whole[len(prompt) :]
            for text, whole, apart in zip(texts[1:], ids[1:], straddles, strict=True)
        )
        warnings = Counter({APART: sum(straddles), LEFT_OUT: left_out(prefix, pair[0])})
        return EncodedPair(self._with_bos(prompt), chosen, rejected, warnings)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without tokens that the tokenizer adds."""
        return self.tokenizer(list(texts), **PLAIN)["input_ids"] if texts else []

    def _tokenise(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of each text, and where in it each token begins and ends, without tokens that the tokenizer adds."""
        if not texts:
            return []
        batch = self.tokenizer(list(texts), return_offsets_mapping=True, **PLAIN)
        return list(zip(batch["input_ids"], batch["offset_mapping"], strict=True))

    def _continue(self, text: str) -> list[int]:
        """Ids of text that follows other text.

        Some tokenizers put a space before the first word of a text, but not after a newline. A newline can merge with
        the text; then a letter is tried.
        """
        before = self._ids(["\n", "a"])
        for first, ids in zip(before, self._ids(["\n" + text, "a" + text]), strict=True):
            if ids[: len(first)] == first:
                return ids[len(first) :]
        return self._ids([text])[0]

    def _encoded(
        self,
        rendered: Rendering,
        tokens: Tokens,
        openings: Sequence[Opening],
        messages: Sequence[Message],
        context: frozenset[int],
    ) -> Encoded:
        """Find the tokens of each reply; its context must be exactly the tokens of its prompt, as in generation.

        Offsets are only a guess: they can lack blanks, or have those that a special token takes from the text after it.
        """
        text, (ids, offsets), apart = rendered.text, tokens, False
        found = []
        for reply, (place, opening) in zip(rendered.replies, openings, strict=True):
            first, start, end = (bisect_left(offsets, (at,)) for at in (place, reply.start, reply.end))
            closed = end > 0 and (ids[end - 1] == self.end_of_turn_id or offsets[end - 1][1] <= reply.end)
            if closed and ids[first:start] == opening:
                found.append((start, end, reply.turn))
        if len(found) < len(rendered.replies):
            ids, found, apart = self._by_prefixes(text, rendered.replies, ids)
        crossed = len(rendered.replies) - len(found)
        input_ids = self._with_bos(ids)
        shift = len(input_ids) - len(ids)
        spans = [(start + shift, end + shift, turn) for start, end, turn in found if start < end]
        learned = [span for span in spans if span[2] not in context]
        replies, turns = [(start, end) for start, end, _ in learned], tuple(turn for _, _, turn in learned)
        said = tuple((start, end) for start, end, turn in spans if turn in context)
        lost = left_out(text, [message for message in messages if message["role"] != "assistant"])
        counts = {APART: int(apart), CROSSED: crossed, CHANGED: rendered.changed, LEFT_OUT: lost}
        return Encoded(input_ids, replies, Counter(counts), said, turns)

    def _by_prefixes(
        self, text: str, replies: Sequence[Reply], ids: list[int]
    ) -> tuple[list[int], list[tuple[int, int, int]], bool]:
        """As the offsets in `_encoded`, by tokenising every prompt; `ids` are those of the whole text.

        Returns ids, ranges and turns of replies whose prompts they begin with, and whether the last reply was cut off.
        """
        last = replies[-1]
        prompts, wholes = (self._ids([text[:end] for end in cuts]) for cuts in list(zip(*replies, strict=True))[:2])
        apart = ids[: len(prompts[-1])] != prompts[-1]
        if apart:
            ids = prompts[-1] + self._continue(text[last.start :])
            wholes[-1] = prompts[-1] + self._continue(text[last.start : last.end])
        found = [
            (len(prompt), len(os.path.commonprefix([whole, ids])), reply.turn)
            for prompt, whole, reply in zip(prompts, wholes, replies, strict=True)
            if ids[: len(prompt)] == prompt
        ]
        return ids, found, apart

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.special_tokens)) or "(?!)")

    def _openings(self, rendered: Sequence[Rendering]) -> list[list[Opening]]:
        """For each reply the end of its prompt; most prompts of a batch have the same."""
        places = [[self._last_special(item.text, reply.start) for reply in item.replies] for item in rendered]
        texts = [
            [item.text[place : reply.start] for place, reply in zip(begins, item.replies, strict=True)]
            for begins, item in zip(places, rendered, strict=True)
        ]
        different = list(dict.fromkeys(text for row in texts for text in row))
        ids = dict(zip(different, self._ids(different), strict=True))
        return [
            [(place, ids[text]) for place, text in zip(*row, strict=True)] for row in zip(places, texts, strict=True)
        ]

    def _last_special(self, text: str, end: int) -> int:
        """Index of the last special token in text[:end]; 0 if it has none."""
        for start in (max(end - OPENING, 0), 0):
            found = [match.start() for match in self._special.finditer(text, start, end)]
            if found:
                return found[-1]
        return 0

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Add BOS if the tokenizer adds one by default and the template has not written it."""
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]


def _or_error(render: Callable[..., Any], *args: Any) -> Any:
    """Return the error instead of a result, so that the rest of a batch continues."""
    try:
        return render(*args)
    except RenderError as error:
        return error
