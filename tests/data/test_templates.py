"""Laws of chat templates: a row is what the template writes for the whole conversation, token for token."""

from pathlib import Path

import pytest
from reference.chat_templates import CHANNELS, DROPPED, FAMILIES, HEADERS, PARTS, THINKING, tokenizer_for
from reference.texts import byte_tokenizer

from dylo_moe.data.encoding import encode, encode_prompt, text_format
from dylo_moe.data.sources.examples import Example, Message, RowError, ask

CALL = {"id": "probe0007", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "one"},
                    "b": {"type": "string", "description": "b"},
                },
                "required": ["a"],
            },
        },
    },
)


def user(content):
    return Message("user", content)


def assistant(content, **more):
    return Message("assistant", content, **more)


SYSTEM = Message("system", "Be the best.")
CONVERSATIONS = {
    "one answer": Example((user("the 2+2?"),), "It is\n\n4."),
    "an answer in capitals": Example((user("2+2?"),), "THE 4"),
    "with a system message": Example((SYSTEM, user("2+2?")), "It is 4."),
    "three answers": Example((user("q1"), assistant("a1"), user("q2"), assistant("a2"), user("q3")), "a3"),
    "three answers to a system": Example((SYSTEM, user("q1"), assistant("a1"), user("q2")), "a2"),
    "a thought": Example((user("2+2?"),), "It is 4.", thought="Two\n\nand two."),
    "two thoughts": Example((user("q1"), assistant("a1", thought="t1"), user("q2")), "a2", thought="t2"),
    "a thought in the answer": Example((user("q1"),), "<think>\nTwo and two.\n</think>\n\nIt is 4."),
    "tools": Example(
        (
            user("q1"),
            assistant("", tool_calls=(CALL,)),
            Message("tool", "7", name="add", tool_call_id="probe0007"),
        ),
        "seven",
        tools=TOOLS,
    ),
}


def published() -> dict[str, str]:
    """The templates that TRL brings along, as their models publish them; none without TRL."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja")) if "training" not in path.stem}


def as_given(form, example: Example) -> list[dict]:
    """The conversation as `apply_chat_template` takes it."""
    template = form.template
    messages = [template.as_wanted(message) for message in template.with_system(example.messages)]
    found = []
    for message in messages:
        content = [{"type": "text", "text": message.content}] if template.in_parts else message.content
        said = {"role": message.role, "content": content}
        if message.thought:
            said |= {"reasoning_content": message.thought, "thinking": message.thought}
        said |= {key: getattr(message, key) for key in ("name", "tool_call_id") if getattr(message, key)}
        found.append(said | ({"tool_calls": list(message.tool_calls)} if message.tool_calls else {}))
    return found


def applied(form, messages, example, *, prompt=False) -> list[int]:
    """What the tokenizer's own `apply_chat_template` gives, with the date of the rows."""
    tokenizer = form.tokenizer
    template = tokenizer.get_chat_template(None, list(example.tools) or None)
    for form_of_date, date in (("%Y-%m-%d", "2024-07-26"), ("%d %b %Y", "26 Jul 2024")):
        for quote in "'\"":
            template = template.replace(f"strftime_now({quote}{form_of_date}{quote})", repr(date))
    return tokenizer.apply_chat_template(
        messages,
        tools=list(example.tools) or None,
        chat_template=template,
        add_generation_prompt=prompt,
        return_dict=False,
    )


def spans_of(labels: list[int]) -> list[tuple[int, int]]:
    found, start = [], None
    for place in range(len(labels) + 1):
        is_trained = place < len(labels) and labels[place] != -100
        if is_trained and start is None:
            start = place
        if not is_trained and start is not None:
            found.append((start, place))
            start = None
    return found


def check(source, example: Example) -> None:
    """Every law of a row."""
    form = text_format(tokenizer_for(source))
    try:
        row = encode(form, example, max_seq_length=100_000)
    except RowError as error:  # only what a template does not write is refused, and by its name
        assert example.tools and "the chat template does not write" in str(error)
        return
    if "<think>, written as plain characters" in row.note:  # the template would have written two
        assert form.template.thoughts == ""
        return
    given = as_given(form, example)
    whole = applied(form, given, example)
    ends = (form.response_end_id,)
    assert row.input_ids == whole[: len(row.input_ids)] or tuple(row.input_ids) == (*whole, *ends)
    spans = spans_of(row.labels)
    assert spans[-1][1] == len(row.input_ids) and row.prompt_length == spans[0][0]
    assert row.input_ids[-1] in form.end_ids
    answers = [place for place, message in enumerate(given) if message["role"] == "assistant"]
    prompts = [applied(form, given[:place], example, prompt=True) for place in answers]
    for start, stop in spans:  # behind what a model is given, and to its end
        matching = [
            place
            for place, prompt in zip(answers, prompts, strict=True)
            if start <= len(prompt) and row.input_ids[:start] == form_prompt(form, given[:place], example)
        ]
        assert len(matching) == 1, (start, stop)
        alone = applied(form, given[: matching[0] + 1], example)
        assert row.input_ids[:stop] == alone[:stop] or (*alone, *ends) == tuple(row.input_ids[:stop])
    assert len(spans) == len(answers) or "earlier answers are not trained" in row.note


