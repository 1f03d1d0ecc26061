"""check one step of a run against its formula in float64; exit code 1 if a check fails"""

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
    console = quiet_console()
    from lowlevel.verification.verify import verify_run

    verify_run(
        options.path,
        console,
        overrides=overrides,
        batch=options.step,
        json_file=options.json,
        exact_parameters=options.exact_parameters,
    )
