"""The parts of a sandbox: limits, an environment, and the command line that isolates a process."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dylo_moe.evaluation.sandbox.python_files import LOCALES, numpy_folders, python_files

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
        SandboxError: if Python's files cannot be found, or its library not copied.
    """
    words = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--clearenv"]
    for name, value in sandbox_environment(SCRATCH).items():
        words += ["--setenv", name, value]
    try:
        python = python_files()
    except OSError as error:
        raise SandboxError(f"Python's files cannot be listed and copied to {tempfile.gettempdir()}: {error}") from error
    for path in (str(python.executable), *python.shared_libraries):
        words += ["--ro-bind", path, path]
    for path in ("/etc/ld.so.cache", *LOCALES):
        words += ["--ro-bind-try", path, path]
    words += ["--ro-bind", str(python.library_copy), str(python.library)]
    if python.extensions is not None:
        words += ["--ro-bind", str(python.extensions), str(python.library / "lib-dynload")]
    for package in numpy_folders():
        words += ["--ro-bind", str(package), f"{PACKAGES_FOLDER}/{package.name}"]
    words += ["--ro-bind", str(GUEST), "/guest.py", "--dev", "/dev", "--remount-ro", "/dev"]
    words += ["--size", str(scratch_mib * 2**20), "--tmpfs", SCRATCH, "--chdir", SCRATCH, "--remount-ro", "/"]
    return words


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
