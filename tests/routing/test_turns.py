"""Laws of finding answers in the tokens of a conversation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.turns import TURNS, naive_openers

from dylo_moe import RouterConfig
from dylo_moe.routing.turn_tokens import TurnTokens
from dylo_moe.routing.turns import find_answers

KINDS = {
    "headers and two ends": TURNS,
    "one token opens and one closes": TurnTokens(opening=(1,), adapted_from=0, endings=((2,),)),
    "an end within an opening": TurnTokens(opening=(2, 1, 1), adapted_from=2, endings=((2, 1), (3,))),
    "an end longer than an opening": TurnTokens(opening=(1, 2), adapted_from=1, endings=((3, 3, 1, 3),)),
}


@st.composite
def rows(draw):
    """Rows of few kinds of tokens, padded anywhere, with the sizes of the calls in which they are read."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    alphabet = sorted({*KINDS[kind].opening, *itertools.chain(*KINDS[kind].endings), 7})
    seq, batch = draw(st.integers(1, 24)), draw(st.integers(1, 3))
    some = st.lists(st.lists(st.sampled_from(alphabet), min_size=seq, max_size=seq), min_size=batch, max_size=batch)
    real = st.lists(st.lists(st.booleans(), min_size=seq, max_size=seq), min_size=batch, max_size=batch)
    cuts = sorted(draw(st.sets(st.integers(1, seq), max_size=4)) | {seq})
    return KINDS[kind], torch.tensor(draw(some)), torch.tensor(draw(real)), cuts


@settings(max_examples=150, deadline=None)
@given(rows())
def test_answers_are_those_of_a_naive_loop_however_the_tokens_come(case):
    turns, ids, mask, cuts = case
    recent = is_open = None
    for start, stop in itertools.pairwise([0, *cuts]):
        part = find_answers(ids[:, start:stop], mask=mask[:, start:stop], turns=turns, recent=recent, is_open=is_open)
        recent, is_open = part.recent[:, -1], part.is_open[:, -1:]
        for row in range(len(ids)):
            columns = mask[row].nonzero()[:, 0].tolist()
            openers = dict(zip(columns, naive_openers(ids[row, columns].tolist(), turns), strict=True))
            for column in range(start, stop):
                opener = openers.get(column)
                at = column - start
                assert part.tokens[row, at] == (opener is not None)
                assert part.openings[row, at] == (opener is not None and columns[opener] == column)
                if opener is not None:
                    assert part.opened_at[row, at] == max(columns[opener] - start, -1)


@settings(max_examples=60, deadline=None)
@given(rows(), st.data())
def test_an_answer_does_not_go_on_into_the_next_packed_text(case, data):
    turns, ids, _, cuts = case
    mask = torch.ones_like(ids, dtype=torch.bool)
    starts = torch.zeros_like(mask)
    starts[:, [cut for cut in cuts if cut < ids.shape[1]]] = True
    found = find_answers(ids, mask=mask, turns=turns, starts=starts)
    for row in range(len(ids)):
        for start, stop in itertools.pairwise([0, *cuts]):
            alone = [opener is not None for opener in naive_openers(ids[row, start:stop].tolist(), turns)]
            assert found.tokens[row, start:stop].tolist() == alone


@pytest.mark.parametrize(
    "given, message",
    [
        ({"opening": [], "adapted_from": 0, "endings": [[3]]}, r"opening holds \[\]"),
        ({"opening": [1, -2], "adapted_from": 0, "endings": [[3]]}, r"opening holds \[1, -2\]; it must be a list of"),
        ({"opening": [1, 2.0], "adapted_from": 0, "endings": [[3]]}, r"opening holds \[1, 2.0\]"),
        ({"opening": [1, 2], "adapted_from": 2, "endings": [[3]]}, "adapted_from is 2; .* from 0 to 1"),
        ({"opening": [1, 2], "adapted_from": True, "endings": [[3]]}, "adapted_from is True"),
        ({"opening": [1, 2], "adapted_from": 0, "endings": []}, r"endings is \[\]; it must hold the ids of at least"),
        ({"opening": [1, 2], "adapted_from": 0, "endings": [3]}, "endings holds 3"),
        ({"opening": [1, 2], "adapted_from": 0}, "turns is {.*endings"),
        ([1, 2], r"turns is \[1, 2\]; it must be TurnTokens, a dict of its fields, or None"),
    ],
    ids=str,
)
def test_turn_tokens_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(granularity="response", turns=given)


def test_turn_tokens_with_another_granularity_are_refused():
    for granularity in ("token", "sequence"):
        with pytest.raises(ValueError, match=f"turns is given, which has no meaning with granularity '{granularity}'"):
            RouterConfig(granularity=granularity, turns=TURNS)
