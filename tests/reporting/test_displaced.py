"""`lowlevel report --displaced N`: which pairs are looked at, under which weights, and a planted token."""

import html
import re
import shlex
import shutil
from pathlib import Path

import helpers
import pytest
from contrast import check_page, keep, show_as
from rich.console import Console
from workspace import PAIRS, run

import lowlevel as ll
from lowlevel.checkpoints.tables import write_table
from lowlevel.errors import ConfigError
from lowlevel.inspection.opening import example_of_row
from lowlevel.inspection.pairs import inspect_pairs
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.model.adapters import save_adapter
from lowlevel.model.policy import TRAINED
from lowlevel.reporting.displaced import displaced_pairs, pair_tables
from lowlevel.reporting.report import report_run
from lowlevel.running.assembly import prepare_data
from lowlevel.running.reopening import load_run, reopen

pytestmark = pytest.mark.usefixtures("no_pngs")
LOOKS = {"light": (1280, False), "dark": (1280, True), "phone": (390, False), "phone-dark": (390, True)}


def copied(run_dir: Path, to: Path) -> Path:
    return Path(shutil.copytree(run_dir, to / run_dir.name))


def rewrite(folder: Path, *, token: int | None) -> Path:
    """Put an adapter in the place of a copied run's final one: one without effect, or one that learnt `token`."""
    run_of = reopen(folder).load(None)
    if token is not None:
        tokenizer, data = prepare_data(run_of.config)
        examples = [example_of_row(run_of.config, tokenizer, data, row) for row in fell(folder, 4)]
        helpers.push_mass(run_of.policy, run_of.method, examples, token)
    shutil.rmtree(folder / "adapter")
    save_adapter(run_of.policy.model, TRAINED, folder / "adapter", run_of.config.model.name)
    return folder


def fell(folder: Path, count: int) -> list[int]:
    return [row["row"] for row in pair_tables(folder / "trace").lowest[:count]]


def section(folder: Path) -> str:
    page = (folder / "report.html").read_text(encoding="utf-8")
    return page.split('id="took"')[1].split("</section>")[0] if 'id="took"' in page else ""


