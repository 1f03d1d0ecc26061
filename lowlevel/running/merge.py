"""`lowlevel merge`: merges base and adapters into one model, and measures its difference to the trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from lowlevel.batch.layout import PackedBatch
from lowlevel.config.data import DataConfig
from lowlevel.config.schema import DPOConfig, ModelConfig, SFTConfig
from lowlevel.durable import check_new, new_folder, write_json
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.heartbeat import working
from lowlevel.methods.choice import build_method
from lowlevel.model.attention_choice import MASKED, Attention
from lowlevel.model.base import load_base, load_stored, public_name
from lowlevel.model.merging import check_is_original, merged_model, refuse_quantisation_errors
from lowlevel.model.placement import Placement
from lowlevel.model.quantisation import lacks_16_bits
from lowlevel.online.rollouts import KeptRollouts, step_examples
from lowlevel.running.assembly import prepare_data
from lowlevel.running.progress import lines_to
from lowlevel.running.reopening import LoadedRun, load_run, reopen
from lowlevel.running.result_files import complete_result
from lowlevel.running.run_folder import RunFolder

PROBE_ROWS = 8
# The dequantised target is the same function up to rounding, so a larger divergence means a wrong merge.
KL_BOUNDS = {"fp32": 1e-5, "fp16": 1e-4, "bf16": 1e-3}


@dataclass(frozen=True)
class Fidelity:
    """A merged model compared with the training-time model, over the scored tokens of the probe rows."""

    kl: float  # KL(training-time || merged), nats a token
    loss: float  # cross-entropy of the merged model, nats a token
    training_time_loss: float
    same_top_token: float  # share of tokens with the same most likely prediction
    tokens: int


def merge_run(run_dir: Path, into: str, out: Path, console: Console, *, base: str | None = None) -> Fidelity:
    """Merge the adapters of a run into its base and write an ordinary model folder.

    Args:
        run_dir: a finished run; its parent adapter is merged too.
        into: dequantized, original or requantized.
        out: a new folder.
        console: prints the result.
        base: original, requantized: the model with the 16-bit weights; None: the run's base.

    Raises:
        ConfigError: `out` exists; the 16-bit weights are missing, or those of `base` are of another model.
        DataError: the probe rows changed since the run.
        CheckpointError: the dequantised merge differs from the trained model; nothing is written.
    """
    check_new(out)
    folder = RunFolder(run_dir)
    config = folder.read_config()
    if config.full:
        raise ConfigError(f"nothing to merge: {run_dir} trained all weights, and {folder.whole} is the whole model")
    source = _source(config.model, into, base)
    adapters = [adapter for adapter in (folder.parent, folder.adapter) if adapter.exists()]
    if into != "dequantized":
        refuse_quantisation_errors(adapters)
    rows = probe_rows(run_dir)
    run = load_run(run_dir, lines_to(console))
    dtype = torch.bfloat16 if run.policy.placement.precision == "bf16" else torch.float16
    if base is not None:
        check_is_original(source, run.policy.model)
    quantised = run.policy.model if into == "dequantized" else None
    with working("merging"):
        merged = merged_model(source, adapters, dtype, quantised=quantised)
    with new_folder(out) as temporary:
        with working("writing the merged model"):
            _write_model(merged, run, temporary, base)
        if into == "requantized":
            del merged
            merged = _requantise(run, temporary, base)
        with working("comparing the merged model with the run"):
            fidelity = measure(run, rows, temporary)
        bound = KL_BOUNDS[run.policy.placement.precision]
        if into == "dequantized" and not fidelity.kl <= bound:
            text = f"merge of {run_dir}: KL {fidelity.kl:.2e} to the training-time model exceeds {bound:g}"
            raise CheckpointError(text)
        chain = {"run": run_dir.name, "into": into, "manifest": run.folder.read_manifest()}
        chain |= {"base": public_name(base)} if base is not None else {}
        write_json(temporary / "lowlevel_merge.json", {**chain, "fidelity": asdict(fidelity)})
    console.print(
        f"merged into {into} base{f' {base}' if base is not None else ''}\n"
        f"  KL to the training-time model  {fidelity.kl:.2e} nats a token over {fidelity.tokens:,} tokens\n"
        f"  loss                           {fidelity.loss:.4f}, training-time model {fidelity.training_time_loss:.4f}\n"
        f"  same most likely token         {fidelity.same_top_token:.1%}"
    )
    return fidelity


def _source(model: ModelConfig, into: str, base: str | None) -> ModelConfig:
    """The base whose files are merged into. Raises ConfigError if it has to have 16-bit weights and has not."""
    if base is not None and into == "dequantized":
        raise ConfigError("--base is for --into original and requantized; dequantized merges into the run's own base")
    source = model if base is None else model.model_copy(update={"name": base, "revision": None})
    stored = load_stored(source)
    if stored and into != "dequantized":
        hint = "give the original model with --base, or use --into dequantized"
        raise ConfigError(f"--into {into} {lacks_16_bits(source.name, stored)}: {hint}")
    return source


def _write_model(model: PreTrainedModel, run: LoadedRun, folder: Path, base: str | None) -> None:
    """Write a Hugging Face folder: weights, tokenizer, chat template, end-of-reply tokens, model card."""
    model.config.use_cache = True
    model.generation_config.eos_token_id = run.tokenizer.stop_ids
    model.generation_config.pad_token_id = run.tokenizer.pad_id
    model.save_pretrained(folder)
    complete_result(folder, run.tokenizer, run.folder, run.config, "merged", merged_into=base)


def _requantise(run: LoadedRun, folder: Path, base: str | None) -> PreTrainedModel:
    """Replace the merged 16-bit model in `folder` by one that is quantised like the run's base."""
    model_config = run.config.model.model_copy(update={"name": str(folder), "revision": None, "load_in_4bit": True})
    model = load_base(model_config, run.policy.placement)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    _write_model(model, run, folder, base)
    return model


