"""reply to a prompt with a run, an adapter or a merged model"""

import argparse
from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, positive, quiet_console


def add_arguments(parser: Parser) -> None:
    parser.set_defaults(output_is_result=True)
    parser.add_argument("model_dir", type=Path, metavar="DIR", help="run folder, PEFT adapter or merged model")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="user message")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="longest reply, in tokens (default: 256)")
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling if temperature > 0 (default: 0)")


def run(options: Options, overrides: Overrides) -> None:
    quiet_console()
    from lowlevel.running.replies import Sampling, stream_reply

    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    stream_reply(options.model_dir, options.prompt, options.system, sampling)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return value