def rows(table: str) -> list[list[str]]:
    """Texts of a table's body."""
    body = table.split("<tbody>")[1].split("</tbody>")[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
    return [[html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in row] for row in cells]


@pytest.fixture(scope="module")
def planted(runs, tmp_path_factory) -> Path:
    """A run whose adapter learnt to write Z, which no chosen completion does."""
    assert all("Z" not in pair["chosen"] for pair in PAIRS)
    folder = copied(runs["dpo"], tmp_path_factory.mktemp("planted"))
    return rewrite(folder, token=load_run(folder).tokenizer.tokenizer.convert_tokens_to_ids("Z"))


def test_the_planted_token_is_named(planted):
    said = run("report", planted, "--displaced", 4)
    assert (said.code, said.err) == (0, "")
    gains, falls = section(planted).split("</table>")[:2]
    token, _, gained, positions = rows(gains)[0]
    assert token == "Z"
    over, lost = re.search(r"At the (\d+) positions .* a probability of ([\d.]+) in all", section(planted)).groups()
    assert int(over) >= int(positions) > 0.9 * int(over) and float(gained) > 0.8 * int(over) and float(lost) > 0
    assert "4 of 4 pairs with the lowest chosen log-ratios of steps 1 to 6" in section(planted)
    lines = rows(falls)
    assert {int(line[0]) for line in lines} == set(fell(planted, 4))
    ratios = [float(line[1].replace("−", "-")) for line in lines]
    assert ratios == sorted(ratios) and ratios[-1] < 0
    assert all(line[5].startswith("Z ") and line[3] != "Z" for line in lines)
    assert "where the probability went: 4 of 4 pairs" in said.out
    assert f"at the {over} positions where chosen tokens of 4 fell, by {lost} in all" in said.out
    assert f"gained most: Z {gained} ({positions}), " in said.out


def test_the_page_says_what_the_records_say(planted):
    assert run("report", planted, "--displaced", 3).code == 0
    loaded = load_run(planted)
    tokenizer, data = prepare_data(loaded.config)
    examples = [example_of_row(loaded.config, tokenizer, data, row) for row in fell(planted, 3)]
    records = inspect_pairs(loaded.policy, loaded.method, examples)
    pieces = TokenPieces(loaded.tokenizer)
    found = displaced_pairs(records, pieces, weights="", origin="", limit=2)
    assert (found.looked, found.below, len(found.falls)) == (3, 3, 2)
    for row, line in found.falls:
        (shown,) = (shown for shown in rows(section(planted).split("</table>")[1]) if shown[0] == str(row))
        assert shown[2:4] == [line.position, line.token]
        assert shown[4].replace("−", "-") == f"{line.ref_logp} → {line.logp}"
    said = run("inspect", planted, "--example", found.falls[0][0])
    assert re.sub(r"\s+", "", found.falls[0][1].sentence) in re.sub(r"\s+", "", said.out)


def test_the_pairs_looked_at_are_those_that_fell_farthest_whatever_their_margins(planted, tmp_path):
    folder = copied(planted, tmp_path)
    shutil.rmtree(folder / "trace")
    columns = {"step": [6] * 4, "row": fell(planted, 4), "chosen_logratio": [-1.0, -2.0, -3.0, -4.0]}
    zeros = dict.fromkeys(("rejected_logratio", "weight", "loss"), [0.0] * 4)
    write_table(folder / "trace", "pairs", columns | zeros | {"margin": [-4.0, -3.0, -2.0, -1.0]})
    assert run("report", folder, "--displaced", 2).code == 0
    shown = rows(section(folder).split("</table>")[1])
    assert {int(line[0]) for line in shown} == set(columns["row"][2:])


def test_without_the_option_no_model_is_loaded_and_the_alarm_gives_the_command(runs, tmp_path, monkeypatch):
    folder = copied(runs["dpo"], tmp_path)
    shutil.rmtree(folder / "trace")
    columns = {"step": [6] * 4, "row": [2, 3, 5, 7], "chosen_logratio": [-1.0, -3.0, 0.5, -2.0]}
    zeros = dict.fromkeys(("margin", "rejected_logratio", "weight", "loss"), [0.0] * 4)
    write_table(folder / "trace", "pairs", columns | zeros)
    monkeypatch.setattr("lowlevel.reporting.report.reopen", lambda *_, **__: pytest.fail("loaded"))
    said = run("report", folder)
    assert said.code == 0 and not section(folder)
    assert (
        "likelihood displacement: 3 of 4 chosen completions are below the reference, farthest those of rows 3, 7, 2; "
        f"to see which tokens gained their probability: lowlevel report {folder} --displaced 5\n" in said.out
    )
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"<code>lowlevel report {folder} --displaced 5</code>" in page
    assert [row[0] for row in rows(page.split("Chosen completions that fell farthest</h3>")[1])] == ["3", "7", "2"]


def test_the_page_quotes_a_folder_for_the_shell(runs, tmp_path):
    folder = Path(shutil.copytree(runs["dpo"], tmp_path / "my run"))
    assert run("report", folder).code == 0
    commands = re.findall(r"<code>(lowlevel [^<]*)</code>", html.unescape((folder / "report.html").read_text()))
    assert commands and all(shlex.split(command)[2] == str(folder) for command in commands)


def test_nothing_is_displaced_where_policy_and_reference_are_one(runs, tmp_path):
    folder = rewrite(copied(runs["dpo"], tmp_path), token=None)
    said = run("report", folder, "--displaced", 2)
    assert said.code == 0, said.err
    assert "none of 2 pairs with the lowest chosen log-ratios of steps 1 to 6 is below its reference" in said.out
    assert "None of 2 pairs" in section(folder)


def test_without_a_trace_the_last_step_is_looked_at(runs, tmp_path):
    folder = copied(runs["plain"], tmp_path)
    said = run("report", folder, "--displaced", 2)
    assert said.code == 0, said.err
    assert re.search(r"of 4 pairs of step 6 (are|is) below", said.out)
    assert section(folder)


def test_an_unfinished_run_is_looked_at_with_its_newest_good_checkpoint(runs, space, tmp_path):
    file = space.write("saved", "dpo", folder=tmp_path, train={"max_steps": 3, "logging_steps": 1, "save_steps": 1})
    assert run("dpo", file).code == 0
    folder = tmp_path / "saved"
    shutil.rmtree(folder / "adapter")
    newest = max(folder.glob("step-*"))
    (newest / "adapter_model.safetensors").write_bytes(b"x")
    said = run("report", folder, "--displaced", 1)
    assert said.code == 0, said.err
    assert f"skipped a damaged checkpoint: {newest}" in said.out and "step-00000002, the newest checkpoint" in said.out
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    said = run("report", folder, "--displaced", 1)
    assert said.code == 2 and "no saved weights yet" in said.err and len(said.err.splitlines()) == 1


def test_rows_given_in_python_come_with_the_reopened_run(space, tmp_path):
    quiet = Console(quiet=True)
    keys = {"model": str(space.base), "output_dir": str(tmp_path / "given"), "max_steps": 2, "logging_steps": 1}
    given = ll.dpo(
        data=PAIRS, r=4, max_length=128, per_device_train_batch_size=2, learning_rate=1e-2, console=quiet, **keys
    )
    page = report_run(given.path, quiet, displaced=2, opened=given.opened)
    assert "pairs of step 2" in section(page.parent)
    with pytest.raises(ConfigError, match="given in Python"):
        report_run(given.path, quiet, displaced=2)


def test_refusals_are_one_line(runs, tmp_path):
    said = run("report", runs["sft"], "--displaced", 1)
    assert said.code == 2 and "is a run of sft" in said.err and len(said.err.splitlines()) == 1
    said = run("report", runs["dpo"], "--displaced", 0)
    assert said.code == 2 and "argument --displaced: expected a whole number >= 1, got '0'" in said.err
    folder = copied(runs["dpo"], tmp_path)
    changed = helpers.write_jsonl(tmp_path / "pairs.jsonl", [{**PAIRS[0], "chosen": "other"}, *PAIRS[1:]])
    config = folder / "config.toml"
    config.write_text(re.sub(r'(?m)^source = ".*"', f'source = "{changed}"', config.read_text()))
    said = run("report", folder, "--displaced", 1)
    assert said.code == 3 and "not the rows that" in said.err and len(said.err.splitlines()) == 1


def test_the_tables_in_a_browser(browser, planted):
    assert run("report", planted, "--displaced", 4).code == 0
    for look, (width, dark) in LOOKS.items():
        check_look(browser, planted, look, width, dark)


def check_look(browser, planted, look, width, dark):
    show_as(browser, (width, 900), dark)
    browser.get((planted / "report.html").as_uri() + "#took")
    ask = browser.execute_script
    check_page(browser)
    assert ask("return [...document.querySelectorAll('#took .scroll')].every(e => e.tabIndex == 0 && e.ariaLabel)")
    text, back = ask(
        "const token = getComputedStyle(document.querySelector('#took .token'));"
        "return [token.color, token.backgroundColor].map(c => c.match(/\\d+/g).slice(0, 3).map(Number))"
    )
    assert abs(sum(text) - sum(back)) > 3 * 100 and (sum(back) < sum(text)) == dark
    keep(browser, f"report-displaced-{look}")
