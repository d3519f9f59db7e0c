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
"""Tasks of MBPP's split prompt that its paper puts before the question."""


class Problem(NamedTuple):
    """One task of a benchmark."""

    task_id: str
    """As EvalPlus writes it: HumanEval/0, Mbpp/11."""
    prompt: str
    """HumanEval: the beginning of a program. MBPP: what to write, in words."""
    tests: tuple[str, ...]
    """HumanEval: one text that defines `check(candidate)`. MBPP: asserts."""
    entry_point: str | None
    """The function that `check` is given; None where the tests say whom they call."""
    setup: str
    """Trusted code that the tests rely on. HumanEval: the prompt, for some tests call a function that is given there.
    MBPP: what is to be made of the program's own classes first; empty for most."""
    solution: str
    """The reference: HumanEval: what goes on after the prompt. MBPP: a whole program."""

    @property
    def names(self) -> tuple[str, ...]:
        """What a solution must define: the entry point, or the functions that the tests call."""
        return (self.entry_point,) if self.entry_point is not None else called_names("\n".join(self.tests))

    @property
    def builtin_in_question(self) -> str | None:
        """The builtin, or module of the standard library, whose name the function in question has."""
        known = vars(builtins).keys() | sys.stdlib_module_names
        own = set(re.findall(r"^def (\w+)", self.solution, re.MULTILINE)) & known
        return next((name for name in sorted(own) if re.search(rf"\b{name}\(", "\n".join(self.tests))), None)


def load_problems(benchmark: str, data_dir: str | None) -> list[Problem]:
    """The test split of "humaneval" or "mbpp", in its own order.

    Args:
        data_dir: a local mirror, which goes before the package and the hub.

    Raises:
        ValueError: for another name, where the dataset is not to be had, or a row lacks a column.
    """
    return list(_problems(benchmark, data_dir, TEST))


def load_examples(benchmark: str, data_dir: str | None) -> list[Problem]:
    """The problems, with solutions, that a completion prompt shows before its question: MBPP's tasks 2, 3 and 4.

    Raises:
        ValueError: as `load_problems`, and where one of them is missing.
    """
    if benchmark == HUMANEVAL:
        return []
    known = {problem.task_id: problem for problem in _problems(benchmark, data_dir, PROMPT)}
    wanted = [f"Mbpp/{number}" for number in FEW_SHOTS]
    missing = [task_id for task_id in wanted if task_id not in known]
    if missing:
        raise ValueError(
            f"the split prompt of mbpp has no {', '.join(missing)}, which are shown before each question; look at "
            "data_dir, which must hold the dataset as it is published"
        )
    return [known[task_id] for task_id in wanted]


def problems_digest(problems: Sequence[Problem]) -> str:
    """A hash of problems, in order."""
    return hashlib.sha256(repr([tuple(problem) for problem in problems]).encode("utf-8", "surrogatepass")).hexdigest()


def called_names(code: str) -> tuple[str, ...]:
    """The plain names that code calls, builtins aside, in order; none where it is no Python."""
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
