"""Imports go one way: a module may read only those before it in DESIGN.md's list."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import dylo_moe
from dylo_moe.arguments import ModelArguments, build_parser
from dylo_moe.config import DataConfig
from dylo_moe.stream_arguments import StreamArguments

ORDER = [
    "whole_file",
    "ranks",
    "config",
    "base",
    "architectures",
    "frozen",
    "config_view",
    "clusters",
    "dispatch",
    "context",
    "storage",
    "mixture",
    "layer",
    "spans",
    "features",
    "router",
    "router_cache",
    "skill_library",
    "novelty_detector",
    "gate_fit",
    "lora_config",
    "quantized",
    "adapter_files",
    "expert",
    "growth",
    "chunked_loss",
    "routing_hooks",
    "decoding",
    "model",
    "card",
    "checkpoint",
    "data",
    "facts",
    "meter",
    "memory",
    "flags",
    "recipe",
    "resume",
    "tracking",
    "arguments",
    "stream_arguments",
    "plan_arguments",
    "look_arguments",
    "watch",
    "summary",
    "progress",
    "inspection",
    "generate",
    "stopping",
    "matrix",
    "matrix_table",
    "sharding",
    "trainer",
    "scheduler",
    "stage_trainer",
    "evaluate",
    "run_view",
    "train",
    "workload",
    "process_share",
    "plan",
    "stream_state",
    "record",
    "charts",
    "page",
    "stream_record",
    "stream_page",
    "report",
    "continual",
    "experts",
    "compare_arguments",
    "compare_process",
    "compare_table",
    "compare",
    "export",
    "cloud",
    "cli",
]
PACKAGE = Path(dylo_moe.__file__).parent
LATE = {("model", "checkpoint")}
"""Imports inside a function that go against the order on purpose: a model saves and loads itself, and the checkpoint
module is what knows how."""


def noun(path):
    """The entry of ORDER that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(noun, at module level) of each import of ours in a file; what is for types alone is not at module level."""
    tree = ast.parse(path.read_text())
    inner = set()
    for node in ast.walk(tree):
        late = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if late:
            inner |= {id(child) for child in ast.walk(node)}
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "dylo_moe"]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and (node.module or "").split(".")[0] == "dylo_moe":
                names = [[*node.module.split(".")[1:], alias.name] for alias in node.names]
            elif node.level == depth:
                names = [[*(node.module or "").split("."), alias.name] for alias in node.names]
        for name in names:
            first = next((part for part in name if part), None)
            if first is not None and not first.startswith("__"):
                yield first, id(node) not in inner


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_has_its_place():
    assert {noun(path) for path in sources()} - set(ORDER) == set()


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    own = noun(path)
    for other, at_module_level in imports(path):
        if other == own:  # inside data/, evaluate/, export/ or cloud/
            continue
        allowed = ORDER.index(other) < ORDER.index(own) or (not at_module_level and (own, other) in LATE)
        assert allowed, f"{own} imports {other}, which comes after it"


def test_the_reader_of_imports_sees_them(monkeypatch, tmp_path):
    """Else the law above would hold for any code."""
    source = (
        "from .layer import Order\nfrom . import router\nimport dylo_moe.expert\nfrom dylo_moe.model import DyLoRAMoE\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .cli import main\n"
        "def late():\n    from .checkpoint import save\n    import torch\n"
    )
    (tmp_path / "config.py").write_text(source)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "formats.py").write_text("from ..config import RouterConfig\nfrom .sources import load\n")
    monkeypatch.setattr("test_architecture.PACKAGE", tmp_path)
    found = set(imports(tmp_path / "config.py"))
    assert found == {
        ("layer", True),
        ("router", True),
        ("expert", True),
        ("model", True),
        ("cli", False),
        ("checkpoint", False),
    }
    assert set(imports(tmp_path / "data" / "formats.py")) == {("config", True)}


def test_the_readme_names_every_file_and_no_other():
    readme = (PACKAGE.parent / "README.md").read_text()
    tree = readme.split("## The tree")[1].split("## ")[0]
    named = set(re.findall(r"^  (\w+)(?:\.py|/) ", tree, re.MULTILINE))
    assert named == {noun(path) for path in sources()} - {"__init__"}
    for folder, files in re.findall(r"^(\w+)/ +(.*)$", tree, re.MULTILINE):
        for file in re.findall(r"[\w]+\.(?:py|md|yaml)", files):
            assert (PACKAGE.parent / folder / file).is_file(), f"{folder}/{file}"


def test_the_readme_shows_the_flags_of_the_command_with_their_defaults():
    """Ours, all of them; a default that is one value is compared."""
    table = re.findall(r"^\| (`--.*?`) \| (.*?) \| .* \|$", (PACKAGE.parent / "README.md").read_text(), re.MULTILINE)
    shown = {}
    for flags, defaults in table:
        names = re.findall(r"--(\w+)", flags)
        values = [value.strip().strip("`") for value in defaults.split(",")]
        shown |= dict(zip(names, values, strict=False))
    ours = [field for kind in (ModelArguments, DataConfig) for field in dataclasses.fields(kind)]
    assert {field.name for field in ours} <= shown.keys()
    known = {option.lstrip("-") for action in build_parser("x")._actions for option in action.option_strings}
    assert shown.keys() - {"config"} <= known
    for field in ours:
        if field.default not in (dataclasses.MISSING, None):  # the README says what None means
            value = shown[field.name]
            assert str(field.default) == value or float(field.default) == float(value), field.name


def test_docs_have_every_flag_of_a_stream_with_its_default():
    lines = (PACKAGE.parent / "docs" / "continual.md").read_text().splitlines()
    rows = {line.split("`")[1].removeprefix("--"): line.split("|")[2].strip(" `") for line in lines if "| `--" in line}
    defaults = {item.name: getattr(StreamArguments(), item.name) for item in dataclasses.fields(StreamArguments)}
    shown = {name: "none" if value in (None, []) else str(value) for name, value in defaults.items()}
    assert rows == shown
