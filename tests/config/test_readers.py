"""No option without a reader: every field is looked up somewhere, on an expression that holds its section."""

import ast

from config_keys import KEYS, PACKAGE

from lowlevel.config import SECTIONS, Filter

CLASSES = {model.__name__: section for section, model in SECTIONS.items()} | {"Filter": "filter", "RunConfig": "run"}


def read_keys(source: str) -> set[tuple[str, str]]:
    """(section, key) of every attribute that a file takes from something annotated as, or assigned from, a section."""
    tree, found = ast.parse(source), set()
    fields = {
        node.target.id: CLASSES[node.annotation.id]
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Name) and node.annotation.id in CLASSES
    }

    def kind(node: ast.AST, names: dict[str, str]) -> str | None:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            inner = kind(node.value, names)
            if inner == "run" and node.attr in SECTIONS:
                return node.attr
            if inner is None and node.attr == "config" and isinstance(node.value, ast.Name):
                return fields.get("config") if node.value.id == "self" else "run"  # LoadedRun.config
        return None

    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = {
            arg.arg: CLASSES[arg.annotation.id]
            for arg in [*function.args.args, *function.args.kwonlyargs]
            if isinstance(arg.annotation, ast.Name) and arg.annotation.id in CLASSES
        }
        if any(
            isinstance(a.annotation, ast.Subscript) and "Filter" in ast.unparse(a.annotation)
            for a in function.args.args
        ):
            names["f"] = "filter"
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                pairs = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = list(zip(target.elts, value.elts, strict=True))
                for left, right in pairs:
                    if isinstance(left, ast.Name) and (section := kind(right, names)):
                        names[left.id] = section
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and (section := kind(node.value, names)):
                found.add((section, node.attr))
            call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"
            if call and (section := kind(node.args[0], names)):  # getattr(config, name) for name in a tuple beside it
                texts = [
                    n.value for n in ast.walk(function) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                found.update((section, text) for text in texts)
    return found


def test_every_key_is_read_outside_the_configuration():
    read = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "config.py":
            read |= read_keys(path.read_text(encoding="utf-8"))
    expected = {tuple(key.split(".")) for key in KEYS} | {("filter", key) for key in Filter.model_fields}
    assert expected - read == set()
    assert ("run", "method") in read
