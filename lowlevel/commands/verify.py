"""check one step of a run against its formula in float64; exit code 1 if a check fails"""

import tempfile
from pathlib import Path

from lowlevel.commands import common
from lowlevel.commands.common import Options, Overrides, Parser
from lowlevel.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    common.add_run_file(parser)
    add("--step", "--batch", type=common.positive, default=1, metavar="N", help="optimizer step to check (default: 1)")
    add("--json", type=Path, metavar="FILE", help="result (default: verify.json in the run folder)")
    text = "also run a base of up to N weights in float64 on the CPU (default: 500,000,000)"
    add("--exact-parameters", type=common.not_negative, default=500_000_000, metavar="N", help=text)


def run(options: Options, overrides: Overrides) -> None:
    folder: Path | None = options.config if options.config and options.config.is_dir() else None
    given = [f"--{key}" for key in overrides]
    given += [f"--{key.replace('_', '-')}" for key in ("method", "on_bad_row", "as_t4") if vars(options)[key]]
    if folder and given:
        raise ConfigError(f"{given[0]}: {folder} has its own config.toml; flags are for the start of a run")
    common.check_target("--json", options.json)
    console = common.quiet_console()
    config = None if folder else common.read_any_run(options, overrides, console)
    common.cap_gpu_memory(options)
    from lowlevel.durable import write_given_json
    from lowlevel.running.progress import lines_to
    from lowlevel.running.reopening import reopen
    from lowlevel.verification.opening import open_start, verify_run
    from lowlevel.verification.report import print_checks

    note = lines_to(console)
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_start(config, Path(scratch)) if config else reopen(options.config, note)
        report = verify_run(opened, step=options.step, exact_parameters=options.exact_parameters)
    note(report.heading)
    print_checks(report.checks, console)
    target = options.json or (folder / "verify.json" if folder else None)
    if target:
        write_given_json(target, report.as_json())
    report.check()
    console.print(f"all {len(report.checks)} checks hold")
