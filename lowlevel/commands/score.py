"""rewards of completions or pairs from a reward run; for pairs accuracy and calibration"""

import json
from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, check_target, quiet_console


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="folder of a lowlevel reward run")
    add(
        "--data",
        required=True,
        metavar="SOURCE",
        help='.jsonl, .jsonl.gz or .parquet file, hub data set, or "demo" (its held-out pairs): rows with "prompt", '
        '"chosen", "rejected"; "prompt", "completion"; or "messages", whose last reply is scored',
    )
    add("--split", default="test", metavar="NAME", help="of a hub data set (default: test)")
    add("--out", type=Path, metavar="FILE", help="write one JSON line a row with its rewards")


def run(options: Options, overrides: Overrides) -> None:
    check_target("--out", options.out)
    console = quiet_console()
    from lowlevel.durable import write_given
    from lowlevel.running.progress import lines_to
    from lowlevel.running.scoring import load_reward_run, score_source, summary

    scored = score_source(load_reward_run(options.run_dir, lines_to(console)), options.data, options.split)
    if options.out:
        write_given(options.out, "".join(json.dumps(one.as_json()) + "\n" for one in scored))
    console.print(summary(scored), markup=False)
