"""Tokenizer, generation settings and model card of a result folder, which make it usable alone; and its upload.

Result folders are adapter/ and stacked/ of a run, and the output of `lowlevel merge`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig

from lowlevel.config import METHODS
from lowlevel.config.schema import RunConfig
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.errors import CheckpointError, ConfigError, how_many, one_line
from lowlevel.model.adapters import ADAPTER_CONFIG
from lowlevel.model.base import base_location, public_name
from lowlevel.model.files import read_or_empty
from lowlevel.model.quantisation import double_quantisation
from lowlevel.redaction import REDACTED, redact
from lowlevel.running.machine import LIBRARIES
from lowlevel.running.run_folder import RunFolder

Kind = Literal["adapter", "stacked", "merged", "full"]
LOGGED = {"loss": "loss", "held-out loss": "eval_loss", "reward": "reward", "held-out reward": "eval_reward"}
LOADING = """\
import torch
from transformers import AutoTokenizer, {imports}

folder = "{folder}"  # or its repository on the hub
model = {loader}.from_pretrained(folder, {arguments})
model.generation_config = GenerationConfig.from_pretrained(folder)  # the tokens that end a reply
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs.to(model.device), max_new_tokens=64)[0]))
"""
REWARDS = """\
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer{imports}

folder = "{folder}"  # or its repository on the hub
base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=1, {arguments})
base.config.pad_token_id = None  # score one text at a time, read at its last token: a pad id could be the end's too
model = PeftModel.from_pretrained(base, folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
chat = [{{"role": "user", "content": "Hello"}}, {{"role": "assistant", "content": "Hi!"}}]
text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()  # ends with the end-of-turn token
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
print(model(**inputs.to(model.device)).logits.item())
"""


def complete_result(
    target: Path,
    tokenizer: ChatTokenizer,
    folder: RunFolder,
    config: RunConfig,
    kind: Kind,
    *,
    merged_into: str | None = None,
) -> None:
    """Add everything except the weights to a result folder.

    Args:
        target: has the weights, and for a merged model its generation_config.json.
        tokenizer: the run's, saved with its chat template.
        folder: the run; the card uses its report, manifest, log and environment.
        config: the run's.
        kind: of the weights.
        merged_into: the base of a merged model, if it is not the run's.
    """
    save_tokenizer(tokenizer, target)
    if kind != "merged":
        GenerationConfig(eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.pad_id).save_pretrained(target)
    (target / "README.md").write_text(redact(model_card(folder, config, kind, merged_into)), encoding="utf-8")


def save_tokenizer(tokenizer: ChatTokenizer, target: Path) -> None:
    """Save a tokenizer with the chat template of its run."""
    tokenizer.tokenizer.chat_template = tokenizer.chat_template.text
    tokenizer.tokenizer.save_pretrained(target)


def model_card(folder: RunFolder, config: RunConfig, kind: Kind, merged_into: str | None = None) -> str:
    """README.md of a result: YAML front matter for the hub, a table of facts, and code that loads it."""
    manifest = read_or_empty(folder.path / "manifest.json")
    whole = kind in ("merged", "full")
    library = "transformers" if whole else "peft"
    name = merged_into or config.model.name
    on_hub = name != "demo" and not Path(name).exists()
    front = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {'text-classification' if config.method == 'reward' else 'text-generation'}",
        *([f"base_model: {json.dumps(name)}"] if on_hub else []),
        f"tags: [lowlevel, {'full' if kind == 'full' else 'lora'}, {config.method}]",
        "# license: not set by the trainer; set one that the base and the data allow",
        "---",
    ]
    what = {
        "adapter": "A LoRA adapter",
        "stacked": "A LoRA adapter that contains two: the trained one, and the frozen one on which it was trained,",
        "merged": "A model with its LoRA adapters merged in (lowlevel_merge.json has the measured difference),",
        "full": "A model with all its weights trained, in fp32,",
    }[kind]
    lacking = kind == "adapter" and manifest.get("parent_adapter") is not None
    note = "\nThis adapter lacks the frozen adapter on which it was trained: load `stacked/` of the run instead.\n"
    facts = _facts(folder, config, manifest, merged_into)
    table = "\n".join(f"| {key} | {value.replace('|', '/')} |" for key, value in facts)
    return (
        "\n".join(front) + f"\n\n# {folder.path.resolve().name}\n\n"
        f"{what} from a run of `lowlevel {config.method}`: {METHODS[config.method]}.\n{note if lacking else ''}\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Load it\n\n```python\n{_loading(config, manifest, kind, '../stacked' if lacking else '.')}```\n"
    )


def _facts(
    folder: RunFolder, config: RunConfig, manifest: dict[str, Any], merged_into: str | None
) -> list[tuple[str, str]]:
    model, train, lora = config.model, config.train, config.lora
    base, environment = manifest.get("base", {}), read_or_empty(folder.path / "environment.json")
    bits = f"4-bit {model.bnb_4bit_quant_type}" if model.load_in_4bit else "not quantised"
    if base.get("prequantised"):
        bits += f", pre-quantised {double_quantisation(model.bnb_4bit_use_double_quant)}"
    revision = f", revision {model.revision}" if model.revision else ""
    loss = f", {config.loss_line}" if config.method != "sft" else ""
    parent = manifest.get("parent_adapter")
    facts = [
        ("base", f"{base_location(model.name)}{revision}, {bits}, SHA-256 of its weights {base.get('sha256')}"),
        *([("merged into", base_location(merged_into))] if merged_into else []),
        ("method", f"{config.method}{loss}"),
        *([("frozen adapter", f"SHA-256 {parent}")] if parent else []),
        ("trained", f"all {manifest.get('trainable_parameters', 0):,} weights") if config.full else
        ("adapter", f"r {lora.r}, lora_alpha {lora.lora_alpha:g}{' (rsLoRA)' * lora.use_rslora}"
                    f"{' (DoRA)' * lora.use_dora}, "
                    f"dropout {lora.lora_dropout:g}, "
                    f"{manifest.get('trainable_parameters', 0):,} parameters in {', '.join(lora.target_modules)}"),
        *[(f"{name} rows", text) for name in ("train", "evaluation") if (text := _rows(folder, name))],
        ("training", f"{how_many(config.rows_per_step, 'rows')} a step, peak learning rate {train.learning_rate:g} "
                     f"({train.lr_scheduler_type}), {train.optim}, {base.get('dtype')}, seed {train.seed}"
                     + (f", {environment['ranks']} GPUs" if "ranks" in environment else "")),
        *[(name, _first_and_last(folder, key)) for name, key in LOGGED.items()],
        ("versions", ", ".join(f"{name} {environment[name]}" for name in ("lowlevel", *LIBRARIES)
                               if name in environment)),
    ]  # fmt: skip
    return [(name, value) for name, value in facts if value]


def _rows(folder: RunFolder, split: str) -> str:
    report = read_or_empty(folder.path / "data_report.json").get(split)
    if not report:
        return ""
    tokens, lost = report["tokens"], report["rows_selected"] - report["rows_kept"]
    dropped = f" ({lost:,} dropped)" if lost else ""
    return (
        f"{report['rows_kept']:,} of {public_name(report['source'])}{dropped}, {tokens['total']:,} tokens, "
        f"{tokens['supervised']:,} supervised, SHA-256 {report['fingerprint']}"
    )


def _first_and_last(folder: RunFolder, key: str) -> str:
    found = [f"{record[key]:.4f} (step {record['step']})" for record in folder.read_metrics() if key in record]
    return " -> ".join(dict.fromkeys([found[0], found[-1]])) if found else ""


def _loading(config: RunConfig, manifest: dict[str, Any], kind: Kind, folder: str) -> str:
    """Python code that loads the result with the precision of training and prints a reply."""
    if kind in ("merged", "full"):
        return LOADING.format(
            imports="AutoModelForCausalLM, GenerationConfig", folder=folder, loader="AutoModelForCausalLM",
            arguments='dtype="auto"',
        )  # fmt: skip
    dtype = f"torch.{manifest.get('base', {}).get('dtype', 'float16')}"
    imports, arguments = "GenerationConfig\nfrom peft import AutoPeftModelForCausalLM", f"dtype={dtype}"
    if config.model.load_in_4bit and not manifest.get("base", {}).get("prequantised"):
        model = config.model
        imports = f"BitsAndBytesConfig, {imports}"
        arguments += (
            f", quantization_config=BitsAndBytesConfig(\n    load_in_4bit=True, "
            f'bnb_4bit_quant_type="{model.bnb_4bit_quant_type}", bnb_4bit_compute_dtype={dtype},\n'
            f"    bnb_4bit_use_double_quant={model.bnb_4bit_use_double_quant})"
        )
    if config.method == "reward":
        more = ", BitsAndBytesConfig" if config.model.load_in_4bit else ""
        return REWARDS.format(imports=more, folder=folder, base=base_location(config.model.name), arguments=arguments)
    return LOADING.format(imports=imports, folder=folder, loader="AutoPeftModelForCausalLM", arguments=arguments)


# Weights, tokenizer, settings and card; not optimizer.safetensors, logs, traces or other files.
UPLOADED = re.compile(
    r"(adapter_model|model(-\d+-of-\d+)?)\.safetensors|model\.safetensors\.index\.json|README\.md|lowlevel_merge\.json"
    r"|(adapter_|generation_|tokenizer_)?config\.json|tokenizer\.(json|model)|chat_template\.jinja"
    r"|(special_tokens_map|added_tokens|vocab)\.json|merges\.txt|vocab\.txt"
)


def push_to_hub(
    folder: Path, repo_id: str, *, private: bool = True, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a result and return the URL of its repository, which is created if necessary.

    Args:
        folder: adapter/, stacked/ or a merged model; or a run folder: its stacked/, or adapter/ if it has none.
        repo_id: "name" or "owner/name".
        private: whether a new repository is private.
        token: of the hub; None: HF_TOKEN or the login of `hf auth login`.
        endpoint: a server other than huggingface.co.

    Raises:
        ConfigError: no result in the folder, or the hub refuses (name, token or rights).
        CheckpointError: the connection or the server fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    source = _result(Path(folder))
    files = sorted(file.name for file in source.iterdir() if file.is_file() and UPLOADED.fullmatch(file.name))
    api = HfApi(endpoint=endpoint, token=token, library_name="lowlevel")
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=source,
            allow_patterns=files,
            commit_message=f"Upload {source.resolve().name}",
        )
    except Exception as error:  # from huggingface_hub, its HTTP client, or the file system
        refused = isinstance(error, ValueError) or (
            isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500
        )
        text = f"{source} was not uploaded to {repo_id}: {one_line(error)}"
        raise (ConfigError if refused else CheckpointError)(text.replace(token, REDACTED) if token else text) from None
    return str(repository)


def _result(folder: Path) -> Path:
    run = RunFolder(folder)
    found = next((path for path in (run.stacked, run.adapter) if path.exists()), folder) if run.holds_run() else folder
    if (found / "optimizer.safetensors").exists():
        raise ConfigError(f"{found} is a checkpoint; upload the result of a finished run")
    if not any((found / name).exists() for name in (ADAPTER_CONFIG, "lowlevel_merge.json")):
        raise ConfigError(f"{found} holds no result: give a finished run, its adapter or stacked folder, or a merge")
    return found
