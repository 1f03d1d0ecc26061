"""training data after filters and chat template, without a GPU and without the model"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowlevel.commands.common import Options, Overrides, Parser, add_run_file, quiet_console, read_any_run
from lowlevel.errors import ConfigError, how_many

if TYPE_CHECKING:
    from rich.console import Console

    from lowlevel.config.schema import RunConfig
    from lowlevel.model.attention_choice import Attention


def add_arguments(parser: Parser) -> None:
    add_run_file(parser)


def run(options: Options, overrides: Overrides) -> None:
    console = quiet_console()
    show_data(read_any_run(options, overrides, console), console)


def show_data(config: RunConfig, console: Console) -> None:
    """Print the data report, how the rows fill batches, and one example with its supervised tokens coloured."""
    from lowlevel.batch.order import DataOrder
    from lowlevel.data.report import render_report, show_example
    from lowlevel.methods.choice import build_method
    from lowlevel.methods.kto import balance
    from lowlevel.online.rollouts import longest_examples
    from lowlevel.running.assembly import prepare_data

    tokenizer, data = prepare_data(config)
    render_report(data.report, console)
    if config.method == "kto":
        console.print(balance(data.train, config.kto), markup=False, highlight=False)
    order = DataOrder.of(config, data.train)
    attention, where = layout_of(config)
    method = build_method(config, attention, data.train)
    examples = [data.train[i] for i in order.step_rows(0)]
    batches = method.micro_batches(longest_examples(config, examples) if config.sampled else examples)
    positions = sum(batch.input_ids.numel() for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    scored = sum(batch.num_scored for batch in batches)
    step = "first step with the longest completions" if config.sampled else "first step"
    console.print(
        f"\n{step}: {how_many(config.rows_per_step, 'examples')} in {how_many(len(batches), 'micro-batches')}, "
        f"{positions:,} positions, {tokens:,} tokens ({1 - tokens / positions:.1%} padding), {scored:,} supervised; "
        f"{how_many(order.steps_per_epoch, 'steps')} an epoch\n{where}\n",
        markup=False,
    )
    show_example(data.train[0], tokenizer, console)


def layout_of(config: RunConfig) -> tuple[Attention, str]:
    """The attention that decides how rows fill batches on this machine, and a line that names it.

    The attention of a CPU if this machine cannot make the run: its data can be looked at anywhere.
    """
    from lowlevel.model.attention_choice import MASKED, choose_attention
    from lowlevel.model.base import load_model_config
    from lowlevel.model.placement import choose_placement

    try:
        placement = choose_placement(config.train.precision)
        attention = choose_attention(config.model, load_model_config(config.model), placement)
    except ConfigError as error:
        return MASKED, f"laid out as on a CPU; this machine cannot make the run: {error}"
    chosen = "; train.memory_budget may choose other micro-batches" if config.train.memory_budget else ""
    return attention, f"laid out as on this machine: {attention.reason}{chosen}"
