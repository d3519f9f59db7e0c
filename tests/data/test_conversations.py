"""What a conversation says: thoughts, weights, tools and parts, each read, or named as the reason why not."""

import json

import datasets
import pytest
from reference.chat_templates import THINKING, tokenizer_for
from reference.texts import write_rows

from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
from dylo_moe.data.sources.examples import Example, Fate, Message, RowError, ask
from dylo_moe.data.sources.formats import read_row
from dylo_moe.data.sources.roles import recognise, unread_columns

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
FUNCTION = {"name": "add", "arguments": {"a": 1}}
CALL = {"type": "function", "function": FUNCTION}
OFFERED = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def read(*messages, **columns) -> Example:
    return read_row({"messages": list(messages), **columns}, None)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_read_of_answers_alone(key):
    context = (Message(USER, "q"), Message(ASSISTANT, "a", thought="t"), Message(USER, "r"))
    found = read(
        *(said(USER, "q"), said(ASSISTANT, "a", **{key: "t"}), said(USER, "r")), said(ASSISTANT, "b", **{key: "u"})
    )
    assert found == Example(context, "b", thought="u")
    assert read(said(USER, "q"), said(ASSISTANT, "a", **{key: None})) == ask("q", "a")
    with pytest.raises(RowError, match=f"a message's {key} is not a string"):
        read(said(USER, "q"), said(ASSISTANT, "a", **{key: 3}))


@pytest.mark.parametrize(("key", "off", "on"), [("weight", 0, 1), ("train", False, True), ("loss", 0.0, 1.0)])
def test_answers_of_weight_0_are_read_and_not_learned(key, off, on):
    found = read(
        *(said(USER, "q"), said(ASSISTANT, "wrong", **{key: off}), said(USER, "no")), said(ASSISTANT, "a", **{key: on})
    )
    context = (Message(USER, "q"), Message(ASSISTANT, "wrong", trained=False), Message(USER, "no"))
    assert found == Example(context, "a")
    cut = read(
        *(said(USER, "q"), said(ASSISTANT, "a"), said(USER, "r")),
        said(ASSISTANT, "wrong", **{key: off}),
        said(USER, "s"),
    )
    assert cut == ask("q", "a")._replace(note="its last answers have weight 0 and are left out")
    with pytest.raises(RowError, match="none of its answers is to be learned") as error:
        read(said(USER, "q"), said(ASSISTANT, "wrong", **{key: off}))
    assert error.value.fate is Fate.EMPTY
    with pytest.raises(RowError, match=f"a message's {key} is 0.5, neither 0 nor 1"):
        read(said(USER, "q"), said(ASSISTANT, "a", **{key: 0.5}))


CALLING = (Message(USER, "q"), Message(ASSISTANT, "", tool_calls=(CALL,)), Message(TOOL, "7"))


@pytest.mark.parametrize(
    "tools", [[OFFERED], [OFFERED["function"]], json.dumps([OFFERED])], ids=["OpenAI", "bare", "text"]
)
@pytest.mark.parametrize(
    "call",
    [
        said(ASSISTANT, None, tool_calls=[CALL]),
        said(ASSISTANT, "", tool_calls=[FUNCTION]),
        said(ASSISTANT, None, tool_calls=json.dumps([CALL])),
        said(ASSISTANT, None, function_call=FUNCTION),
        said("function_call", json.dumps(FUNCTION)),
    ],
    ids=["OpenAI", "bare", "text", "function_call", "a speaker"],
)
@pytest.mark.parametrize("role", ["tool", "function", "ipython", "observation"])
def test_tools_their_calls_and_their_results_are_read(tools, call, role):
    found = read(said(USER, "q"), call, said(role, "7"), said(ASSISTANT, "a"), tools=tools)
    assert found == Example(CALLING, "a", tools=(OFFERED,))


def test_a_conversation_may_end_with_a_call():
    last = said(ASSISTANT, "Wait.", tool_calls=[CALL])
    assert read(said(USER, "q"), last) == Example((Message(USER, "q"),), "Wait.", tool_calls=(CALL,))
    noted = read(said(USER, "q"), last, said(TOOL, "7", name="add", tool_call_id="x"))
    assert noted.note == "its last message has no answer and is left out"


def test_who_speaks_and_which_call_is_answered_are_kept():
    found = read(
        said(USER, "q", name="Ann"),
        said(ASSISTANT, None, tool_calls=[CALL]),
        said(TOOL, "7", tool_call_id="x"),
        said(ASSISTANT, "a"),
    )
    assert (found.context[0].name, found.context[2].tool_call_id) == ("Ann", "x")


