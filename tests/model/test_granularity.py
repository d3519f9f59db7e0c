"""Laws of routing that is decided once for a text, and of the router that reads the base's last hidden states."""

import copy
import itertools
import pickle

import pytest
import torch
from reference.decoding import (
    assert_varied,
    drafting,
    generate,
    longer,
    positions,
    prompts,
    scripted,
    shared,
    uncached,
    used_by,
    whole,
)
from reference.router import naive_causal_mean
from reference.tiny import assert_same_gradients, gradients, padded, tiny_base, tiny_moe, tokens
from transformers import StaticCache

from dylo_moe import DyLoRAMoE, RouterConfig

CLOSE = 1e-4
LAYERS = ["embeddings", 1, "final"]
HALF_LIFE = 1.5
BY_TEXT = {"granularity": "sequence", "top_k": 2}


# --- what a text is decided on


def texts_of(mask, position_ids):
    """For each row, its texts: lists of columns. Padding belongs to none, and a restart of the positions begins one."""
    for row, (real, places) in enumerate(zip(mask.tolist(), position_ids.tolist(), strict=True)):
        texts = []
        for column in (column for column, is_real in enumerate(real) if is_real):
            begins = not texts or (texts[-1][-1] == column - 1 and places[column] != places[column - 1] + 1)
            texts += [[column]] if begins else []
            if not begins:
                texts[-1].append(column)
        yield from ((row, text) for text in texts)


def naive_routing(model, ids, mask, position_ids, *, family, lengths=None, labels=None):
    """[batch, seq, experts] in fp64: the gate on the features of each text's last prompt token, at all its tokens."""
    layer = {"embeddings": 0, "final": -1}.get(model.router_config.router_layer, model.router_config.router_layer)
    base, router = tiny_base(family), model.router
    weights = torch.zeros(*ids.shape, len(model.experts), dtype=torch.float64)
    for row, text in texts_of(mask, position_ids):
        length = min(len(text), 32)
        answers = [] if labels is None else [place for place, at in enumerate(text) if labels[row, at] != -100]
        if lengths is not None:
            length = int(lengths[row])
        elif answers and answers[0] > 1:
            length = answers[0]
        inputs = {"input_ids": ids[row, text][None], "position_ids": position_ids[row, text][None]}
        with torch.no_grad():
            alone = base(**inputs, output_hidden_states=True, use_cache=False).hidden_states[layer]
        feature = naive_causal_mean(alone, mask=torch.ones(1, len(text)), half_life=HALF_LIFE)[0, length - 1]
        feature = (feature - router.feature_mean) * router.feature_scale
        logits = torch.stack([router.gate[name] @ feature.float() + router.gate_bias[name] for name in router.names])
        best = logits.topk(model.router_config.top_k)
        for column in text:
            weights[row, column, best.indices] = best.values.softmax(-1).detach().double()
    return weights


def labelled(ids, mask):
    """Answers behind prompts of 3, 1 (no prompt), 12 tokens, and none at all; gaps in them, and labels on padding."""
    labels = ids.clone()
    for row, prompt in enumerate((3, 1, 12, 99)):
        real = mask[row].nonzero()[:, 0]
        labels[row, real[:prompt]] = -100
        labels[row, real[prompt + 2 : prompt + 4]] = -100
    return labels


