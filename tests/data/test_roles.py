"""Which columns of a row are read, which way wins where several match, and what is said of those that nothing reads."""

import json
import re

import pytest
from reference.texts import CHAT

from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
from dylo_moe.data.sources.examples import Example, Fate, Message, RowError, ask
from dylo_moe.data.sources.formats import read_row
from dylo_moe.data.sources.roles import Columns
from dylo_moe.training.run_info import dataset_facts

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
PAIR = {"instruction": "q", "output": "a"}
TALK = [{"role": USER, "content": "q"}, {"role": ASSISTANT, "content": "a"}]


def told(*context: tuple[str, str], response: str = "a") -> Example:
    return Example(tuple(Message(role, content) for role, content in context), response)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"prompt": "q", "answer": "a"}, "q", "a"),  # TRACE
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"question": "q", "response": "a"}, "q", "a"),
        ({"question": "q", "solution": "a"}, "q", "a"),
        ({"instruction": "q", "answer": "a"}, "q", "a"),
        ({"query": "q", "response": "a", "original_question": "x"}, "q", "a"),
        ({"problem": "q", "solution": "a", "level": 5}, "q", "a"),
        ({"input": "q", "target": "a"}, "q", "a"),
        ({"input": "q", "output": "a"}, "q", "a"),
        ({"inputs": "q", "targets": "a"}, "q", "a"),
        ({"source": "q", "target": "a"}, "q", "a"),
        ({"prompt": "q", "target": "a", "source": "web"}, "q", "a"),
        ({"text": "q", "label": "positive"}, "q", "positive"),
        ({"text": "q", "summary": "a", "title": "t"}, "q", "a"),
        ({"article": "q", "highlights": "a", "id": 1}, "q", "a"),
        ({"document": "q", "summary": "a"}, "q", "a"),
        ({"dialogue": "q", "summary": "a"}, "q", "a"),
        ({"prompt": "q", "code": "a", "source_file": "x"}, "q", "a"),
        ({"prompt": "q", "input": "with", "output": "a"}, "q\n\nwith", "a"),
        ({"question": "q", "context": "with", "answer": "a"}, "q\n\nwith", "a"),
        ({"question": "q", "answer": "a", "text": "t", "code": "c", "label": 3}, "q", "a"),
        ({"prompt": "q", "response": "a", "completion": None, "instruction": " "}, "q", "a"),
        ({"problem": "x", "solution": "y", "messages": TALK}, "q", "a"),
    ],
)
def test_a_question_and_its_answer_are_recognised_by_their_names(row, question, answer):
    assert read_row(row, None) == ask(question, answer)


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "dialog", "chat"])
def test_a_conversation_is_recognised_by_its_name(column):
    assert read_row({column: TALK, "source": "x"}, None) == ask("q", "a")


@pytest.mark.parametrize("column", ["text", "content", "code"])
def test_a_plain_text_is_recognised_by_its_name(column):
    assert read_row({column: "t", "title": "x"}, None) == Example((), "t")


TWO_QUESTIONS = {"instruction": "i", "question": "q", "answer": "a"}
TWO_ANSWERS = {"prompt": "q", "input": "x", "response": "a", "output": "b"}


@pytest.mark.parametrize(
    ("row", "way", "differs"),
    [
        ({"question": "q", "answer": "4", "solution": "a"}, "prompt=question,response={}", ["answer", "solution"]),
        (TWO_QUESTIONS, "prompt={},response=answer", ["instruction", "question"]),
        (TWO_ANSWERS, "prompt=prompt,input=input,response={}", ["output", "response"]),
        ({"messages": TALK, "chat": TALK, "system": "s"}, "system=system,messages={}", ["messages", "chat"]),
        ({"text": "t", "content": "u"}, "text={}", ["text", "content"]),
        ({"text": "t", "summary": "u", "label": "x"}, "prompt=text,response={}", ["summary", "label"]),
    ],
)
def test_a_row_that_can_be_read_in_two_ways_is_refused_with_the_flag_for_each(row, way, differs):
    ways = [way.format(name) for name in differs]
    flags = " or ".join(f"--columns {way}" for way in ways)
    with pytest.raises(RowError, match=re.escape(f"can be read in 2 ways; give the one that is meant: {flags}")):
        read_row(row, None)
    for way in ways:
        assert read_row(row, Columns(**dict(part.split("=") for part in way.split(","))))