@pytest.mark.parametrize(
    ("messages", "columns", "reason"),
    [
        (
            [said(USER, "q"), said(ASSISTANT, None, tool_calls=[CALL]), said(USER, "r")],
            {},
            "user where the tool's turn",
        ),
        ([said(USER, "q"), said(TOOL, "7")], {}, "a message of the tool where the assistant's turn is"),
        (
            [said(USER, "q"), said(ASSISTANT, "a"), said(TOOL, "7")],
            {},
            "a message of the tool where the user's turn is",
        ),
        ([said(USER, "q"), said(ASSISTANT, None, tool_calls=[{"id": "x"}])], {}, "a call of a tool has no name"),
        ([said(USER, "q"), said(ASSISTANT, None, tool_calls=["x"])], {}, "tool_calls is not a list of objects"),
        ([said("user", "q"), said("function_call", "not JSON")], {}, "tool_calls is not a list of objects"),
        (
            [said(USER, "q"), said(ASSISTANT, None, tool_calls=[{"name": "f", "arguments": "x"}])],
            {},
            "not a JSON object",
        ),
        (
            [said(USER, "q"), said(ASSISTANT, None, tool_calls=[{"name": "f", "arguments": [1]}])],
            {},
            "not a JSON object",
        ),
        ([said(USER, "q"), said(ASSISTANT, "a")], {"tools": "not JSON"}, "tools is not a list of objects"),
        ([said(USER, "q"), said(ASSISTANT, None)], {}, "a message's content is null"),
        (
            [said(USER, [{"type": "image_url"}]), said(ASSISTANT, "a")],
            {},
            "a part of type 'image_url'; only text is read",
        ),
        ([said(USER, [{"type": "thinking", "thinking": "t"}]), said(ASSISTANT, "a")], {}, "of the user holds thoughts"),
        ([said(USER, [3]), said(ASSISTANT, "a")], {}, "a part of type 'int'; only text is read"),
    ],
)
def test_what_is_no_conversation_is_told(messages, columns, reason):
    with pytest.raises(RowError, match=reason) as error:
        read(*messages, **columns)
    assert error.value.fate in (Fate.MALFORMED, Fate.EMPTY)


def test_contents_may_be_lists_of_parts():
    parts = [{"type": "text", "text": "a "}, "b", {"text": " c", "image": None}]
    thinking = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "d"}]
    assert read(said(USER, parts), said(ASSISTANT, thinking)) == ask("a b c", "d")._replace(thought="t")


@pytest.mark.parametrize("answer", [[said(ASSISTANT, "c")], "c"], ids=["message", "text"])
def test_a_prompt_may_be_a_conversation_whose_answers_are_only_read(answer):
    """As TRL has prompts and completions."""
    prompt = [said(SYSTEM, "s"), said(USER, "q"), said(ASSISTANT, "a"), said(USER, "r")]
    row = {"prompt": prompt, "completion": answer, "tools": [OFFERED], "input": "more"}
    context = (Message(SYSTEM, "s"), Message(USER, "q"), Message(ASSISTANT, "a", trained=False), Message(USER, "r"))
    note = "its input is not read, for its prompt is a conversation"
    assert read_row(row, None) == Example(context, "c", note, tools=(OFFERED,))
    assert unread_columns(row, recognise(row)) == []
    with pytest.raises(RowError, match="a message of the user where the assistant's turn is"):
        read_row({"prompt": prompt, "completion": [said(USER, "c")]}, None)


def test_keys_of_messages_that_nothing_reads_are_named():
    found = read(said(USER, "q", mood="calm", refusal=None), said(ASSISTANT, "a", country="x", annotations=[]))
    assert found.note == "its messages' country is not read; its messages' mood is not read"


def test_tools_of_a_table_lose_the_nulls_that_its_types_put_there(tmp_path):
    """Arrow gives each object of a column the keys of all others."""
    rows = [
        {
            "messages": [
                said(USER, f"q{number}"),
                said(
                    ASSISTANT,
                    None,
                    tool_calls=[{"type": "function", "function": {"name": name, "arguments": {name: 1}}}],
                ),
                said(TOOL, "7"),
                said(ASSISTANT, f"a{number}"),
            ],
            "tools": [{"name": name, "parameters": {"type": "object", name: "x"}}],
        }
        for number, name in enumerate(["f", "g"] * 4)
    ]
    tokenizer = tokenizer_for(THINKING)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    paths = [str(tmp_path / "table.parquet"), write_rows(tmp_path / "lines.jsonl", rows)]
    texts = []
    for path in paths:
        data = load_data(DataConfig(datasets=[path], preprocessing_num_workers=1), tokenizer)
        texts.append({tokenizer.decode(ids) for ids in data.train["input_ids"]})
        assert data.counts[0].malformed == 0 and not data.unread[data.counts[0].name]
    assert len(texts[0] & texts[1]) >= 6 and not any("null" in text for text in texts[0])
