"""rewards of completions or pairs from a reward run; for pairs accuracy and calibration"""

import json
from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, quiet_console
from lowlevel.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a lowlevel reward run")
    parser.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help='.jsonl, .jsonl.gz or .parquet file, hub data set, or "demo" (its held-out pairs): rows with "prompt", '
        '"chosen", "rejected"; "prompt", "completion"; or "messages", whose last reply is scored',
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="of a hub data set (default: test)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON line a row with its rewards")


def run(options: Options, overrides: Overrides) -> None:
    if options.out and not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: no such folder")
    console = quiet_console()
    from lowlevel.durable import given_file
    from lowlevel.running.progress import lines_to
    from lowlevel.running.scoring import load_reward_run, score_source, summary

    scored = score_source(load_reward_run(options.run_dir, lines_to(console)), options.data, options.split)
    if options.out:
        try:
            with given_file(options.out) as target:
                target.write_text("".join(json.dumps(one.as_json()) + "\n" for one in scored), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {options.out}: {error.strerror}") from None
    console.print(summary(scored), markup=False)
