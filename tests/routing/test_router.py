"""Laws of the router: what the gate reads, and what becomes of its logits."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.router import naive_causal_mean
from reference.tiny import FAMILIES, padded, tiny_base, tiny_moe, tokens
from torch import nn

from dylo_moe import RouterConfig
from dylo_moe.routing.features import CHUNK, RouterState, causal_exponential_mean
from dylo_moe.routing.initial_gate import START_MARGIN
from dylo_moe.routing.router import Router, select_top_k

seeds = st.integers(0, 2**31 - 1)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(features):
    """States of which these are the means, for gates that are as sure of one token as of many."""
    return RouterState(features, torch.ones(*features.shape[:-1], 1))


def router_with(num_experts, *, width=24, **config):
    router = Router(RouterConfig(**config), hidden_size=width, names=[f"e{index}" for index in range(num_experts)])
    for row in itertools.chain(router.gate.values(), router.gate_bias.values()):
        nn.init.normal_(row)
    nn.init.normal_(router.feature_mean)
    return router


# --- the causal exponential mean


@settings(max_examples=40, deadline=None)
@given(seed=seeds, batch=st.integers(1, 3), seq=st.integers(1, 12), half_life=st.sampled_from([0.3, 1.0, 7.0, 1e6]))
def test_features_equal_the_loop_over_tokens(seed, batch, seq, half_life):
    hidden, mask = draw(seed, batch, seq, 6) * 3 + 1, draw(seed + 1, batch, seq) > -0.7
    features, _ = causal_exponential_mean(hidden, mask=mask, half_life=half_life)
    expected = naive_causal_mean(hidden, mask=mask, half_life=half_life)
    torch.testing.assert_close(features[mask].double(), expected[mask], rtol=1e-4, atol=1e-5)
    before_text = mask.cumsum(1) == 0
    assert not features[before_text].any()


@pytest.mark.parametrize("seq", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_of_long_texts_equal_the_loop(seq, dtype):
    hidden = (draw(0, 2, seq, 4) + 0.5).to(dtype)
    mask = draw(1, 2, seq) > -1.5
    features, state = causal_exponential_mean(hidden, mask=mask, half_life=32.0)
    assert features.dtype == state.total.dtype == state.mass.dtype == torch.float32
    expected = naive_causal_mean(hidden, mask=mask, half_life=32.0)
    torch.testing.assert_close(features[mask].double(), expected[mask], rtol=1e-4, atol=2e-5)


def test_after_a_half_life_a_text_counts_half():
    """From a first subject held long to a second one: h tokens later the features are halfway."""
    half_life = 5
    hidden = torch.cat([draw(1, 1, 1, 8).expand(1, 400, 8), draw(2, 1, 1, 8).expand(1, 400, 8)], 1)
    features, _ = causal_exponential_mean(hidden, mask=torch.ones(1, 800, dtype=torch.bool), half_life=float(half_life))
    first, second = features[0, 399], features[0, 799]
    for halvings in (1, 2, 3):
        share = 0.5**halvings
        torch.testing.assert_close(features[0, 399 + halvings * half_life], share * first + (1 - share) * second)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, seq=st.integers(2, 300), cuts=st.lists(st.floats(0, 1), max_size=5), tail=st.booleans())
def test_a_state_carried_over_any_split_changes_nothing(seed, seq, cuts, tail):
    hidden, mask = draw(seed, 2, seq, 5), draw(seed + 1, 2, seq) > -1.0
    whole, end = causal_exponential_mean(hidden, mask=mask, half_life=9.0)
    borders = sorted(
        {0, seq, *(int(cut * seq) for cut in cuts)} | (set(range(seq - 4, seq)) if tail and seq > 4 else set())
    )
    state, parts = None, []
    for start, stop in itertools.pairwise(borders):
        part, states = causal_exponential_mean(
            hidden[:, start:stop], mask=mask[:, start:stop], half_life=9.0, state=state
        )
        state = states.last
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.total, end.last.total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.mass, end.last.mass, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, seq=st.integers(2, 150), data=st.data())
def test_a_later_token_never_changes_an_earlier_feature(seed, seq, data):
    position = data.draw(st.integers(1, seq - 1))
    hidden, mask = draw(seed, 1, seq, 5), torch.ones(1, seq, dtype=torch.bool)
    other = hidden.clone()
    other[:, position:] = draw(seed + 1, 1, seq - position, 5) * 100
    before, _ = causal_exponential_mean(hidden, mask=mask, half_life=3.0)
    after, _ = causal_exponential_mean(other, mask=mask, half_life=3.0)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position:], after[:, position:])


@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_what_stands_on_padding_is_never_read(value):
    """Reported: padding was multiplied by zero, which lets inf and nan through."""
    hidden, mask = draw(0, 2, 9, 5), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    clean, end = causal_exponential_mean(hidden, mask=mask, half_life=3.0)
    hidden[~mask] = value
    dirty, dirty_end = causal_exponential_mean(hidden, mask=mask, half_life=3.0)
    assert torch.equal(clean[mask], dirty[mask])
    assert torch.equal(end.total[mask], dirty_end.total[mask]) and torch.equal(end.mass, dirty_end.mass)


@pytest.mark.parametrize("router_layer", ["embeddings", 1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_for_real_tokens(family, side, router_layer):
    model = tiny_moe(family, top_k=2, router_layer=router_layer)
    rows = [tokens(n, seed=n) for n in (13, 4, 9)]
    ids, mask = padded(rows, side=side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    assert not out.routing.weights[mask == 0].any()
    for index, row in enumerate(rows):
        alone, real = model(input_ids=row[None]), mask[index].bool()
        torch.testing.assert_close(out.routing.weights[index, real], alone.routing.weights[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.logits[index, real], alone.logits[0], rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_what_the_experts_learned():
    model, ids = tiny_moe("llama", router_layer=1), tokens(2, 9)
    before = model.router_features(ids)
    with torch.no_grad():
        for expert in model.experts:
            for parameter in model.experts.parameters(expert.name):
                parameter.add_(1.0)
    assert torch.equal(model.router_features(ids), before)
    with model.route_to(None), torch.no_grad():
        hidden = tiny_base("llama")(ids, output_hidden_states=True).hidden_states[1]
        expected, _ = causal_exponential_mean(hidden, mask=torch.ones_like(ids).bool(), half_life=1.5)
        assert torch.equal(model.router_features(ids), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_starting_the_router_reads_real_tokens_only(side):
    padded_model, model = tiny_moe("llama"), tiny_moe("llama")
    rows = [tokens(n, seed=n) for n in (13, 4, 9, 1)]
    ids, mask = padded(rows, side=side)
    padded_model.initialize_router([{"input_ids": ids, "attention_mask": mask}])
    model.initialize_router({"input_ids": row[None]} for row in rows)
    for name, tensor in model.router.state_dict().items():
        torch.testing.assert_close(padded_model.router.state_dict()[name], tensor, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(ValueError, match="2 texts for 3 experts"):
        model.initialize_router({"input_ids": row[None]} for row in rows[:2])


def test_a_started_gate_scales_features_and_leads_by_the_margin():
    router = router_with(3, width=16)
    texts = [centre + 0.1 * draw(index, 1, 16) for index in range(30) for centre in [4 * draw(index % 3, 1, 16)]]
    points = torch.cat(texts)
    router.initialize(texts, seed=0)
    scaled = (points - router.feature_mean) * router.feature_scale
    torch.testing.assert_close(scaled.mean(0), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.var(0), torch.full((16,), 1 / 16))
    first, second = router.logits(points).topk(2).values.unbind(-1)
    torch.testing.assert_close((first - second).mean(), torch.tensor(START_MARGIN))
    chosen = router.logits(points).argmax(-1).view(10, 3)
    assert (chosen == chosen[0]).all() and len(set(chosen[0].tolist())) == 3


# --- the gate and the routing


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 9),
    dense=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_weights_are_a_distribution_over_the_selected(seed, num_experts, top_k, dense, scale):
    torch.manual_seed(seed)
    top_k = min(top_k, num_experts)
    router = router_with(num_experts, top_k=top_k, temperature=2.0)
    mask = draw(seed + 1, 3, 5) > -0.7
    routing, selected = router(read(draw(seed, 3, 5, 24) * scale), mask=mask, dense=dense)
    weights = routing.weights.detach()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), mask.float())
    assert not weights[~mask].any()
    if selected is None:
        assert dense or top_k == num_experts
        return
    assert (selected.sort(-1).values.diff(dim=-1) > 0).all()
    chosen = torch.zeros_like(weights).scatter(-1, selected, 1.0).bool()
    assert not weights[~chosen].any()
    kept = routing.logits.detach().masked_fill(~chosen, float("-inf"))
    assert (kept.amax(-1) == routing.logits.amax(-1)).all()
    torch.testing.assert_close(weights, kept.softmax(-1) * mask[..., None])
    if top_k == 1:
        assert (weights[chosen & mask[..., None]] == 1.0).all()


@pytest.mark.parametrize("width", [5, 24, 576])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (4, 33)], ids=str)
@pytest.mark.parametrize("start", [1, 3, 7, 62])
def test_adding_rows_leaves_the_old_logits_bit_equal(start, shape, width):
    """62 passes the width that the gate's product is padded to."""
    router, features = router_with(start, width=width), draw(0, *shape, width)
    before = router.logits(features).detach()
    for index in range(4):
        router.add_row(f"new{index}")
        assert torch.equal(router.logits(features)[..., :start], before), f"{start + index + 1} experts"
    for index in range(4):
        router.remove_row(f"new{index}")
    assert torch.equal(router.logits(features), before)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, order=st.permutations(range(5)), top_k=st.integers(1, 5), dense=st.booleans())