@torch.no_grad()
def measure(run: LoadedRun, rows: Sequence[Any], merged_dir: Path) -> Fidelity:
    """Compare the merged folder, loaded as a user would, with base + adapters as trained."""
    # Only its layout: the loss may be one that only the program knows which trained the run.
    plain = run.config.model_copy(update={"sft": SFTConfig(), "dpo": DPOConfig()})
    method = build_method(plain, run.opened.attention)
    batches = [batch for row in rows for batch in method.micro_batches([row])]
    run.activate(run.stages[-1])
    policy = run.policy
    before = [vocabulary_logps(policy.causal_lm, batch, policy.placement, policy.attention) for batch in batches]
    attention = MASKED if policy.attention.kernel else policy.attention
    merged_config = ModelConfig(name=str(merged_dir), load_in_4bit=False)
    merged = load_base(merged_config, policy.placement, attention=attention.implementation)
    merged.eval()
    kl = loss = reference_loss = same = 0.0
    for batch, (old, targets) in zip(batches, before, strict=True):
        new, _ = vocabulary_logps(merged, batch, policy.placement, attention)
        kl += float((old.exp() * (old - new)).sum())
        loss -= float(new.gather(-1, targets.unsqueeze(-1)).sum())
        reference_loss -= float(old.gather(-1, targets.unsqueeze(-1)).sum())
        same += float((old.argmax(-1) == new.argmax(-1)).sum())
    tokens = sum(len(targets) for _, targets in before)
    return Fidelity(kl / tokens, loss / tokens, reference_loss / tokens, same / tokens, tokens)


def probe_rows(run_dir: Path) -> Sequence[Any]:
    """A few held-out rows, or training rows without held-out ones; of an online method sampled completions.

    If the run's rows were given in Python, those of the demo. Raises DataError if the rows changed since the run.
    """
    opened = reopen(run_dir)
    if opened.config.sampled:
        return step_examples(opened.config, KeptRollouts(run_dir).newest())[:PROBE_ROWS]
    if opened.config.data.given:
        kept = opened.config.data.model_dump(include={"chat_template_from", "template_date", "max_length"})
        demo = opened.config.model_copy(update={"data": DataConfig(limit=PROBE_ROWS, **kept)})
        return prepare_data(demo)[1].train
    rows: Sequence[Any] = opened.held_out() or opened.data()[1].train
    return rows[:PROBE_ROWS]


def vocabulary_logps(
    model: Any, batch: PackedBatch, placement: Placement, attention: Attention = MASKED
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the vocabulary, (n, V) float64, at the n scored tokens of a batch, and those tokens, (n,).

    Excludes positions that pad the batch to a shape.
    """
    moved = batch.to(placement.device)
    positions, targets = (of_all[moved.belongs] for of_all in (moved.scored_positions, moved.scored_targets))
    with placement.autocast():
        hidden = model.get_decoder()(
            input_ids=moved.input_ids,
            position_ids=moved.position_ids,
            use_cache=False,
            **attention.arguments(moved, placement.dtype),
        ).last_hidden_state
        logits = model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, positions))
    return log_softmax(logits.double(), -1), targets
