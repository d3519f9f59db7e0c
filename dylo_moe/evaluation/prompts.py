"""The prompts of a benchmark, where an answer to them ends, and the program that is in the answer."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dylo_moe.data.encoding import encode_prompt, text_format
from dylo_moe.evaluation.names import CHAT, COMPLETION, HUMANEVAL
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.sandbox.sandbox import Program

BEGIN, DONE = "[BEGIN]", "[DONE]"

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""The stop sequences that end a function's body, from Chen et al. 2021 (arXiv:2107.03374), section 2.1."""

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)

_CODE_LINE = re.compile(r"^(?:import |from \w|def |class |async def |@\w)", re.MULTILINE)


class Asking(NamedTuple):
    """How the problems of one benchmark are put to a model."""

    benchmark: str
    """The name of the benchmark, "humaneval" or "mbpp"."""
    style: str
    """How it is asked: "completion" lets the model continue a text, "chat" asks a question in the chat template."""
    examples: tuple[Problem, ...] = ()
    """Problems that are shown with their solutions before the question; only for completions."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer besides the end tokens; the answer is what precedes the first of them."""
        if self.style == CHAT:
            return ()
        return HUMANEVAL_STOPS if self.benchmark == HUMANEVAL else (DONE,)

    def text(self, problem: Problem) -> str:
        """The text that the model continues, or the question it is asked, before any chat template.

        A completion of HumanEval starts after the prompt's last word. The line break is left to the model, because
        many tokenizers have one token for it and the indentation after it. SmolLM2-135M, given the break, takes the
        function for finished: it then solves none of the first 48 problems, otherwise 5.

        The prompt of MBPP follows Austin et al. 2021 (arXiv:2108.07732), section 3: the task, its tests, and the code
        between [BEGIN] and [DONE].
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

    def ids(self, problems: Iterable[Problem], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The token ids that the model is given for each problem.

        Raises:
            ValueError: for a chat without a chat template.
        """
        form = text_format(tokenizer)  # the template is asked what it writes: once for all problems
        if self.style == CHAT:
            check_chat(tokenizer)
            return [encode_prompt(form, self.text(problem)) for problem in problems]
        start = form.start_ids
        return [[*start, *tokenizer(self.text(each), add_special_tokens=False)["input_ids"]] for each in problems]

    def program(self, problem: Problem, answer: str) -> str:
        """The whole program that an answer amounts to.

        A completion is cut at the first stop. From an answer in a chat the first block of code is taken that defines
        the names asked for, or else the last block, or without any block the answer from its first line of code on. For
        HumanEval, code that does not define the function becomes its body, and other code is put after the imports and
        functions that precede the function in the prompt.

        Args:
            answer: the generated text without end tokens.
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
    """Combine a whole program with the test that judges it."""
    if problem.entry_point is None:  # MBPP: its setup uses the program's names, as its asserts do
        return Program(solution, "\n".join([problem.setup, *problem.tests]), problem.builtin_in_question)
    return Program(solution, "\n".join(problem.tests), problem.entry_point, problem.setup)


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"prompt is chat, but the tokenizer of {tokenizer.name_or_path} has no chat template; use --prompt "
            "completion"
        )


def cut(text: str, stops: Sequence[str]) -> str:
    """The part of a text before the first stop; all of it if there is none."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else text


def chat_code(answer: str, names: Sequence[str]) -> str:
    """The code in an answer; empty if it has none.

    Args:
        names: the names that the code should define.
    """
    blocks = [block.strip("\n") for block in _FENCE.findall(answer)]
    if blocks:
        return next((block for block in blocks if defines(block, names)), blocks[-1])
    start = _CODE_LINE.search(answer)
    if start is None:
        return ""
    lines = answer[start.start() :].splitlines()
    for length in range(len(lines), 0, -1):  # prose after the code is left out
        code = "\n".join(lines[:length])
        if is_python(code):
            return code
    return "\n".join(lines)


def defines(code: str, names: Sequence[str]) -> bool:
    """Whether code defines one of some names at its top level, as a function, a class or a value.

    Only its lines are looked at, because code that was cut off cannot be parsed.
    """
    wanted = "|".join(map(re.escape, names))
    found = re.search(rf"^(?:(?:async )?def ({wanted})\s*\(|class ({wanted})\b|({wanted})\s*=)", code, re.MULTILINE)
    return bool(names) and found is not None


def preamble(problem: Problem) -> str:
    """The part of a prompt before the function that is asked for: imports, and other functions."""
    place = re.search(rf"^def {re.escape(str(problem.entry_point))}\b", problem.prompt, re.MULTILINE)
    return problem.prompt[: place.start()] if place is not None else ""


def indented(code: str) -> str:
    """Indent code to be the body of a function; code that is indented already stays as it is."""
    if not code or code[0] in " \t":
        return code
    return "\n".join(f"    {line}" if line.strip() else line for line in code.splitlines())


def is_python(code: str) -> bool:
    """Whether code can be parsed as Python."""
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
