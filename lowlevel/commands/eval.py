"""tasks of the LM Evaluation Harness for base, SFT and DPO, and paired differences between them"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, not_negative, positive, quiet_console
from lowlevel.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--tasks",
        type=_names,
        required=True,
        metavar="NAMES",
        help="lm-eval's tasks, groups, or task files (.yaml), by comma",
    )
    parser.add_argument(
        "--stages", type=_names, default=(), metavar="NAMES", help="for example base,dpo (default: all)"
    )
    parser.add_argument(
        "--num-fewshot", type=not_negative, metavar="N", help="examples in each prompt (default: the task's)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N items of each task")
    parser.add_argument(
        "--no-chat-template",
        action="store_true",
        help="prompts as plain text, as in most published numbers (default: the run's template, examples as turns)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the result as JSON (default: RUN_DIR/eval.json)")


def run(options: Options, overrides: Overrides) -> None:
    if options.out and not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: no such folder")
    console = quiet_console()
    from lowlevel.evaluation.tasks import evaluate_run

    evaluate_run(
        options.run_dir,
        console,
        tasks=options.tasks,
        stages=options.stages,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        chat_template=not options.no_chat_template,
        out=options.out,
    )


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