def test_relabelling_experts_permutes_the_weights(seed, order, top_k, dense):
    torch.manual_seed(seed)
    router = router_with(5, top_k=top_k, temperature=0.7)
    other = Router(router.config, hidden_size=24, names=[f"e{index}" for index in order])
    other.load_state_dict(router.state_dict())
    features, mask = draw(seed, 2, 6, 24), torch.ones(2, 6, dtype=torch.bool)
    ours, _ = router(read(features), mask=mask, dense=dense)
    theirs, _ = other(read(features), mask=mask, dense=dense)
    torch.testing.assert_close(theirs.weights, ours.weights[..., list(order)])
    torch.testing.assert_close(theirs.logits, ours.logits[..., list(order)])


def test_a_new_gate_row_is_random_and_a_fresh_gate_sends_tokens_to_more_than_one_expert():
    router = Router(RouterConfig(), hidden_size=32, names=["a", "b", "c", "d"])
    routing, _ = router(read(draw(0, 4, 50, 32)), mask=torch.ones(4, 50, dtype=torch.bool), dense=False)
    assert (routing.weights.sum((0, 1)) > 0).all()


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_temperature_divides_the_logits_of_dense_collaboration_only(temperature):
    router = router_with(4, top_k=2, temperature=temperature)
    features, mask = draw(0, 2, 6, 24), torch.ones(2, 6, dtype=torch.bool)
    dense, _ = router(read(features), mask=mask, dense=True)
    torch.testing.assert_close(dense.weights, (router.logits(features) / temperature).softmax(-1))
    sparse, selected = router(read(features), mask=mask, dense=False)
    expected = router.logits(features).gather(-1, selected).softmax(-1)
    torch.testing.assert_close(sparse.weights.gather(-1, selected), expected)


