"""The structure: folders are layers that import only downwards, and no module takes part in a circle."""

import ast
import re

import pytest
from reference.paths import ROOT

from dylo_moe.cli import COMMANDS

LAYERS = (
    ("utils",),
    ("base", "routing"),
    ("experts", "data"),
    ("continual",),
    ("model",),
    ("training",),
    ("evaluation",),
    ("report",),
    ("parsing",),
    ("commands",),
    ("cli",),
)
"""A layer imports from those above it in this list. Folders of one layer do not know each other."""
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
PACKAGE = ROOT / "dylo_moe"


def module_name(path):
    """data/sources/read.py -> "data.sources.read"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """(module, at module level) of every import of ours in a file, those inside functions included."""
    tree = ast.parse(path.read_text())
    late = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    package = ["dylo_moe", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            home = [*start, *(node.module or "").split(".")] if node.module else start
            names = [[*home, alias.name] for alias in node.names]
        for name in names:
            if name[0] == "dylo_moe" and len(name) > 1:
                yield as_module(name[1:]), id(node) not in late


def as_module(name):
    """The longest part of a dotted name that is a file or a folder of ours."""
    for end in range(len(name), 0, -1):
        path = PACKAGE.joinpath(*name[:end])
        if path.is_dir() or path.with_suffix(".py").is_file():
            return ".".join(name[:end])
    return "__init__"


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_folder_has_its_layer():
    assert {module_name(path).split(".")[0] for path in sources()} == LEVEL.keys()


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_downwards(path):
    own = module_name(path).split(".")[0]
    for other, _ in imports(path):
        folder = other.split(".")[0]
        assert folder in (own, "__init__") or LEVEL[folder] < LEVEL[own], f"{module_name(path)} imports {other}"


def test_the_page_for_contributors_shows_the_layers():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [(int(level) - 1, folder) for level, folder in rows] == [(LEVEL[folder], folder) for folder in LEVEL]


def test_no_module_is_in_a_circle():
    """Imports inside functions count too: laziness is for start-up time, not to hide a circle."""
    needs = {module_name(path): {other for other, _ in imports(path)} for path in sources()}
    while free := [name for name in needs if not needs[name] & (needs.keys() - {name})]:
        for name in free:
            del needs[name]
    assert not needs, f"these import each other: {', '.join(sorted(needs))}"


def test_the_commands_are_those_of_the_command_line():
    folders = {path.name for path in (PACKAGE / "commands").iterdir() if (path / "__init__.py").is_file()}
    assert folders == COMMANDS.keys()


def test_the_reader_of_imports_sees_them(monkeypatch, tmp_path):
    """Else the laws above would hold for any code."""
    for name in ("experts/layer.py", "routing/router.py", "model/model.py", "data/formats.py", "data/sources/read.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr("test_architecture.PACKAGE", tmp_path)
    file = tmp_path / "data" / "formats.py"
    file.write_text(
        "from dylo_moe import __version__\nfrom dylo_moe.experts.layer import Routed\n"
        "from dylo_moe.routing import router\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..model.model import DyLoRAMoE\n"
        "def late():\n    from .sources.read import read\n    import torch\n"
    )
    assert set(imports(file)) == {
        ("__init__", True),
        ("experts.layer", True),
        ("routing.router", True),
        ("model.model", False),
        ("data.sources.read", False),
    }
