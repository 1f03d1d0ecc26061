"""Judges: an endpoint that misbehaves, verdicts in both orders, win rates against known ones, and the command."""

import json
from pathlib import Path
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
import workspace
from judge_server import judge_server

from lowlevel.annotation import replies
from lowlevel.errors import ConfigError, DataError
from lowlevel.evaluation import judging
from lowlevel.evaluation.endpoint import KEY, Endpoint, EndpointError
from lowlevel.evaluation.judging import Question, judged_by_endpoint, judged_by_reward, question_of
from lowlevel.evaluation.preference import Verdict, length_controlled, preferences
from lowlevel.evaluation.rows import read_rows
from lowlevel.running.replies import Reply, Sampling

SECRET = "sk-" + "not-for-any-file"
ASKED = [{"role": "user", "content": "hello"}]


def endpoint_of(server, waits: list[float] | None = None, **settings) -> Endpoint:
    return Endpoint(server.url, "judge", SECRET, wait=([] if waits is None else waits).append, **settings)


@pytest.mark.parametrize(
    ("fault", "first_wait"),
    [("429", 7.0), ("500", 1.0), ("503", 1.0), ("cut", 1.0), ("closed", 1.0), ("html", 1.0), ("empty", 1.0),
     ("null", 1.0), ("400", 0.0)],
)  # fmt: skip
def test_another_attempt_after_what_may_pass(fault, first_wait):
    waits: list[float] = []
    with judge_server(lambda text: "fine", fault) as server:
        endpoint = endpoint_of(server, waits)
        assert endpoint.ask(ASKED) == "fine"
    assert waits == [first_wait] and (endpoint.usage["requests"], endpoint.usage["retries"]) == (2, 1)
    assert (endpoint.usage["prompt_tokens"], endpoint.usage["completion_tokens"]) == (100, 10)
    assert server.keys == [f"Bearer {SECRET}"] * 2
    assert ("temperature" in server.bodies[1]) == (fault != "400")  # left out for a model that has only its own


@pytest.mark.parametrize("fault", ["slow headers", "slow body"])
def test_an_answer_that_never_ends(fault):
    with judge_server(lambda text: "fine", fault) as server:
        endpoint = endpoint_of(server, waits := [], timeout=0.3)
        assert endpoint.ask(ASKED) == "fine"
        with pytest.raises(EndpointError, match=r"took longer than 0.3 s \(the limit of an answer\)$"):
            server.faults.append(fault)
            endpoint_of(server, timeout=0.3, attempts=1).ask(ASKED)
    assert waits == [1.0]


def test_counts_that_are_none_are_left_out():
    with judge_server(lambda text: "fine", "usage") as server:
        assert endpoint_of(server).ask(ASKED) == "fine"


@pytest.mark.parametrize(
    ("faults", "requests", "message"),
    [(["401"], 1, "HTTP 401"), (["404"], 1, "HTTP 404"), (["redirect"], 1, "HTTP 302"),
     (["500"] * 4, 3, "no answer in 3 attempts; the last one: HTTP 500"), (["400", "400"], 2, "HTTP 400")],
)  # fmt: skip
def test_the_end_is_one_line_without_the_key(faults, requests, message):
    with judge_server(lambda text: "fine", *faults) as server, pytest.raises(EndpointError, match=message) as raised:
        endpoint_of(server, attempts=3).ask(ASKED)
    assert len(server.bodies) == requests
    assert SECRET not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["api.openai.com/v1", "https://me:" + "secret@host/v1", "https://host/v1?key=secret", "ftp://x"]
)
def test_unsuitable_urls(url):
    with pytest.raises(ConfigError, match="--endpoint: expected"):
        Endpoint.of(url, "judge")


def test_the_key_is_not_sent_in_the_clear(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with pytest.raises(ConfigError, match="only sent by https"):
        Endpoint.of("http://example.org/v1", "judge")
    assert Endpoint.of("http://127.0.0.1:8000/v1/", "judge").key == SECRET


def chats_of(*replies: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}] for reply in replies]


