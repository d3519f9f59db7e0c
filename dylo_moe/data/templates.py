"""A tokenizer's chat template: what it writes, found out by letting it write short conversations.

A template is a program, so nothing is assumed of it: whether it writes a system message, an assistant's thoughts, tools
and their results, what it puts between its generation prompt and an answer, and what ends a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from dylo_moe.data.sources.examples import ASSISTANT, SYSTEM, TOOL, USER, Fate, Message, RowError

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The keys of a message under which data and templates know an assistant's thoughts."""

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

_ASKED = Message(USER, "probe question")
_ANSWERED = Message(ASSISTANT, "probe answer")
_THOUGHT = "probe thought"
_CALL = {"name": "probe_call", "arguments": {"probe_key": "probe_value"}}
_CALLED = Message(ASSISTANT, "", tool_calls=({"id": "probe0001", "type": "function", "function": _CALL},))
_RESULT = Message(TOOL, "probe_result", name="probe_call", tool_call_id="probe0001")
_PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "string", "description": "probe"}}}
_TOOL = {
    "type": "function",
    "function": {"name": "probe_call", "description": "probe", "parameters": {**_PARAMETERS, "required": []}},
}


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
    """What one tokenizer's chat template writes; made by `probe_template`."""

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
        prompt = self._render(context, tools, generation_prompt=True)
        given = prompt.removesuffix(self.opening)
        opening = prompt[len(given) :]
        text = self._render(messages, tools, generation_prompt=False).removesuffix(self.after)
        notes = []
        if not text.startswith(given):
            if answer.thought or answer.tool_calls:
                raise RowError(Fate.MALFORMED, "the chat template writes its conversation otherwise than its prompt")
            text = f"{given}{self.lead}{answer.content}{self.end}"
            notes.append("its last answer follows the prompt: the template writes the whole conversation otherwise")
        if self.thoughts == BY_PROMPT and answer.thought:
            text = f"{given}{_inline(answer.thought)}{text[len(given) :].lstrip()}"
        elif opening.strip() and not text.startswith(prompt):
            notes.append(f"the template writes it without the {opening.strip()} of its generation prompt")
        if answer.thought and answer.thought.strip() not in text:
            notes.append("its thoughts are left out: the chat template has no place for them")
        self._check_calls(answer, text[len(given) :])
        size = len(text)
        return Turn(given, text if text.endswith(self.specials) else text + self.end, size, "; ".join(notes))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text from which a model generates its answer. Raises RowError for what the template refuses."""
        return self._render(messages, tools, generation_prompt=True).removesuffix(self.opening)

    def call(self) -> str:
        """A conversation that ends with a call of a tool, to the end of its turn."""
        return self.turn([_ASKED, _CALLED], [_TOOL]).text

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them: with an empty system message, or the first question begins with
        theirs."""
        if messages[0].role != SYSTEM:
            return [*self.system, *messages]
        if self.takes_system:
            return list(messages)
        system, question, *rest = messages
        return [question._replace(content=f"{system.content}\n\n{question.content}"), *rest]

    def with_thought(self, message: Message) -> Message:
        """The message with the thought apart that its content begins with, if the template wants it so."""
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

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, generation_prompt: bool) -> str:
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
            content = f"{_inline(message.thought)}{content}"
        elif message.thought and self.thoughts != BY_PROMPT:
            said[self.thoughts or THOUGHT_KEYS[0]] = message.thought
        if content or self.empty_content or not message.tool_calls:
            said["content"] = [{"type": "text", "text": content}] if self.in_parts else content
        if message.tool_calls:
            said["tool_calls"] = [self._call(call) for call in message.tool_calls]
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


