"""What is measured: one case is a method and its settings in one tool. Pure data; nothing heavy is imported here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROWS_PER_STEP = 8  # the recipe's 2 x 4, and what every other setting is compared at
WORKERS = {
    "lowlevel": "benchmarks.lowlevel_case",
    "trl": "benchmarks.peers.trl_peer",
    "unsloth": "benchmarks.peers.unsloth_peer",
    "plain": "benchmarks.peers.plain_peer",
    "liger": "benchmarks.peers.plain_peer",
}
FIELDS = (
    "case", "method", "tool", "version", "setting", "execution", "plan",
    "tokens_per_second", "computed_tokens_per_second",
    "seconds_per_step", "seconds_p10", "seconds_p90", "peak_allocated_gib", "peak_reserved_gib", "device_used_gib",
    "loss_first", "loss_last", "losses", "first_step_seconds", "case_seconds", "tokens", "positions_per_step",
    "padding_share", "timed_steps", "status", "shape", "gpu", "torch", "transformers", "peft", "bitsandbytes",
    "commit", "cap_gib", "started",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Settings of one measurement; what is not named here is as `runs/tinyllama_*.toml` says."""

    name: str
    tool: str  # a key of WORKERS
    method: str  # sft or dpo
    batch: int = 2  # rows or pairs a micro-batch
    accumulation: int = 4  # micro-batches a step
    checkpointing: bool = True
    execution: str = "eager"  # lowlevel only: eager, compiled, graphed or auto
    dropout: float = 0.1
    precision: str = "auto"  # what the tool runs best in: fp16, for TRL bf16
    stacked: bool = False  # lowlevel's dpo on a frozen SFT adapter, as the recipe's second step
    rank: int = 64
    variant: str = ""  # lowlevel only: "fast" or "low_vram", with that run file's own settings
    budget: str = ""  # lowlevel only: train.memory_budget
    on_host: bool = False  # lowlevel only: model.embeddings_on_host
    offload: bool = False  # lowlevel only: train.offload_activations
    deterministic: bool = False  # lowlevel only: train.deterministic
    core: bool = True  # part of the table; the others are run by name

    @property
    def setting(self) -> str:
        """A short description for the table."""
        if self.variant:
            return f"tinyllama_{self.method}_{self.variant}.toml"
        parts = [f"{self.batch}x{self.accumulation}", "checkpointing" if self.checkpointing else "no checkpointing"]
        parts += [self.execution] * (self.tool == "lowlevel")
        parts += [f"dropout {self.dropout:g}"] * (self.method == "sft" and self.dropout != 0.1)
        parts += [self.precision] * (self.precision != "auto")
        parts += ["on a frozen adapter"] * self.stacked
        parts += [f"r={self.rank}"] * (self.rank != 64)
        parts += [f"memory_budget {self.budget}"] * bool(self.budget)
        parts += ["embeddings on the host"] * self.on_host
        parts += ["layer inputs on the host"] * self.offload
        parts += ["deterministic"] * self.deterministic
        return ", ".join(parts)

    @property
    def identity(self) -> dict[str, str]:
        """The fields of a row that say which case it is of."""
        execution = self.execution if self.tool == "lowlevel" else ""
        return {"case": self.name, "method": self.method, "tool": self.tool, "setting": self.setting,
                "execution": execution}  # fmt: skip


