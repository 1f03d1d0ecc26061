"""The server over HTTP: who is refused, and what each action answers."""

import json
import socket
import struct
from http.client import HTTPConnection
from threading import Thread

import pytest
from hostile import MARKUP, PAIRS

from lowlevel.annotation.journal import Journal
from lowlevel.annotation.server import LARGEST, AnnotationServer
from lowlevel.errors import ConfigError


class Client:
    """Requests as a browser on the page sends them, unless a test changes them."""

    def __init__(self, server: AnnotationServer) -> None:
        self.server, (self.host,) = server, server.hosts[:1]

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str | None):
        sent = {"Host": self.host, "Origin": f"http://{self.host}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = HTTPConnection("127.0.0.1", self.server.server_address[1], timeout=5)
        connection.putrequest(method, path, skip_host=True)
        if body is not None:
            sent = {"Content-Length": str(len(body)), **sent}
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        with connection.getresponse() as reply:
            return reply.status, reply.headers, reply.read().decode()

    def act(self, action: str, **body):
        status, _, text = self.ask("POST", f"/{self.server.token}/{action}", json.dumps(body).encode())
        return status, json.loads(text)


@pytest.fixture
def client(server):
    return Client(server)


def test_the_page_and_its_policy(client):
    status, headers, page = client.ask("GET", f"/{client.server.token}/", Origin=None)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    nonce = policy.split("nonce-")[1].split("'")[0]
    assert page.count(f'nonce="{nonce}"') == 2 and "src=" not in page
    assert nonce not in client.ask("GET", f"/{client.server.token}/")[2]
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("method", "changed", "status"),
    [
        ("GET", {"Host": "evil.example"}, 403),
        ("GET", {"Host": "127.0.0.1"}, 403),
        ("GET", {"Host": None}, 403),
        ("GET", {"Origin": "http://evil.example"}, 403),
        ("POST", {"Host": "evil.example:80"}, 403),
        ("POST", {"Origin": "http://evil.example"}, 403),
        ("POST", {"Origin": "null"}, 403),
        ("POST", {"Origin": None}, 403),
        ("POST", {"Content_Type": "text/plain"}, 400),
        ("POST", {"Content_Length": None}, 400),
        ("POST", {"Content_Length": str(LARGEST + 1)}, 413),
        ("POST", {"token": "wrong"}, 404),
        ("POST", {"token": "%C3%A9"}, 404),
        ("POST", {"token": ""}, 404),
        ("GET", {"token": "wrong"}, 404),
        ("GET", {"action": "../x"}, 404),
        ("POST", {"action": "state/"}, 400),
        ("PUT", {}, 501),
    ],
)
def test_what_is_refused(client, method, changed, status):
    there = {"token": client.server.token, "action": "judge" if method != "GET" else "", **changed}
    path = f"/{there.pop('token')}/{there.pop('action')}"
    body = json.dumps({"annotator": "ada", "pair": 0, "choice": "left"}).encode()
    found, headers, text = client.ask(method, path, body if method == "POST" else None, **there)
    assert found == status
    assert client.server.token not in text and "Access-Control-Allow-Origin" not in headers
    assert not client.server.journal.judgements


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"[]", b"\xff", b'{"annotator": "ada", "pair": 0, "choice": "left", "written": "\\ud800"}'),
        *(b"[" * 10000, b'{"annotator": 1}', b'{"annotator": " "}', b'{"annotator": "a\\u0000"}'),
        *(b'{"annotator": "ada", "pair": "0", "choice": "left"}', b'{"annotator": "ada", "pair": 0}'),
        *(b'{"annotator": "ada", "pair": -1, "choice": "left"}', b'{"annotator": "ada", "pair": 0, "choice": "up"}'),
        *(b'{"annotator": "ada", "pair": 0, "choice": "left", "written": 1}', b'{"annotator": "%s"}' % (b"a" * 61)),
    ],
)
def test_a_body_that_is_no_judgement(client, body):
    status, _, text = client.ask("POST", f"/{client.server.token}/judge", body)
    assert status == 400 and json.loads(text)["error"]
    assert not client.server.journal.judgements


