"""The file that `--config` names: a file of the user's, or a recipe that comes with the package."""

from __future__ import annotations

from pathlib import Path

import dylo_moe
from dylo_moe.utils.errors import UsageError

LAUNCH_PREFIX = "accelerate_"
"""The prefix of the names of configs for `accelerate launch`, which are in the folder of the recipes but are none."""


def recipe_file(name: str) -> Path:
    """The file that `--config name` means; a file at that path takes precedence over a shipped recipe of that name.

    Raises:
        UsageError: where there is neither; the message lists the recipes that are shipped.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    shipped = shipped_recipes()
    if name not in shipped:
        lack = "it is a folder, not a file" if path.is_dir() else "there is no such file"
        raise UsageError(
            f"recipe {name} cannot be read: {lack}, and no recipe has that name; "
            f"those that come with dylora are {', '.join(shipped)}"
        )
    return shipped[name]


def shipped_recipes() -> dict[str, Path]:
    """The files of the recipes that come with the package, by their names, in alphabetical order."""
    files = sorted(_folder().glob("*.yaml"))
    return {path.stem: path for path in files if not path.stem.startswith(LAUNCH_PREFIX)}


def _folder() -> Path:
    """The folder of the recipes: in the package when it was installed from a wheel, beside it in a clone."""
    package = Path(dylo_moe.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"