def probe_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Find out what a tokenizer's chat template writes.

    Raises:
        ValueError: for a template that does not write what a user asks and an assistant answers.
    """
    specials = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special})
    specials = sorted({*specials, *tokenizer.all_special_tokens} - {""})
    template = Template(tokenizer, end=str(tokenizer.eos_token), specials=tuple(specials))
    for in_parts in (False, True):
        template = replace(template, in_parts=in_parts)
        whole = _written(template, [_ASKED, _ANSWERED])
        if _ASKED.content in whole and _ANSWERED.content in whole:
            break
    else:
        raise ValueError(
            "the tokenizer's chat template does not write a question and its answer; without one (chat_template = "
            f"None) rows are written as plain texts. It writes {whole[:200]!r}"
        )
    template = _with_end(template, whole.rpartition(_ANSWERED.content)[2])
    template = _with_opening(template)
    template = _with_thoughts(template)
    template = _with_opening(template)
    template = replace(template, takes_system=_takes_system(template), system=_shorter_system(template))
    return _with_tools(template)


def _written(
    template: Template, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, generation: bool = False
) -> str:
    """What the template writes; empty if it refuses."""
    try:
        return template._render(messages, tools, generation_prompt=generation)
    except RowError:
        return ""


def _with_end(template: Template, tail: str) -> Template:
    """The template with what ends a turn: the first special tokens behind an answer."""
    special = "|".join(map(re.escape, sorted(template.specials, key=len, reverse=True)))
    found = re.search(f"(?:{special})+", tail) if special else None
    if found is None:
        return replace(template, after=tail[len(tail.rstrip()) :])
    return replace(template, end=found[0], after=tail[found.end() :])


def _with_opening(template: Template) -> Template:
    """The template with the part of its generation prompt that its whole conversations do not hold, and what they write
    in its place."""
    prompt = _written(template, [_ASKED], generation=True)
    wholes = [_written(template, [_ASKED, _ANSWERED])]
    if template.thoughts in (*THOUGHT_KEYS, IN_CONTENT):
        wholes.append(_written(template, [_ASKED, _ANSWERED._replace(thought=_THOUGHT)]))
    ids = [_ids(template.tokenizer, whole) for whole in wholes]
    header = len(prompt) - _num_common(prompt, _written(template, [_ASKED]))
    for size in range(header + 1):
        given = prompt[: len(prompt) - size]
        given_ids = _ids(template.tokenizer, given)
        if all(whole.startswith(given) for whole in wholes) and all(of[: len(given_ids)] == given_ids for of in ids):
            lead = wholes[0][len(given) :].partition(_ANSWERED.content)[0]
            return replace(template, opening=prompt[len(given) :], lead=lead)
    return template


def _with_thoughts(template: Template) -> Template:
    """The template with how it is given an assistant's thoughts, if it has a place for them."""
    answer = _ANSWERED._replace(thought=_THOUGHT)
    for way in (*THOUGHT_KEYS, IN_CONTENT):
        if way == IN_CONTENT and "think>" not in template.tokenizer.get_chat_template():
            return template
        tried = replace(template, thoughts=way)
        written = _written(tried, [_ASKED, answer])
        if _THOUGHT in written and written.count("<think>") <= 1:  # not behind an empty one
            inline = _written(template, [_ASKED, _ANSWERED._replace(content=f"{_inline(_THOUGHT)}{_ANSWERED.content}")])
            return replace(tried, takes_inline=inline.count("<think>") == written.count("<think>") > 0)
    return replace(template, thoughts=BY_PROMPT) if "<think>" in template.opening else template


def _takes_system(template: Template) -> bool:
    messages = [Message(SYSTEM, "probe system"), _ASKED, _ANSWERED]
    prompt = _written(template, messages[:-1], generation=True).removesuffix(template.opening)
    whole = _written(template, messages)
    return "probe system" in prompt and "probe system" in whole and whole.startswith(prompt)


def _shorter_system(template: Template) -> tuple[Message, ...]:
    empty = Message(SYSTEM, "")
    with_empty, without = (_written(template, [*before, _ASKED], generation=True) for before in ([empty], []))
    is_shorter = len(_ids(template.tokenizer, with_empty)) < len(_ids(template.tokenizer, without))
    return (empty,) if is_shorter and _ASKED.content in with_empty else ()


def _with_tools(template: Template) -> Template:
    """The template with what it can write of tools, and how it wants to be given them."""
    tools = [_TOOL]
    template = replace(template, takes_tools="probe_call" in _written(template, [_ASKED], tools))
    as_text = ({**_CALLED.tool_calls[0], "function": {**_CALL, "arguments": json.dumps(_CALL["arguments"])}},)
    for empty_content in (True, False):
        tried = replace(template, empty_content=empty_content)
        of_object = _written(tried, [_ASKED, _CALLED], tools)
        of_text = _written(tried, [_ASKED, _CALLED._replace(tool_calls=as_text)], tools)
        prompt = _written(tried, [_ASKED], tools, generation=True)
        good = [
            all(word in written[_num_common(prompt, written) :] for word in ("probe_call", "probe_value"))
            for written in (of_object, of_text)
        ]
        if any(good):
            arguments = "any" if all(good) and of_object == of_text else "object" if good[0] else "text"
            template = replace(tried, takes_calls=True, arguments=arguments)
            break
    results = _written(template, [_ASKED, _CALLED, _RESULT], tools, generation=True)
    return replace(template, takes_results=_RESULT.content in results)


def _inline(thought: str) -> str:
    """A thought as most models write it before an answer."""
    return f"<think>\n{thought}\n</think>\n\n"


def _num_common(one: str, other: str) -> int:
    """The length of the longest common beginning of two texts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
