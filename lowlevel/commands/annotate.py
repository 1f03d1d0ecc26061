"""judge pairs of sampled replies on a local page; the judgements become rows for dpo"""

import sys
from pathlib import Path

from lowlevel.commands import common
from lowlevel.commands.common import Options, Overrides, Parser, not_negative, positive, quiet_console, temperature
from lowlevel.errors import ConfigError

LAST_PORT = 65_535


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, nargs="?", metavar="RUN_DIR", help="run folder whose replies are judged")
    add("--prompts", metavar="FILE", help='rows with "prompt" or "messages"; "demo": its held-out rows')
    add("--other", type=Path, metavar="RUN_DIR2", help="second reply from this run (default: RUN_DIR)")
    add("--out", type=Path, metavar="FILE", help="preference file for lowlevel dpo, journal beside it")
    add("--max-new-tokens", type=positive, default=256, help="longest reply, in tokens (default: 256)")
    add("--temperature", type=temperature, default=1.0, help="of the sampling (default: 1)")
    add("--seed", type=int, default=0, help="of the sampling and of the sides (default: 0)")
    add("--resume", action="store_true", help="go on with the journal of --out")
    text = "default: a free one; an SSH tunnel needs the same number at both ends"
    add("--port", type=not_negative, default=0, help=text)
    add("--report", type=Path, metavar="FILE", help="only print the report of this preference file")


def run(options: Options, overrides: Overrides) -> None:
    if options.report:
        _report(options.report)
        return
    needed = {"RUN_DIR": options.run_dir, "--prompts": options.prompts, "--out": options.out}
    if missing := [name for name, value in needed.items() if value is None]:
        raise ConfigError(f"lowlevel annotate needs {', '.join(missing)}; or --report FILE")
    common.check_target("--out", options.out)
    if options.prompts != "demo" and not Path(options.prompts).is_file():
        raise ConfigError(f"--prompts {options.prompts}: no such file")
    if options.temperature == 0 and options.other is None:
        raise ConfigError("--temperature 0 gives two equal replies of one run: set it above 0, or give --other")
    if options.port > LAST_PORT:
        raise ConfigError(f"--port {options.port}: at most {LAST_PORT}; leave it out to take a free one")
    console = quiet_console()
    from lowlevel.annotation.session import annotate
    from lowlevel.running.progress import lines_to
    from lowlevel.running.replies import Sampling

    runs = [options.run_dir, *([options.other] if options.other else [])]
    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    settings = (runs, options.prompts, options.out, sampling)
    annotate(*settings, lines_to(console), resume=options.resume, port=options.port)


def _report(file: Path) -> None:
    from lowlevel.annotation.agreement import report
    from lowlevel.annotation.journal import Journal, journal_path

    path = journal_path(file)
    if not path.is_file():
        raise ConfigError(f"--report {file}: there is no {path}")
    sys.stdout.write(report(Journal(path)) + "\n")
