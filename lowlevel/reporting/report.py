"""`lowlevel report`: a run as one page and its charts as PNG files, optionally compared with other runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lowlevel.config.schema import RunConfig
from lowlevel.durable import write_text
from lowlevel.errors import ConfigError, LowlevelError
from lowlevel.evaluation.forgetting import forgetting_table
from lowlevel.evaluation.results import eval_tables
from lowlevel.inspection.displacement import NOTICED
from lowlevel.inspection.page import render_template
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import percent
from lowlevel.model.files import read_or_empty
from lowlevel.reporting.comparison import sample_table, score_table
from lowlevel.reporting.displaced import SHOWN, PairTables, look_at_displaced, pair_tables
from lowlevel.reporting.series import chart
from lowlevel.running.assembly import load_run_tokenizer
from lowlevel.running.plots import Panel, panels, plot_panels
from lowlevel.running.reopening import Reopened, reopen
from lowlevel.running.run_folder import RunFolder
from lowlevel.table import TextTable

NO_TRACE = (
    "A trace adds the best and the worst pairs, the number of chosen completions below the reference, and the tokens "
    "that lost probability: train with --trace.every 10 (and --trace.level token)."
)


def report_run(
    run_dir: Path,
    console: Console,
    *,
    compare: Sequence[Path] = (),
    displaced: int | None = None,
    opened: Reopened | None = None,
) -> Path:
    """Write RUN_DIR/report.html and RUN_DIR/report/*.png.

    Args:
        run_dir: the run folder.
        console: receives the paths of the files, and the alarm if there is one.
        compare: other run folders, drawn into the same charts.
        displaced: number of pairs to inspect with the run's model: which tokens gained what the chosen ones lost.
        opened: the run, for `displaced`; required if its rows were given in Python, else reopened if None.

    Raises:
        ConfigError: not a run folder, or nothing logged yet.
        CheckpointError: a damaged trace; with `displaced`, no good weights, or a base that is not the run's.
        DataError: with `displaced`, data that changed since the run.
    """
    folders = [RunFolder(path) for path in (run_dir, *compare)]
    folder, names = folders[0], _names([run_dir, *compare])
    config, *_ = [each.read_config() for each in folders]
    records = [each.read_metrics() for each in folders]
    for each, found in zip(folders, records, strict=True):
        if not found:
            raise ConfigError(f"{each.path}: nothing is logged yet")
    made = panels(list(zip(names, records, strict=True)))
    tables = pair_tables(folder.trace) if config.method == "dpo" else None
    moved = None
    if displaced is not None:
        moved = look_at_displaced(opened or reopen(run_dir, lambda text: _say(console, text)), tables, displaced)
    quoted, page = shlex.quote(str(run_dir)), folder.path / "report.html"
    command = f"lowlevel report {quoted} --displaced {SHOWN}"
    text = render(
        made,
        title=names[0],
        folder=quoted,
        command=command,  # shows which tokens gained the probability of displaced pairs
        facts=_facts(folder, config, names[1:]),
        pair_tables=tables,
        missing=NO_TRACE if config.method == "dpo" and tables is None else None,
        tokens=_token_texts(config, tables),
        pages=_inspection_pages(folder),
        measured=measured_tables(folder.path),
        displaced=moved,
    )
    plot_panels(made, folder.report, title=" / ".join(names))
    write_text(page, text)
    _say(console, f"page written to {page}, {len(made)} charts to {folder.report}")
    if tables and tables.alarm:
        _say(console, _alarm(tables, command))
    if moved:
        _say(console, f"where the probability went: {moved.sentence}")
    return page


def render(panels: Sequence[Panel], **values: Any) -> str:
    """The page as HTML, in the style of the inspection page; needs no network, and its policy forbids all scripts."""
    styles = ["inspection/page.css", "reporting/report.css"]
    values |= {"charts": [chart(panel) for panel in panels], "noticed": percent(NOTICED)}
    return render_template("reporting/report.html", styles, **values)


def _alarm(tables: PairTables, command: str) -> str:
    rows = ", ".join(str(row["row"]) for row in tables.farthest)
    below = f"{tables.below} of {tables.count} chosen completions are below the reference"
    hint = f"to see which tokens gained their probability: {command}"
    return f"likelihood displacement: {below}, farthest those of rows {rows}; {hint}"


def measured_tables(folder: Path) -> list[TextTable]:
    """The data, and what lowlevel compare and eval have written here. Raises ConfigError for a damaged file."""
    made: list[TextTable] = []
    files: list[tuple[str, Callable[[Any], list[TextTable]]]] = [
        ("data_report.json", lambda found: [data_table(found)]),
        ("compare.json", lambda found: [score_table(found["scores"])]),
        ("eval.json", lambda found: eval_tables(found["rows"])),
        ("forgetting.json", lambda found: [forgetting_table(found["rows"])]),
        ("compare.json", lambda found: [one for one in [sample_table(found)] if one.rows]),
    ]
    for name, tables in files:
        try:
            made += tables(json.loads((folder / name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            raise ConfigError(f"{folder / name} cannot be read: remove it, or measure again") from None
    return made


def data_table(found: Mapping[str, Any]) -> TextTable:
    """Rows and tokens of the training and the held-out data; older runs may lack some of the numbers."""
    rows = []
    for name, title in (("train", "training"), ("evaluation", "held out")):
        if part := found.get(name):
            tokens = part.get("tokens", {})
            counts = (part.get("rows_read"), part.get("rows_kept"), tokens.get("total"), tokens.get("supervised"))
            cut = part.get("truncated_rows")
            rows.append([title, str(part.get("source")), *("-" if n is None else f"{n:,}" for n in (*counts, cut))])
    columns = ["data", "source", "rows read", "rows kept", "tokens", "supervised tokens", "rows cut"]
    return TextTable("Data", columns, rows, "supervised: tokens that the loss is about; cut: longer than max_length")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names; with the parent folder if two are the same."""
    short = [path.resolve().name for path in paths]
    return [
        name if short.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, path in zip(short, paths, strict=True)
    ]


def _facts(folder: RunFolder, config: RunConfig, others: Sequence[str]) -> list[tuple[str, str]]:
    train = config.train
    rows = f"{train.per_device_train_batch_size} x {train.gradient_accumulation_steps}"
    facts = [
        ("method", f"{config.method}, {config.loss_line}"),
        ("base", config.model.name + (", 4-bit" if config.model.load_in_4bit else "")),
        ("trained", "all weights") if config.full else
        ("adapter", f"r = {config.lora.r}, dropout {config.active_dropout:g}"),
        ("data", config.data.names),
        ("step", f"{rows}, learning rate {train.learning_rate:g}, {train.lr_scheduler_type}"),
    ]  # fmt: skip
    ranks, status = (read_or_empty(folder.path / name) for name in ("environment.json", "run-status.json"))
    facts += [("GPUs", str(ranks["ranks"]))] if "ranks" in ranks else []
    known = status.keys() >= {"state", "step"}
    facts.append(("state", f"{status['state']}, step {status['step']}" if known else "unknown"))
    return facts + ([("compared with", ", ".join(others))] if others else [])


def _token_texts(config: RunConfig, tables: PairTables | None) -> dict[int, str]:
    """Texts of the named tokens; empty if the run's tokenizer cannot be loaded."""
    if not (tables and tables.falls):
        return {}
    try:
        tokenizer = load_run_tokenizer(config)
    except LowlevelError:
        return {}
    pieces = TokenPieces(tokenizer)
    return {fall.token: pieces.text(fall.token) for fall in tables.falls}


def _inspection_pages(folder: RunFolder) -> dict[int, str]:
    """Links to pages of `lowlevel inspect --html` in the run folder, by data row; their articles have the id row-N."""
    found: dict[int, str] = {}
    for path in folder.inspection_pages():
        text = path.read_text(encoding="utf-8", errors="replace")
        found |= {int(row): f"{path.name}#row-{row}" for row in re.findall(r'id="row-(\d+)"', text)}
    return found
