"""The image's own install steps and entry point, run in a fresh virtual environment.

    python benchmarks/deployment/image_check.py

For machines without a container engine. The steps are read from the Dockerfile: what it copies before them is copied
into an empty folder, its RUN line that calls pip is run there, the code is copied over it, and the entry point is
called in every form that docs/docker.md names. What needs root (system packages, the user) is left out. pip keeps to
the machine's own settings, so where they name another build of torch, that one is taken.
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


def entry_point() -> tuple[str, list[str]]:
    """The script that follows tini, which only hands signals on, and the words that it gets where none are given."""
    words = {name: json.loads(value) for name, value in instructions() if name in ("ENTRYPOINT", "CMD")}
    tini, separator, script = words["ENTRYPOINT"]
    assert (tini, separator) == ("tini", "--"), words
    return script, words["CMD"]


def forms() -> list[tuple[list[str], int, str]]:
    """What follows the image's name, with the exit status and a part of what must be printed."""
    return [
        (entry_point()[1], 0, "usage: dylora COMMAND"),
        (["train", "--help"], 0, "usage: dylora train"),
        (["dylora", "train", "--help"], 0, "usage: dylora train"),
        (["python", "train.py", "--help"], 0, "usage: dylora train"),
        (["torchrun", "--nproc_per_node", "1", "train.py", "--help"], 0, "usage: dylora train"),
        (["bash", "-c", "ls"], 0, "train.py"),
        (["eval", "--help"], 0, "usage: dylora eval"),
        (["trian"], 2, "there is no command 'trian'; did you mean train?"),
    ]


def call(app: Path, words: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Call the entry point in a folder that stands for the image's /app."""
    script = app / Path(entry_point()[0]).relative_to("/app")
    return subprocess.run([script, *words], cwd=app, env=variables, capture_output=True, text=True)


def check_forms(app: Path, variables: dict[str, str]) -> None:
    """Call the entry point in every form.

    Raises:
        RuntimeError: for a form that ends or prints otherwise.
    """
    for words, status, text in forms():
        done = call(app, words, variables)
        if done.returncode != status or text not in done.stdout + done.stderr:
            raise RuntimeError(f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


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
    check_forms(app, {**variables, "PATH": path})
    subprocess.run([environment / "bin" / "pip", "check"], cwd=app, env=variables, check=True)
    print(f"the image's install steps and entry point work with Python {sys.version.split()[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="print the install step and the entry point, run nothing")
    if parser.parse_args().show:
        script, words = entry_point()
        print(install_step(), " ".join([script, *words]), sep="\n")
        return
    with tempfile.TemporaryDirectory(prefix="dylora-image-") as folder:
        check(Path(folder))


if __name__ == "__main__":
    main()
