"""Short conversations that tell what a chat template writes, and how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from dylo_moe.data.sources.examples import ASSISTANT, SYSTEM, THOUGHT_KEYS, TOOL, USER, Message, RowError
from dylo_moe.data.templates import BY_PROMPT, IN_CONTENT, Template, written_thought
from dylo_moe.data.token_rows import ids_of_text

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
        return template.render(messages, tools, generation_prompt=generation)
    except RowError:
        return ""


def _with_end(template: Template, tail: str) -> Template:
    """The template with what ends a turn: the first special tokens behind an answer."""
    tokens = template.tokenizer.convert_ids_to_tokens(ids_of_text(template.tokenizer, tail))
    first = next((token for token in tokens if token in template.specials), None)
    if first is None:
        return replace(template, after=tail[len(tail.rstrip()) :])
    after = tail.partition(first)[2]
    while more := next((token for token in template.specials if after.startswith(token)), ""):
        after = after.removeprefix(more)
    return replace(template, end=tail[tail.index(first) : len(tail) - len(after)], after=after)


def _with_opening(template: Template) -> Template:
    """The template with the part of its generation prompt that its whole conversations do not hold, and what they write
    in its place."""
    prompt = _written(template, [_ASKED], generation=True)
    wholes = [_written(template, [_ASKED, _ANSWERED])]
    if template.thoughts in (*THOUGHT_KEYS, IN_CONTENT):
        wholes.append(_written(template, [_ASKED, _ANSWERED._replace(thought=_THOUGHT)]))
    ids = [ids_of_text(template.tokenizer, whole) for whole in wholes]
    header = len(prompt) - _num_common(prompt, _written(template, [_ASKED]))
    for size in range(header + 1):
        given = prompt[: len(prompt) - size]
        given_ids = ids_of_text(template.tokenizer, given)
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
            inline = _written(
                template, [_ASKED, _ANSWERED._replace(content=f"{written_thought(_THOUGHT)}{_ANSWERED.content}")]
            )
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
    is_shorter = len(ids_of_text(template.tokenizer, with_empty)) < len(ids_of_text(template.tokenizer, without))
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
    results = _written(template, [_ASKED, template.as_wanted(_CALLED), _RESULT], tools, generation=True)
    return replace(template, takes_results=_RESULT.content in results)


def text_with_a_call(template: Template) -> str:
    """A conversation that ends with a call of a tool, to the end of its turn; empty if the template writes none."""
    return template.turn([_ASKED, template.as_wanted(_CALLED)], [_TOOL]).text if template.takes_calls else ""


def _num_common(one: str, other: str) -> int:
    """The length of the longest common beginning of two texts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
