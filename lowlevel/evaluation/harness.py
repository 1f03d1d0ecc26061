"""A run as a model of the LM Evaluation Harness (the package lm-eval, extra `eval`).

Texts become tokens as in lm-eval's own `hf` model, so both give the same numbers: tests/evaluation compares them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lowlevel.data.rendering import PLAIN
from lowlevel.errors import ConfigError
from lowlevel.evaluation.continuations import Ids, likelihoods
from lowlevel.evaluation.stopping import reply_texts
from lowlevel.running.reopening import LoadedRun
from lowlevel.sampling import Sampler, Sampling, build_sampler

MAX_GEN_TOKS = 256  # of a task that sets none, as in `hf`
UNDERSTOOD = ("until", "max_gen_toks", "do_sample", "temperature", "seed")
NEUTRAL = {"top_p": 1, "top_k": 0, "num_beams": 1, "repetition_penalty": 1}  # values that change nothing
NARROWING = ("top_p", "top_k", "min_p", "typical_p")  # change nothing in greedy replies


class RunLM(TemplateLM):
    """The active stage of a run; `run.activate` switches it."""

    def __init__(self, run: LoadedRun) -> None:
        super().__init__()
        self.run = run
        self.tokenizer = run.tokenizer.tokenizer
        self.max_length = int(resolve_max_length(run.policy.causal_lm.config, self.tokenizer))

    @cached_property
    def sampler(self) -> Sampler:
        """One sampler for all stages and tasks: what it compiles and captures stays."""
        run = self.run
        return build_sampler(run.policy.model, run.policy.placement, run.tokenizer.stop_ids, run.opened.note)

    @property
    def eot_token_id(self) -> int:
        """End of sequence."""
        return self.run.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: BOS if there is one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Identity of the template, for lm-eval's cache of requests, which is not used here."""
        return self.run.tokenizer.chat_template.sha256

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The run's template."""
        return self.run.tokenizer.chat_template.text

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation with the opening of a reply; else its last message is a reply to be continued."""
        *before, last = chat_history
        template = self.run.tokenizer.chat_template
        if add_generation_prompt:
            return template.render(chat_history, add_generation_prompt=True)
        return template.render(before, add_generation_prompt=True) + last["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Token ids; BOS comes first if the tokenizer adds one, unless the text has it."""
        ids, bos = self.tokenizer(string, **PLAIN)["input_ids"], self.run.tokenizer.bos_id
        return ids if bos is None or add_special_tokens is False or ids[:1] == [bos] else [bos, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], **kwargs: object
    ) -> Sequence[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return likelihoods(self.run.policy, pairs, self.max_length)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text, in windows of `max_length`; every token is predicted once."""
        windows = [
            (place, *make_disjoint_window(window))
            for place, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
        ]
        sums = [0.0] * len(requests)
        for (place, *_), (logp, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            sums[place] += logp
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """A reply to each context, up to its stop texts. Contexts lose their beginning if the reply needs the room."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        texts = [""] * len(requests)
        for given, places in groups.items():
            stops, sampling = generation_settings(json.loads(given))
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                asked = f"the task asks for {sampling.max_new_tokens} new tokens"
                raise ConfigError(f"{asked}, and the model has {self.max_length} positions: lower max_gen_toks")
            stops = handle_stop_sequences(stops, eos=self.tokenizer.decode([self.eot_token_id]))
            prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            made = reply_texts(self.sampler, self.run.tokenizer, prompts, stops, sampling)
            for place, text in zip(places, made, strict=True):
                texts[place] = text
        return texts


def generation_settings(given: Mapping[str, Any]) -> tuple[list[str], Sampling]:
    """Stop texts and sampling of a task's `generation_kwargs`. Raises ConfigError for what does not exist here."""
    kwargs: dict[str, Any] = {**normalize_gen_kwargs(dict(given), MAX_GEN_TOKS)}
    temperature = float(kwargs.get("temperature", 1.0)) if kwargs["do_sample"] else 0.0
    known = (*UNDERSTOOD, *(NARROWING if temperature == 0 else ()))
    other = [
        f"{name} = {value!r}" for name, value in kwargs.items() if name not in known and value != NEUTRAL.get(name)
    ]
    if other:
        raise ConfigError(f"a task generates with {', '.join(other)}, which lowlevel eval does not have")
    return kwargs["until"], Sampling(kwargs["max_gen_toks"], temperature, int(kwargs.get("seed", 0)))
