"""Folders with a settings.json: their content is resumed only with the same settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.differences import Difference, in_words
from dylo_moe.utils.owner import OWNER

SETTINGS_FILE = "settings.json"

Settings = dict[str, Any]


def refuse_foreign(folder: Path, *, what: str, beside: Sequence[str] = ()) -> None:
    """Raise ValueError for a file, and for a folder that holds something, but no settings.

    Args:
        what: what the folder is for, in the message, such as "evaluation".
        beside: the names of files that may be there without settings.
    """
    if not folder.exists() or (folder / SETTINGS_FILE).is_file():
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a new folder")
    if any(item.name not in (*beside, OWNER) for item in folder.iterdir()):
        raise ValueError(f"output_dir {folder} is not empty, and holds no {what}; choose a new one")


def check_folder(
    folder: Path,
    settings: Settings,
    *,
    what: str,
    changes: Callable[[Settings, Settings], list[Difference]],
    merge: Callable[[Settings, Settings], Settings],
    beside: Sequence[str] = (),
) -> Settings:
    """Check that some work can begin in a folder with these settings, or go on with them; nothing is written.

    Args:
        what, beside: the arguments of `refuse_foreign`.
        changes: given the settings in the folder and those of now, returns those that differ but must not.
        merge: given the same, returns the settings that the folder has from now on.

    Returns:
        The settings that the folder has from now on.

    Raises:
        ValueError: for a folder that holds something else, or was begun with other settings; each of them is named.
    """
    refuse_foreign(folder, what=what, beside=beside)
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return settings
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = changes(before, settings)
    if changed:
        raise ValueError(
            f"the {what} in {folder} has other settings: {in_words(changed)}. Give the same ones to resume it, "
            "or a new --output_dir"
        )
    return merge(before, settings)


def take_folder(folder: Path, settings: Settings, **how: Any) -> None:
    """Write the settings of some work into its folder, after `check_folder` with the same arguments."""
    settings = check_folder(folder, settings, **how)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS_FILE, settings)
