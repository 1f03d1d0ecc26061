"""A chat-completions server on this machine that misbehaves on request."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = str | None


class JudgeServer(ThreadingHTTPServer):
    """Answers with `reply(user's text)`, after the faults of `faults`, one a request, in order.

    Faults: an HTTP status as text ("429" with Retry-After 7), "cut" (the body ends early), "closed" (no answer),
    "html", "empty" (no choices), "null" (a content that is no text), "redirect", "usage" (a list, and not the counts),
    "slow headers" and "slow body" (a byte from time to time, without end).
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[str], str], faults: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.faults, self.lock = reply, faults, threading.Lock()
        self.ended = threading.Event()
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            fault = self.server.faults.pop(0) if self.server.faults else None
        self.answer(fault, body)

    def answer(self, fault: Fault, body: dict) -> None:
        if fault == "closed":
            self.connection.close()
            return
        if fault and fault.startswith("slow"):
            self.trickle(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if fault == "slow body" else b""))
            return
        content = None if fault == "null" else self.server.reply(body["messages"][-1]["content"])
        choices = [] if fault == "empty" else [{"message": {"role": "assistant", "content": content}}]
        usage = [1] if fault == "usage" else {"prompt_tokens": 100, "completion_tokens": 10}
        text = json.dumps({"choices": choices, "usage": usage})
        if fault == "html":
            text = "<html>busy</html>"
        status = 302 if fault == "redirect" else int(fault) if fault and fault.isdigit() else 200
        if status >= 400:
            text = json.dumps({"error": {"message": f"refused {self.headers['Authorization']}: temperature"}})
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.url.replace("/v1", "/elsewhere"))
        if status == 429:
            self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode()[: 20 if fault == "cut" else None])

    def trickle(self, start: bytes) -> None:
        try:
            self.wfile.write(start)
            while not self.server.ended.wait(0.02):
                self.wfile.write(b" ")
        except OSError:
            pass

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def judge_server(reply: Callable[[str], str], *faults: str) -> Iterator[JudgeServer]:
    """A running server."""
    server = JudgeServer(reply, list(faults))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
