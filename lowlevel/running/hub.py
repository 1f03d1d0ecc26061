"""Uploads adapter/, stacked/ or a merged model to the Hugging Face hub, and no other files of a run."""

from __future__ import annotations

import re
from pathlib import Path

from lowlevel.errors import CheckpointError, ConfigError, one_line
from lowlevel.model.adapters import ADAPTER_CONFIG
from lowlevel.redaction import REDACTED
from lowlevel.running.run_folder import RunFolder

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
