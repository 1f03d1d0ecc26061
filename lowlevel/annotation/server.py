"""Serves the page and saves what it says: one address that only this machine reaches, and only who has its token.

The standard library's server, without a framework: one page and three actions, on 127.0.0.1. Every request must name
this server as its Host (a page elsewhere that lets its own name point here is refused), every action also as its Origin
(so is a form or script of another page), and all of them the token in the path.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from hmac import compare_digest
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from lowlevel.annotation.journal import Conflict, Journal
from lowlevel.errors import ConfigError
from lowlevel.inspection.page import read_part, render_template

LARGEST = 2**20  # bytes of a request's body
LONGEST_NAME = 60
JSON, HTML = "application/json", "text/html; charset=utf-8"
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Body = dict[str, Any]


class Refusal(Exception):  # noqa: N818 - an answer to the client, not a failure
    """A request that is not served."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class AnnotationServer(ThreadingTCPServer):
    """Serves `journal` at `url` until `shutdown`; a thread a request, which the journal's lock puts in order."""

    journal: Journal  # set before it serves; the port is taken first, since sampling the pairs takes long

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        """Raises ConfigError if the port is taken; 0 takes a free one."""
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--port {port}: {error}; leave it out to take a free one") from None
        self.hosts = [f"{name}:{self.server_address[1]}" for name in ("127.0.0.1", "localhost")]

    def handle_error(self, request: object, client_address: object) -> None:
        """Print the traceback, unless the browser only went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{self.hosts[0]}/{self.token}/"


class Handler(BaseHTTPRequestHandler):
    """One request: GET the page, POST an action as JSON."""

    server: AnnotationServer
    server_version, sys_version = "lowlevel", ""
    timeout = 20  # seconds for a client that says nothing

    def do_GET(self) -> None:  # noqa: D102, N802 - a name of the base class
        self._serve(self._page)

    def do_POST(self) -> None:  # noqa: D102, N802
        self._serve(self._action)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: each line would hold the token."""

    def _serve(self, work: Callable[[str], tuple[str, str]]) -> None:
        nonce = secrets.token_urlsafe(16)
        status: HTTPStatus = HTTPStatus.OK
        try:
            self._check_address()
            kind, text = work(nonce)
        except Refusal as refusal:
            status, kind, text = refusal.status, JSON, json.dumps({"error": str(refusal)})
        except OSError as error:  # a full disk: the page must not go on
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, JSON
            text = json.dumps({"error": f"not saved: {error.strerror or error}"})
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY.format(nonce=nonce))
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def _check_address(self) -> None:
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise Refusal(HTTPStatus.FORBIDDEN, "wrong host")
        if origins != [f"http://{hosts[0]}"] and (origins or self.command == "POST"):
            raise Refusal(HTTPStatus.FORBIDDEN, "wrong origin")
        _, token, self.action = (*self.path.split("/", 2), "", "")[:3]
        if not compare_digest(token.encode(), self.server.token.encode()):
            raise Refusal(HTTPStatus.NOT_FOUND, "no such page: use the address that lowlevel annotate printed last")

    def _page(self, nonce: str) -> tuple[str, str]:
        if self.action:
            raise Refusal(HTTPStatus.NOT_FOUND, "no such page")
        styles, script = ["inspection/page.css", "annotation/page.css"], read_part("annotation/page.js")
        return HTML, render_template("annotation/page.html", styles, script=script, nonce=nonce)

    def _action(self, nonce: str) -> tuple[str, str]:
        body, journal = self._body(), self.server.journal
        annotator, pair = body.get("annotator"), body.get("pair")
        name = " ".join(annotator.split()) if isinstance(annotator, str) else ""
        if not (name and name.isprintable() and len(name) <= LONGEST_NAME):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"a name has 1 to {LONGEST_NAME} characters")
        answer: Body = {}
        try:
            match self.action, pair, body.get("choice"), body.get("written"):
                case "state", _, _, _:
                    pass
                case "judge", int(), str(choice), (None | str()) as written:
                    journal.judge(name, pair, choice, written)
                case "undo", int(), _, _:
                    answer["written"] = journal.undo(name, pair).written
                case _:
                    raise Refusal(HTTPStatus.BAD_REQUEST, "no such action")
        except Conflict as conflict:
            answer["conflict"] = str(conflict)
        except ValueError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
        return JSON, json.dumps(answer | state(journal, name))

    def _body(self) -> Body:
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != JSON or not length.isdecimal():
            raise Refusal(HTTPStatus.BAD_REQUEST, "not JSON with its length")
        if int(length) > LARGEST:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {LARGEST:,} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
            json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "not a JSON object")
        return body


def state(journal: Journal, annotator: str) -> Body:
    """What the page shows next; which run gave which reply is not in it."""
    number, last = journal.next_pair(annotator), journal.last(annotator)
    done = sum(one.annotator == annotator for one in journal.judgements.values())
    shown: Body | None = None
    if number is not None:
        pair, left = journal.pairs[number], journal.left(annotator, number)
        sides = [{"text": pair.replies[i], "cut": not pair.ended[i]} for i in (left, 1 - left)]
        turns = [{"role": one["role"], "text": _text(one)} for one in pair.prompt]
        shown = {"number": number, "prompt": turns, "left": sides[0], "right": sides[1]}
    undo = None if last is None else {"pair": last.pair, "choice": last.choice}
    return {"annotator": annotator, "pair": shown, "done": done, "total": len(journal.pairs), "undo": undo}


def _text(message: Body) -> str:
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False, indent=2) if calls else "")
