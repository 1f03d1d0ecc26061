"""Which file may import which: a layer imports from itself and from below, so the lower ones can be read alone."""

import ast
from pathlib import Path

import lowlevel

ROOT = Path(lowlevel.__file__).parent
LAYERS = (
    ("version", "config/", "durable", "errors", "redaction", "table", "running/__init__"),
    ("losses/", "labels", "hashing", "determinism", "perplexity", "heartbeat", "hub", "batch/"),
    ("data/", "demo/", "kernels/"),
    (
        "model/",
        "optim/",
        "checkpoints/",
        "running/plots",
        "running/progress",
        "running/run_folder",
        "running/endings",
        "watch",
        "ranks",
        "launching",
    ),  # a base may lie on several GPUs
    ("methods/", "execution", "reference_cache", "batch/replies", "online/rollouts", "sampling/"),
    ("loop", "tracing/", "running/rehearsal", "running/forensics", "running/failure"),
    ("running/", "online/"),
    (
        "inspection/",
        "verification/",
        "replaying/",
        "reporting/",
        "preflight/",
        "timing/",
        "exporting/",
        "evaluation/",
        "annotation/",
    ),
    ("api", "run", "__init__"),
    ("commands/", "cli", "__main__"),
)
TRITON_FILES = (
    "kernels/vocabulary",
    "kernels/dequantize",
    "kernels/host_rows",
    "kernels/decoding",
    "ranks",
    "launching",
    "watch",
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


def test_imports_go_down():
    upward = [
        f"{name_of(file)} imports {target}"
        for file in FILES
        for target in filter(None, map(own_module, imports_of(file)))
        if layer_of(target) > layer_of(name_of(file))
    ]
    assert not upward


def test_no_file_imports_one_that_imports_it():
    """Over any number of files, also for type checkers and inside functions: then the order of the layers is real."""
    needs = {name_of(file): {*filter(None, map(own_module, imports_of(file)))} - {name_of(file)} for file in FILES}
    while free := {name for name, targets in needs.items() if not targets & needs.keys()} or (
        needs.keys() - set().union(*needs.values())
    ):
        needs = {name: targets for name, targets in needs.items() if name not in free}
    assert not sorted(needs), "a circle, and what lies between circles"


def test_the_losses_stand_alone():
    import sys

    for file in (ROOT / "losses").glob("*.py"):
        for dotted in imports_of(file):
            root = dotted.split(".")[0]
            alone = root == "torch" or root in sys.stdlib_module_names or dotted.startswith("lowlevel.losses")
            assert alone, f"{name_of(file)} imports {dotted}"


def test_nothing_opens_a_pickle():
    """A pickle runs code when it is read: weights are safetensors, everything else is JSON or TOML."""
    assert not {place: found for file in FILES for place, found in dangerous_lines(file)}


def dangerous_lines(file):
    """(place, why) of each line that could run code from a file that is read."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    constants = {"trust_remote_code": False, "allow_pickle": False, "shell": False, "use_safetensors": True}
    attributes = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load")}
    name = name_of(file)
    for dotted in imports_of(file):
        if dotted.split(".")[0] in forbidden:
            yield name, dotted
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        place = f"{name}:{getattr(node, 'lineno', getattr(getattr(node, 'value', None), 'lineno', 0))}"
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and (node.value.id, node.attr) in attributes:
                yield place, f"{node.value.id}.{node.attr}"
            if node.attr in ("read_pickle", "to_pickle"):
                yield place, node.attr
        if isinstance(node, ast.keyword) and node.arg in constants:
            if not (isinstance(node.value, ast.Constant) and node.value.value is constants[node.arg]):
                yield place, node.arg
        if isinstance(node, ast.Name) and node.id in ("eval", "exec"):
            yield place, node.id


def test_a_dangerous_line_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "bad.py"
    lines = ("import pickle", "torch.load(f)", "np.load(f)", "f(trust_remote_code=x)", "f(shell=True)", "eval(s)")
    for line in (*lines, "f(use_safetensors=False)", "df.to_pickle(f)"):
        file.write_text(line)
        assert list(dangerous_lines(file)), line


def test_kernels_and_collectives_stay_in_their_files():
    special = {
        name_of(file)
        for file in FILES
        for dotted in imports_of(file)
        if dotted.split(".")[0] == "triton" or dotted.startswith("torch.distributed")
    }
    assert special <= set(TRITON_FILES)