def test_probabilities_are_over_all_experts_and_unknown_where_route_to_decided():
    model, ids = tiny_moe("llama", top_k=1), tokens(2, 9)
    routing = model.route(ids)
    torch.testing.assert_close(routing.probabilities, routing.logits.softmax(-1))
    with model.route_to("expert_1"):
        forced = model.route(ids)
    assert forced.weights[..., 1].eq(1).all() and forced.weights.sum() == ids.numel()
    with pytest.raises(ValueError, match="forced"):
        forced.probabilities  # noqa: B018


def test_the_fewest_experts_whose_probabilities_reach_top_p_are_selected(laws):
    """Against the naive way, token by token; alone an expert has weight exactly 1, and the gate its gradient."""
    logits = (3 * torch.randn(400, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    weights, selected = select_top_k(logits, top_k=3, top_p=0.8)
    num_alone = 0
    for row, row_weights, chosen in zip(logits.detach(), weights.detach(), selected, strict=True):
        probabilities, order = row.softmax(-1).sort(descending=True)
        count = next((n for n in range(1, 4) if probabilities[:n].sum() >= 0.8), 3)
        expected = torch.zeros(6).scatter(0, order[:count], row[order[:count]].softmax(-1))
        laws.close("top-p weights equal the naive ones", row_weights, expected, atol=1e-6)
        assert chosen.tolist() == [*order[:count].tolist(), *[-1] * (3 - count)]
        if count == 1:
            num_alone += 1
            assert row_weights.max() == 1.0
    assert 50 < num_alone < 350
    weights.square().sum().backward()
    assert (logits.grad.abs().sum(-1) > 0).all()


def test_top_p_of_1_is_top_k_bit_for_bit():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    for one, other in zip(select_top_k(logits, top_k=2, top_p=1.0), select_top_k(logits, top_k=2), strict=True):
        assert torch.equal(one, other)