IN_WORDS = "write what is asked and its answer in words, in the columns prompt and response"
NUMBER = "label is a number, which says nothing; "
PAIRED = "--columns prompt=text,response="


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "t", "label": 1}, f"{NUMBER}add a column with the names of the classes, and give {PAIRED}COLUMN"),
        ({"text": "t", "label": 1, "label_text": "good"}, f"{NUMBER}give {PAIRED}label_text, or --columns text=text"),
        ({"premise": "p", "hypothesis": "h", "label": 0}, f"(hypothesis, label, premise); {IN_WORDS}"),
        ({"goal": "g", "sol1": "a", "sol2": "b", "label": 0}, IN_WORDS),
        ({"question": "q", "choices": ["a", "b"], "answerKey": "A"}, IN_WORDS),
        ({"text": "t", "prompt": "p"}, "no known format has its columns (prompt, text)"),
        ({"code": "t", "answer": None}, "no known format has its columns (answer, code)"),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, "=system,prompt=question,response=chosen"),
        ({**PAIR, "history": ["x"]}, "history is not a list of [question, answer] pairs or of messages"),
        ({**PAIR, "history": [["x", 3]]}, "an answer of history is not a string"),
        ({**PAIR, "history": [["x"]]}, "history is not a list of [question, answer] pairs"),
        ({**PAIR, "system": 3}, "system is not a string"),
    ],
)  # fmt: skip
def test_a_row_of_another_kind_says_what_to_do(row, reason):
    with pytest.raises(RowError, match=re.escape(reason)) as error:
        read_row(row, None)
    assert error.value.fate is Fate.MALFORMED


@pytest.mark.parametrize("system", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("row", [PAIR, {"messages": TALK}, {"conversations": TALK}, {"text": "q", "summary": "a"}])
def test_a_column_of_system_messages_comes_before_the_question(row, system):
    assert read_row({**row, system: "s"}, None) == told((SYSTEM, "s"), (USER, "q"))
    assert read_row({**row, system: None}, None) == ask("q", "a")


@pytest.mark.parametrize(
    "history",
    [
        [["h", "i"], ["j", "k"]],
        [{"role": role, "content": text} for role, text in zip([USER, ASSISTANT] * 2, "hijk", strict=True)],
    ],
)
def test_a_history_comes_before_the_question_and_after_the_system_message(history):
    earlier = ((USER, "h"), (ASSISTANT, "i"), (USER, "j"), (ASSISTANT, "k"))
    row = {**PAIR, "history": history, "system": "s"}
    assert read_row(row, None) == told((SYSTEM, "s"), *earlier, (USER, "q"))
    assert read_row({"messages": TALK, "past": history}, Columns(messages="messages", history="past")) == told(
        *earlier, (USER, "q")
    )
    for nothing in ([], None, ""):
        assert read_row({**row, "history": nothing}, None) == told((SYSTEM, "s"), (USER, "q"))
    assert read_row({**PAIR, "history": "the history of Rome"}, None) == ask("q", "a")


def test_of_two_system_messages_the_conversation_s_is_read_and_a_different_one_is_noted():
    talk = [{"role": SYSTEM, "content": "own"}, *TALK]
    assert read_row({"messages": talk, "system": "own"}, None) == told((SYSTEM, "own"), (USER, "q"))
    note = "its system message in system is not read, for messages has another one"
    assert read_row({"messages": talk, "system": "s"}, None) == told((SYSTEM, "own"), (USER, "q"))._replace(note=note)


def load(path, rows, **config):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(DataConfig(datasets=[str(path)], **config), CHAT)


def test_answers_of_the_history_are_trained_as_earlier_answers_are(tmp_path):
    rows = [{**PAIR, "instruction": f"q{i}", "history": [["before", f"earlier{i}"]], "system": "s"} for i in range(8)]
    data = load(tmp_path / "mine.jsonl", rows)
    for row in data.train:
        trained = CHAT.decode([label for label in row["labels"] if label != -100])
        assert "earlier" in trained and "before" not in trained and "before" in CHAT.decode(row["input_ids"])


def test_columns_that_nothing_reads_are_counted_and_named(tmp_path):
    rows = [{"prompt": f"q{i}", "response": f"a{i}", "id": i, "tags": [], "note": "x" * (i < 3)} for i in range(8)]
    data = load(tmp_path / "mine.jsonl", [*rows, {"prompt": "q"}])
    assert data.unread == {"mine": {"id": 8, "note": 3}}
    assert "mine has columns that nothing reads: id (8 rows), note (3 rows)." in data.notes
    assert dataset_facts(data)[0]["unread"] == data.unread["mine"]
    wide = load(tmp_path / "wide.jsonl", [{**row, **dict.fromkeys("abcdefg", 1)} for row in rows])
    assert "wide has columns that nothing reads: id, a, b, c, d, e and 2 more (8 rows), note (3 rows)." in wide.notes


@pytest.mark.parametrize(
    ("columns", "unread"), [("prompt=q,response=a", {"system": 8}), ("system=system,prompt=q,response=a", {})]
)
def test_columns_that_were_not_chosen_are_named_too(tmp_path, columns, unread):
    rows = [{"q": f"q{i}", "a": "a", "system": "s"} for i in range(8)]
    assert load(tmp_path / "mine.jsonl", rows, columns=[columns]).unread == {"mine": unread}


def test_the_rows_of_one_file_may_have_different_columns(tmp_path):
    rows = [{"prompt": f"q{i}", "response": f"a{i}", "text": None} for i in range(4)]
    rows += [{"problem": f"r{i}", "solution": f"b{i}", "prompt": "", "response": None} for i in range(4)]
    data = load(tmp_path / "mine.jsonl", rows)
    assert data.counts[0].train + data.counts[0].evaluation == 8 and not data.reasons["mine"]
