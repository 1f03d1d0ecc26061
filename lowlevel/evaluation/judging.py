"""`lowlevel judge`: which of two runs replies better, by a model on a server, or by a reward run.

A judge on a server reads each pair of conversations twice, once in either order, since judges favour one side (Zheng et
al., arXiv 2306.05685). Questions of two turns, as in their MT-Bench, are asked turn by turn, and judged as a whole.
Answers are written to a log before the next question's, and are not paid for again when the command is repeated.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lowlevel.config.given import GivenRows
from lowlevel.data.rows import Row
from lowlevel.durable import append_line, write_given_json
from lowlevel.errors import ConfigError, LowlevelError, how_many
from lowlevel.evaluation.endpoint import Endpoint, EndpointError
from lowlevel.evaluation.preference import Verdict, preferences
from lowlevel.evaluation.rows import read_rows
from lowlevel.heartbeat import working
from lowlevel.running.progress import lines_to
from lowlevel.running.replies import generate_replies, load_for_replies
from lowlevel.running.run_folder import check_reward_run
from lowlevel.running.scoring import load_reward_run, score_source
from lowlevel.sampling import Sampling

Message = dict[str, str]
# The verdict on each question, None if one of the orders has none; and what the result's file says about it.
Judged = tuple[list[Verdict | None], list[dict[str, Any]]]
WORKERS = 4  # requests at a time
READINGS = 3  # times that the judge is asked until its answer has a verdict
SCORES = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the conversation that was read first
VERDICT = re.compile(r"\[\[([ABC])\]\]")
TASK = """You compare two assistants that talked with the same user. Judge which one served the user better: right, \
relevant, complete, clear, and doing what was asked. Do not favour a conversation because it comes first, or a reply \
because it is long. Give your reasons in a few sentences. Then write the verdict on a line of its own: [[A]] if \
assistant A is better, [[B]] if assistant B is better, [[C]] if they are equally good or equally bad."""


@dataclass(frozen=True)
class Question:
    """What a user says, turn by turn."""

    turns: tuple[str, ...]
    system: str = ""


def judge_runs(
    dirs: tuple[Path, Path],
    prompts: Path,
    console: Console,
    *,
    endpoint: Endpoint | None = None,
    reward: Path | None = None,
    sampling: Sampling,
    price: tuple[float, float] | None = None,
    out: Path,
) -> dict[str, Any]:
    """Let two runs reply to the same questions, have their replies judged, and write the result to `out`.

    Args:
        dirs: run folders, adapters or merged models: A and B.
        prompts: file of questions, see `question_of`.
        console: receives the summary.
        endpoint, reward: the judge; one of them.
        sampling: of the replies.
        price: dollars for a million input tokens and a million output tokens, for the summary.
        out: JSON file; the judge's answers are beside it, in NAME_answers.jsonl.

    Raises ConfigError and DataError for unusable arguments, EndpointError if the server fails.
    """
    questions, answers = read_rows(prompts, question_of), out.with_name(f"{out.stem}_answers.jsonl")
    if reward:
        check_reward_run(reward)
    if missing := [folder for folder in dirs if not folder.is_dir()]:
        raise ConfigError(f"{missing[0]}: no such folder")
    if endpoint:  # a wrong URL, key or model is known before the replies are made
        with working("asking the judge whether it is ready"):
            endpoint.ask([{"role": "user", "content": "Answer with one word: ready"}])
    chats = [conversations(folder, questions, sampling, console) for folder in dirs]
    if endpoint:
        found, said = judged_by_endpoint(endpoint, chats, answers)
        judge: dict[str, Any] = {"url": endpoint.url, "model": endpoint.model, "usage": dict(endpoint.usage)}
    else:
        assert reward is not None
        found, said = judged_by_reward(reward, chats, console)
        judge = {"reward": str(reward)}
    verdicts = [one for one in found if one is not None]
    if not verdicts:
        raise LowlevelError(f"no verdict on any question: {answers} has what the judge said")
    result = {"a": str(dirs[0]), "b": str(dirs[1]), "judge": judge, "unreadable": len(questions) - len(verdicts)}
    result |= preferences(verdicts)
    asked = enumerate(zip(*chats, said, strict=True), 1)
    every = [{"question": number, "a": a, "b": b, **one} for number, (a, b, one) in asked]
    write_given_json(out, {**result, "conversations": every})
    console.print(summary(result, price), markup=False)
    kept = f"; the judge's answers, for which it is not asked again, are in {answers}" if endpoint else ""
    console.print(f"written to {out}{kept}", markup=False)
    return result


def summary(result: Mapping[str, Any], price: tuple[float, float] | None = None) -> str:
    """The result in a few lines."""
    rates = {"win rate of A, a tie counting one half": "win_rate"} | {"at equal lengths": "length_controlled_win_rate"}
    lines = [
        f"A {result['a']}, B {result['b']}: of {how_many(result['questions'], 'questions')} A won {result['won']:,}, "
        f"lost {result['lost']:,}, tied {result['tied']:,}",
        *(f"{name}: {_share(result[key])}" for name, key in rates.items()),
        "mean characters of the replies: A {a:.0f}, B {b:.0f}".format(**result["characters"]),
    ]
    if usage := result["judge"].get("usage"):
        first = result["first_wins"]
        lines.append(
            f"both orders agree on {result['orders_agree']:.0%} of the questions"
            + ("" if first is None else f"; the conversation that came first got {first:.0%} of the decisions")
        )
        cost = price and (usage["prompt_tokens"] * price[0] + usage["completion_tokens"] * price[1]) / 1e6
        lines.append(
            f"{how_many(usage['requests'], 'requests')} ({how_many(usage['retries'], 'retries')}), "
            f"{usage['prompt_tokens']:,} input and "
            f"{usage['completion_tokens']:,} output tokens" + ("" if cost is None else f", ${cost:.2f}")
        )
    if result["unreadable"]:
        lines.append(f"warning: {how_many(result['unreadable'], 'questions')} left out: no verdict in both orders")
    return "\n".join(lines)


def _share(one: Mapping[str, float | None]) -> str:
    low, high = one["low"], one["high"]
    ends = "" if low is None or high is None else f" (95 % interval {low:.1%} to {high:.1%})"
    return f"{one['value']:.1%}{ends}"


def question_of(row: Row) -> Question:
    """A row with "turns" (a list of texts) or "prompt", and "system" if there is one. Raises ValueError for others."""
    given: Mapping[str, Any] = row.columns
    turns, system = given.get("turns", [given.get("prompt")]), given.get("system") or ""
    if not (isinstance(turns, list) and turns and all(isinstance(one, str) and one.strip() for one in turns)):
        raise ValueError('needs "prompt", a text, or "turns", a list of texts')
    if not isinstance(system, str):
        raise ValueError('"system" must be a text')
    return Question(tuple(turns), system)


def conversations(
    model_dir: Path, questions: Sequence[Question], sampling: Sampling, console: Console
) -> list[list[Message]]:
    """The questions with the replies of a run, adapter or merged model, which is loaded for this only."""
    sampler, tokenizer = load_for_replies(model_dir, lines_to(console))
    chats = [[{"role": "system", "content": one.system}] if one.system else [] for one in questions]
    for turn in range(max(len(one.turns) for one in questions)):
        asked = [i for i, one in enumerate(questions) if turn < len(one.turns)]
        for i in asked:
            chats[i].append({"role": "user", "content": questions[i].turns[turn]})
        prompts = [tokenizer.encode_prompt(chats[i]) for i in asked]
        for i, reply in zip(asked, generate_replies(sampler, tokenizer, prompts, sampling), strict=True):
            chats[i].append({"role": "assistant", "content": reply.text})
    del sampler
    gc.collect()  # the model is in reference cycles, and the next one needs its memory
    return chats


def judged_by_reward(run_dir: Path, chats: Sequence[Sequence[list[Message]]], console: Console) -> Judged:
    """The conversation with the higher reward of its last reply wins; an order does not exist."""
    run = load_reward_run(run_dir, lines_to(console))
    rows = [{"messages": chat} for pair in zip(*chats, strict=True) for chat in pair]
    rewards = [one.rewards[0] for one in score_source(run, GivenRows.of(rows))]
    verdicts: list[Verdict | None] = []
    for a, b, *lengths in zip(rewards[::2], rewards[1::2], *(map(_characters, side) for side in chats), strict=True):
        score = 0.5 + 0.5 * ((a > b) - (a < b))
        verdicts.append(Verdict(score, score, *lengths))
    return verdicts, [{"rewards": pair} for pair in zip(rewards[::2], rewards[1::2], strict=True)]


def judged_by_endpoint(endpoint: Endpoint, chats: Sequence[Sequence[list[Message]]], log: Path) -> Judged:
    """Each pair of conversations in both orders. Raises EndpointError; what was answered until then is in the log."""
    journal = Journal(log)
    pairs = list(zip(*chats, strict=True))
    asked = [(first, second) for a, b in pairs for first, second in ((a, b), (b, a))]
    with working("judging", len(asked), "answers") as work, ThreadPoolExecutor(WORKERS) as pool:
        found = []
        waiting = [pool.submit(journal.verdict, endpoint, *order) for order in asked]
        try:
            for one in waiting:
                found.append(one.result())
                work.done += 1
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            if isinstance(error, EndpointError):
                kept = f"the answers so far are in {log}, and the same command goes on from there"
                raise EndpointError(f"{error}; {kept}") from None
            raise
    verdicts: list[Verdict | None] = []
    for (a, b), first, second in zip(pairs, found[::2], found[1::2], strict=True):
        if first["verdict"] is None or second["verdict"] is None:
            verdicts.append(None)
        else:
            scores = SCORES[first["verdict"]], 1 - SCORES[second["verdict"]]
            verdicts.append(Verdict(*scores, _characters(a), _characters(b)))
    said = [{"a_first": first, "b_first": second} for first, second in zip(found[::2], found[1::2], strict=True)]
    return verdicts, said


class Journal:
    """The judge's answers as JSON lines, by a hash of the request and the model; written before they count."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.known = {one["request"]: one for one in filter(None, map(_entry, text.splitlines()))}
        if text and not text.endswith("\n"):  # a killed process cut the last line
            path.write_text(f"{text}\n", encoding="utf-8")

    def verdict(self, endpoint: Endpoint, first: Sequence[Message], second: Sequence[Message]) -> dict[str, Any]:
        """The known answer about two conversations, or a new one; `verdict` is None if no reading of the judge had one.

        Equal conversations are a tie without a request.
        """
        if first == second:
            return {"verdict": "C", "text": "equal"}
        messages = request(first, second)
        key = hashlib.sha256(json.dumps([endpoint.model, list(messages)]).encode()).hexdigest()
        if key in self.known:
            return self.known[key]
        text, verdict = "", None
        for _ in range(READINGS):
            text = endpoint.ask(messages)
            if marks := VERDICT.findall(text):
                verdict = marks[-1]
                break
        entry = {"request": key, "verdict": verdict, "text": text}
        with self.lock:
            append_line(self.path, entry, synced=True)
        return entry


def _entry(line: str) -> dict[str, Any] | None:
    """An entry of the log; None for a line that a killed process left unfinished."""
    try:
        entry = json.loads(line)
        return entry if entry["verdict"] in (*SCORES, None) and entry["request"] else None
    except (ValueError, KeyError, TypeError):
        return None


def request(first: Sequence[Message], second: Sequence[Message]) -> list[Message]:
    """What the judge reads."""
    shown = "\n\n".join(f"<conversation {name}>\n{_shown(chat)}\n</conversation {name}>" for name, chat in
                        (("A", first), ("B", second)))  # fmt: skip
    return [{"role": "system", "content": TASK}, {"role": "user", "content": shown}]


def _shown(chat: Sequence[Message]) -> str:
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in chat)


def _characters(chat: Sequence[Message]) -> int:
    """Length of the assistant's replies."""
    return sum(len(message["content"]) for message in chat if message["role"] == "assistant")
