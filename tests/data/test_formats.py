"""What a row says: each published format, and a reason for every row that says nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylo_moe.data.sources.examples import Example, Fate, Message, RowError, ask
from dylo_moe.data.sources.formats import parse_json, read_row
from dylo_moe.data.sources.roles import (
    ANSWERING,
    ASKING,
    CONVERSATIONS,
    HISTORY,
    OTHER_PAIRS,
    SYSTEMS,
    TESTS,
    TEXTS,
    Columns,
    recognise,
)

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
CHAT = Example((Message(SYSTEM, "s"), Message(USER, "q"), Message(ASSISTANT, "a"), Message(USER, "r")), "b")


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def spoken(who: str, what: str, system: str, user: str, assistant: str) -> list[dict]:
    speakers = (system, user, assistant, user, assistant)
    return [{who: speaker, what: text} for speaker, text in zip(speakers, "sqarb", strict=True)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, ask("q", "a")),
        ({"instruction": "q", "input": "with", "output": "a"}, ask("q\n\nwith", "a")),
        ({"instruction": "q", "input": None, "output": "a", "text": "all", "prompt": "Below"}, ask("q", "a")),
        ({"instruction": "q", "output": "a"}, ask("q", "a")),
        ({"instruction": "q", "context": "with", "response": "a"}, ask("q\n\nwith", "a")),
        (turns((SYSTEM, ""), (USER, "q"), (ASSISTANT, "a")), ask("q", "a")),
        ({"query": "q", "answer": "a", "resource": "x", "lang": "python"}, ask("q", "a")),
        ({"prompt": "q", "completion": "a"}, ask("q", "a")),
        ({"system": "s", "prompt": "q", "response": "a"}, Example((Message(SYSTEM, "s"), Message(USER, "q")), "a")),
        ({"text": "q", "code": "a\r\nb\r", "test_list": ["t", "u"]}, ask("q\n\nThe code must pass:\nt\nu", "a\nb\n")),
        ({"text": "t", "source": 3}, Example((), "t")),
        ({"content": "t", "path": "x.py"}, Example((), "t")),
        ({"messages": spoken("role", "content", "system", "user", "assistant")}, CHAT),
        ({"conversations": spoken("from", "value", "system", "human", "gpt")}, CHAT),
    ],
)  # fmt: skip
def test_each_format_is_recognised_and_read(row, expected):
    assert read_row(row, None) == expected
    assert read_row(row, recognise(row)) == expected


def test_a_message_without_an_answer_is_left_out_and_noted():
    for more in ("more", "", None):
        said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": more}]
        example = read_row({"conversations": said}, None)
        assert example == ask("q", "a")._replace(note="its last message has no answer and is left out")


@pytest.mark.parametrize(
    ("row", "fate", "reason"),
    [
        ({"prompt": "q", "response": ""}, Fate.EMPTY, "response is empty"),
        ({"prompt": " \n", "response": "a"}, Fate.EMPTY, "prompt is empty"),
        ({"prompt": "q", "response": None}, Fate.EMPTY, "response is null"),
        ({"prompt": 1, "response": "a"}, Fate.MALFORMED, "prompt is not a string"),
        ({"prompt": "q", "response": ["a"]}, Fate.MALFORMED, "response is not a string"),
        ({"text": "\udfff"}, Fate.MALFORMED, "text holds half a surrogate pair"),
        ({"text": "a", "prompt": "b"}, Fate.MALFORMED, r"no known format has its columns \(prompt, text\)"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, Fate.MALFORMED, "--columns prompt=prompt,response=chosen$"),
        ({"chosen": "a", "rejected": "b"}, Fate.MALFORMED, "preference data .*--columns text=chosen$"),
        ({"prompt": "q", "chosen": [], "rejected": []}, Fate.MALFORMED, "--columns messages=chosen$"),
        ({"a": 1}, Fate.MALFORMED, r"no known format has its columns \(a\); say which to read with --columns"),
        ({}, Fate.MALFORMED, r"its columns \(none\)"),
        ({"text": "q", "code": "a", "test_list": 3}, Fate.MALFORMED, "test_list is neither a string nor a list"),
        ({"text": "q", "code": "a", "test_list": [3]}, Fate.MALFORMED, "a test of test_list is not a string"),
        ({"messages": []}, Fate.EMPTY, "messages is empty"),
        ({"messages": None}, Fate.EMPTY, "messages is null"),
        ({"messages": "hello"}, Fate.MALFORMED, "messages is not a list of messages"),
        ({"messages": ["hello"]}, Fate.MALFORMED, "a message is not an object"),
        (turns((USER, "q")), Fate.EMPTY, "no message of the assistant"),
        (turns((SYSTEM, "s")), Fate.EMPTY, "no message of the assistant"),
        (turns((ASSISTANT, "a")), Fate.MALFORMED, "a message of the assistant where the user's turn is"),
        (turns((USER, "q"), (USER, "q")), Fate.MALFORMED, "a message of the user where the assistant's turn is"),
        (turns((USER, "q"), (SYSTEM, "q")), Fate.MALFORMED, "a message of the system where the assistant's"),
        (turns((USER, "q"), ("narrator", "x")), Fate.MALFORMED, "role is 'narrator', none of user, human"),
        (turns((USER, "q"), (3, "x")), Fate.MALFORMED, "role is missing or not a string"),
        (turns((USER, "q"), (ASSISTANT, " ")), Fate.EMPTY, "a message's content is empty"),
        (
            turns((USER, [{"type": "text"}]), (ASSISTANT, "a")),
            Fate.MALFORMED,
            "a part of type 'text' of a message has no",
        ),
    ],
)
def test_a_row_that_says_nothing_has_a_fate_and_a_reason(row, fate, reason):
    with pytest.raises(RowError, match=reason) as error:
        read_row(row, None)
    assert error.value.fate == fate


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[]", "not a JSON object"),
        (b'{"a" 1}', "not JSON: Expecting ':' delimiter"),
        (b"\xff", "not UTF-8"), (b"[" * 100_000, "not JSON")],
)  # fmt: skip
def test_a_line_that_is_no_object_says_why(line, reason):
    with pytest.raises(RowError, match=reason):
        parse_json(line)


def test_columns_of_ones_own():
    assert read_row({"q": "x", "a": "y", "text": 3}, Columns(prompt="q", response="a")) == ask("x", "y")
    with pytest.raises(RowError, match="no a"):
        read_row({"q": "x"}, Columns(prompt="q", response="a"))
    assert Columns(prompt="q", response="a", tests="t").problem() is None
    assert "prompt do not form a format" in Columns(prompt="q").problem()
    assert "prompt, text" in Columns(prompt="q", text="t").problem()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PAIRED = {name for pair in OTHER_PAIRS for name in pair}
NAMES = sorted({*CONVERSATIONS, *ASKING, *ANSWERING, *PAIRED, *TEXTS, *SYSTEMS, HISTORY, TESTS, "context", "x"})


@settings(max_examples=400, deadline=None)
@given(row=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5))
def test_any_row_is_an_example_or_a_reason(row):
    try:
        example = read_row(row, None)
    except RowError as error:
        assert error.reason and "\n" not in error.reason and error.fate in (Fate.EMPTY, Fate.MALFORMED)
    else:
        assert example.response.strip() and all(message.content.strip() for message in example.context)
        assert "\r" not in example.text
        example.text.encode("utf-8")
