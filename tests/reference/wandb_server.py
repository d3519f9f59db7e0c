"""A stand-in for the part of Weights & Biases' client that fetches artifacts: a folder is the server."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import wandb


class StandInArtifact:
    """A folder's files, under the names that the manifest shall claim.

    Args:
        folder: what is downloaded.
        claimed: more names in the manifest, each with the address of an external file, or None.
    """

    def __init__(self, folder: Path, claimed: dict[str, str | None] | None = None) -> None:
        self.folder, self.downloads = folder, 0
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
        entries = {**dict.fromkeys(names), **(claimed or {})}
        self.manifest = SimpleNamespace(
            entries={name: SimpleNamespace(path=name, ref=ref) for name, ref in entries.items()}
        )

    def download(self, root: str, skip_cache: bool) -> str:
        self.downloads += 1
        shutil.copytree(self.folder, root, symlinks=True, dirs_exist_ok=True)
        return root


class StandInApi:
    """Put in the place of `wandb.Api`: knows artifacts of type "model" by their reference."""

    def __init__(self, artifacts: dict[str, Any]) -> None:
        self.artifacts = artifacts

    def __call__(self, timeout: float) -> StandInApi:
        return self

    def artifact(self, reference: str, type: str) -> Any:
        """What the real one raises was read from its source, `Artifact._from_name` and `normalize_exceptions`."""
        assert type == "model"
        found = self.artifacts.get(reference)
        if isinstance(found, Exception):
            raise found
        if found is None:
            entity, project, name = reference.split("/")
            error = ValueError(f"artifact membership {name!r} not found in '{entity}/{project}'")
            raise wandb.errors.CommError(str(error), error) from error
        return found


def connected(monkeypatch: Any, artifacts: dict[str, Any]) -> None:
    """From now on in this test, the client has a key, is online, and talks to the stand-in."""
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")))
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: True)
    monkeypatch.setattr(wandb, "Api", StandInApi(artifacts))