FULL: dict[str, Any] = {"batch": 8, "accumulation": 1}  # one micro-batch a step
NOCKPT: dict[str, Any] = {**FULL, "checkpointing": False}  # the fastest setting that a 16 GB card holds
HOST: dict[str, Any] = {"on_host": True, "offload": True}  # all that may lie there
TWO_GB = "1.86GiB"  # 2 GB: the memory class in which the recipe runs as it is written
CASES = (
    Case("lowlevel_sft_2x4_eager", "lowlevel", "sft"),
    Case("lowlevel_sft_2x4_compiled", "lowlevel", "sft", execution="compiled"),
    Case("lowlevel_sft_2x4_graphed", "lowlevel", "sft", execution="graphed"),
    Case("lowlevel_sft_2x4_host_graphed", "lowlevel", "sft", execution="graphed", on_host=True),
    Case("lowlevel_sft_2gb_graphed", "lowlevel", "sft", execution="graphed", budget=TWO_GB),
    Case("lowlevel_sft_2gb_host_graphed", "lowlevel", "sft", execution="graphed", budget=TWO_GB, **HOST),
    Case("lowlevel_sft_8x1_nockpt_graphed", "lowlevel", "sft", execution="graphed", **NOCKPT),
    Case("lowlevel_dpo_2x4_eager", "lowlevel", "dpo"),
    Case("lowlevel_dpo_2x4_graphed", "lowlevel", "dpo", execution="graphed"),
    Case("lowlevel_dpo_2gb_graphed", "lowlevel", "dpo", execution="graphed", budget=TWO_GB),
    Case("lowlevel_dpo_2gb_host_graphed", "lowlevel", "dpo", execution="graphed", budget=TWO_GB, **HOST),
    Case("lowlevel_dpo_8x1_nockpt_graphed", "lowlevel", "dpo", execution="graphed", **NOCKPT),
    Case("lowlevel_dpo_2x4_stacked_graphed", "lowlevel", "dpo", execution="graphed", stacked=True),
    Case("trl_sft_2x4", "trl", "sft"),
    Case("trl_sft_2x4_fp16", "trl", "sft", precision="fp16"),  # fails: LoRA weights become bf16, and the scaler raises
    Case("trl_sft_8x1_nockpt", "trl", "sft", **NOCKPT),
    Case("trl_dpo_2x4", "trl", "dpo"),
    Case("trl_dpo_8x1_nockpt", "trl", "dpo", **NOCKPT),
    Case("unsloth_sft_2x4", "unsloth", "sft", dropout=0.0),
    Case("unsloth_sft_8x1_nockpt", "unsloth", "sft", dropout=0.0, **NOCKPT),
    Case("unsloth_dpo_2x4", "unsloth", "dpo", dropout=0.0),
    Case("unsloth_dpo_8x1_nockpt", "unsloth", "dpo", dropout=0.0, **NOCKPT),
    Case("liger_sft_2x4", "liger", "sft"),
    Case("liger_sft_8x1_nockpt", "liger", "sft", **NOCKPT),
    # Not in the table: more points for t4.py, and what a reader may want to check.
    Case("lowlevel_sft_2x4_host_offload_graphed", "lowlevel", "sft", execution="graphed", core=False, **HOST),
    Case(
        "lowlevel_sft_2x4_deterministic_graphed", "lowlevel", "sft", execution="graphed", deterministic=True, core=False
    ),
    Case("lowlevel_sft_4x2_graphed", "lowlevel", "sft", 4, 2, execution="graphed", core=False),
    Case("lowlevel_sft_8x1_graphed", "lowlevel", "sft", execution="graphed", core=False, **FULL),
    Case("lowlevel_sft_4x2_nockpt_graphed", "lowlevel", "sft", 4, 2, False, "graphed", core=False),
    Case("lowlevel_dpo_8x1_graphed", "lowlevel", "dpo", execution="graphed", core=False, **FULL),
    *(
        Case(f"lowlevel_{method}_{variant}", "lowlevel", method, execution="auto", variant=variant, core=False)
        for variant in ("fast", "low_vram")
        for method in ("sft", "dpo")
    ),
    Case(
        "lowlevel_sft_8x1_nockpt_dropout0_graphed",
        "lowlevel",
        "sft",
        execution="graphed",
        dropout=0.0,
        core=False,
        **NOCKPT,
    ),
    Case("lowlevel_sft_8x1_nockpt_eager", "lowlevel", "sft", core=False, **NOCKPT),
    Case("lowlevel_dpo_2x4_compiled", "lowlevel", "dpo", execution="compiled", core=False),
    Case("trl_sft_8x1", "trl", "sft", core=False, **FULL),
    Case("trl_dpo_8x1", "trl", "dpo", core=False, **FULL),
    Case("unsloth_sft_2x4_dropout", "unsloth", "sft", core=False),
    Case("unsloth_sft_8x1", "unsloth", "sft", dropout=0.0, core=False, **FULL),
    Case("unsloth_dpo_8x1", "unsloth", "dpo", dropout=0.0, core=False, **FULL),
    Case("plain_sft_2x4", "plain", "sft", core=False),
    Case("plain_sft_8x1_nockpt", "plain", "sft", core=False, **NOCKPT),
)


def select(patterns: Sequence[str]) -> list[Case]:
    """Cases in the order asked for: any by its full name, the table's by shell pattern; without patterns the table's.

    Raises:
        SystemExit: a pattern that matches nothing.
    """
    if not patterns:
        return [case for case in CASES if case.core]
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        matching = {case.name: case for case in CASES if case.core and fnmatchcase(case.name, pattern)}
        found = {case.name: case for case in CASES if case.name == pattern} or matching
        if not found:
            raise SystemExit(f"no case {pattern!r}; known: {', '.join(case.name for case in CASES)}")
        chosen |= found
    return list(chosen.values())


@dataclass(frozen=True)
class Job:
    """A case with where it finds its work and leaves its result: what a worker process is given, as JSON."""

    case: Case
    workload: str  # folder that workload.py wrote
    scratch: str  # folder for whatever the tool writes
    result: str  # JSON file for the row
    steps: int
    warmup: int
    cap_gib: float

    def write(self, path: Path) -> None:
        """Write the job for a worker."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """What `write` wrote."""
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "case": Case(**fields["case"])})
