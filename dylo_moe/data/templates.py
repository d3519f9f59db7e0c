"""A tokenizer's chat template: what it writes, found out by letting it write short conversations.

A template is a program, so nothing is assumed of it: whether it writes a system message, an assistant's thoughts, tools
and their results, what it puts between its generation prompt and an answer, and what ends a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from dylo_moe.data.sources.examples import ASSISTANT, SYSTEM, THOUGHT_KEYS, TOOL, Fate, Message, RowError

IN_CONTENT, BY_PROMPT = "<think> in the content", "<think> in the generation prompt"
"""How a template without such a key can have thoughts: it keeps them in an answer, or its generation prompt opens
them."""

_INLINE_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)

# Some templates write today's date, but rows must be the same tomorrow. Llama 3's template writes this date if it is
# given none.
_FIXED_DATE = (
    "{%- macro strftime_now(form) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024', '%Y': '2024'}.get(form, '26 Jul 2024') }}"
    "{%- endmacro -%}"
)


class Turn(NamedTuple):
    """An answer as a model gives it, behind the whole conversation before it."""

    prompt: str
    """The text that the model is given."""
    text: str
    """The prompt, and what the model writes, to the end of its turn."""
    size: int
    """How much of the text the template wrote: all, or all but the end that was added to it."""
    note: str = ""
    """A remark about how the template's own text differs."""


