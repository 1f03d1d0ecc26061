"""merge a run's adapters into its base, and measure the difference"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, quiet_console


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR")
    add(
        "--into",
        choices=("dequantized", "original", "requantized"),
        default="dequantized",
        help="dequantized: the 4-bit base used in training, in 16 bits (default); original: the unquantised base; "
        "requantized: the merged original, quantised again",
    )
    add("--base", metavar="NAME", help="original, requantized: folder or hub name with the base's 16-bit weights")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the merged model")


def run(options: Options, overrides: Overrides) -> None:
    console = quiet_console()
    from lowlevel.running.merge import merge_run

    merge_run(options.run_dir, options.into, options.out, console, base=options.base)
    console.print(f"written: {options.out}", markup=False, soft_wrap=True)
