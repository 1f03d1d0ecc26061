"""`lowlevel doctor`: the table of this machine, and how it ends where a check fails."""

import json
import os
import socket

import pytest
from refusals import refused
from workspace import run

import lowlevel.preflight.doctor as command
from lowlevel.preflight import software
from lowlevel.preflight.finding import fail, note, ok

CHECKS = (
    *("python", "libraries", "device", "precision", "attention", "execution", "compiler"),
    *("4-bit weights", "Triton kernels", "optimizer", "run folder", "hub cache", "sft step", "dpo step"),
)


@pytest.fixture(scope="session")
def examined(tmp_path_factory):
    """The real thing, once: what it said, its JSON file, and the folder that it was run in."""
    folder, before = tmp_path_factory.mktemp("doctor"), os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "a-secret-of-the-hub")

        def no_network(self, address):
            raise AssertionError(f"doctor connects to {address}")

        patch.setattr(socket.socket, "connect", no_network)
        os.chdir(folder)
        try:
            said = run("doctor", "--json", "doctor.json")
        finally:
            os.chdir(before)
    return said, folder


def test_the_table_of_this_machine(examined):
    said, _ = examined
    assert (said.code, said.err) == (0, "")
    lines = [line for line in said.out.splitlines() if line.startswith(CHECKS)]
    assert tuple(line[:14].rstrip() for line in lines) == CHECKS
    assert {line[16:20].rstrip() for line in lines} <= {"ok", "note"}
    assert said.out.splitlines()[-1].startswith("a run can start here: 14 checks")


def test_the_same_as_json_and_nothing_else_is_left(examined):
    said, folder = examined
    assert [path.name for path in folder.iterdir()] == ["doctor.json"]
    written = json.loads((folder / "doctor.json").read_text())
    assert written["ok"] and tuple(one["what"] for one in written["findings"]) == CHECKS
    for one in written["findings"]:
        assert one["found"][:60] in said.out and one["advice"][:60] in said.out
        assert bool(one["advice"]) == (one["verdict"] != "ok")
    assert "a-secret-of-the-hub" not in said.out + (folder / "doctor.json").read_text()


@pytest.fixture
def few(monkeypatch):
    """Three checks that say what a test wants, in the place of the real ones."""

    def make(*answers):
        checks = tuple((f"check {i}", lambda one=one: one() if callable(one) else one) for i, one in enumerate(answers))
        monkeypatch.setattr(command, "machine_checks", lambda out: checks)
        monkeypatch.setattr(command, "step_checks", lambda: ())

    return make


def test_notes_are_no_failure(cli, few):
    few(ok("a"), note("slow", "buy a GPU"))
    said = cli("doctor")
    assert (said.code, said.err) == (0, "")
    assert "-> buy a GPU" in said.out
    assert said.out.endswith("a run can start here: 4 checks; 1 with a note: check 1\n")


def test_a_failure_is_exit_code_1_after_the_whole_table(cli, few, tmp_path):
    def raises():
        raise RuntimeError("no kernel image is available")

    few(fail("broken", "mend it"), raises, ok("the last one"))
    said = cli("doctor", "--json", tmp_path / "d.json")
    assert said.code == 1
    assert said.err == "error: 2 of 5 checks failed: check 0, check 1\n"
    assert "RuntimeError: no kernel image is available" in said.out and "the last one" in said.out
    written = json.loads((tmp_path / "d.json").read_text())
    assert not written["ok"] and [one["verdict"] for one in written["findings"]][2:] == ["FAIL", "FAIL", "ok"]


def test_without_a_library_the_others_are_not_imported(cli, monkeypatch, few):
    few(lambda: pytest.fail("looked at"))
    monkeypatch.setattr(software.metadata, "requires", lambda name: ["no-such-library>=3"])
    said = cli("doctor")
    assert said.code == 1
    assert "no-such-library is missing (asked for: >=3)" in said.out and "pip install 'no-such-library>=3'" in said.out
    assert said.err.endswith("1 of 2 checks failed: libraries; nothing else can be looked at without no-such-library\n")


def test_lines_come_one_by_one(few, monkeypatch, capsys):
    """A check that ends the process is the one after the last line."""

    def ends():
        raise SystemExit(134)

    few(ok("before"), ends)
    with pytest.raises(SystemExit):
        command.run_doctor(command.Path(), None, command.Console(), lambda: None)
    assert "before" in capsys.readouterr().out


def test_usage(cli, tmp_path):
    refused(cli("doctor", "--json", tmp_path / "none" / "d.json"), 2, "--json", "no such folder")
    refused(cli("doctor", "--train.seed", 1), 2, "--train.seed")
    refused(cli("doctor", "RUN.toml"), 2, "'RUN.toml'")


def test_the_folder_that_is_looked_at(tmp_path):
    checks = dict(command.machine_checks(tmp_path / "out" / "run"))
    assert str(tmp_path) in checks["run folder"]().found
