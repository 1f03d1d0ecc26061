"""Reference log-probabilities on disk: later epochs, and runs with another beta, skip the reference pass.

The reference is frozen, so the same micro-batch gives the same numbers in every epoch and run. An entry is a whole
micro-batch with its layout and not a pair, because kernels add in an order that depends on the batch's shape: a pair
in another batch differs in the last bits. How often an entry is found depends on what repeats:

    another beta, learning rate or loss; same rows, seed, batch sizes     every micro-batch
    more epochs with train.data_order = "sequential"                      every micro-batch after the first epoch
    more epochs with "shuffled"                                           almost none: the pairs are mixed differently

DIR/<SHA-256 of identity.json>/    one folder for each identity: everything else that the numbers depend on
  identity.json                    base, parent adapter, dtype, attention, layers, device, versions
  <SHA-256>.safetensors            a shard, named by its content: SHA-256 of a micro-batch -> (S,) fp32, all chosen,
                                   then all rejected

Of the entries from disk that a run uses, the first two and then one in a hundred are recomputed and must be equal bit
for bit; a difference switches the cache off and repeats the step. (On a GPU without train.deterministic, another
process may compute other bits, because the compiler picks some kernels by timing them.) Several processes can share a
folder: a complete file in it never changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.durable import remove_left, write_bytes, write_json
from lowlevel.errors import CheckpointError, how_many
from lowlevel.execution import Execution, ExecutionFailedError
from lowlevel.losses import LossSums
from lowlevel.methods import Method
from lowlevel.methods.dpo import reference_token_logps
from lowlevel.model.placement import dtype_name
from lowlevel.model.policy import PARENT, Policy
from lowlevel.version import __version__

LAYOUT_VERSION = 1  # increase it if the same tensors of a PackedBatch give other reference numbers
KERNELS_VERSION = 1  # increase it if a change of kernels/ or model/linear.py changes any bit
IDENTITY = "identity.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
ENTRIES_PER_SHARD = 256  # new entries are written at the latest after so many
ALWAYS_VERIFIED, VERIFIED_ONE_IN = 2, 100  # entries from disk
UNUSED = ("dropout_keys", "row_values", "reference_logps")  # tensors that the reference pass does not see
PLACES = ("_name_or_path", "transformers_version")  # of a base's configuration: its origin, not its content


def content_sha256(batch: PackedBatch) -> str:
    """SHA-256 of everything that the reference pass reads of a micro-batch; waits for the GPU if it is there."""
    digest = hashlib.sha256(f"longest {batch.longest}\n".encode())
    for name, tensor in sorted(batch.tensors().items()):
        if name not in UNUSED:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def with_content(lay_out: Callable[[Any], list[PackedBatch]]) -> Callable[[Any], list[PackedBatch]]:
    """The same function, whose micro-batches know their hash, computed on the CPU before they move to a device."""
    return lambda rows: [replace(batch, content=content_sha256(batch)) for batch in lay_out(rows)]


def with_blanks(batch: PackedBatch) -> PackedBatch:
    """The same micro-batch with zeros as reference numbers: a rehearsal with it takes the memory of a real one."""
    return replace(batch, reference_logps=torch.zeros(len(batch.lengths)))


def reference_identity(policy: Policy, base_sha256: str, parent_sha256: str | None) -> dict[str, Any]:
    """Everything that the reference's numbers depend on, except the micro-batch and how layers run.

    The hashes cover only weights, so the base's configuration (rotary angles, epsilons) and the parent adapter's
    scaling are listed too.
    """
    settings = {k: v for k, v in policy.causal_lm.config.to_dict().items() if k not in PLACES}
    scaling = {layer.scaling[PARENT] for layer in policy.lora_layers} if policy.has_parent else set()
    return {
        "base": base_sha256,
        "base_config": _json_sha256(settings),
        "parent_adapter": parent_sha256,
        "parent_scaling": sorted(scaling),
        "dtype": dtype_name(policy.placement.dtype),
        "attention": policy.attention.implementation,
        "linear": sorted({type(layer.get_base_layer()).__name__ for layer in policy.lora_layers}),
        "device": _device_kind(policy.placement.device),
        "versions": {"lowlevel": __version__, **{name: version(name) for name in LIBRARIES}},
        "layout_version": LAYOUT_VERSION,
        "kernels_version": KERNELS_VERSION,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


class ReferenceCache:
    """The entries of one identity: those on disk when it was opened, and those computed since then."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Read every shard; `note` prints a line for each damaged one, which is ignored. Partial files are removed."""
        self.identity, self.note = identity, note
        self.folder = folder / _json_sha256(identity)
        self.entries: dict[str, Tensor] = {}
        self._unwritten: list[str] = []
        self._writable = True
        remove_left(self.folder)  # partial files of killed writers
        for shard in sorted(self.folder.glob("*.safetensors")):
            try:
                self.entries |= read_shard(shard)
            except CheckpointError as error:
                note(f"reference cache: ignored {error}")
        self.from_disk = frozenset(self.entries)

    def add(self, key: str, logps: Tensor) -> None:
        """Keep the reference numbers of a micro-batch, (S,) fp32; they are written later."""
        self.entries[key] = logps
        self._unwritten.append(key)
        if len(self._unwritten) >= ENTRIES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write new entries; a disk error prints one line and ends the writing, not the run."""
        keys, self._unwritten = self._unwritten, []
        if not keys or not self._writable:
            return
        together = torch.cat([self.entries[key] for key in keys]).cpu()  # one wait for the device
        parts = together.split([len(self.entries[key]) for key in keys])
        host = {key: part.clone() for key, part in zip(keys, parts, strict=True)}
        self.entries |= host
        finite = {key: part for key, part in host.items() if bool(part.isfinite().all())}
        try:
            if finite:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not (self.folder / IDENTITY).exists():
                    write_json(self.folder / IDENTITY, self.identity)
                write_shard(self.folder, finite)
        except OSError as error:
            self._writable = False
            self.note(f"reference cache: {self.folder} is not written any further: {error.strerror}")


class CachedReference:
    """An Execution that adds reference numbers to each micro-batch before it runs."""

    def __init__(
        self,
        execution: Execution,
        policy: Policy,
        folder: Path,
        identity: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        """`identity` is that of `reference_identity`; `note` prints a line."""
        self.execution, self.policy, self.note = execution, policy, note
        self.folder, self.identity = folder, identity
        self.hits = self.computed = 0
        self.refused = False
        self._hits_from_disk = 0
        self._caches: dict[bool, ReferenceCache] = {}
        self._cache()

    @property
    def method(self) -> Method:
        """See Execution."""
        return self.execution.method

    def __enter__(self) -> CachedReference:
        return self

    def __exit__(self, *exception: object) -> None:
        off = ", then refused" if self.refused else ""
        counts = f"{how_many(self.hits, 'micro-batches')} found, {self.computed:,} computed{off}"
        self.note(f"reference cache: {counts} ({self.folder})")

    def run(self, batch: PackedBatch, factor: float, dropout_key: int) -> LossSums:
        """See Execution.

        Raises ExecutionFailedError: an entry was wrong and the cache is off now, or the execution itself failed.
        """
        return self.execution.run(batch if self.refused else self._with_logps(batch), factor, dropout_key)

    def flush(self) -> None:
        """Write new entries, unless one was wrong."""
        for cache in self._caches.values() if not self.refused else ():
            cache.flush()

    def _with_logps(self, batch: PackedBatch) -> PackedBatch:
        cache, key = self._cache(), batch.content or content_sha256(batch)
        found, from_disk, number = cache.entries.get(key), key in cache.from_disk, self._hits_from_disk
        check_is_due = from_disk and (number < ALWAYS_VERIFIED or number % VERIFIED_ONE_IN == 0)
        try:
            trusted = None if check_is_due else found
            logps = batch.sequence_sums(reference_token_logps(self.policy, batch)) if trusted is None else trusted
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception:  # the execution then fails in the same way, and can fall back; the next entry is checked
            return batch
        if found is None:
            cache.add(key, logps)
            self.computed += 1
        else:
            self._refuse_unless_equal(found, logps, batch)
            self.hits += 1
            self._hits_from_disk += from_disk
        if logps.device != batch.input_ids.device:
            logps = logps.pin_memory().to(batch.input_ids.device, non_blocking=True)
        return replace(batch, reference_logps=logps)

    def _cache(self) -> ReferenceCache:
        """The cache for the present mode: an execution may fall back from compiled to eager layers."""
        compiled = self.policy.layers.compiled
        if compiled not in self._caches:
            identity = {**self.identity, "layers": "compiled" if compiled else "eager"}
            self._caches[compiled] = ReferenceCache(self.folder, identity, self.note)
        return self._caches[compiled]

    def _refuse_unless_equal(self, found: Tensor, live: Tensor, batch: PackedBatch) -> None:
        problem = None
        if found.shape != batch.lengths.shape:
            problem = f"an entry has shape {tuple(found.shape)}, not {tuple(batch.lengths.shape)}"
        elif live is not found:
            problem = _difference(found, live.cpu(), batch.data_rows)
        if problem:
            self.refused = True
            self.note(f"reference cache: refused: {problem}, in {self._cache().folder}; continuing with the live pass")
            raise ExecutionFailedError("live reference pass")


def _difference(found: Tensor, live: Tensor, rows: tuple[int, ...]) -> str | None:
    """Where two (S,) tensors differ most; None if they are equal bit for bit."""
    if torch.equal(found.view(torch.int32), live.view(torch.int32)):
        return None
    apart = (found.double() - live.double()).abs()
    place = int(apart.argmax())
    side, pair = divmod(place, len(live) // 2)
    where = f"data row {rows[pair]}" if pair < len(rows) else "a dummy pair"
    name = ("chosen", "rejected")[side]
    return f"largest difference {apart[place]:.3g} ({name}, {where}: {found[place]:.9g}, live {live[place]:.9g})"


def write_shard(folder: Path, entries: Mapping[str, Tensor]) -> None:
    """Write entries under the hash of their content."""
    data = save({key: entries[key] for key in sorted(entries)}, metadata={"format": "pt"})
    write_bytes(folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)


def read_shard(path: Path) -> dict[str, Tensor]:
    """The entries of a shard.

    Raises CheckpointError: it cannot be read, its name is not the hash of its content, or an entry has a wrong dtype or
    shape.
    """
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != path.stem:
            raise CheckpointError(f"{path}: its content does not match its name")
        entries = load(data)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}") from None
    for key, logps in entries.items():
        if logps.dtype != torch.float32 or logps.ndim != 1 or not bool(logps.isfinite().all()):
            raise CheckpointError(f"{path}: entry {key[:12]} is not a vector of finite fp32 numbers")
    return entries


def _device_kind(device: torch.device) -> str:
    """What determines the order of additions: the GPU, or the CPU's instructions and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"


def _json_sha256(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
