"""Chat completions of an OpenAI-compatible server, with retries: `POST {url}/chat/completions`.

The key comes from the environment. It goes into the Authorization header and nowhere else: it is only sent by HTTPS or
to this machine, a redirection is an error and is not followed, and error messages have it blotted out.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from lowlevel.errors import ConfigError, LowlevelError, one_line, quoted
from lowlevel.heartbeat import limited

KEY = "OPENAI_API_KEY"
HERE = ("localhost", "127.0.0.1", "::1")
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # states that may pass
LONGEST_WAIT = 60.0  # seconds between two attempts, also if Retry-After asks for more
LARGEST_ANSWER = 4 * 2**20  # bytes
COUNTED = ("requests", "retries", "prompt_tokens", "completion_tokens")  # of what was asked of the server


class EndpointError(LowlevelError):
    """The server refuses, or did not answer in any attempt."""


@dataclass(frozen=True)
class Endpoint:
    """A model on a server. Safe to use from several threads."""

    url: str
    model: str
    key: str | None = None
    timeout: float = 120.0  # seconds for one answer
    attempts: int = 6
    wait: Callable[[float], None] = time.sleep
    note: Callable[[str], None] = lambda line: None  # gets a line for each new reason to wait
    told: set[str] = field(default_factory=set)
    usage: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))  # so far
    settings: dict[str, float] = field(default_factory=lambda: {"temperature": 0.0})  # removed if the server objects
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, url: str, model: str, note: Callable[[str], None] = print) -> Endpoint:
        """With the key of the environment, if there is one. Raises ConfigError for an unsuitable URL."""
        parts, key = urlsplit(url), os.environ.get(KEY)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError("--endpoint: expected http://HOST/v1 or https://HOST/v1, without a name, key or query")
        if key and parts.scheme == "http" and parts.hostname not in HERE:
            raise ConfigError(f"--endpoint {parts.hostname}: {KEY} is only sent by https, or unset it")
        return cls(url.rstrip("/"), model, key, note=note)

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The reply to a conversation. Raises EndpointError after the last attempt, or if another one is no use."""
        problem = ""
        for attempt in range(self.attempts):
            try:
                return self._in_time(messages)
            except _PassingError as passing:
                problem = str(passing)
                if attempt + 1 < self.attempts:
                    self._count(retries=1)
                    seconds = min(2.0**attempt if passing.seconds is None else passing.seconds, LONGEST_WAIT)
                    if problem not in self.told:
                        self.told.add(problem)
                        self.note(f"{self.url}: {problem}; again in {seconds:.0f} s")
                    self.wait(seconds)
        raise EndpointError(f"{self.url}: no answer in {self.attempts} attempts; the last one: {problem}")

    def _in_time(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:  # a socket's time limit is that of its next byte: an answer that trickles in would never end
            return limited(lambda: self._ask(messages), self.timeout, "the limit of an answer")
        except TimeoutError as error:
            raise _PassingError(str(error)) from None

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        body = json.dumps({"model": self.model, "messages": list(messages), **self.settings}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = Request(f"{self.url}/chat/completions", data=body, headers=headers)
        self._count(requests=1)
        try:
            with build_opener(_NoRedirection).open(request, timeout=self.timeout) as response:
                answer = json.loads(response.read(LARGEST_ANSWER))
            text, usage = answer["choices"][0]["message"]["content"], answer.get("usage")
            if not isinstance(text, str):
                raise ValueError("the content is no text")
        except HTTPError as error:
            self._refused(error)
        except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off, too slow
            raise _PassingError(self._safe(f"{type(error).__name__}: {one_line(error)}")) from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _PassingError(f"malformed answer ({type(error).__name__}: {self._safe(one_line(error))})") from None
        counts = usage if isinstance(usage, dict) else {}
        self._count(**{name: n for name, n in counts.items() if name in COUNTED and isinstance(n, int)})
        return text

    def _refused(self, error: HTTPError) -> NoReturn:
        """Raise what a status means: another attempt, or the end."""
        try:
            said = error.read(2000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        text = self._safe(f"HTTP {error.code}: {' '.join(said.split()) or error.reason}")
        if error.code == 400 and "temperature" in said and self.settings.pop("temperature", None) is not None:
            raise _PassingError(text, 0.0) from None  # models that reason only have their own
        if error.code in AGAIN:
            raise _PassingError(text, _seconds(error.headers.get("Retry-After"))) from None
        hint = f"; is {KEY} set?" if error.code == 401 and not self.key else ""
        raise EndpointError(f"{self.url}: {text}{hint}") from None

    def _safe(self, text: str) -> str:
        return quoted(text.replace(self.key, "[key]") if self.key else text)

    def _count(self, **changes: int) -> None:
        with self.lock:
            self.usage.update(changes)


class _PassingError(Exception):
    """An attempt failed, and another one may succeed, after some seconds if they are known."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class _NoRedirection(HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Not followed: urllib would send the key to the other host."""


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; its form as a date is not read."""
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return None
