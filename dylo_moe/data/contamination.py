"""Whether training rows hold the problems that a model will be judged by.

A row overlaps with a problem when at least half of the 8-word sequences of its question, or of its reference
solution, are in the row. Words are runs of letters, digits and underscores, in lower case, so layout and
punctuation change nothing. After the n-gram overlap of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 8), which
looks for 70 % of a problem's 8-grams in the whole of the training data; here one row must hold them.
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
"""Words."""

SHARE = 0.5
"""Of a question's or a solution's n-grams, in one row."""

_WORD = re.compile(r"\w+")

_EXAMPLES = re.compile(r"^\s*(?:>>>|(?:for )?examples?\b)", re.MULTILINE | re.IGNORECASE)


class BenchmarkText(NamedTuple):
    """One problem of a benchmark."""

    task: str
    question: str
    solution: str


class Overlap(NamedTuple):
    """What a row shares with a problem."""

    task: str
    share: float
    """Of the n-grams of the problem's question or solution, whichever is more."""


class Benchmarks:
    """An index of problems by their word sequences.

    Args:
        problems: of all benchmarks. A question or solution of fewer than 8 words cannot be found.
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
        """Problems of which neither part has enough words."""
        return sum(not any(self._sizes[2 * place : 2 * place + 2]) for place in range(len(self.problems)))

    def overlap(self, text: str) -> Overlap | None:
        """The problem that a text shares most with, where that is enough to call it contaminated."""
        counts = Counter(part for gram in set(ngrams(text)) for part in self._parts.get(gram, ()))
        if not counts:
            return None
        share, part = max((count / self._sizes[part], -part) for part, count in counts.items())
        return Overlap(self._tasks[-part], share) if share >= SHARE else None


def load_benchmarks(config: DataConfig) -> tuple[Benchmarks, dict[str, str]]:
    """The problems of HumanEval and of MBPP's test split, and why a benchmark is not to be had, by its name."""
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
    """Every sequence of 8 words."""
    words = _WORD.findall(text.lower())
    return (" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1))


def _humaneval_problem(row: dict) -> BenchmarkText:
    return BenchmarkText(row["task_id"], _described(row["prompt"]), row["canonical_solution"])


def _mbpp_problem(row: dict) -> BenchmarkText:
    return BenchmarkText(f"MBPP/{row['task_id']}", row["text"], row["code"])


def _described(prompt: str) -> str:
    """What the last function is told to do, without its examples, which a copy may leave out."""
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
    told = _EXAMPLES.split(texts[-1], maxsplit=1)[0]
    return told if len(_WORD.findall(told)) >= NGRAM else texts[-1]
