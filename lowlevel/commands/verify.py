"""check one step of a run against its formula in float64; exit code 1 if a check fails"""

import tempfile
from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, not_negative, positive, quiet_console
from lowlevel.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    parser.set_defaults(takes_config=True)
    parser.add_argument(
        "path", type=Path, metavar="RUN_DIR|RUN.toml", help="run folder, or run file for the start of a run"
    )
    parser.add_argument(
        "--step", "--batch", type=positive, default=1, metavar="N", help="optimizer step to check (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="result (default: verify.json in the run folder)")
    parser.add_argument(
        "--exact-parameters",
        type=not_negative,
        default=500_000_000,
        metavar="N",
        help="also run a base of up to N weights in float64 on the CPU (default: 500,000,000)",
    )


def run(options: Options, overrides: Overrides) -> None:
    if overrides and options.path.is_dir():
        raise ConfigError(
            f"--{next(iter(overrides))}: {options.path} has its own config.toml; flags are for a run file"
        )
    if options.json and not options.json.parent.is_dir():
        raise ConfigError(f"--json {options.json}: no such folder")
    console = quiet_console()
    from lowlevel.durable import write_given_json
    from lowlevel.running.progress import lines_to
    from lowlevel.running.reopening import reopen
    from lowlevel.verification.opening import open_file, verify_run
    from lowlevel.verification.report import print_checks

    path, note = options.path, lines_to(console)
    with tempfile.TemporaryDirectory() as scratch:
        opened = reopen(path, note) if path.is_dir() else open_file(path, overrides, Path(scratch))
        report = verify_run(opened, step=options.step, exact_parameters=options.exact_parameters)
    note(report.heading)
    print_checks(report.checks, console)
    target = options.json or (path / "verify.json" if path.is_dir() else None)
    if target:
        write_given_json(target, report.as_json())
    report.check()
    console.print(f"all {len(report.checks)} checks hold")
