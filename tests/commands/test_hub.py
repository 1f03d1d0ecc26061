"""push_to_hub against a stand-in for the hub on 127.0.0.1: what arrives there, and what its refusals become."""

import base64
import json
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from transformers import AutoConfig

from lowlevel.config.schema import ModelConfig
from lowlevel.demo import DEMO_BASE
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model import base
from lowlevel.running.result_files import push_to_hub

TOKEN = "a-token-of-no-known-form"


class Hub(ThreadingHTTPServer):
    """Answers as the hub does where every file is a regular one; keeps requests and uploaded files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()
        self.status, self.cut = 200, ""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:  # noqa: N802 - http.server's name
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.server, self.path.split("?")[0]
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.cut and hub.cut in path:
            self.connection.close()
            return
        if hub.status != 200:
            self.answer({"error": f"refused for {self.headers.get('Authorization')}"}, hub.status)
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer({"url": f"{hub.endpoint}/me/x", "name": "me/x"})
        elif path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{hub.endpoint}/me/x/commit/abc", "commitOid": "abc", "success": True})
        else:
            self.answer({"error": path}, 404)

    def do_GET(self) -> None:  # noqa: N802
        if self.server.status != 200:
            self.answer({"error": "refused"}, self.server.status)
        elif "/revision/" in self.path or self.path.startswith("/api/models/"):
            self.answer({"id": "me/x", "sha": "0" * 40, "siblings": [], "private": True, "tags": []})
        else:
            self.answer({"error": self.path}, 404)

    def answer(self, value: dict, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("folder", "result"), [("sft", "sft/adapter"), ("dpo", "dpo/stacked"),
                                                ("dpo/adapter", "dpo/adapter")])  # fmt: skip
def test_a_result_arrives_whole_and_nothing_else_of_the_run(runs, hub, folder, result):
    url = push_to_hub(runs.space.folder / folder, "me/x", token=TOKEN, endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/me/x"
    expected = {file.name: file.read_bytes() for file in (runs.space.folder / result).iterdir()}
    assert hub.files == expected
    assert hub.created[0]["visibility"] == "private"
    assert f"Bearer {TOKEN}" in hub.tokens


def test_other_files_in_the_folder_stay(runs, hub, tmp_path):
    import shutil

    folder = shutil.copytree(runs.sft / "adapter", tmp_path / "adapter")
    for name in ("metrics.jsonl", "trainer_state.json", "secrets.env", "events.out.tfevents.1", "training_args.bin"):
        (folder / name).write_text("mine")
    shutil.copytree(runs.sft / "step-00000006", folder / "step-00000006")
    push_to_hub(folder, "me/x", private=False, token=TOKEN, endpoint=hub.endpoint)
    assert hub.files.keys() == {file.name for file in (runs.sft / "adapter").iterdir()}
    assert hub.created[0]["visibility"] == "public"


def test_a_merged_model_is_uploaded(merged, hub):
    push_to_hub(merged, "x", token=TOKEN, endpoint=hub.endpoint)
    assert hub.files.keys() == {file.name for file in merged.iterdir()}


@pytest.mark.parametrize("name", ["dpo/step-00000006", "dpo/trace", "tiny"])
def test_what_is_no_result_is_refused_before_any_request(runs, hub, name):
    with pytest.raises(ConfigError):
        push_to_hub(runs.space.folder / name, "me/x", token=TOKEN, endpoint=hub.endpoint)
    assert not hub.tokens


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_one_line_without_the_token(runs, hub, status):
    hub.status = status
    with pytest.raises(ConfigError) as caught:
        push_to_hub(runs.sft, "me/x", token=TOKEN, endpoint=hub.endpoint)
    text = str(caught.value)
    assert "was not uploaded to me/x" in text and str(status) in text and "\n" not in text
    assert TOKEN not in text and caught.value.__cause__ is None


@pytest.mark.parametrize("cut", ["/repos/create", "/commit/"])
def test_a_cut_connection_is_one_line(runs, hub, monkeypatch, cut):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
    hub.cut = cut
    with pytest.raises(CheckpointError) as caught:
        push_to_hub(runs.sft, "me/x", token=TOKEN, endpoint=hub.endpoint)
    assert "was not uploaded to me/x" in str(caught.value) and "\n" not in str(caught.value)
    assert not hub.files and TOKEN not in str(caught.value)


def test_a_name_that_the_hub_does_not_allow_is_refused(runs, hub):
    with pytest.raises(ConfigError, match="a//b"):
        push_to_hub(runs.sft, "a//b", token=TOKEN, endpoint=hub.endpoint)


def test_the_hub_is_asked_once_for_the_config_of_a_base_and_each_caller_gets_its_own(monkeypatch):
    asked = []

    def read(name, **settings):
        asked.append((name, settings["revision"]))
        return AutoConfig.from_pretrained(DEMO_BASE)

    monkeypatch.setattr(base, "_config_of_hub", cache(read))
    monkeypatch.setattr(base, "check_is_model", lambda name: None)
    first = base.load_model_config(ModelConfig(name="me/x"))
    first.vocab_size = 1
    assert base.load_model_config(ModelConfig(name="me/x")).vocab_size > 1
    base.load_model_config(ModelConfig(name="me/x", revision="v2"))
    assert asked == [("me/x", None), ("me/x", "v2")]
    base.load_model_config(ModelConfig(name="demo"))  # files on disk may change
    assert len(asked) == 2