@pytest.mark.parametrize("prompt", ["prompt_lengths", "labels", "the first 32 tokens", "packed", "packed, labels"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("router_layer", LAYERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_text_is_decided_at_the_last_token_of_its_prompt(laws, family, router_layer, side, prompt):
    model = shared(family, router_layer=router_layer, **BY_TEXT)
    ids, mask = padded([tokens(n, seed=n + 3) for n in (40, 7, 35, 33)], side=side)
    inputs, known, places = {}, {}, positions(mask)
    if prompt == "prompt_lengths":
        inputs["prompt_lengths"] = known["lengths"] = torch.tensor([40, 1, 33, 5])
    if "packed" in prompt:
        places = places - torch.where(places >= 28, 28, torch.where(places >= 11, 11, 0))
    if "labels" in prompt:
        inputs["labels"] = known["labels"] = labelled(ids, mask)
    out = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, **inputs)
    expected = naive_routing(model, ids, mask, places, family=family, **known)
    laws.close("text routed by its prompt = naive", out.routing.weights, expected, family=family, atol=CLOSE)
    assert_varied(out.routing)
    for row, text in texts_of(mask, places):
        assert (out.routing.weights[row, text] == out.routing.weights[row, text[0]]).all()
    assert not out.routing.weights[mask == 0].any()
    assert sum(1 for _ in texts_of(mask, places)) == (10 if "packed" in prompt else 4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_the_last_hidden_states_are_those_of_the_plain_base(laws, family):
    model, (ids, mask) = shared(family, router_layer="final", top_k=2), prompts(side="right")
    with torch.no_grad():
        states = tiny_base(family)(ids, attention_mask=mask, output_hidden_states=True)
    expected = naive_causal_mean(states.hidden_states[-1], mask=mask, half_life=HALF_LIFE)
    features = model.router_features(ids, mask)
    laws.close("final features = plain base's", features, expected, family=family, atol=CLOSE)
    out = whole(model, ids, mask, output_hidden_states=True)
    logits = (features - model.router.feature_mean) * model.router.feature_scale
    logits = logits @ torch.stack([*model.router.gate.values()]).T + torch.stack([*model.router.gate_bias.values()])
    laws.close("final routing = gate on them", out.routing.logits, logits, family=family, atol=CLOSE)
    assert_varied(out.routing)
    assert not torch.allclose(out.hidden_states[-1], states.hidden_states[-1], atol=0.1)  # the experts' pass is another
    with model.route_to(None):
        alone = whole(model, ids, mask).logits
    laws.equal("the base alone = plain base", alone[mask.bool()], states.logits[mask.bool()], family=family)


@pytest.mark.parametrize("router", [{"router_layer": "final"}, *({"router_layer": at, **BY_TEXT} for at in LAYERS)])
def test_what_experts_learn_never_changes_where_texts_go(laws, router):
    model, (ids, mask) = tiny_moe("llama", **router), prompts(side="right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    before = model(input_ids=ids, attention_mask=mask, labels=labels)
    learning = [parameter for expert in model.experts for parameter in model.experts.parameters(expert.name)]
    optimizer = torch.optim.SGD(learning, lr=0.5)
    model.train()
    for _ in range(3):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    after = model.eval()(input_ids=ids, attention_mask=mask, labels=labels)
    laws.equal("routing after training experts = before", after.routing.logits, before.routing.logits)
    assert after.lm_loss < before.lm_loss - 0.1


@pytest.mark.parametrize("router", [{"router_layer": "final"}, *({"router_layer": at, **BY_TEXT} for at in LAYERS)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_are_the_same_when_activations_are_recomputed(laws, family, router):
    model, (ids, mask) = tiny_moe(family, **router).train(), prompts(side="right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100

    def backward():
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()

    kept = gradients(model, backward)
    model.gradient_checkpointing_enable()
    recomputed = gradients(model, backward)
    assert_same_gradients(recomputed, kept, relative=1e-4)
    gate = [name for name in kept if ".gate." in name]
    assert len(gate) == 3 and all(kept[name].abs().max() > 0 for name in gate)
    for name in gate:
        laws.close("gradients, recomputed = kept", recomputed[name], kept[name], family=family, atol=CLOSE)


@pytest.mark.parametrize("router_layer", LAYERS)
def test_a_gate_learns_of_a_text_as_of_all_its_tokens(laws, router_layer):
    """The gate's gradient is a finite difference of the loss."""
    model, ids = tiny_moe("llama", router_layer=router_layer, granularity="sequence", top_k=3), tokens(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    gate = model.router.gate["expert_1"]

    def loss():
        return model(input_ids=ids, labels=labels).loss

    found = gradients(model, lambda: loss().backward())["router.gate.expert_1"]
    direction = found / found.norm()
    with torch.no_grad():
        gate.add_(direction, alpha=1e-2)
        above = loss()
        gate.add_(direction, alpha=-2e-2)
        slope = (above - loss()) / 2e-2
    assert slope > 1e-3
    laws.close("gate's gradient = finite difference, relative", slope / found.norm(), torch.tensor(1.0), atol=2e-2)


@pytest.mark.parametrize("router_layer", LAYERS)
def test_a_row_alone_is_a_row_in_a_batch(laws, router_layer):
    model, rows = shared("gpt2", router_layer=router_layer, **BY_TEXT), [tokens(n, seed=n) for n in (40, 3, 34)]
    for side in ("left", "right"):
        ids, mask = padded(rows, side=side)
        together = whole(model, ids, mask)
        for index, row in enumerate(rows):
            alone, real = whole(model, row[None], torch.ones(1, len(row))), mask[index].bool()
            laws.close("row alone = in a batch, logits", together.logits[index, real], alone.logits[0], atol=CLOSE)
            ours, theirs = together.routing.weights[index, real], alone.routing.weights[0]
            laws.close("row alone = in a batch, routing", ours, theirs, atol=CLOSE)
    assert_varied(together.routing)


def test_a_row_of_padding_alone_is_decided_on_nothing_and_disturbs_no_one(laws):
    model, (ids, mask) = shared("llama", **BY_TEXT), prompts()
    expected, kept = generate(model, ids, mask), torch.tensor([0, 2])
    mask[1] = 0
    out = generate(model, ids, mask)
    laws.equal("beside an empty row = without", out.sequences[kept], expected.sequences[kept])
    laws.close(
        "beside an empty row = without, routing", out.routing.weights[kept], expected.routing.weights[kept], atol=0
    )


# --- generation


@pytest.mark.parametrize("router_layer", LAYERS)
@pytest.mark.parametrize("family, top_k", [("llama", 1), ("gemma3", 2), ("gpt2", 2), ("gpt_neox", 2)])
def test_generation_holds_what_its_prompt_decided(laws, family, router_layer, top_k):
    model, (ids, mask) = shared(family, router_layer=router_layer, granularity="sequence", top_k=top_k), prompts()
    expected, logits = uncached(model, ids, mask, prompt_lengths=mask.sum(1))
    out, used = used_by(model, lambda: generate(model, ids, mask))
    laws.equal("held decision = uncached, greedy", out.sequences, expected, family=family)
    laws.close("held decision = uncached, logits", torch.stack(out.logits, 1), logits, family=family, atol=CLOSE)
    real = longer(mask, out.sequences)
    expected = whole(model, out.sequences, real, prompt_lengths=mask.sum(1)).routing.weights
    laws.close("reported routing = one forward", out.routing.weights, expected, family=family, atol=CLOSE)
    laws.close("reported routing = used", out.routing.weights[:, :-1], used, family=family, atol=CLOSE)
    if family != "gpt2":  # whose learned positions count from the padding in `route`
        routed = model.route(out.sequences, real, prompt_lengths=mask.sum(1)).weights
        laws.close("reported routing = route", out.routing.weights, routed, family=family, atol=CLOSE)
    assert_varied(out.routing)
    otherwise = whole(model, out.sequences, real).routing.weights
    assert top_k == 1 or not torch.allclose(otherwise, expected, atol=0.1)  # the answer would have decided otherwise


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static"},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("router_layer", ["embeddings", "final"])
def test_every_way_of_generating_holds_the_decision(laws, router_layer, options):
    model, (ids, mask) = shared("gemma3", router_layer=router_layer, **BY_TEXT), prompts()
    torch.manual_seed(5)
    out = generate(model, ids, mask, **options)
    if options.keys() & {"prefill_chunk_size", "cache_implementation"}:
        options = {}
    torch.manual_seed(5)
    plain = generate(model, ids, mask, use_cache=False, **options)
    laws.equal("held decision = uncached, every mode", out.sequences, plain.sequences, family="gemma3")
    rows = mask.repeat_interleave(options.get("num_return_sequences", 1), 0)
    expected = whole(model, out.sequences, longer(rows, out.sequences), prompt_lengths=rows.sum(1)).routing
    laws.close("reported routing = one forward", out.routing.weights, expected.weights, family="gemma3", atol=CLOSE)
    assert_varied(out.routing)


@pytest.mark.parametrize("router_layer", LAYERS)
def test_drafts_are_routed_as_their_prompt(laws, router_layer):
    model, ids = shared("gemma3", router_layer=router_layer, **BY_TEXT), tokens(1, 9)
    expected, _ = uncached(model, ids, torch.ones_like(ids), steps=20, prompt_lengths=torch.tensor([9]))
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        noisy.router.gate["expert_0"].add_(2.0)
    for assistant in (scripted(expected), noisy):
        out = generate(model, ids, torch.ones_like(ids), max_new_tokens=20, **drafting(assistant, count=4))
        laws.equal("held decision = uncached, assisted", out.sequences, expected, family="gemma3")
        assert (out.routing.weights == out.routing.weights[:, :1]).all()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("router_layer", LAYERS)
@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_a_conversation_keeps_what_its_first_prompt_decided(laws, family, router_layer, kind):
    model, (ids, mask) = shared(family, router_layer=router_layer, **BY_TEXT), prompts()
    cache = StaticCache(config=model.base.config, max_cache_len=50) if kind == "static" else None
    first = generate(model, ids, mask, past_key_values=cache)
    text = torch.cat([first.sequences, tokens(3, 6, seed=6)], 1)
    real = longer(mask, text)
    fresh = generate(model, text, real)
    out = generate(model, text, real, past_key_values=first.past_key_values)
    expected, _ = uncached(model, text, real, prompt_lengths=mask.sum(1))
    laws.equal("conversation = uncached by its first prompt", out.sequences, expected, family=family)
    ours, theirs = out.routing.weights[:, -1], first.routing.weights[:, -1]
    laws.close("conversation's routing = first prompt's", ours, theirs, family=family, atol=CLOSE)
    assert not torch.allclose(fresh.routing.weights[:, -1], theirs, atol=0.1)
    assert not torch.equal(fresh.sequences, out.sequences)


@pytest.mark.parametrize("router_layer", LAYERS)
def test_a_cache_by_hand_holds_the_decision_of_its_first_call(laws, router_layer):
    model, ids = shared("gpt2", router_layer=router_layer, **BY_TEXT), tokens(3, 12)
    lengths, cache, parts = torch.tensor([5, 2, 4]), None, []
    for start, stop in itertools.pairwise((0, 5, 6, 10, 12)):
        inputs = {"prompt_lengths": lengths} if start == 0 else {}
        with torch.no_grad():
            out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **inputs)
        cache = out.past_key_values
        parts.append(out)
        if stop == 6:  # wrong tokens, and back
            with torch.no_grad():
                model(input_ids=tokens(3, 3, seed=9), past_key_values=cache)
            cache.crop(-3)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 2, 4]))
            cache.reorder_cache(torch.tensor([2, 0, 1]))
            ids, lengths, parts = ids[[2, 0, 1]], lengths[[2, 0, 1]], []
    expected = model(input_ids=ids, prompt_lengths=lengths)
    logits, weights = (
        torch.cat(list(own), 1) for own in zip(*((p.logits, p.routing.weights) for p in parts), strict=True)
    )
    laws.close("cache by hand = one forward", logits, expected.logits[:, 6:], family="gpt2", atol=CLOSE)
    laws.close(
        "cache by hand = one forward, routing", weights, expected.routing.weights[:, 6:], family="gpt2", atol=CLOSE
    )
    assert_varied(expected.routing)


def test_a_cache_that_begins_with_packed_texts_goes_on_with_the_last(laws):
    model, ids = shared("llama", **BY_TEXT), tokens(2, 60)
    places = torch.cat([torch.arange(15), torch.arange(45)])[None].expand(2, -1)
    expected = model(input_ids=ids, position_ids=places).routing.weights
    with torch.no_grad():
        cache = model(input_ids=ids[:, :50], position_ids=places[:, :50], use_cache=True).past_key_values
        out = model(input_ids=ids[:, 50:], position_ids=places[:, 50:], past_key_values=cache)
    laws.close("cache by hand = one forward, routing", out.routing.weights, expected[:, 50:], atol=CLOSE)
    assert not torch.allclose(expected[:, 0], expected[:, -1], atol=0.1)


def test_the_last_layer_decides_no_tokens_in_generation_but_follows_route_to(laws):
    """Reported: inside route_to, generation ended in an AssertionError when it reported its routing."""
    model, (ids, mask) = shared("llama", router_layer="final"), prompts()
    with pytest.raises(ValueError, match=r"'final' with granularity='token' cannot generate.*second pass"):
        generate(model, ids, mask)
    experts = ["expert_2", None, "expert_0"]
    for asked in ("expert_1", experts):
        with model.route_to(asked):
            out, expected = generate(model, ids, mask), uncached(model, ids, mask)[0]
            laws.equal("forced = uncached, greedy", out.sequences, expected)
            reported = model.route(out.sequences, longer(mask, out.sequences)).weights
        laws.equal("reported routing = route", out.routing.weights, reported)
    assert out.routing.weights[:, -1].tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_cache_that_nothing_was_decided_on_is_refused(granularity):
    model, ids = shared("llama", router_layer="final", granularity=granularity), tokens(2, 6)
    with torch.no_grad(), model.route_to("expert_1"):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with model.route_to(None):  # which goes on
            model(input_ids=ids[:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match="this cache's 8 tokens were not read by the router"):
        model(input_ids=ids, past_key_values=cache)
    assert model(input_ids=ids).routing.logits is not None  # nothing of the refused forwards is left


# --- beside everything else


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("router_layer", LAYERS)
def test_a_merged_expert_serves_everyone(laws, router_layer, granularity):
    """Reported: with router_layer='final', a model with a merged expert refused every forward."""
    model, (ids, mask) = tiny_moe("llama", router_layer=router_layer, granularity=granularity), prompts()
    with model.route_to("expert_1"):
        expected = generate(model, ids, mask)
    model.merge_adapter(["expert_1"])
    out = generate(model, ids, mask)
    laws.equal("merged = route_to, greedy", out.sequences, expected.sequences)
    laws.close("merged = route_to, logits", torch.stack(out.logits, 1), torch.stack(expected.logits, 1), atol=CLOSE)
    laws.equal("merged = route_to, routing", out.routing.weights, expected.routing.weights)
    model.unmerge_adapter()
    assert model(input_ids=ids, attention_mask=mask).routing.logits is not None


@pytest.mark.parametrize("router_layer", LAYERS)
def test_a_list_for_route_to_is_each_row_with_its_own(laws, router_layer):
    model, (ids, mask) = shared("llama", router_layer=router_layer, **BY_TEXT), prompts()
    experts = ["expert_2", None, "expert_0"]
    with model.route_to(experts):
        out = generate(model, ids, mask)
    for index, expert in enumerate(experts):
        with model.route_to(expert):
            alone = generate(model, ids[index : index + 1], mask[index : index + 1])
        laws.equal("list of experts = one by one", out.sequences[index], alone.sequences[0])


@pytest.mark.parametrize("way", ["save", "deepcopy", "pickle"])
@pytest.mark.parametrize("router_layer", LAYERS)
def test_a_copy_decides_as_the_original(laws, router_layer, way, tmp_path):
    model, (ids, mask) = shared("llama", router_layer=router_layer, **BY_TEXT), prompts()
    if way == "save":
        model.save_pretrained(str(tmp_path / "saved"))
        other = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), tiny_base("llama"))
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert other.router_config == model.router_config
    ours, theirs = (whole(each, ids, mask, prompt_lengths=torch.tensor([4, 2, 6])) for each in (other, model))
    laws.equal("copy = original, logits", ours.logits, theirs.logits)
    laws.equal("copy = original, routing", ours.routing.weights, theirs.routing.weights)


@pytest.mark.parametrize("router_layer", LAYERS)
def test_a_nascent_expert_makes_the_one_decision_dense(laws, router_layer):
    model, (ids, mask) = tiny_moe("llama", router_layer=router_layer, temperature=2.0, **BY_TEXT), prompts()
    model.add_expert("young")
    lengths = mask.sum(1)
    features = model.router_features(ids, mask, prompt_lengths=lengths)
    expected = (model.router.logits(features) / 2.0).softmax(-1) * mask[..., None]
    out = generate(model, ids, mask)
    laws.close("nascent = softmax over all", out.routing.weights[:, : ids.shape[1]], expected.detach(), atol=1e-6)
    laws.equal("held decision = uncached, greedy", out.sequences, uncached(model, ids, mask, prompt_lengths=lengths)[0])
    assert (out.routing.weights[:, -1] > 0).all()


@pytest.mark.parametrize("router_layer", LAYERS)
def test_the_gate_starts_at_the_prompts_that_it_will_decide_on(laws, router_layer):
    """Reported: labels were not looked at, so that the gate started at other features than it is trained on."""
    kinds = [tokens(6, 8, seed=kind, low=3 + 30 * kind, high=5 + 30 * kind) for kind in range(3)]
    ids = torch.cat([torch.cat(kinds), tokens(18, 6, seed=9)], 1)[torch.randperm(18)]
    labels = ids.clone()
    labels[:, :8] = -100
    model, other = (
        tiny_moe(router_layer=router_layer, granularity="sequence", router_half_life=32.0) for _ in range(2)
    )
    model.initialize_router([{"input_ids": ids, "labels": labels}])
    features = other.router_features(ids, prompt_lengths=torch.full((18,), 8))
    other.router.initialize(list(features), seed=0)
    for (name, ours), theirs in zip(model.router.state_dict().items(), other.router.state_dict().values(), strict=True):
        laws.equal(f"gate's start = on the prompts, {name.split('.')[0]}", ours, theirs)
    chosen = model(input_ids=ids, labels=labels).routing.weights[:, 0].argmax(-1)
    pairs = set(zip(((ids[:, 0] - 3) // 30).tolist(), chosen.tolist(), strict=True))
    assert len(pairs) == 3 and {kind for kind, _ in pairs} == {expert for _, expert in pairs} == {0, 1, 2}


@pytest.mark.parametrize("texts", [tokens(1, 1), tokens(1, 8).repeat(4, 1)], ids=["one token", "all alike"])
def test_a_gate_that_starts_at_texts_without_difference_scales_nothing(laws, texts):
    """Reported: the scale was NaN or millions, and so were the logits of the next expert."""
    model = tiny_moe("llama", num_experts=1, granularity="sequence")
    model.initialize_router([{"input_ids": texts}])
    laws.equal("start without difference = no scale", model.router.feature_scale, torch.full((32,), 32**-0.5))


# --- refusals


@pytest.mark.parametrize("granularity", ["rows", "", None, 1, "Token"], ids=repr)
def test_another_granularity_is_refused(granularity):
    with pytest.raises(
        ValueError, match=f"granularity is {granularity!r}; it must be 'token', 'sequence' or 'response'"
    ):
        DyLoRAMoE.from_base(tiny_base("llama"), router=RouterConfig(granularity=granularity))


@pytest.mark.parametrize(
    "lengths, message",
    [
        (torch.tensor([0, 1, 1]), "row 0 has 9 tokens and a prompt length of 0"),
        (torch.tensor([9, 4, -1]), "row 1 has 3 tokens and a prompt length of 4; row 2 has 6 tokens .* -1"),
        (torch.tensor([9, 3]), r"has shape \[2\]; it must be \[3\]"),
        (torch.tensor([[9, 3, 6]]), r"has shape \[1, 3\]; it must be \[3\]"),
        (torch.tensor([2.5, 3.0, 6.0]), r"prompt_lengths is torch.float32; it must be an int64 tensor \[3\]"),
        (torch.ones(3, dtype=torch.bool), "prompt_lengths is torch.bool"),
        ([9, 3, 6], "prompt_lengths is list"),
    ],
    ids=str,
)
def test_prompt_lengths_that_cannot_be_are_refused(lengths, message):
    """Reported: a length of 2.5 tokens was taken, and decided the row on its first column."""
    model, (ids, mask) = shared("llama", **BY_TEXT), prompts()
    for call in (model, model.route):
        with pytest.raises(ValueError, match=message):
            call(input_ids=ids, attention_mask=mask, prompt_lengths=lengths)
    assert model(input_ids=ids, attention_mask=mask).routing.logits is not None


def test_prompt_lengths_of_a_decided_cache_are_refused():
    model, ids = tiny_moe("llama", granularity="sequence"), tokens(1, 9)
    cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="prompt_lengths came too late"):
        model(input_ids=ids[:, 6:], past_key_values=cache, prompt_lengths=torch.tensor([2]))


def test_prompt_lengths_where_they_have_no_meaning_are_refused():
    ids, lengths = tokens(2, 8), torch.tensor([3, 3])
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).expand(2, -1)
    with pytest.raises(ValueError, match="cannot say where the prompts of packed rows end; labels can"):
        shared("llama", **BY_TEXT)(input_ids=ids, position_ids=packed, prompt_lengths=lengths)
    with pytest.raises(ValueError, match="prompt_lengths has no meaning with granularity='token'"):
        shared("llama")(input_ids=ids, prompt_lengths=lengths)
