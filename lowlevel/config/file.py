"""Run files: TOML and flags become a `RunConfig`, with all problems reported at once; and the reverse."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from lowlevel.config import METHODS
from lowlevel.config.contradictions import ADAPTER_SHAPE, UNREAD, contradictions, empty_texts, secrets_in
from lowlevel.config.data import DataSource, Filter
from lowlevel.config.given import Source
from lowlevel.config.offline import DPOConfig
from lowlevel.config.schema import (
    FULL_RATES,
    LOSS_DEFAULTS,
    METHOD_DEFAULTS,
    SECTIONS,
    RunConfig,
    other_section,
    sections_of,
)
from lowlevel.config.section import as_sum
from lowlevel.errors import ConfigError, one_line, quoted

TEXTS = (str, str | None, get_args(Source)[0], Source | None)  # types of keys whose flags are not parsed as TOML
# Names of keys in other programs and papers that are too different for a suggestion by spelling.
OTHER_NAMES = {
    **dict.fromkeys(("fp16", "bf16", "dtype"), "precision"),
    **dict.fromkeys(("data", "dataset", "dataset_name", "train_dataset", "path"), "source"),
    **dict.fromkeys(("args", "training_args"), "train"),
    **dict.fromkeys(("peft", "peft_config"), "lora"),
    **dict.fromkeys(("tokenizer", "processing_class"), "chat_template_from"),
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    **dict.fromkeys(("o", "out", "output", "run_name"), "output_dir"),
    "optimizer": "optim",
    "clip": "max_grad_norm",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    **dict.fromkeys(
        ("seq_len", "seq_length", "max_seq_length", "max_seq_len", "sequence_len", "cutoff_len"), "max_length"
    ),
    **dict.fromkeys(("model_name_or_path", "base_model", "model_name"), "name"),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir", "ref_model"), "adapter"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), "target_modules"),
    "micro_batch_size": "per_device_train_batch_size",
    "sample_packing": "packing",
    "eval_dataset": "eval_source",
    "lora_rank": "r",
    "lora_r": "r",
    "loss": "loss_type",
}
TRUNCATED = "is not supported: the loss needs the distribution that was sampled from, which is that of all tokens"
REFUSED = dict.fromkeys(("top_p", "top_k", "min_p"), TRUNCATED)
REFUSED["loss_weights"] = 'write the weights into loss_type: "0.8*sigmoid + 0.2*bco_pair"'


def load_config(path: Path | None, overrides: Mapping[str, str] = {}, *, method: str | None = None) -> RunConfig:
    """Read a run file (None: the defaults) and apply `overrides`: "section.key" -> text as typed on the command line.

    `method` is that of the command. Raises ConfigError with one line for each problem found.
    """
    return config_from_tables(given_tables(path, overrides, method), str(path or "flags"))


def given_tables(path: Path | None, overrides: Mapping[str, str], method: str | None) -> dict[str, Any]:
    """The tables of a run file with flags applied, not yet validated. Arguments and errors as in `load_config`."""
    where = str(path) if path else "flags"
    tables = load_tables(path, method)
    for dotted, text in overrides.items():
        section, _, key = dotted.partition(".")
        table = tables.setdefault(section, {})
        if not isinstance(table, dict):
            name, value = quoted(section), quoted(repr(table))
            raise ConfigError(f"{where}: --{quoted(dotted)}: {name} is {value}, not a section")
        table[key] = _parse_flag(section, key, text)
    return tables


def load_tables(path: Path | None, method: str | None) -> dict[str, Any]:
    """The tables of a run file, not yet validated. Raises ConfigError if its method is not that of the command."""
    tables = _read_toml(path) if path else {}
    if method and tables.setdefault("method", method) != method:
        found = quoted(str(tables["method"]))
        raise ConfigError(f'{path}: method = "{found}", but the command is "{method}"')
    return tables


def config_from_tables(tables: Mapping[str, Any], where: str) -> RunConfig:
    """Validate nested tables into a RunConfig, with the defaults that depend on other keys; errors begin with `where`.

    `METHOD_DEFAULTS` are those of the method; full fine-tuning has a base that is not quantised, and `FULL_RATES`.
    data.max_length is 256 for the demo's base, which has only 256 positions.
    """
    model = tables.get("model", {})
    if isinstance(model, Mapping) and model.get("name", "demo") == "demo":
        tables = _with_defaults(tables, "data", {"max_length": 256})
    train, method = tables.get("train"), str(tables.get("method", "sft"))
    if isinstance(train, Mapping) and train.get("finetuning_type") == "full":
        tables = _with_defaults(tables, "model", {"load_in_4bit": False})
        tables = _with_defaults(tables, "train", {"learning_rate": FULL_RATES[method]} if method in FULL_RATES else {})
    for section, defaults in METHOD_DEFAULTS.get(str(tables.get("method")), {}).items():
        tables = _with_defaults(tables, section, defaults)
    if isinstance(given := tables.get("dpo"), Mapping):
        tables = _with_defaults(tables, "dpo", LOSS_DEFAULTS.get(str(as_sum(given.get("loss_type"))), {}))
    try:
        config = RunConfig.model_validate(tables)
    except ValidationError as error:
        lines = [_describe(problem, where) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None
    problems = [*secrets_in(tables), *empty_texts(tables), *contradictions(config, tables)]
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    if config.method == "online_dpo":  # its loss is that of dpo
        own = config.online_dpo.model_dump(include={"beta", "loss_type", "loss_kwargs"})
        return config.model_copy(update={"dpo": DPOConfig(**own)})
    return config


def _with_defaults(tables: Mapping[str, Any], section: str, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    given = tables.get(section, {})
    return {**tables, section: {**defaults, **given}} if isinstance(given, Mapping) else tables


def to_tables(config: RunConfig) -> dict[str, Any]:
    """The configuration as tables for `config_from_tables`, without unset and unused keys."""
    tables = config.model_dump(mode="json", exclude_none=True)
    for key in ("source", "split") if config.data.sources else ("sources",):
        del tables["data"][key]
    for other in METHODS:
        if other != config.method:
            del tables[other]
    if config.method == "grpo":
        for key in (*UNREAD.get(config.grpo.loss_type, ()), *["kl_estimator"] * (config.grpo.beta == 0)):
            tables["grpo"].pop(key, None)
    if not (config.trace.every or config.trace.steps):
        del tables["trace"]
    if config.model.adapter is None:
        del tables["model"]["adapter_mode"]
    if config.lora.init_from is not None:
        for key in ADAPTER_SHAPE:
            del tables["lora"][key]
    if config.full:
        del tables["lora"]
    if not config.model.load_in_4bit:
        del tables["model"]["bnb_4bit_quant_type"], tables["model"]["bnb_4bit_use_double_quant"]
    return tables


def keys_named(name: str, method: str | None) -> list[str]:
    """The keys that a method reads (None: any method), "section.key", with this name or with that of OTHER_NAMES."""
    key = OTHER_NAMES.get(name, name)
    return [f"{section}.{key}" for section, model in sections_of(method).items() if key in model.model_fields]


def flag_hint(name: str, method: str | None, options: Sequence[str]) -> str:
    """What a mistaken flag may mean: a key with this name, else a near one or a near option; "" for nothing."""
    keys = [f"--{key}" for key in keys_named(name, method)]
    if method and not keys and (found := other_section(OTHER_NAMES.get(name, name), method)):
        return found
    known = [f"--{section}.{key}" for section, model in sections_of(method).items() for key in model.model_fields]
    near = keys if len(keys) == 1 else difflib.get_close_matches(f"--{name}", keys or [*options, *known], n=1)
    return f"did you mean {near[0]}?" if near else ""


def _read_toml(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Notepad writes a byte order mark
        return tomllib.loads(text)
    except FileNotFoundError:
        hint = "; flags begin with two hyphens: --train.max_steps 3" if "=" in path.name else ""
        hint = f"; a method is --method {path}" if str(path) in METHODS else hint
        raise ConfigError(f"{path}: no such run file{hint}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a readable TOML file: nested too deeply") from None
    except (ValueError, OSError) as error:  # ValueError: bad TOML or UTF-8, too many digits, a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        reason += "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        place = re.search(r"at line (\d+)", reason)
        if place and (line := text.split("\n")[int(place[1]) - 1].strip()):
            reason += f": {quoted(line)}"
        reason += "" if path.suffix in ("", ".toml") else f"; if it holds rows: --data.source {path}"
        raise ConfigError(f"{path}: not a readable TOML file: {reason}") from None


def _parse_flag(section: str, key: str, text: str) -> object:
    """The text of a flag as a TOML value (1e-4, true, [..]); if it is none, as a JSON list or object, or as it is."""
    field = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    if field is not None and field.annotation in TEXTS:
        return text
    if key in ("target_modules", "columns", "report_to", "reward") and not text.startswith("["):
        return text
    if text in ("True", "False"):  # Python's
        return text == "True"
    with suppress(tomllib.TOMLDecodeError):
        return tomllib.loads(f"value = {text}")["value"]
    with suppress(ValueError, RecursionError):
        return json.loads(text) if text.startswith(("[", "{")) else text
    return text


def _describe(problem: Mapping[str, Any], where: str) -> str:
    location = [str(part) for part in problem["loc"]]
    name = quoted(".".join(location))
    if problem["type"] == "extra_forbidden" and location[-1] in REFUSED:
        return f"{where}: {name}: {REFUSED[location[-1]]}"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        key = location[-1].replace("-", "_")
        key = OTHER_NAMES.get(key, key)
        section = f"{location[0]}." if len(location) == 2 else ""
        near = [section + key] if key in known else []
        method = location[0] if location[0] in METHODS else None
        if not near and len(location) <= 2:
            near = keys_named(key, method)
        hint = other_section(key, method) if method and not near else ""
        near = near or [section + one for one in difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)]
        hint = hint or (f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}")
        return f'{where}: unknown key "{name}"; {hint}'
    if problem["type"] == "missing":
        return f"{where}: {name}: is missing"
    if "filters" in location and "value" in location:  # pydantic reports each type that does not match
        name = quoted(".".join(location[: location.index("value") + 1]))
        return f"{where}: {name}: expected text, a number, true or false, or a list of them"
    expected = problem["msg"].removeprefix("Input should be ")
    expected = expected.replace("a valid ", "a ").replace("a integer", "an integer").replace("a tuple", "a list")
    known = re.findall("'(.*?)'", expected) if problem["type"] == "literal_error" else []
    near = difflib.get_close_matches(str(problem["input"]), known, n=1)
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    return f"{where}: {name}: expected {expected}{hint}, got {quoted(' '.join(repr(problem['input']).split()))}"


def _known_keys(location: list[str]) -> list[str]:
    if not location:
        return list(RunConfig.model_fields)
    if location[:2] in (["data", "filters"], ["data", "sources"]):
        return list((Filter if "filters" in location else DataSource).model_fields)
    return list(SECTIONS[location[0]].model_fields) if location[0] in SECTIONS else []
