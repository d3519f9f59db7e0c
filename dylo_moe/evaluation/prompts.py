"""What a model is asked, where its answer ends, and the program that is in the answer."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dylo_moe.data.encoding import encode_prompt, text_format
from dylo_moe.evaluation.names import CHAT, COMPLETION, HUMANEVAL
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox.sandbox import Program

BEGIN, DONE = "[BEGIN]", "[DONE]"

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Chen et al. 2021 (arXiv:2107.03374), section 2.1: where a function's body is over."""

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)

_CODE_LINE = re.compile(r"^(?:import |from \w|def |class |async def |@\w)", re.MULTILINE)


class Asking(NamedTuple):
    """How the problems of one benchmark are put to a model."""

    benchmark: str
    """"humaneval" or "mbpp"."""
    style: str
    """"completion": the model goes on with a text; "chat": it answers a question, in the tokenizer's chat template."""
    examples: tuple[Problem, ...] = ()
    """Shown, with their solutions, before the question; completion only."""

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends an answer besides the end tokens; the answer is what is before the first of them."""
        if self.style == CHAT:
            return ()
        return HUMANEVAL_STOPS if self.benchmark == HUMANEVAL else (DONE,)

    def text(self, problem: Problem) -> str:
        """What the model goes on with, or the question it is asked, before any chat template.

        A completion of HumanEval goes on from the prompt's last word: the line break is left to the model, for many
        tokenizers have one token for it and the indentation behind it. SmolLM2-135M, given the break, takes the
        function for finished: of the first 48 problems it solves none, else 5.

        MBPP's is after Austin et al. 2021 (arXiv:2108.07732), section 3: the task, its tests, and the code between
        [BEGIN] and [DONE].
        """
        is_humaneval = self.benchmark == HUMANEVAL
        if self.style == CHAT:
            if is_humaneval:
                task = f"Complete this Python function.\n\n```python\n{problem.prompt.rstrip()}\n```"
            else:
                task = _mbpp_task(problem)
            return f"{task}\n\nAnswer with the whole code in one ```python block."
        if is_humaneval:
            return problem.prompt.rstrip()
        shown = [f"{_mbpp_task(example)}\n{BEGIN}\n{example.solution}\n{DONE}\n\n" for example in self.examples]
        return "".join([*shown, f"{_mbpp_task(problem)}\n{BEGIN}\n"])

    def ids(self, problem: Problem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The token ids that the model is given.

        Raises:
            ValueError: for a chat without a chat template.
        """
        form = text_format(tokenizer)
        if self.style == CHAT:
            check_chat(tokenizer)
            return encode_prompt(form, self.text(problem))
        return [*form.start_ids, *tokenizer(self.text(problem), add_special_tokens=False)["input_ids"]]

    def program(self, problem: Problem, answer: str) -> str:
        """The whole program that an answer makes.

        A completion is cut at the first stop. Of a chat's answer it is the first block of code that defines what is
        asked for; else the last block, as a body where the prompt is a function's beginning; else, without a block, the
        answer from its first line of code on. What HumanEval's prompt has before the function goes before it.

        Args:
            answer: as generated, end tokens aside.
        """
        if self.style == COMPLETION:
            code = cut(answer, self.stops)
            return self.text(problem) + code if self.benchmark == HUMANEVAL else code
        code = chat_code(answer, problem.names)
        if problem.entry_point is None:
            return code
        if not defines(code, [problem.entry_point]):
            return f"{problem.prompt}{indented(code)}\n"
        return f"{preamble(problem)}{code}"


def to_judge(problem: Problem, solution: str) -> Program:
    """A whole program together with what it is judged by."""
    if problem.entry_point is None:  # MBPP: its setup calls what the program defines, as its asserts do
        return Program(solution, "\n".join([problem.setup, *problem.tests]), problem.builtin_in_question)
    return Program(solution, "\n".join(problem.tests), problem.entry_point, problem.setup)


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"prompt is chat, but the tokenizer of {tokenizer.name_or_path} has no chat template; use --prompt "
            "completion"
        )


def cut(text: str, stops: Sequence[str]) -> str:
    """What is before the first of some stops; all of it where there is none."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else text


def chat_code(answer: str, names: Sequence[str]) -> str:
    """The code in an answer; empty where it has none.

    Args:
        names: what it should define.
    """
    blocks = [block.strip("\n") for block in _FENCE.findall(answer)]
    if blocks:
        return next((block for block in blocks if defines(block, names)), blocks[-1])
    start = _CODE_LINE.search(answer)
    if start is None:
        return ""
    lines = answer[start.start() :].splitlines()
    for length in range(len(lines), 0, -1):  # what is said behind the code is left out
        code = "\n".join(lines[:length])
        if is_python(code):
            return code
    return "\n".join(lines)


def defines(code: str, names: Sequence[str]) -> bool:
    """Whether code defines one of some names at its top level, as a function, a class or a value; by its lines alone,
    for it may be cut off."""
    wanted = "|".join(map(re.escape, names))
    found = re.search(rf"^(?:(?:async )?def ({wanted})\s*\(|class ({wanted})\b|({wanted})\s*=)", code, re.MULTILINE)
    return bool(names) and found is not None


def preamble(problem: Problem) -> str:
    """What a prompt has before the function that is asked for: imports, and other functions."""
    place = re.search(rf"^def {re.escape(str(problem.entry_point))}\b", problem.prompt, re.MULTILINE)
    return problem.prompt[: place.start()] if place is not None else ""


def indented(code: str) -> str:
    """A function's body as it stands below its head; one that is indented already stays as it is."""
    if not code or code[0] in " \t":
        return code
    return "\n".join(f"    {line}" if line.strip() else line for line in code.splitlines())


def is_python(code: str) -> bool:
    """Whether it can be parsed."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _mbpp_task(problem: Problem) -> str:
    tests = "\n".join(problem.tests)
    return (
        f"You are an expert Python programmer, and here is your task: {problem.prompt} Your code should pass these "
        f"tests:\n\n{tests}"
    )
