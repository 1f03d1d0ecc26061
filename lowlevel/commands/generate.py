"""reply to a prompt with a run, an adapter or a merged model"""

import sys
from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, positive, quiet_console, temperature
from lowlevel.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    parser.set_defaults(output_is_result=True)
    add("model_dir", type=Path, metavar="DIR", help="run folder, PEFT adapter or merged model")
    add("--prompt", required=True, metavar="TEXT", help="user message")
    add("--system", metavar="TEXT", help="system message")
    add("--max-new-tokens", type=positive, default=256, help="longest reply, in tokens (default: 256)")
    add("--temperature", type=temperature, help="0: always the likeliest token (default)")
    add("--seed", type=int, default=0, help="of the sampling if temperature > 0 (default: 0)")
    add("--best-of", type=positive, metavar="N", help="sample N replies, print the best by --reward")
    add("--reward", type=Path, metavar="RUN_DIR", help="reward run that chooses the best reply")


def run(options: Options, overrides: Overrides) -> None:
    if (options.best_of is None) != (options.reward is None):
        raise ConfigError("--best-of and --reward belong together: give both or none")
    if options.best_of and options.temperature == 0:
        raise ConfigError("--best-of needs different replies: set --temperature above 0 (1 if it is left out)")
    quiet_console()
    from lowlevel.running.replies import sample_best, stream_reply
    from lowlevel.sampling import Sampling

    default = 1.0 if options.best_of else 0.0
    heat = default if options.temperature is None else options.temperature
    sampling = Sampling(options.max_new_tokens, heat, options.seed)
    if options.best_of:
        prompt, best = (options.prompt, options.system), options.best_of
        replies = sample_best(options.model_dir, *prompt, sampling, best, options.reward)
        for reward, text in replies:
            print(f"reward {reward:+.4f}  {' '.join(text.split())}", file=sys.stderr)
        print(replies[0][1] if replies else "")
        return
    stream_reply(options.model_dir, options.prompt, options.system, sampling)
