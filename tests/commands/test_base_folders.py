"""A folder given as base or adapter that holds something else, or more: used as said in one line, or refused in one."""

import json
import re
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from workspace import metrics

from lowlevel.config.schema import ModelConfig
from lowlevel.data.tokenizer import UNUSED_TEMPLATE, load_chat_tokenizer
from lowlevel.errors import ConfigError
from lowlevel.model.base import load_base, load_model_config

ONE_STEP = {"train": {"max_steps": 1}}


def flat(text: str) -> str:
    return " ".join(text.split())


def configure(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def with_adapter(runs, tmp_path_factory) -> Path:
    """The base with an adapter's two files beside its own."""
    base = Path(shutil.copytree(runs.space.base, tmp_path_factory.mktemp("both") / "tiny"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(runs.sft / "adapter" / name, base / name)
    return base


@pytest.mark.parametrize("quantised", [True, False])
def test_an_adapter_beside_the_bases_weights_is_not_loaded(runs, with_adapter, quantised):
    ids, found = torch.arange(3, 40)[None], []
    for base in (runs.space.base, with_adapter):
        model = load_base(ModelConfig(name=str(base), load_in_4bit=quantised), helpers.CPU)
        assert not [name for name, _ in model.named_modules() if "lora" in name]
        found.append(model(input_ids=ids).logits)
    assert torch.equal(*found)


def test_a_run_on_such_a_base_says_so_and_merges_as_on_the_clean_one(runs, cli, tmp_path, with_adapter):
    out = {}
    for name, base in (("clean", runs.space.base), ("both", with_adapter)):
        out[name] = cli("sft", runs.space.write(name, "sft", folder=tmp_path, model={"name": str(base)}, **ONE_STEP))
        assert out[name].code == 0, out[name].err
    assert flat(out["both"].out).count("also holds an adapter (adapter_config.json), which is not loaded") == 1
    assert "holds an adapter" not in out["clean"].out
    assert metrics(tmp_path / "both")[0]["loss"] == metrics(tmp_path / "clean")[0]["loss"]
    for into in ("dequantized", "original", "requantized"):
        for name in ("clean", "both"):
            said = cli("merge", tmp_path / name, "--into", into, "--out", tmp_path / f"{name}-{into}")
            assert said.code == 0, said.err
        merged = [load_file(tmp_path / f"{name}-{into}" / "model.safetensors") for name in ("clean", "both")]
        assert merged[0].keys() == merged[1].keys()
        assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])
        assert not list((tmp_path / f"both-{into}").glob("adapter_*"))
    said = cli("generate", with_adapter, "--prompt", "a", "--max-new-tokens", 2)
    assert said.code == 0 and "which is not loaded" in said.err


def test_what_is_no_model_is_refused_as_a_base(runs, cli, tmp_path):
    alone = Path(shutil.copytree(runs.sft / "adapter", tmp_path / "alone"))
    shutil.copy(runs.space.base / "config.json", with_config := Path(shutil.copytree(alone, tmp_path / "with-config")))
    (tmp_path / "parent").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copytree(alone, tmp_path / "parent" / "sft")
    (tmp_path / "trainer").mkdir()
    shutil.copytree(runs.space.base, tmp_path / "trainer" / "checkpoint-500")
    base = repr(str(runs.space.base))
    for name, text in (
        (alone, f"is an adapter for {base}, not a model: set model.name to that base and lora.init_from"),
        (with_config, f"is an adapter for {base}, not a model"),
        (tmp_path / "parent", "has no config.json; in it, sft holds an adapter: give its path"),
        (tmp_path / "trainer", "has no config.json; in it, checkpoint-500 holds a model: give its path"),
        (runs.sft, "is a run folder: set model.name to that run's base"),
        (tmp_path / "empty", "is a folder without config.json"),
    ):
        config = runs.space.write("refused", "sft", folder=tmp_path, model={"name": str(name)})
        refused(cli("sft", config), 2, f"model.name {str(name)!r}", text)
        assert not (tmp_path / "refused").exists()


def test_a_repository_that_is_an_adapter_is_refused_from_the_cache(tmp_path, monkeypatch):
    """As the hub's cache lays it out: no network is needed to say what it is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    repository = tmp_path / "models--me--sft"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    file = repository / "snapshots" / ("0" * 40) / "adapter_config.json"
    file.write_text('{"peft_type": "LORA", "base_model_name_or_path": "big/base"}')
    with pytest.raises(ConfigError, match=r"'me/sft' is an adapter for 'big/base', not a model"):
        load_model_config(ModelConfig(name="me/sft"))


@pytest.fixture
def other_head(tmp_path) -> Path:
    """A base whose config.json says that its head is tied, and whose file holds another one."""
    helpers.write_tiny_base(tmp_path / "tied")
    configure(tmp_path / "tied", tie_word_embeddings=True)
    return tmp_path / "tied"


@pytest.mark.parametrize("into", ["dequantized", "original", "requantized"])
def test_a_head_of_its_own_in_a_tied_base_is_used_said_and_merged(runs, cli, tmp_path, other_head, into):
    config = runs.space.write("run", "sft", folder=tmp_path, model={"name": str(other_head)}, **ONE_STEP)
    said = cli("sft", config)
    assert said.code == 0, said.err
    assert (
        flat(said.out).count("says tie_word_embeddings = true, but its files hold another LM head, which is used") == 1
    )
    assert cli("merge", tmp_path / "run", "--into", into, "--out", tmp_path / "merged").code == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    head = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head.float(), load_file(other_head / "model.safetensors")["lm_head.weight"].half().float())


def test_a_tied_base_stays_tied_and_a_missing_head_is_refused(runs, cli, tmp_path):
    helpers.write_tiny_base(tied := tmp_path / "tied", tie_word_embeddings=True)
    change(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))  # the same values
    assert load_base(ModelConfig(name=str(tied)), helpers.CPU).config.tie_word_embeddings is True
    change(tied, lambda t: t.pop("lm_head.weight"))
    configure(tied, tie_word_embeddings=False)
    config = runs.space.write("run", "sft", folder=tmp_path, model={"name": str(tied)}, **ONE_STEP)
    refused(cli("sft", config), 4, "1 tensors missing: lm_head.weight", "tie_word_embeddings = false")


@pytest.fixture
def adapters(runs, tmp_path):
    """Make folders of adapters: PEFT's multi-adapter save, or the checkpoints of a trainer."""

    def make(parent: str, *names: str) -> Path:
        for name in names:
            shutil.copytree(runs.sft / "adapter", tmp_path / parent / name)
        return tmp_path / parent

    return make


def test_the_only_adapter_in_a_folder_is_used_and_said(runs, cli, tmp_path, adapters):
    for key, name, inside in (
        ("lora.init_from", "named", "sft"),
        ("lora.init_from", "trainer", "checkpoint-500"),
        ("model.adapter", "deep", "checkpoint-500/default"),
    ):
        method, made = "dpo" if key == "model.adapter" else "sft", adapters(name, inside)
        shape = {} if method == "dpo" else {"r": None, "lora_alpha": None}
        config = runs.space.write(f"run-{name}", method, folder=tmp_path, lora=shape, **ONE_STEP)
        said = cli(method, config, f"--{key}", made)
        assert said.code == 0, said.err
        assert f"note: {key}: {made} holds one adapter, {inside}: it is used" in flat(said.out).replace("/ ", "/")
        losses = [metrics(tmp_path / f"run-{name}")[0]["loss"]]
        if method == "sft":
            said = cli(method, config, "--restart", f"--{key}", made / inside)
            assert said.code == 0 and "holds one adapter" not in said.out, said.err
            assert losses == [metrics(tmp_path / f"run-{name}")[0]["loss"]]


def test_what_is_no_adapter_is_refused_with_what_it_is(runs, cli, tmp_path, adapters):
    unfinished = runs.space.copy("sft", tmp_path)
    shutil.rmtree(unfinished / "adapter")
    config = runs.space.write("run", "sft", folder=tmp_path, lora={"r": None, "lora_alpha": None})
    for path, text in (
        (adapters("two", "sft", "dpo"), "holds no adapter; these in it do, give the path of one: dpo, sft"),
        (adapters("old", "checkpoint-1000", "checkpoint-500"), "give the path of one: checkpoint-500, checkpoint-1000"),
        (unfinished, "has that run finished? Its checkpoints can be given: step-00000003, step-00000006"),
        (runs.space.base, "holds no adapter; it holds a whole model: set model.name to it"),
        (
            runs.sft / "adapter" / "adapter_model.safetensors",
            "is a file; give the folder that holds adapter_config.json",
        ),
        ("someone/sft", "someone/sft does not exist; to use one of the hub: hf download someone/sft --local-dir DIR"),
    ):
        refused(cli("sft", config, "--lora.init_from", path), 2, f"lora.init_from: {path}", text)
        assert not (tmp_path / "run").exists()


def test_what_is_no_run_is_refused_with_what_it_is(runs, cli, tmp_path):
    alone = Path(shutil.copytree(runs.sft / "adapter", tmp_path / "alone"))
    for path, text in (
        (runs.sft / "adapter", f"its run folder is {runs.sft}"),
        (runs.sft / "step-00000006", f"its run folder is {runs.sft}"),
        (alone, "it holds an adapter: set lora.init_from (dpo: or model.adapter) to it"),
        (runs.sft.parent, "runs in it: "),
    ):
        refused(cli("merge", path, "--out", tmp_path / "merged"), 2, f"{path} is not a run folder", text)


def _edit(file: str, change) -> None:
    def edit(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        change(settings)
        (folder / file).write_text(json.dumps(settings))

    return edit


def _pointer(file: str):
    return lambda folder: (folder / file).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def _template(folder: Path, value: object, *, file: bool) -> None:
    """Let tokenizer_config.json have this template, too, or alone."""
    _edit("tokenizer_config.json", lambda settings: settings.update(chat_template=value))(folder)
    if not file:
        (folder / "chat_template.jinja").unlink()


UNUSABLE = {
    "dtype with torch.": (
        lambda folder: configure(folder, dtype="torch.bfloat16"),
        2,
        "dtype = 'torch.bfloat16', expected",
    ),
    "old dtype": (
        _edit("config.json", lambda s: (s.pop("dtype"), s.update(torch_dtype="auto"))),
        2,
        "dtype = 'auto', expected",
    ),
    "fp8": (lambda folder: configure(folder, dtype="float8_e4m3fn"), 2, "dtype = 'float8_e4m3fn', expected"),
    "multimodal": (
        lambda folder: configure(folder, model_type="llava", text_config={"model_type": "llama"}, vision_config={}),
        *(2, "(llava) reads more than text; only a text decoder"),
    ),
    "weights are a pointer": (_pointer("model.safetensors"), 4, "model.safetensors is a Git LFS pointer"),
    "tokenizer is a pointer": (_pointer("tokenizer.json"), 4, "tokenizer.json is a Git LFS pointer"),
    "no index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        *(4, "no model.safetensors.index.json; found: model-00001-of-00002.safetensors"),
    ),
    "gguf": (lambda folder: (folder / "model.safetensors").rename(folder / "m.gguf"), 4, "found: m.gguf"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("*token*")], 2, "holds no tokenizer"),
    "several templates": (
        lambda folder: _template(folder, [{"name": name, "template": name} for name in ("rag", "tool")], file=False),
        *(2, "has several chat templates and no default one"),
    ),
    "dropout of tokens": (
        _edit("tokenizer.json", lambda s: s["model"].update(dropout=0.1)),
        *(2, "BPE dropout, which draws other tokens each time"),
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_folder_that_cannot_be_used_is_refused_before_any_work(runs, cli, tmp_path, case):
    edit, code, message = UNUSABLE[case]
    folder = Path(shutil.copytree(runs.space.base, tmp_path / "base"))
    edit(folder)
    refused(cli("sft", runs.space.write("run", "sft", folder=tmp_path, model={"name": str(folder)})), code, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("C:\\models\\llama", "no such folder"),
        ("https://huggingface.co/owner/name/tree/main", 'is a web address: use the hub name "owner/name"'),
        ("{base}/model.safetensors", "is a file; give a folder with config.json and *.safetensors"),
        ("{base}/m.gguf", "GGUF cannot be trained"),
    ],
)
def test_a_name_that_is_no_model(runs, tmp_path, name, message):
    base = Path(shutil.copytree(runs.space.base, tmp_path / "base"))
    (base / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_model_config(ModelConfig(name=name.format(base=base)))


def test_a_template_that_another_file_replaces_is_named(runs, tmp_path):
    base = Path(shutil.copytree(runs.space.base, tmp_path / "base"))
    for other, notes in (((base / "chat_template.jinja").read_text(), 0), ("another", 1)):
        _template(base, other, file=True)
        assert load_chat_tokenizer(str(base), None, None).chat_template.notes.count(UNUSED_TEMPLATE) == notes


@pytest.mark.parametrize("source", ["demo", None])
def test_a_run_on_ones_own_base_says_that_its_rows_are_the_demos(runs, cli, tmp_path, source):
    data = {"source": source, "limit": 8, "max_length": 256} if source else {}
    said = cli("sft", runs.space.write("run", "sft", folder=tmp_path, data=data, **ONE_STEP))
    assert said.code == 0, said.err
    line = 'data.source is "demo", the default: the rows are those of the built-in demo'
    assert (line in flat(said.out)) == (source == "demo")
