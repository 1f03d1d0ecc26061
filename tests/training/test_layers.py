"""Which file may import which: a layer imports from itself and from below, so the lower ones can be read alone."""

import ast
from pathlib import Path

import pytest

import lowlevel

ROOT = Path(lowlevel.__file__).parent
LAYERS = (
    (
        *("__init__", "config", "config_file", "contradictions", "durable", "errors", "operators", "redaction"),
        *("running/__init__", "running/interrupts"),
    ),
    (
        *("losses/", "labels", "layout", "packing", "spans", "attention", "hashing", "dropout", "order"),
        *("determinism", "workspaces", "loss_scale", "running/prefetch"),
    ),
    ("data/", "demo/", "kernels/"),
    (
        *("model/", "optimizer", "metrics", "loss_sums", "checkpoints/"),
        *("running/plots", "running/progress", "running/run_folder", "running/endings"),
    ),
    ("sft", "dpo", "method", "execution", "reference_cache"),
    ("loop", "tracing/", "running/rehearsal", "running/forensics", "running/failure_folder"),
    ("running/",),
    ("inspection/", "verification/", "replaying/", "reporting/", "preflight/", "timing/"),
    ("commands/", "cli", "__main__"),
)
TRITON_FILES = (
    "kernels/vocabulary",
    "kernels/dequantize",
    "kernels/host_rows",
)  # files that may import triton or torch.distributed
FILES = sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    """ "model/base" for lowlevel/model/base.py."""
    return file.relative_to(ROOT).with_suffix("").as_posix()


def layer_of(name: str) -> int:
    exact = [i for i, members in enumerate(LAYERS) if name in members]
    found = exact or [i for i, members in enumerate(LAYERS)
                      if any(m.endswith("/") and f"{name}/".startswith(m) for m in members)]  # fmt: skip
    assert len(found) == 1, f"{name} must be in exactly one layer of the table above, it is in {found}"
    return found[0]


def imports_of(file: Path) -> list[str]:
    """Every module that a file names in an import, in functions and under TYPE_CHECKING too, as dotted names."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import in line {node.lineno}"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def own_module(dotted: str) -> str | None:
    """The file of this package that an import reads: "model/base" for lowlevel.model.base.Placement."""
    parts = dotted.split(".")
    if parts[0] != "lowlevel":
        return None
    for size in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[1:size])
        if path.with_suffix(".py").is_file() and size > 1:
            return name_of(path.with_suffix(".py"))
        if (path / "__init__.py").is_file():
            return name_of(path / "__init__.py")
    raise AssertionError(f"{dotted} is no module of this package")


def test_every_file_is_in_the_table_and_the_table_names_only_files():
    names = {name_of(file) for file in FILES}
    for name in names:
        layer_of(name)
    for member in (member for layer in LAYERS for member in layer):
        assert any(name == member or name.startswith(member) for name in names), f"{member} does not exist"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down(file):
    for dotted in imports_of(file):
        target = own_module(dotted)
        if target is not None:
            assert layer_of(target) <= layer_of(name_of(file)), f"{name_of(file)} imports {target}, which is above it"


def test_the_losses_stand_alone():
    import sys

    for file in (ROOT / "losses").glob("*.py"):
        for dotted in imports_of(file):
            root = dotted.split(".")[0]
            alone = root == "torch" or root in sys.stdlib_module_names or dotted.startswith("lowlevel.losses")
            assert alone, f"{name_of(file)} imports {dotted}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_opens_a_pickle(file):
    """A pickle runs code when it is read: weights are safetensors, everything else is JSON or TOML."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {dotted.split(".")[0] for dotted in imports_of(file)} & forbidden
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, f"line {node.lineno}"
            assert not (node.value.id in ("np", "numpy") and node.attr == "load"), f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"line {node.value.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("read_pickle", "to_pickle"), f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "shell":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"line {node.value.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "use_safetensors":
            assert isinstance(node.value, ast.Constant) and node.value.value is True, f"line {node.value.lineno}"
        if isinstance(node, ast.Name):
            assert node.id not in ("eval", "exec"), f"line {node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_kernels_and_collectives_stay_in_their_files(file):
    special = [d for d in imports_of(file) if d.split(".")[0] == "triton" or d.startswith("torch.distributed")]
    assert not special or name_of(file) in TRITON_FILES
