"""The filter through which a gate that follows the skill library reads a text: against the recursion, token by token,
and against what a mean cannot do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.tiny import tiny_moe, tokens

from dylo_moe.routing.belief import CHUNK, MOST_EVIDENCE, MOST_MULTIPLIED, evidence_of, filtered
from dylo_moe.routing.config import GrowingRouterConfig, RouterConfig
from dylo_moe.routing.features import causal_exponential_mean, joined, read_tokens
from dylo_moe.routing.router import Router

RATE = 0.02


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(evidence, mask, starts, rate):
    """The recursion as it is written down, for one text of float64."""
    members = evidence.shape[-1]
    p, found = [1 / members] * members, []
    for token in range(len(evidence)):
        if mask[token]:
            prior = [1 / members] * members if starts[token] else [(1 - rate) * one + rate / members for one in p]
            p = [one * math.exp(nats) for one, nats in zip(prior, evidence[token].tolist(), strict=True)]
            p = [one / sum(p) for one in p]
        found.append(p)
    return torch.tensor(found, dtype=torch.float64).log()


@given(
    seed=st.integers(0, 1000),
    length=st.sampled_from([1, 2, 3, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]),
    members=st.sampled_from([1, 2, 3, 5, 9, MOST_MULTIPLIED, MOST_MULTIPLIED + 1]),
    rate=st.sampled_from([1e-6, 0.01, 0.5]),
    scale=st.sampled_from([1.0, 200.0]),
)
def test_chunks_give_what_the_recursion_gives(seed, length, members, rate, scale):
    evidence = evidence_of(scale * draw(seed, 2, length, members))
    mask, starts = draw(seed + 1, 2, length) > -1, draw(seed + 2, 2, length) > 1.5
    found = filtered(evidence, mask=mask, change_rate=rate, starts=starts)
    assert found.dtype == torch.float32
    for row in range(2):
        expected = one_by_one(evidence[row].double(), mask[row], starts[row], rate)
        torch.testing.assert_close(found[row].double(), expected, atol=2e-4, rtol=1e-4)


@given(seed=st.integers(0, 1000), cut=st.integers(1, 149))
def test_a_text_read_in_two_calls_is_believed_as_in_one(seed, cut):
    evidence, mask = evidence_of(60 * draw(seed, 2, 150, 4)), draw(seed + 1, 2, 150) > -1.5
    whole = filtered(evidence, mask=mask, change_rate=RATE)
    head = filtered(evidence[:, :cut], mask=mask[:, :cut], change_rate=RATE)
    tail = filtered(evidence[:, cut:], mask=mask[:, cut:], change_rate=RATE, belief=head[:, -1])
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, atol=1e-4, rtol=1e-4)


def test_one_token_says_no_more_than_the_most():
    logits = torch.tensor([[0.0, 1e6, -1e6], [3.0, 3.0, 3.0]])
    assert torch.equal(evidence_of(logits), torch.tensor([[-MOST_EVIDENCE, 0.0, -MOST_EVIDENCE], [0.0, 0.0, 0.0]]))


def test_a_filter_follows_a_change_that_a_mean_of_as_long_a_memory_misses():
    """Two skills: 600 tokens of one, then 60 of the other. Inside a text the filter is as sure as the long mean."""
    means, noise = torch.stack([draw(1, 16), draw(2, 16)]), draw(3, 1, 660, 16)
    skill = (torch.arange(660) >= 600).long()
    x, mask = 3.0 * noise + means[skill], torch.ones(1, 660, dtype=torch.bool)
    rows, bias = means, -0.5 * means.square().sum(-1)
    belief = filtered(evidence_of(20 * (x @ rows.T + bias)), mask=mask, change_rate=0.01)[0]
    decay = 2 ** (-torch.arange(660.0) / 64)
    mean = torch.stack([(decay[: t + 1].flip(0)[:, None] * x[0, : t + 1]).sum(0) for t in range(660)])
    long_mean = mean / decay.cumsum(0)[:, None] @ rows.T + bias
    right = {name: found.argmax(-1) == skill for name, found in (("filter", belief), ("mean", long_mean))}
    assert right["filter"][32:600].float().mean() > 0.98 and right["mean"][32:600].float().mean() > 0.98
    assert right["filter"][632:].float().mean() > 0.9
    assert right["mean"][632:].float().mean() < 0.5


def test_tokens_can_be_had_back_from_their_sums():
    """So that a gate of later can read again what an earlier one read; several texts may be packed in a row."""
    hidden, mask = 5 * draw(0, 1, 200, 24), torch.ones(1, 200, dtype=torch.bool)
    starts = torch.zeros_like(mask)
    starts[0, 90] = True
    _, states = causal_exponential_mean(hidden, mask=mask, half_life=8.0, starts=starts)
    text = states.each(lambda part: part[0])
    torch.testing.assert_close(text.tokens(8.0), read_tokens(hidden, mask=mask)[0], atol=1e-4, rtol=1e-4)


def test_a_router_without_a_rate_has_no_belief():
    router = Router(RouterConfig(), hidden_size=24, names=("a", "b"))
    assert router.believe(draw(0, 1, 5, 24), mask=torch.ones(1, 5, dtype=torch.bool)) is None


def test_another_gate_reads_a_text_again():
    router = Router(RouterConfig(change_rate=RATE, router_half_life=8.0), hidden_size=24, names=("a", "b", "c"))
    x, mask = draw(0, 1, 90, 24), torch.ones(1, 90, dtype=torch.bool)
    _, states = causal_exponential_mean(x, mask=mask, half_life=8.0)
    states = states._replace(belief=router.believe(read_tokens(x, mask=mask), mask=mask))
    text = states.each(lambda part: part[0])
    torch.testing.assert_close(router.reread(text).belief, text.belief, atol=1e-4, rtol=1e-4)
    router.set_row("b", 9 * draw(1, 24), torch.tensor(0.5))
    again = router.reread(text).belief
    assert not torch.allclose(again, text.belief, atol=0.1)
    torch.testing.assert_close(again, router.believe(read_tokens(x, mask=mask), mask=mask)[0], atol=1e-4, rtol=1e-4)
    assert joined([text, text]).belief.shape == (180, 3)


# In a model.


def grown(**router):
    """A model of four mature experts and the base, whose gate has a filter."""
    model = tiny_moe(num_experts=4, **router)
    model.router.add_base()
    for index, name in enumerate(model.router.names):
        model.router.set_row(name, 40 * draw(index, model.router.hidden_size), torch.tensor(0.1 * index))
    model.router.config = model.router_config = GrowingRouterConfig(top_k=2, router_half_life=4.0, change_rate=0.05)
    model.router.place_temperatures = torch.tensor([8.0, 6.0, 4.0, 3.0, 2.0, 1.5, 1.2, 1.0])
    return model.eval()


def test_decoding_token_by_token_believes_what_one_forward_believes():
    model, ids = grown(), tokens(2, 150)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False)
        out = model(input_ids=ids[:, :40], use_cache=True)
        logits, weights = [out.logits], [out.routing.weights]
        for token in range(40, 150):
            out = model(input_ids=ids[:, token : token + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
            weights.append(out.routing.weights)
    assert len(whole.routing.weights.flatten(0, 1).argmax(-1).unique()) > 2
    torch.testing.assert_close(torch.cat(weights, 1), whole.routing.weights, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=1e-3, rtol=1e-3)


def test_a_cropped_cache_believes_what_it_believed_then():
    model, ids = grown(), tokens(1, 60)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :40], use_cache=True).past_key_values
        model(input_ids=tokens(1, 9), past_key_values=cache, use_cache=True)
        cache.crop(-9)
        out = model(input_ids=ids[:, 40:], past_key_values=cache, use_cache=True)
        whole = model(input_ids=ids, use_cache=False)
    torch.testing.assert_close(out.routing.weights, whole.routing.weights[:, 40:], atol=1e-4, rtol=1e-4)


def test_padding_and_packing_leave_a_text_believed_as_alone():
    model, first, second = grown(), tokens(1, 50), tokens(1, 70)
    alone = [model.route(ids).weights for ids in (first, second)]
    positions = torch.cat([torch.arange(50), torch.arange(70)])[None]
    packed = model.route(torch.cat([first, second], 1), position_ids=positions).weights
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)
    mask = torch.cat([torch.zeros(1, 20), torch.ones(1, 50)], 1).long()
    padded = model.route(torch.cat([tokens(1, 20), first], 1), mask).weights
    torch.testing.assert_close(padded[:, 20:], alone[0], atol=1e-4, rtol=1e-4)


def test_a_model_with_a_filter_compiles_in_one_graph():
    model, ids = grown(), tokens(2, 70)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found, expected = fast(input_ids=ids, use_cache=False), model(input_ids=ids, use_cache=False)
    torch._dynamo.reset()
    torch.testing.assert_close(found.routing.weights, expected.routing.weights, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


# The options.


def test_a_filter_is_the_default_of_a_pool_that_grows_by_token():
    assert (GrowingRouterConfig().change_rate, GrowingRouterConfig().router_half_life) == (0.01, 8.0)
    by_sequence = GrowingRouterConfig(granularity="sequence")
    assert (by_sequence.change_rate, by_sequence.router_half_life) == (0.0, 32.0)
    mean_alone = GrowingRouterConfig(change_rate=0.0)
    assert (mean_alone.change_rate, mean_alone.router_half_life) == (0.0, 32.0)
    assert GrowingRouterConfig(router_half_life=5.0).router_half_life == 5.0
    assert RouterConfig().change_rate == 0.0


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2, math.nan, math.inf, "0.1", True])
def test_a_rate_is_a_probability_below_one(rate):
    with pytest.raises(ValueError, match=r"change_rate is .*; it must be a number of at least 0 and below 1"):
        GrowingRouterConfig(change_rate=rate)


def test_a_rate_has_no_meaning_by_sequence_or_where_a_gate_is_trained():
    with pytest.raises(ValueError, match=r"change_rate is 0.1, which has no meaning with granularity 'sequence'"):
        GrowingRouterConfig(change_rate=0.1, granularity="sequence")
    with pytest.raises(ValueError, match=r"change_rate is 0.1, but the gate of a pool that does not grow is trained"):
        tiny_moe(change_rate=0.1)
