"""Find training rows that hold the problems by which a model will be judged.

A row overlaps with a problem when at least half of the 8-word sequences of its question, or of its reference
solution, are in the row. Words are runs of letters, digits and underscores, in lower case, so layout and
punctuation change nothing. The measure follows the n-gram overlap of PaLM (Chowdhery et al. 2022, arXiv:2204.02311,
section 8), which looks for 70 % of a problem's 8-grams in the whole of the training data; here one row must hold them.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dylo_moe.data.config import DataConfig
from dylo_moe.data.sources.read import read_test

NGRAM = 8
"""The length of an n-gram, in words."""

SHARE = 0.5
"""The share of a question's or a solution's n-grams from which on a row that holds them is contaminated."""

_WORD = re.compile(r"\w+")

_EXAMPLES = re.compile(r"^\s*(?:>>>|(?:for )?examples?\b)", re.MULTILINE | re.IGNORECASE)


class BenchmarkText(NamedTuple):
    """One problem of a benchmark."""

    task: str
    question: str
    solution: str


class Overlap(NamedTuple):
    """The problem that a row overlaps with, and how much of it the row holds."""

    task: str
    share: float
    """The share of the n-grams of the problem's question or solution, whichever is larger."""


class Benchmarks:
    """An index of problems by their word sequences.

    Args:
        problems: the problems of all benchmarks. A question or solution of fewer than 8 words cannot be found.
    """

    def __init__(self, problems: Iterable[BenchmarkText]) -> None:
        self.problems = tuple(problems)
        self._sizes: list[int] = []
        self._tasks: list[str] = []
        self._parts: dict[str, list[int]] = {}
        for problem in self.problems:
            for part in (problem.question, problem.solution):
                grams = set(ngrams(part))
                for gram in grams:
                    self._parts.setdefault(gram, []).append(len(self._sizes))
                self._sizes.append(len(grams))
                self._tasks.append(problem.task)
        self.key = hashlib.sha256(repr((NGRAM, SHARE, self.problems)).encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def unfindable(self) -> int:
        """The number of problems that cannot be found, because neither question nor solution has enough words."""
        return sum(not any(self._sizes[2 * place : 2 * place + 2]) for place in range(len(self.problems)))

    def overlap(self, text: str) -> Overlap | None:
        """The problem that a text overlaps with most, if that is enough to call it contaminated; else None."""
        counts = Counter(part for gram in set(ngrams(text)) for part in self._parts.get(gram, ()))
        if not counts:
            return None
        share, part = max((count / self._sizes[part], -part) for part, count in counts.items())
        return Overlap(self._tasks[-part], share) if share >= SHARE else None


def load_benchmarks(config: DataConfig) -> tuple[Benchmarks, dict[str, str]]:
    """Load the problems of HumanEval and of MBPP's test split.

    Returns:
        The index of the problems, and by its name the reason for each benchmark that is not available.
    """
    readers = {"humaneval": _humaneval_problem, "mbpp": _mbpp_problem}
    problems: list[BenchmarkText] = []
    missing: dict[str, str] = {}
    for name, problem in readers.items():
        try:
            problems += [problem(row) for row in read_test(name, config)]
        except ValueError as error:
            missing[name] = str(error)
    return Benchmarks(problems), missing


def ngrams(text: str) -> Iterator[str]:
    """Every sequence of 8 words of a text."""
    words = _WORD.findall(text.lower())
    return (" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1))


def _humaneval_problem(row: dict) -> BenchmarkText:
    return BenchmarkText(row["task_id"], _described(row["prompt"]), row["canonical_solution"])


def _mbpp_problem(row: dict) -> BenchmarkText:
    return BenchmarkText(f"MBPP/{row['task_id']}", row["text"], row["code"])


def _described(prompt: str) -> str:
    """The description of a prompt's last function, without its examples, which a copy may leave out."""
    try:
        tree = ast.parse(prompt)
    except SyntaxError:
        return prompt
    texts = [
        statement.value.value  # one prompt has an import before its docstring
        for function in tree.body
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for statement in function.body
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]
    if not texts:
        return prompt
    description = _EXAMPLES.split(texts[-1], maxsplit=1)[0]
    return description if len(_WORD.findall(description)) >= NGRAM else texts[-1]
