"""No key that nothing reads: each is named by an attribute or a text of some file outside lowlevel/config/."""

import ast

from config_keys import KEYS, PACKAGE

from lowlevel.config.schema import Filter


def names_in(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_every_key_is_read_outside_the_configuration():
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "config"]
    read = set().union(*(names_in(path.read_text(encoding="utf-8")) for path in files))
    assert {key.split(".")[1] for key in KEYS} | set(Filter.model_fields) | {"method"} <= read
