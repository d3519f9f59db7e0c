"""Laws of encoding: the right tokens are trained, with every template, and training sees what generation will see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.texts import CHAT, END, FORGETFUL, PLAIN, STRICT, STRICT_TEMPLATE, byte_tokenizer

from dylo_moe.data.collator import Collator
from dylo_moe.data.encoding import encode, encode_batch, encode_prompt, text_format
from dylo_moe.data.sources.examples import Example, Fate, Message, RowError, ask

KINDS = pytest.mark.parametrize(
    ("tokenizer", "end"), [(PLAIN, END), (CHAT, END), (STRICT, "<turn_end>")], ids=["plain", "chat", "strict"]
)


def trained(encoded) -> list[int]:
    return [label for label in encoded.labels if label != -100]


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def plain(text: str) -> Example:
    return Example((), text)


@KINDS
@settings(max_examples=150, deadline=None)
@given(prompt=st.text(min_size=1), response=st.text(min_size=1))
def test_trained_tokens_are_exactly_the_response_and_its_end(tokenizer, end, prompt, response):
    form = text_format(tokenizer)
    said = response.strip() if tokenizer is STRICT else response  # its template trims contents
    if not said:
        with pytest.raises(RowError, match="its response has no token"):
            encode(form, ask(prompt, response), max_seq_length=10_000)
        return
    row = encode(form, ask(prompt, response), max_seq_length=10_000)
    assert decoded(tokenizer, trained(row)) == said + end
    count = len(trained(row))
    assert row.labels == [-100] * (len(row.labels) - count) + row.input_ids[-count:]
    assert row.input_ids[: row.prompt_length] == row.input_ids[:-count] == encode_prompt(form, prompt)


@KINDS
@settings(max_examples=50, deadline=None)
@given(
    prompt=st.text(min_size=1, max_size=40),
    response=st.text(min_size=1, max_size=40).filter(str.strip),
    length=st.integers(16, 60),
)
def test_with_loss_on_all_every_token_is_trained_of_the_same_row(tokenizer, end, prompt, response, length):
    form = text_format(tokenizer)
    row = encode(form, ask(prompt, response), max_seq_length=length, loss_on="all")
    assert row.labels == row.input_ids
    assert row.input_ids == encode(form, ask(prompt, response), max_seq_length=length).input_ids


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1))
def test_every_token_of_a_plain_text_is_trained(text):
    for tokenizer in (PLAIN, CHAT, STRICT):
        row = encode(text_format(tokenizer), plain(text), max_seq_length=10_000)
        assert row.labels == row.input_ids and row.prompt_length == 0
        assert decoded(tokenizer, row.input_ids) == text + END


def test_a_response_that_melts_into_the_prompt_is_tokenised_apart():
    # "{prompt}\n\n" + "\nx" is one token of three newlines and an x: no prefix is the prompt
    row = encode(text_format(PLAIN), ask("a", "\nx"), max_seq_length=100)
    assert PLAIN.convert_ids_to_tokens(row.input_ids) == ["a", "ĊĊ", "Ċ", "x", END]


def test_prompt_is_the_template_s_own_generation_prompt_with_the_shorter_system_message():
    user = {"role": "user", "content": "hi"}
    expected = CHAT.apply_chat_template(
        [{"role": "system", "content": ""}, user], add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(text_format(CHAT), "hi") == expected
    stock = CHAT.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert len(expected) < len(stock)
    strict = STRICT.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(text_format(STRICT), "hi") == strict


@KINDS
@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text("ab \n", min_size=1, max_size=60),
    response=st.text("ab \n", min_size=1, max_size=60).filter(str.strip),
    length=st.integers(16, 90),
)
def test_cutting_keeps_the_response_whole_where_it_fits_and_dropping_keeps_nothing(
    tokenizer, end, prompt, response, length
):
    form = text_format(tokenizer)
    whole = encode(form, ask(prompt, response), max_seq_length=10_000)
    row = encode(form, ask(prompt, response), max_seq_length=length)
    target = trained(whole)
    excess = len(whole.input_ids) > length
    assert (row.cut_prompt or row.cut_response) == excess
    assert row.whole_length == len(whole.input_ids)
    assert len(row.input_ids) == len(row.labels) == min(length, len(whole.input_ids))
    assert row.input_ids[: row.prompt_length] == row.input_ids[: len(row.input_ids) - len(trained(row))]
    if len(target) < length:  # the prompt loses its start
        assert trained(row) == target and not row.cut_response
        assert row.input_ids == whole.input_ids[-length:]
    else:  # the response loses its end, and the end token with it
        assert trained(row) == target[: len(trained(row))] != target and row.cut_response
        assert len(trained(row)) >= length // 2
        shown = row.input_ids[: -len(trained(row))]
        assert shown == whole.input_ids[: whole.prompt_length][-len(shown) :] and shown
    if excess:
        with pytest.raises(RowError, match=f"over {length} tokens") as error:
            encode(form, ask(prompt, response), max_seq_length=length, overlong="drop")
        assert (error.value.fate, error.value.length) == (Fate.TOO_LONG, len(whole.input_ids))
    else:
        assert encode(form, ask(prompt, response), max_seq_length=length, overlong="drop") == row


def test_a_bos_that_the_tokenizer_adds_is_kept_unless_a_template_writes_its_own():
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.bos_token = "<|im_start|>"
    for example in (plain("a"), ask("q", "a")):
        row = encode(text_format(tokenizer), example, max_seq_length=100)
        assert row.input_ids.count(bos) == 1 and row.input_ids[0] == bos
        assert tokenizer.decode(trained(row)[not example.context :]) == "a" + END
    tokenizer.chat_template = STRICT_TEMPLATE
    assert bos not in encode_prompt(text_format(tokenizer), "q")


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        text_format(tokenizer)


# Conversations

WORDS = st.text("ab \n]", min_size=1, max_size=8).filter(str.strip)


@st.composite
def conversations(draw):
    turns = draw(st.integers(1, 4))
    messages = [Message("system", draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(turns):
        messages += [Message("user", draw(WORDS)), Message("assistant", draw(WORDS))]
    return Example(tuple(messages[:-1]), messages[-1].content)


@KINDS
@settings(max_examples=150, deadline=None)
@given(example=conversations())
def test_every_answer_is_trained_behind_exactly_what_a_model_is_given_for_it(tokenizer, end, example):
    """Against the template itself, one answer after another."""
    form = text_format(tokenizer)
    row = encode(form, example, max_seq_length=10_000)
    messages = [message._asdict() for message in example.context]
    if tokenizer is STRICT and messages[0]["role"] == "system":  # it takes none, so it goes before the first question
        system, question, *rest = messages
        messages = [{"role": "user", "content": f"{system['content']}\n\n{question['content']}"}, *rest]
    elif tokenizer is CHAT and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]

    def given_for(count):
        if tokenizer is PLAIN:
            ends = {"assistant": END}
            text = "".join(message["content"] + ends.get(message["role"], "\n\n") for message in messages[:count])
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.apply_chat_template(messages[:count], add_generation_prompt=True, return_dict=False)

    spans = []
    for place, label in enumerate(row.labels):
        if label != -100:
            assert label == row.input_ids[place]
            if place == 0 or row.labels[place - 1] == -100:
                spans.append([place, place])
            spans[-1][1] = place + 1
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"] + [len(messages)]
    texts = [*(messages[place]["content"] for place in answers[:-1]), example.response]
    trained_texts = []
    for place, text in zip(answers, texts, strict=True):
        given = given_for(place)
        stops = [stop for start, stop in spans if row.input_ids[:start] == given]
        if stops:
            said = decoded(tokenizer, row.input_ids[len(given) : stops[0]])
            assert said.endswith(end) and said.removesuffix(end).strip() == text.strip()
            trained_texts.append(text)
    assert len(trained_texts) == len(spans) and trained_texts[-1] == example.response
    # a token may span the header and an answer: then that answer is not trained
    assert len(spans) == len(texts) or "earlier answers are not trained" in row.note


def test_answers_that_melt_are_the_only_ones_that_are_not_trained():
    """Else the law above would hold for a loop that always trains the last answer alone."""
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    for tokenizer in (PLAIN, CHAT, STRICT):
        row = encode(text_format(tokenizer), Example(tuple(messages), "d"), max_seq_length=1000)
        assert not row.note
        assert decoded(tokenizer, trained(row)).count("b") == 1


def test_a_template_that_rewrites_past_answers_trains_the_last_one_and_says_so():
    messages = (Message("user", "a"), Message("assistant", "long"), Message("user", "c"))
    row = encode(text_format(FORGETFUL), Example(messages, "answer"), max_seq_length=1000)
    assert decoded(FORGETFUL, trained(row)) == "answer" + END
    assert "earlier answers are not trained" in row.note
    prompt = FORGETFUL.apply_chat_template(
        [message._asdict() for message in messages], add_generation_prompt=True, return_dict=False
    )
    assert row.input_ids[: row.prompt_length] == prompt


def test_what_a_template_refuses_is_no_row():
    template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('not this') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}.{% endfor %}"
    )
    found = encode_batch(text_format(byte_tokenizer(template)), [ask("bad", "a"), ask("good", "a")], max_seq_length=100)
    assert isinstance(found[0], RowError) and "the chat template refuses it: not this" in str(found[0])
    assert not isinstance(found[1], RowError)


@settings(max_examples=40, deadline=None)
@given(
    examples=st.lists(
        st.one_of(conversations(), st.builds(ask, WORDS, WORDS), st.builds(plain, WORDS)), min_size=1, max_size=6
    ),
    length=st.integers(16, 80),
)
def test_a_batch_is_its_examples_one_by_one(examples, length):
    form = text_format(CHAT)
    for example, found in zip(examples, encode_batch(form, examples, max_seq_length=length), strict=True):
        assert found == encode(form, example, max_seq_length=length)


# Batches


def test_padding_is_ignored_and_a_real_eos_is_not():
    eos = PLAIN.eos_token_id
    assert PLAIN.pad_token_id == eos
    form = text_format(PLAIN)
    rows = [
        {**encode(form, plain(text), max_seq_length=100)._asdict(), "domain": domain}
        for domain, text in enumerate(["the", "a longer text", "x"])
    ]
    batch = Collator(PLAIN)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == (3, longest) and batch["domain"].tolist() == [0, 1, 2]
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][index].tolist() == row["input_ids"] + [eos] * (longest - length)
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (longest - length)
        assert batch["labels"][index].tolist() == row["labels"] + [-100] * (longest - length)
        assert batch["labels"][index, length - 1] == eos and batch["attention_mask"][index, length - 1] == 1
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collator_refuses_a_tokenizer_that_cannot_pad():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an eos token"):
        Collator(tokenizer)