def form_prompt(form, messages, example) -> list[int]:
    """What a model is given by this library: the template's generation prompt, but for what no answer begins with."""
    prompt = applied(form, messages, example, prompt=True)
    text = form.tokenizer.decode(prompt)
    assert text.endswith(form.template.opening)
    text = text.removesuffix(form.template.opening)
    return form.tokenizer(text, add_special_tokens=False)["input_ids"]


DROPS_THOUGHTS = ("dropped", "deepseek_r1_distill", "deepseekv3")


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_the_template_writes_for_the_whole_conversation(family, kind):
    if family in DROPS_THOUGHTS and "thought" in kind:
        pytest.skip("its own law is below")
    check(FAMILIES[family], CONVERSATIONS[kind])


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_a_row_is_what_published_templates_write(kind):
    for family, source in published().items():
        if family in DROPS_THOUGHTS and "thought" in kind:
            continue
        try:
            check(source, CONVERSATIONS[kind])
        except AssertionError as error:
            raise AssertionError(family) from error


# What families do in their own ways


def row_of(source, example):
    form = text_format(tokenizer_for(source))
    row = encode(form, example, max_seq_length=100_000)
    answers = [form.tokenizer.decode(row.input_ids[start:stop]) for start, stop in spans_of(row.labels)]
    assert row.input_ids[: row.prompt_length] == encode_prompt(form, example.question) or len(example.context) > 1
    return answers, row.note


QUESTION = "2+2?"
THOUGHTS = pytest.mark.parametrize(
    "example",
    [
        Example((user(QUESTION),), "It is 4.", thought="Two and two."),
        ask(QUESTION, "<think>\nTwo and two.\n</think>\n\nIt is 4."),
    ],
    ids=["apart", "in the answer"],
)


@pytest.mark.parametrize(
    ("family", "without", "with_thought"),
    [
        ("chatml", "It is 4.<|im_end|>", None),
        (
            "thinking",
            "<think>\n\n</think>\n\nIt is 4.<|im_end|>",
            "<think>\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>",
        ),
        # the line breaks behind <think> are one token without a thought, so they are the model's to write
        ("prefilled", "\n\n</think>\n\nIt is 4.<|im_end|>", "\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>"),
        (
            "channels",
            "<|channel|>final<|message|>It is 4.<|return|>",
            "<|channel|>analysis<|message|>Two and two.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
        ),
        ("dropped", "It is 4.</s>", "<think>\nTwo and two.\n</think>\n\nIt is 4.</s>"),
        ("endless", "\n<think></think>\nIt is 4.</s>", None),
        ("commands", " It is 4.<|END_RESPONSE|><|END_OF_TURN|>", None),
        ("ended twice", "It is 4.<|end|>", None),
    ],
)
@THOUGHTS
def test_the_loss_covers_all_that_follows_the_prompt(family, without, with_thought, example):
    assert row_of(FAMILIES[family], ask(QUESTION, "It is 4."))[0] == [without]
    if with_thought is not None:
        assert row_of(FAMILIES[family], example) == ([with_thought], "")


def test_a_thought_that_a_template_has_no_place_for_is_left_out_and_noted():
    for source in (FAMILIES["chatml"], FAMILIES["endless"], None):
        tokenizer = tokenizer_for(source) if source else byte_tokenizer()
        row = encode(text_format(tokenizer), Example((user("q"),), "a", thought="SECRET"), max_seq_length=1000)
        assert "SECRET" not in tokenizer.decode(row.input_ids) and "its thoughts are left out" in row.note


def test_a_generation_prompt_that_no_conversation_holds_is_noted():
    _, note = row_of(DROPPED, ask(QUESTION, "4"))
    assert note == "the template writes it without the <think> of its generation prompt"
    assert not row_of(DROPPED, Example((user(QUESTION),), "4", thought="t"))[1]


def test_earlier_answers_are_trained_where_they_stand_as_they_were_given():
    called = (user("q1"), assistant("a1"), user("q2"), assistant("", tool_calls=(CALL,)), Message("tool", "7"))
    answers, note = row_of(THINKING, Example(called, "seven", tools=TOOLS))
    assert [answer.partition("</think>\n\n")[2][:5] for answer in answers] == ["<tool", "seven"]
    assert "earlier answers are not trained" in note  # the first one lost its empty thought
    past = (user("q1"), assistant("a1"), user("q2"))
    assert len(row_of(CHANNELS, Example(past, "a2"))[0]) == 1
    assert len(row_of(HEADERS, Example(past, "a2"))[0]) == 2
    assert row_of(FAMILIES["endless"], Example(past, "a2"))[0] == [  # its end is the next turn, which is not its own
        "\n<think></think>\na1",
        "\n<think></think>\na2</s>",
    ]


