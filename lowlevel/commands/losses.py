"""preference losses: formula, paper, value and gradient at a point, curves"""

import os
import sys
from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser

NUMBERS = {
    "chosen": "log-probability of the chosen completion under the policy (default: -10)",
    "rejected": "of the rejected completion (default: -12)",
    "ref_chosen": "of the chosen completion under the reference (default: -11)",
    "ref_rejected": "of the rejected completion under the reference (default: -11.5)",
    "chosen_length": "tokens in the chosen completion: ipo, sigmoid_norm, rpo (default: 4)",
    "rejected_length": "tokens in the rejected completion (default: 5)",
    "beta": "temperature (default: 0.1)",
    "label_smoothing": "share of flipped labels, for cdpo, robust, exo_pair and both aot (default: 0; exo_pair 0.001)",
    "discopop_tau": "discopop's temperature (default: 0.05)",
    "dpop_lambda": "dpop's penalty (default: 50)",
    "rpo_alpha": "weight of rpo's NLL term (default: 1)",
}


def add_arguments(parser: Parser) -> None:
    for name, text in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="NUMBER", help=text)
    parser.add_argument(
        "--loss", metavar="NAME", help="only this loss, with every digit; an option that it does not use is an error"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss and slope over the margin")
    parser.add_argument("--json", action="store_true", help="JSON with every digit")


def run(options: Options, overrides: Overrides) -> None:
    from lowlevel.inspection.losses import show_losses
    from lowlevel.running.progress import PipedConsole

    given = {name: value for name in NUMBERS if (value := vars(options)[name]) is not None}
    fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = PipedConsole(highlight=False, width=fixed)
    show_losses(given, console, name=options.loss, plot=options.plot, as_json=options.json)
