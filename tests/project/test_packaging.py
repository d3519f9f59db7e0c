"""What a user of the wheel has: the modules, the type marker, the recipes by name, one version everywhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from reference.paths import ROOT

import dylo_moe
from dylo_moe.commands.train.request import parse_train, settings_of
from dylo_moe.parsing.recipe_file import recipe_file, shipped_recipes
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.install import EXTRAS

BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "dylo_moe", "recipes")
RECIPES = ["code", "compare", "quickstart", "stream"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what pip unpacks of the wheel, which is built by the project's own backend without network."""
    source, wheels, folder = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    for name in BUILT_FROM:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_package_its_data_and_nothing_else(installed):
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dylo_moe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = {f"dylo_moe/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    metadata = {name for name in found if ".dist-info/" in name}
    assert found - metadata == package | recipes
    assert "dylo_moe/py.typed" in found
    assert {name.rpartition("/")[2] for name in metadata} >= {"LICENSE", "METADATA", "entry_points.txt"}


def test_recipes_of_an_installed_package_are_found_by_name(installed, tmp_path):
    """In an empty folder, by a Python that has the unpacked wheel before this clone."""
    code = "from dylo_moe.parsing.recipe_file import shipped_recipes as shipped; print(*shipped().values())"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(installed / "dylo_moe" / "recipes" / f"{name}.yaml") for name in RECIPES]


def test_a_recipe_is_named_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "somewhere", "--output_dir", "new", "--use_cpu", "true"]
    by_name = parse_train(["--config", "quickstart", *words])
    by_path = parse_train(["--config", str(ROOT / "recipes" / "quickstart.yaml"), *words])
    assert settings_of(by_name) == settings_of(by_path)
    assert by_name.train.max_steps == 32


def test_a_file_goes_before_a_shipped_recipe_and_a_folder_does_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert recipe_file("quickstart") == ROOT / "recipes" / "quickstart.yaml"
    (tmp_path / "stream").write_text("seed: 3\n")
    assert recipe_file("stream").resolve() == tmp_path / "stream"
    monkeypatch.chdir(ROOT)
    assert recipe_file("recipes/quickstart.yaml").resolve() == ROOT / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize("name", ["quickstrat", "quickstart.yaml", "recipes/quickstart", "accelerate_ddp"])
def test_an_unknown_recipe_is_an_error_that_lists_the_shipped_ones(monkeypatch, tmp_path, name):
    """Configs for `accelerate launch` are no recipes, so they have no name here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"recipe {name} cannot be read.* are {', '.join(RECIPES)}$"):
        recipe_file(name)
    assert list(shipped_recipes()) == RECIPES


def test_texts_say_how_to_install_what_can_be_installed():
    """The name dylora-moe is on no package index, so `pip install dylora-moe[wandb]` finds nothing."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: shlex.split(packages) for name, packages in EXTRAS.items()} == {name: extras[name] for name in EXTRAS}
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("dylo_moe/**/*.py"),
    ]
    wrong = [path.name for path in pages if re.search(r"dylora-moe\[|pip install .?dylora-moe", path.read_text())]
    assert not wrong


def test_every_place_that_says_the_version_says_the_same():
    """A tag vVERSION is refused by CI where it differs from pyproject.toml's, so that holds for releases too."""
    project = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project == [dylo_moe.__version__]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dylo_moe.__version__
    changes = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[0] == "Unreleased"
    assert changes[1:2] in ([], [dylo_moe.__version__])