def test_answers_of_weight_0_stand_in_the_row_untrained():
    context = (user("q1"), assistant("WRONG", trained=False), user("q2"), assistant("right"), user("q3"))
    for source in (None, FAMILIES["chatml"], FAMILIES["headers"]):
        tokenizer = tokenizer_for(source) if source else byte_tokenizer()
        form = text_format(tokenizer)
        row, usual = (
            encode(form, Example(of, "a3"), max_seq_length=1000)
            for of in (context, [message._replace(trained=True) for message in context])
        )
        assert row.input_ids == usual.input_ids and row.note == usual.note == ""
        said = [tokenizer.decode(row.input_ids[start:stop]) for start, stop in spans_of(row.labels)]
        assert len(said) == 2 and "right" in said[0] and "a3" in said[1]
        assert spans_of(row.labels) == spans_of(usual.labels)[1:]


def test_tools_are_written_by_the_template_that_has_them_or_the_row_is_refused():
    example = CONVERSATIONS["tools"]
    named = tokenizer_for({"default": FAMILIES["chatml"], "tool_use": THINKING})
    row = encode(text_format(named), example, max_seq_length=1000)
    only = tokenizer_for(THINKING)
    assert named.decode(row.input_ids) == only.decode(encode(text_format(only), example, max_seq_length=1000).input_ids)
    usual = encode(text_format(named), ask("q", "a"), max_seq_length=1000)
    assert "<think>" not in named.decode(usual.input_ids)
    results = THINKING.replace(
        "<|im_start|>{{ m.role }}\n{{ m.content }}", "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
    )
    calls = THINKING.replace("m.tool_calls or []", "[]")
    for source, what in ((FAMILIES["chatml"], "tools"), (calls, "calls of tools"), (results, "results of tools")):
        with pytest.raises(RowError, match=f"the chat template does not write {what}"):
            encode(text_format(tokenizer_for(source)), example, max_seq_length=1000)
    for without in (example, example._replace(tools=()), ask("q", "a")._replace(tools=TOOLS)):
        with pytest.raises(RowError, match="it has tools, which only a chat template can write"):
            encode(text_format(byte_tokenizer()), without, max_seq_length=1000)


@pytest.mark.parametrize("arguments", [{"a": 1, "b": "x"}, '{"a":1,"b":"x"}'], ids=["object", "text"])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("c.function.arguments | tojson", '{"a": 1, "b": "x"}'),
        ("'=' + c.function.arguments", None),  # JSON as it is given, or as it is written of an object
    ],
)
def test_the_arguments_of_a_call_are_given_as_the_template_wants_them(arguments, written, expected):
    source = THINKING.replace("{{ c.function | tojson }}", "{{ c.function.name }}{{ " + written + " }}")
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    row = encode(
        text_format(tokenizer_for(source)),
        Example((user("q"),), "", tool_calls=(call,), tools=TOOLS),
        max_seq_length=1000,
    )
    text = tokenizer_for(source).decode(row.input_ids)
    given = "=" + (arguments if isinstance(arguments, str) else '{"a": 1, "b": "x"}')
    assert f"<tool_call>add{expected or given}</tool_call><|im_end|>" in text


def test_what_a_template_leaves_of_a_call_is_refused():
    source = THINKING.replace("{{ content }}{% for", "{% if not m.tool_calls %}{{ content }}{% endif %}{% for")
    example = Example((user("q"),), "Let me see.", tool_calls=(CALL,), tools=TOOLS)
    with pytest.raises(RowError, match="does not write what is said beside a call"):
        encode(text_format(tokenizer_for(source)), example, max_seq_length=1000)
    encode(text_format(tokenizer_for(THINKING)), example, max_seq_length=1000)


def test_a_generation_stops_at_each_token_that_ends_what_a_model_says():
    source = THINKING.replace(
        "</tool_call>{% endfor %}<|im_end|>",
        "</tool_call>{% endfor %}{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}",
    )
    tokenizer = tokenizer_for(source)
    form = text_format(tokenizer)
    assert {*tokenizer.convert_ids_to_tokens(list(form.end_ids))} == {"<|im_end|>", "<|call|>"}


@pytest.mark.parametrize("date", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%H:%M"])
def test_no_row_holds_today_s_date(date, monkeypatch):
    source = "{{ strftime_now('" + date + "') }}" + FAMILIES["chatml"]
    for template in (source, {"default": source, "tool_use": source}, {"default": "{{ strftime_now('%Y') }}" + source}):
        tokenizer = tokenizer_for(template)
        text = tokenizer.decode(encode_prompt(text_format(tokenizer), "q"))
        assert "2024" in text and str(2026) not in text


def test_contents_are_given_as_parts_where_the_template_wants_them():
    answers, _ = row_of(PARTS, ask(QUESTION, "It is 4."))
    assert answers == [" It is 4.<|im_end|>"]


def test_a_template_that_writes_no_answers_is_refused():
    with pytest.raises(ValueError, match="does not write a question and its answer"):
        text_format(byte_tokenizer("{{ messages[0]['content'] }}"))