def prefers_good(text: str) -> str:
    """A judge that finds the conversation with "good", and else takes the first."""
    first, second = ("good" in part for part in text.split("</conversation A>"))
    better = "C" if first and second else "B" if second else "A"
    return f"[[A]] or [[B]]? I say\n[[{better}]]"


def test_both_orders_and_the_log(tmp_path):
    log = tmp_path / "judge.jsonl"
    log.write_text('{"request": "cut in the mid')
    chats = chats_of("good", "bad", "bad", "good", "same"), chats_of("bad", "good", "poor", "good, too", "same")
    with judge_server(prefers_good) as server:
        judged = judged_by_endpoint(endpoint_of(server), chats, log)
        assert [(one.a_first, one.b_first) for one in judged[0]] == [
            (1, 1),
            (0, 0),
            (1, 0),
            (0.5, 0.5),
            (0.5, 0.5),
        ]
        assert len(server.bodies) == 8  # equal conversations are a tie
        again = judged_by_endpoint(endpoint_of(server), chats, log)
        assert again[0] == judged[0] and len(server.bodies) == 8  # nothing is asked twice
    found = preferences(judged[0])
    assert (found["won"], found["tied"], found["lost"]) == (1, 3, 1)
    assert found["win_rate"]["value"] == 0.5 and found["orders_agree"] == 0.8
    assert found["first_wins"] == pytest.approx(4 / 6)  # of the decisions: 1 of 2, 1 of 2, both of the third
    assert SECRET not in log.read_text()


def test_no_verdict(tmp_path):
    chats = chats_of("good", "a"), chats_of("bad", "b")
    with judge_server(lambda text: "both are nice" if "\na\n" in text else "[[C]]") as server:
        judged = judged_by_endpoint(endpoint_of(server), chats, tmp_path / "log")
        assert [one is None for one in judged[0]] == [False, True]
        assert len(server.bodies) == 2 + 2 * judging.READINGS


def test_length_control_finds_the_rate_at_equal_lengths():
    rng = np.random.default_rng(0)
    differences = rng.normal(300, 200, 4000)
    x = np.tanh(differences / differences.std())
    scores = 1 / (1 + np.exp(-(-0.4 + 2.0 * x)))  # longer replies win, although B is better at equal lengths
    assert scores.mean() > 0.6
    assert length_controlled(scores, differences) == pytest.approx(1 / (1 + np.exp(0.4)), abs=5e-3)
    assert length_controlled(np.array([1.0, 0.0, 0.5]), np.zeros(3)) == pytest.approx(0.5)
    assert 0.99 < length_controlled(np.ones(50), rng.normal(0, 1, 50)) < 1


def test_one_question_has_no_interval():
    found = preferences([Verdict(1, 1, 10, 20)])
    assert found["win_rate"] == {"value": 1.0, "stderr": None, "low": None, "high": None}
    assert found["length_controlled_win_rate"]["low"] is None


