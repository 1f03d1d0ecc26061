"""which of two runs replies better, by a model on an OpenAI-compatible server or by a reward run"""

import argparse
from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, check_target, positive, quiet_console
from lowlevel.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    what = "run folder, PEFT adapter or merged model"
    add("a", type=Path, metavar="DIR_A", help=what)
    add("b", type=Path, metavar="DIR_B", help=f"{what}; of a dpo run, DIR/parent is its SFT stage")
    text = 'rows with "prompt", or "turns": a list of texts, as in MT-Bench; and "system" if you like'
    add("--prompts", type=Path, required=True, metavar="FILE", help=text)
    add("--endpoint", metavar="URL", help="for example https://api.openai.com/v1; key: OPENAI_API_KEY")
    add("--model", metavar="NAME", help="the judge on the server")
    add("--reward", type=Path, metavar="RUN_DIR", help="judge by this reward run instead")
    add("--max-new-tokens", type=positive, default=512, help="longest reply, in tokens (default: 512)")
    add("--price", type=_price, metavar="IN,OUT", help="dollars for a million tokens, to show what the judge cost")
    add("--out", type=Path, default=Path("judge.json"), metavar="FILE", help="the result (default: judge.json)")


def run(options: Options, overrides: Overrides) -> None:
    if (options.endpoint is None) != (options.model is None) or (options.endpoint is None) == (options.reward is None):
        raise ConfigError("give one judge: --endpoint with --model, or --reward")
    check_target("--out", options.out)
    console = quiet_console()
    from lowlevel.evaluation.endpoint import Endpoint
    from lowlevel.evaluation.judging import judge_runs
    from lowlevel.running.progress import lines_to
    from lowlevel.sampling import Sampling

    judge_runs(
        (options.a, options.b),
        options.prompts,
        console,
        endpoint=Endpoint.of(options.endpoint, options.model, lines_to(console)) if options.endpoint else None,
        reward=options.reward,
        sampling=Sampling(options.max_new_tokens),
        price=options.price,
        out=options.out,
    )


def _price(text: str) -> tuple[float, float]:
    try:
        given, made = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers such as 0.15,0.6, got {text!r}") from None
    return given, made
