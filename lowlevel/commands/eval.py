"""tasks of the LM Evaluation Harness for base, SFT and DPO, and paired differences between them"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, check_target, not_negative, positive, quiet_console


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR")
    text = "lm-eval's tasks, groups, or task files (.yaml), by comma"
    add("--tasks", type=_names, required=True, metavar="NAMES", help=text)
    add("--stages", type=_names, default=(), metavar="NAMES", help="for example base,dpo (default: all)")
    add("--num-fewshot", type=not_negative, metavar="N", help="examples in each prompt (default: the task's)")
    add("--limit", type=positive, metavar="N", help="only the first N items of each task")
    text = "prompts as plain text, as in most published numbers (default: the run's template, examples as turns)"
    add("--no-chat-template", action="store_true", help=text)
    add("--out", type=Path, metavar="FILE", help="the result as JSON (default: RUN_DIR/eval.json)")


def run(options: Options, overrides: Overrides) -> None:
    check_target("--out", options.out)
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