def test_questions(tmp_path):
    file = tmp_path / "q.jsonl"
    rows = [{"turns": ["one", "two"], "category": "math"}, {"prompt": "x", "system": "be brief"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(str(file), question_of) == [Question(("one", "two")), Question(("x",), "be brief")]
    for bad in ({"turns": []}, {"turns": ["a", 3]}, {"text": "x"}, {"prompt": ""}):
        file.write_text(json.dumps(rows[0]) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(
            DataError, match='q.jsonl:2: needs "prompt", a text, or "turns", a list of texts .1 of 2 rows'
        ):
            read_rows(str(file), question_of)


def test_command(dpo_run, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    questions, out = tmp_path / "questions.jsonl", tmp_path / "found.json"
    asked = [["What is 3 + 4?", "And 5 + 4?"], ["Say the opposite of hot."]]
    questions.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in asked))
    with judge_server(lambda text: "[[A]]", "400") as server:  # 400: again at once
        flags = ("--endpoint", server.url, "--model", "m", "--max-new-tokens", 12, "--price", "1,10", "--out", out)
        said = workspace.run("judge", dpo_run, dpo_run / "parent", "--prompts", questions, *flags)
    assert said.code == 0, said.err
    assert "won 0, lost 0, tied 2" in said.out and "first got 100% of the decisions" in said.out
    assert "6 requests (1 retry), 500 input and 50 output tokens, $0.00" in said.out
    assert said.out.count("HTTP 400") == 1 and "again in 0 s" in said.out
    assert len((tmp_path / "found_answers.jsonl").read_text().splitlines()) == 4
    found = json.loads(out.read_text())
    roles = [message["role"] for message in found["conversations"][0]["a"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert found["conversations"][0]["a"] != found["conversations"][0]["b"]
    files = [path.read_text() for path in Path(tmp_path).iterdir()]
    assert SECRET not in "".join(files) + said.out + said.err


def test_a_judge_that_refuses_is_known_before_the_replies_are_made(tmp_path, monkeypatch):
    def made(*args: object) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(judging, "conversations", made)
    (tmp_path / "q.jsonl").write_text('{"prompt": "hi"}\n')
    with judge_server(lambda text: "ready", "401") as server:
        flags = ("--endpoint", server.url, "--model", "m", "--out", tmp_path / "found.json")
        said = workspace.run("judge", tmp_path, tmp_path, "--prompts", tmp_path / "q.jsonl", *flags)
    assert said.code != 0 and "HTTP 401" in said.err and "is OPENAI_API_KEY set?" in said.err


def test_a_judge_that_gives_up_says_where_its_answers_are(tmp_path):
    log, chats = tmp_path / "judge.jsonl", [chats_of("good"), chats_of("bad")]
    with judge_server(prefers_good, *["500"] * 8) as server, pytest.raises(EndpointError, match=f"are in {log}"):
        judged_by_endpoint(endpoint_of(server, attempts=2), chats, log)


def test_reward_run_as_judge(monkeypatch):
    class Scored:
        def __init__(self, value: float) -> None:
            self.rewards = (value,)

    monkeypatch.setattr(judging, "load_reward_run", lambda folder, note: "run")
    monkeypatch.setattr(judging, "score_source", lambda run, rows: [Scored(v) for v in (2.0, 1.0, 0.5, 0.5, -1.0, 3.0)])
    chats = chats_of("aaa", "b", "c"), chats_of("a", "b", "ccc")
    judged = judged_by_reward(Path("reward"), chats, None)
    assert judged[0] == [Verdict(1, 1, 3, 1), Verdict(0.5, 0.5, 1, 1), Verdict(0, 0, 1, 3)]


@pytest.mark.parametrize("flags", ["", "--endpoint https://x/v1", "--reward r --endpoint e --model m"])
def test_one_judge(dpo_run, tmp_path, flags):
    said = workspace.run("judge", dpo_run, dpo_run, "--prompts", tmp_path / "q", *flags.split())
    assert said.code == 2 and "give one judge: --endpoint with --model, or --reward" in said.err


@pytest.mark.parametrize("module", [judging, replies])
def test_a_model_is_gone_before_the_next_one_is_loaded(monkeypatch, module):
    class Model:
        def __init__(self) -> None:
            self.itself = self  # models of torch are in cycles

    made: list[ref] = []

    def load(folder: Path, note: object) -> tuple[Model, SimpleNamespace]:
        assert not any(one() for one in made)
        made.append(ref(model := Model()))
        return model, SimpleNamespace(encode_prompt=lambda chat: [1])

    monkeypatch.setattr(module, "load_for_replies", load)
    monkeypatch.setattr(module, "generate_replies", lambda *given, **more: [Reply(f"{len(made)}", 1, True)])
    if module is replies:
        replies.sample_pairs([Path("a"), Path("b")], [("q:1", ASKED)], Sampling(), print)
    else:
        chats = [judging.conversations(Path("a"), [Question(("hi",))], Sampling(), None) for _ in range(2)]
        assert [chat[-1]["content"] for (chat,) in chats] == ["1", "2"]
    assert len(made) == 2
