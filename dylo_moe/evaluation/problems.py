"""The problems of HumanEval and MBPP, from their package, a local mirror or the hub."""

from __future__ import annotations

import ast
import builtins
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dylo_moe.data.config import DataConfig
from dylo_moe.data.sources.read import PROMPT, TEST, read_split
from dylo_moe.evaluation.names import BENCHMARKS, HUMANEVAL, MBPP

FEW_SHOTS = (2, 3, 4)
"""The tasks of MBPP's split `prompt` that its paper shows before the question."""


class Problem(NamedTuple):
    """One task of a benchmark."""

    task_id: str
    """The task's name as EvalPlus writes it, such as HumanEval/0 or Mbpp/11."""
    prompt: str
    """For HumanEval the beginning of a program; for MBPP what to write, in words."""
    tests: tuple[str, ...]
    """For HumanEval one text that defines `check(candidate)`; for MBPP asserts."""
    entry_point: str | None
    """The function that `check` is given; None if the tests call functions by name."""
    setup: str
    """Trusted code that the tests rely on. For HumanEval the prompt, because some tests call a function that it
    defines; for MBPP statements that use the program's own classes before the tests do, empty for most tasks."""
    solution: str
    """The reference solution: for HumanEval the code that continues the prompt, for MBPP a whole program."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a solution must define: the entry point, or the functions that the tests call."""
        return (self.entry_point,) if self.entry_point is not None else called_names("\n".join(self.tests))

    @property
    def builtin_in_question(self) -> str | None:
        """The name of the tested function, if a builtin or a module of the standard library has it too; else None."""
        known = vars(builtins).keys() | sys.stdlib_module_names
        own = set(re.findall(r"^def (\w+)", self.solution, re.MULTILINE)) & known
        return next((name for name in sorted(own) if re.search(rf"\b{name}\(", "\n".join(self.tests))), None)


def load_problems(benchmark: str, data_dir: str | None) -> list[Problem]:
    """Load the test split of "humaneval" or "mbpp", in its own order.

    Args:
        data_dir: a local mirror, which is preferred to the package and the hub.

    Raises:
        ValueError: for another name, if the dataset is not available, or if a row lacks a column.
    """
    return list(_problems(benchmark, data_dir, TEST))


def load_examples(benchmark: str, data_dir: str | None) -> list[Problem]:
    """Load the solved problems that a completion prompt shows before its question: MBPP's tasks 2, 3 and 4.

    Raises:
        ValueError: if one of them is missing, and as `load_problems` does.
    """
    if benchmark == HUMANEVAL:
        return []
    known = {problem.task_id: problem for problem in _problems(benchmark, data_dir, PROMPT)}
    wanted = [f"Mbpp/{number}" for number in FEW_SHOTS]
    missing = [task_id for task_id in wanted if task_id not in known]
    if missing:
        raise ValueError(
            f"the split prompt of mbpp has no {', '.join(missing)}, which are shown before each question; check "
            "that data_dir holds the dataset as it is published"
        )
    return [known[task_id] for task_id in wanted]


def problems_digest(problems: Sequence[Problem]) -> str:
    """A hash of problems and their order."""
    return hashlib.sha256(repr([tuple(problem) for problem in problems]).encode("utf-8", "surrogatepass")).hexdigest()


def called_names(code: str) -> tuple[str, ...]:
    """The plain names that code calls, in order, without builtins; none if it is not valid Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return ()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    names = [(node.lineno, node.col_offset, node.func.id) for node in calls if isinstance(node.func, ast.Name)]
    return tuple(dict.fromkeys(name for _, _, name in sorted(names) if not hasattr(builtins, name)))


def _problems(benchmark: str, data_dir: str | None, split: str) -> Iterator[Problem]:
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark is {benchmark!r}; it must be {' or '.join(BENCHMARKS)}")
    read = {HUMANEVAL: _humaneval, MBPP: _mbpp}[benchmark]
    for place, row in enumerate(read_split(benchmark, split, DataConfig(data_dir=data_dir))):
        try:
            yield read(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"row {place} of {benchmark}'s split {split} is not as published: {error!r}") from error


def _humaneval(row: dict[str, Any]) -> Problem:
    return Problem(
        row["task_id"],
        row["prompt"],
        (row["test"],),
        row["entry_point"],
        row["prompt"],
        row["canonical_solution"],
    )


def _mbpp(row: dict[str, Any]) -> Problem:
    return Problem(
        f"Mbpp/{row['task_id']}",
        row["text"].strip(),
        tuple(row["test_list"]),
        None,
        row["test_setup_code"] or "",
        row["code"].replace("\r\n", "\n").strip(),
    )