@dataclass(frozen=True)
class Template:
    """What one tokenizer's chat template writes; made by `template_probes.probe_template`."""

    tokenizer: PreTrainedTokenizerBase
    end: str
    """The control tokens that end a turn, as they are written: the template's, or eos if it writes none."""
    after: str = ""
    """What the template writes behind the end of the last turn; not part of a row."""
    specials: tuple[str, ...] = ()
    """All special tokens as they are written."""
    takes_system: bool = True
    """Whether the template takes a system message; otherwise it is put before the first question."""
    system: tuple[Message, ...] = ()
    """An empty system message where the template would put a longer one of its own, else nothing."""
    in_parts: bool = False
    """Whether contents are given as lists of parts, as some templates of models that see images need them."""
    opening: str = ""
    """The end of the generation prompt that an answer in a whole conversation does not begin with, or that tokenises
    otherwise there; models are not given it."""
    lead: str = ""
    """What the template writes between the generation prompt and an answer without thoughts."""
    thoughts: str = ""
    """How thoughts are given: one of THOUGHT_KEYS, IN_CONTENT, BY_PROMPT, or empty: the template has none."""
    takes_inline: bool = False
    """Whether an answer may begin with its thought in <think> and </think>, which the template then writes."""
    takes_tools: bool = False
    takes_results: bool = False
    takes_calls: bool = False
    empty_content: bool = True
    """Whether a message that only calls tools has an empty content, rather than none."""
    arguments: str = "any"
    """How the arguments of a call are given: as an "object", as a "text" of JSON, or as "any" of both."""

    def turn(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Turn:
        """The last message, an answer, as a model gives it.

        Raises:
            RowError: for what the template refuses, or does not write.
        """
        *context, answer = messages
        prompt = self.render(context, tools, generation_prompt=True)
        given = prompt.removesuffix(self.opening)
        opening = prompt[len(given) :]
        text = self.render(messages, tools, generation_prompt=False).removesuffix(self.after)
        notes = []
        if not text.startswith(given):
            if answer.thought or answer.tool_calls:
                raise RowError(Fate.MALFORMED, "the chat template writes its conversation otherwise than its prompt")
            text = f"{given}{self.lead}{answer.content}{self.end}"
            notes.append("its last answer follows the prompt: the template writes the whole conversation otherwise")
        if self.thoughts == BY_PROMPT and answer.thought:
            text = f"{given}{written_thought(answer.thought)}{text[len(given) :].lstrip()}"
        elif opening.strip() and not text.startswith(prompt):
            notes.append(f"the template writes it without the {opening.strip()} of its generation prompt")
        if answer.thought and answer.thought.strip() not in text:
            notes.append("its thoughts are left out: the chat template has no place for them")
        self._check_calls(answer, text[len(given) :])
        size = len(text)
        return Turn(given, text if text.endswith(self.specials) else text + self.end, size, "; ".join(notes))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text from which a model generates its answer. Raises RowError for what the template refuses."""
        return self.render(messages, tools, generation_prompt=True).removesuffix(self.opening)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them: with an empty system message, or the first question begins with
        theirs."""
        if messages[0].role != SYSTEM:
            return [*self.system, *messages]
        if self.takes_system:
            return list(messages)
        system, question, *rest = messages
        return [question._replace(content=f"{system.content}\n\n{question.content}"), *rest]

    def as_wanted(self, message: Message) -> Message:
        """The message as the template wants it: a thought that its content begins with, apart or not, and the arguments
        of its calls as objects or as texts."""
        if message.tool_calls:
            message = message._replace(tool_calls=tuple(map(self._call, message.tool_calls)))
        if message.role != ASSISTANT or message.thought or not self.thoughts or self.takes_inline:
            return message
        found = _INLINE_THOUGHT.fullmatch(message.content) if "</think>" in message.content else None
        if found is None or not (found[2].strip() or message.tool_calls):
            return message
        return message._replace(thought=found[1].strip("\n"), content=found[2])

    def problem(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        """The reason why the template cannot write this conversation; empty if it can."""
        for is_there, is_taken, what in (
            (bool(tools), self.takes_tools, "tools"),
            (any(message.tool_calls for message in messages), self.takes_calls, "calls of tools"),
            (any(message.role == TOOL for message in messages), self.takes_results, "results of tools"),
        ):
            if is_there and not is_taken:
                return f"the chat template does not write {what}"
        return ""

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, generation_prompt: bool) -> str:
        """What the template writes. Raises RowError for what it refuses."""
        offered = list(tools) or None
        with_tools = offered is not None or any(message.tool_calls or message.role == TOOL for message in messages)
        template = self.tokenizer.get_chat_template(None, [] if with_tools else None)
        try:
            text = self.tokenizer.apply_chat_template(
                [self._as_dict(message) for message in messages],
                tools=cast(Any, offered),
                chat_template=_FIXED_DATE + template if "strftime_now" in template else template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # a template is a program of another's: whatever it raises, it refuses
            raise RowError(Fate.MALFORMED, f"the chat template refuses it: {str(error)[:80]}") from None
        assert isinstance(text, str)
        return text

    def _as_dict(self, message: Message) -> dict[str, Any]:
        content = message.content
        said: dict[str, Any] = {"role": message.role}
        if message.thought and self.thoughts == IN_CONTENT:
            content = f"{written_thought(message.thought)}{content}"
        elif message.thought and self.thoughts != BY_PROMPT:
            said[self.thoughts or THOUGHT_KEYS[0]] = message.thought
        if content or self.empty_content or not message.tool_calls:
            said["content"] = [{"type": "text", "text": content}] if self.in_parts else content
        if message.tool_calls:
            said["tool_calls"] = list(message.tool_calls)
        return said | {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key))}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"].get("arguments")
        if self.arguments == "object" and isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        if self.arguments == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    def _check_calls(self, answer: Message, said: str) -> None:
        if not answer.tool_calls:
            return
        if not all(call["function"]["name"] in said for call in answer.tool_calls):
            raise RowError(Fate.MALFORMED, "the chat template does not write one of its calls of tools")
        if answer.content.strip() not in said:
            raise RowError(Fate.MALFORMED, "the chat template does not write what is said beside a call of a tool")


def written_thought(thought: str) -> str:
    """A thought as most models write it before an answer."""
    return f"<think>\n{thought}\n</think>\n\n"
