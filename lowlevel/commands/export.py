"""write a run or a merged model for llama.cpp (GGUF), Ollama or vLLM"""

from pathlib import Path

from lowlevel.commands.common import Options, Overrides, Parser, quiet_console


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="RUN_DIR", help="a finished run, or the folder of a merged model")
    add(
        "--to",
        choices=("gguf", "ollama", "vllm", "gguf-adapter"),
        required=True,
        help="gguf: one file, merged, in fp16; ollama: the same with a Modelfile; vllm: the adapter, not merged; "
        "gguf-adapter: likewise, for llama.cpp's --lora and Ollama's ADAPTER",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")


def run(options: Options, overrides: Overrides) -> None:
    console = quiet_console()
    from lowlevel.exporting.export import export

    export(options.source, options.to, options.out, console)
