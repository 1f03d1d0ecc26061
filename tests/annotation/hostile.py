"""Pairs of texts that a page could get wrong, the header of their journal, and a server in a thread."""

import threading
from contextlib import contextmanager

from lowlevel.annotation.pairs import Pair
from lowlevel.annotation.server import AnnotationServer

RUNS = [{"run": "out/a", "adapter_sha256": "aa"}, {"run": "out/b", "adapter_sha256": "bb"}]
HEADER = {
    "runs": RUNS,
    "prompts": {"source": "prompts.jsonl", "sha256": "00"},
    "sampling": {"max_new_tokens": 256, "temperature": 1.0, "seed": 0},
}
MARKUP = "<img src=x onerror=\"document.title='bad'\"><script>document.title='bad'</script> & <b>bold</b> </textarea>"
CODE = 'Use a list:\n\n```python\ndef f(x):\n    return [x,\n            "{{ x }}"]\n```\n\nThen call `f(1)`.'
CUT = "An example that was cut:\n```js\nconst x = '</script>';"
HEBREW = "שלום, זה טקסט מימין לשמאל.\nSecond line in English.\nمرحبا بالعالم: 1, 2, 3"
LONG = "A long reply. " * 120 + "x" * 300


def user(text: str) -> dict:
    return {"role": "user", "content": text}


TURNS = [
    {"role": "system", "content": "You answer briefly."},
    user("How do I make a list in Python?"),
    {"role": "assistant", "content": "Which one?\n\n  - of numbers\n  - of texts"},
    user("Of numbers — naïve Ünïcode, 日本語 and 🙂."),
]
PAIRS = [
    Pair("prompts.jsonl:1", TURNS, (CODE, CUT), (True, False)),
    Pair("prompts.jsonl:2", [user(MARKUP)], (MARKUP, "plain"), (True, True)),
    Pair("prompts.jsonl:3", [user("Say hello, in Hebrew.")], (HEBREW, "Shalom 🙂 שלום"), (True, True)),
    Pair("prompts.jsonl:4", [user("Be long.")], (LONG, "No."), (True, True)),
]


@contextmanager
def served(journal):
    server = AnnotationServer()
    server.journal = journal
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