def test_from_the_first_pair_to_the_last_and_back(client):
    status, state = client.act("state", annotator=" ada \t l ")
    assert status == 200 and state["annotator"] == "ada l"
    assert (state["done"], state["total"], state["undo"]) == (0, 4, None)
    assert [turn["role"] for turn in state["pair"]["prompt"]] == ["system", "user", "assistant", "user"]
    left = client.server.journal.left("ada l", 0)
    assert state["pair"]["left"] == {"text": PAIRS[0].replies[left], "cut": not PAIRS[0].ended[left]}
    assert "out/a" not in json.dumps(state)  # blind
    for number, choice in enumerate(("left", "right", "tie", "bad")):
        assert state["pair"]["number"] == number
        _, state = client.act("judge", annotator="ada l", pair=number, choice=choice, written="w" * (number == 1))
        assert (state["done"], state["undo"]) == (number + 1, {"pair": number, "choice": choice})
        assert len(Journal(client.server.journal.path).judgements) == number + 1
    assert state["pair"] is None
    for number in (3, 2, 1):
        _, state = client.act("undo", annotator="ada l", pair=number)
        assert state["pair"]["number"] == number == state["done"]
    assert state["written"] == "w"
    assert client.act("state", annotator="bo")[1]["pair"]["number"] == 0


def test_a_second_submit_and_a_second_undo_change_nothing(client):
    client.act("judge", annotator="ada", pair=0, choice="left")
    before = client.server.journal.path.read_bytes()
    status, state = client.act("judge", annotator="ada", pair=0, choice="right")
    assert status == 200 and "another tab" in state["conflict"] and state["pair"]["number"] == 1
    assert client.server.journal.path.read_bytes() == before
    client.act("undo", annotator="ada", pair=0)
    assert "conflict" in client.act("undo", annotator="ada", pair=0)[1]


def test_simultaneous_submits_count_once(client):
    answers = []

    def submit(choice):
        answers.append(client.act("judge", annotator="ada", pair=0, choice=choice)[1])

    threads = [Thread(target=submit, args=("left" if i % 2 else "right",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("conflict" not in answer for answer in answers) == 1
    assert len(client.server.journal.path.read_text().splitlines()) == 1 + len(PAIRS) + 1


def test_a_full_disk_keeps_the_pair(client, monkeypatch):
    def full(*args, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowlevel.annotation.journal.append_line", full)
    status, answer = client.act("judge", annotator="ada", pair=0, choice="left")
    assert (status, answer) == (500, {"error": "not saved: No space left on device"})
    assert client.act("state", annotator="ada")[1]["pair"]["number"] == 0


def test_a_browser_that_goes_away_leaves_no_traceback(client, capsys):
    for line in (
        b"",
        b"GET / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
        b"\x16\x03\x01\r\n",
    ):
        with socket.create_connection(("127.0.0.1", client.server.server_address[1])) as connection:
            connection.sendall(line)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by reset
    assert client.act("state", annotator="ada")[0] == 200
    assert capsys.readouterr() == ("", "")


def test_texts_are_sent_as_they_are(client):
    client.act("judge", annotator="ada", pair=0, choice="tie")
    pair = client.act("state", annotator="ada")[1]["pair"]
    assert pair["prompt"][0]["text"] == MARKUP
    assert {pair[side]["text"] for side in ("left", "right")} == set(PAIRS[1].replies)


def test_a_taken_port_is_named(server):
    with pytest.raises(ConfigError, match=r"--port \d+: .*in use"):
        AnnotationServer(server.server_address[1])
    with pytest.raises(ConfigError, match="--port 70000"):
        AnnotationServer(70000)


def test_only_this_machine_reaches_it(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.url.startswith("http://127.0.0.1:") and len(server.token) >= 32
