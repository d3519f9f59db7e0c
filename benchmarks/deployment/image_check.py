"""The image's own install steps and entry point, run in a fresh virtual environment.

    python benchmarks/deployment/image_check.py

For machines without a container engine. The steps are read from the Dockerfile: what it copies before them is copied
into an empty folder, its RUN line that calls pip is run there, the code is copied over it, and the entry point says its
help. What needs root (system packages, the user) is left out. pip keeps to the machine's own settings, so where they
name another build of torch, that one is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile, in order."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, " ".join(words.split())) for name, words in (line.split(maxsplit=1) for line in joined.split("\n"))]


def install_step() -> str:
    """The one RUN line that calls pip."""
    [step] = [words for name, words in instructions() if name == "RUN" and "pip install" in words]
    return step


def entry_point() -> list[str]:
    """What follows tini, which only hands signals on, and what is said where a command is not."""
    words = {name: json.loads(value) for name, value in instructions() if name in ("ENTRYPOINT", "CMD")}
    tini, separator, *command = words["ENTRYPOINT"]
    assert (tini, separator) == ("tini", "--"), words
    return [*command, *words["CMD"]]


def copy(words: str, folder: Path) -> None:
    """A COPY instruction, from the checkout into a folder."""
    *sources, _ = words.split()
    for source in sources:
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, folder / source, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy(ROOT / source, folder / source)


def check(folder: Path) -> None:
    """Walk through the Dockerfile in an empty folder.

    Raises:
        CalledProcessError: a step fails.
    """
    environment, app = folder / "environment", folder / "app"
    venv.create(environment, with_pip=True)
    app.mkdir()
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    variables = {key: value for key, value in os.environ.items() if not re.match("PYTHON|VIRTUAL_ENV", key)}
    for name, words in instructions():
        if name == "COPY":
            copy(words, app)
        elif name == "RUN" and words == install_step():
            subprocess.run(["/bin/sh", "-c", words], cwd=app, env={**variables, "PATH": path}, check=True)
    command = entry_point()
    assert shutil.which(command[0], path=path) == str(environment / "bin" / command[0])
    subprocess.run(
        command, cwd=app, env={**variables, "PATH": path}, check=True, executable=environment / "bin" / command[0]
    )
    subprocess.run([environment / "bin" / "pip", "check"], cwd=app, env=variables, check=True)
    print(f"the image's install steps and entry point work with Python {sys.version.split()[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="print the install step and the entry point, run nothing")
    if parser.parse_args().show:
        print(install_step(), " ".join(entry_point()), sep="\n")
        return
    with tempfile.TemporaryDirectory(prefix="dylora-image-") as folder:
        check(Path(folder))


if __name__ == "__main__":
    main()
