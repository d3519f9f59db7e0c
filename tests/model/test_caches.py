"""Laws of every cache and way of decoding that Transformers has: each equals the loop that keeps nothing."""

import copy
import functools

import pytest
import torch
from reference.decoding import (
    NEW,
    assert_varied,
    assisted,
    drafting,
    generate,
    longer,
    positions,
    prompts,
    scripted,
    shared,
    two_bit_cache,
    uncached,
    used_by,
    whole,
)
from reference.tiny import padded, tiny_base, tiny_moe, tokens
from transformers import DynamicCache, GenerationConfig, StaticCache

CLOSE = 1e-4
"""The allowed difference of logits of a few units, in fp32."""

ROUTERS = [{"top_k": 1}, {"top_k": 2, "router_layer": 1}]
ATTENTION = ["llama", "gemma3", "gpt2", "mistral"]
"""Full, mixed with a sliding window, full with learned positions, sliding in every layer."""


def assert_routing_is_of_the_result(laws, model, out, mask, family):
    expected = whole(model, out.sequences, mask).routing
    laws.close("reported routing = one forward", out.routing.weights, expected.weights, family=family, atol=CLOSE)


# --- assisted decoding


@functools.cache
def noisy(family, **router):
    """A routed model that is often of the same opinion."""
    model, generator = copy.deepcopy(shared(family, **router)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for gate in model.router.gate.values():
            gate.add_(torch.randn(gate.shape, generator=generator) * 4)
    return model


def repetitive():
    return tokens(1, 5, seed=4).repeat(1, 3)


def greedy(model, ids, **options):
    return uncached(model, ids, torch.ones_like(ids), **options)


@pytest.mark.parametrize(
    "family, router, drafted_by",
    [
        *((family, router, "a plain model") for family in ATTENTION for router in ROUTERS),
        ("llama", ROUTERS[0], "a routed model"),
        ("gemma3", ROUTERS[1], "a routed model"),
    ],
    ids=str,
)
def test_assisted_decoding_is_greedy_decoding(laws, family, router, drafted_by):
    model, ids = shared(family, **router), repetitive()
    expected, logits = greedy(model, ids, steps=20)
    if drafted_by == "a plain model":
        draft = drafting(scripted(expected), count=3, schedule="heuristic")
    else:
        draft = drafting(noisy(family, **router), count=6)
    out, taken, thrown = assisted(model, ids, max_new_tokens=20, **draft)
    assert taken > 0 and thrown > 0
    laws.equal("assisted = uncached, greedy", out.sequences, expected, family=family)
    laws.close("assisted = uncached, logits", torch.stack(out.logits, 1), logits, family=family, atol=CLOSE)
    assert_routing_is_of_the_result(laws, model, out, torch.ones_like(out.sequences), family)
    assert_varied(out.routing)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_drafts_that_are_found_in_the_prompt_or_always_wrong_change_nothing(laws, family):
    model, ids = shared(family, top_k=2), repetitive()
    expected, _ = greedy(model, ids, steps=20)
    by_prompt = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}
    for draft in (by_prompt, drafting(tiny_base(family, seed=9), count=12)):
        out, taken, thrown = assisted(model, ids, max_new_tokens=20, **draft)
        assert thrown > 0 and (taken > 0 or draft is not by_prompt)
        laws.equal("assisted = uncached, greedy", out.sequences, expected, family=family)


def three_layers(family="llama", **router):
    """The last layer adds little, so that leaving before it often says the same."""
    model = tiny_moe(tiny_base(family, num_hidden_layers=3), **router)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.2." in name and ("o_proj" in name or "down_proj" in name) and "lora_A" not in name:
                parameter.mul_(0.3)
    return model


@pytest.mark.parametrize("family, router_layer", [("llama", "embeddings"), ("llama", 2), ("mistral", 1)])
def test_a_model_that_drafts_by_its_own_first_layers_decodes_greedily(laws, family, router_layer):
    model, ids = three_layers(family, router_layer=router_layer), repetitive()
    out, taken, thrown = assisted(model, ids, max_new_tokens=20, assistant_early_exit=2)
    assert taken > 0 and thrown > 0
    laws.equal("assisted = uncached, greedy", out.sequences, greedy(model, ids, steps=20)[0], family=family)


@pytest.mark.parametrize("experts", ["expert_1", ["expert_2"], None], ids=str)
def test_assisted_decoding_inside_route_to(laws, experts):
    model, ids = shared("llama"), repetitive()
    with model.route_to(experts):
        expected, _ = greedy(model, ids, steps=20)
        out, taken, thrown = assisted(model, ids, max_new_tokens=20, **drafting(scripted(expected), count=5))
    assert thrown > 0 and taken > 0
    laws.equal("assisted = uncached, greedy", out.sequences, expected)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sampled_drafts_leave_the_cache_right(laws, family, seed):
    """Which tokens are drawn differs from plain sampling; what they were drawn from must not."""
    model, ids = shared(family, top_k=2), repetitive()
    options = {"do_sample": True, "top_k": 0, "temperature": 0.3, "max_new_tokens": 20}
    options |= drafting(noisy(family, top_k=2), count=4)
    torch.manual_seed(seed)
    out, taken, thrown = assisted(model, ids, **options)
    assert taken > 0 and thrown > 0
    logits = whole(model, out.sequences, torch.ones_like(out.sequences)).logits[:, ids.shape[1] - 1 : -1]
    laws.close("assisted sampling = one forward", torch.stack(out.logits, 1), logits, family=family, atol=CLOSE)


@pytest.mark.parametrize("drafted_by", ["a routed model", "itself"])
def test_a_routed_model_may_draft_more_than_a_cache_remembers(laws, drafted_by, monkeypatch):
    """Reported: the draft's tokens are calls of one token each, and could not all be taken back."""
    monkeypatch.setattr("dylo_moe.routing.cache.HISTORY", 2)
    model, ids = tiny_moe(tiny_base("llama", num_hidden_layers=3)), repetitive()
    draft = drafting(model if drafted_by == "itself" else tiny_moe("llama"), count=12)
    out, _, thrown = assisted(model, ids, **({"assistant_early_exit": 1} if drafted_by == "itself" else draft))
    assert thrown > 5
    laws.equal("assisted = uncached, greedy", out.sequences, greedy(model, ids)[0])


# --- taking tokens back by hand

PLANS = {
    "the last call": "right 9, wrong 3, back 3, right 8",
    "several calls": "right 5, right 4, wrong 1, wrong 1, wrong 2, back 4, back 0, right 8",
    "into the right ones": "right 5, right 6, wrong 2, back 6, right 10",
    "all of the first call": "wrong 6, back 6, right 17",
    "everything": "right 4, wrong 6, wrong 1, back 11, right 17",
    "again and again": "right 9, wrong 3, back 3, wrong 2, wrong 1, back 3, right 3, wrong 4, back 4, right 5",
}


def rolling(model):
    cache = DynamicCache(config=model.base.config)
    cache.activate_past_recording()
    return cache


def walk(model, plan, ids, mask, cache):
    """(logits, routing weights) of the whole text, fed and taken back as the plan says."""
    at, logits, weights = 0, [], []
    for step in plan.split(", "):
        kind, count = step.split()[0], int(step.split()[1])
        if kind == "back":
            cache.crop(-count)
            at -= count
            logits, weights = [torch.cat(logits, 1)[:, :at]], [torch.cat(weights, 1)[:, :at]]
            continue
        text, stop = ids if kind == "right" else (ids + 31) % 90 + 3, at + count
        with torch.no_grad():
            out = model(
                input_ids=text[:, at:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions(mask)[:, at:stop],
                past_key_values=cache,
            )
        at = stop
        logits.append(out.logits)
        weights.append(out.routing.weights)
    return torch.cat(logits, 1), torch.cat(weights, 1)


@pytest.mark.parametrize(
    "family, plan",
    [(family, plan) for family in ATTENTION for plan in PLANS]
    # Transformers' sliding window can take back only what was fed since the last time.
    + [(family, "right 9, wrong 3, back 2, wrong 2, back 2, wrong 2, back 3, right 8") for family in ("llama", "gpt2")],
)
def test_tokens_that_are_taken_back_leave_no_trace(laws, family, plan):
    model, (ids, mask) = shared(family, top_k=2), padded([tokens(17, seed=1), tokens(12, seed=2)], side="left")
    logits, weights = walk(model, PLANS.get(plan, plan), ids, mask, rolling(model))
    expected, real = whole(model, ids, mask), mask.bool()
    assert_varied(expected.routing)
    laws.close("taken back = never fed, logits", logits[real], expected.logits[real], family=family, atol=CLOSE)
    laws.close("taken back = never fed, routing", weights, expected.routing.weights, family=family, atol=CLOSE)


def test_taking_back_more_than_there_is_begins_again_as_in_transformers(laws):
    """Reported: the router then counted tokens below zero, or refused."""
    for router in ({}, {"granularity": "sequence"}):
        model, ids = shared("llama", **router), tokens(1, 9)
        cache = model(input_ids=tokens(1, 5, seed=8), use_cache=True).past_key_values
        cache.crop(-9)
        ours, expected = model(input_ids=ids, past_key_values=cache), model(input_ids=ids)
        laws.close("taken back = never fed, logits", ours.logits, expected.logits, atol=CLOSE)


@pytest.mark.parametrize("last", [1, 7])
def test_a_long_text_can_be_taken_back_as_far_as_promised_and_no_further(laws, last):
    """128 tokens before the last call, beside that call itself, or everything."""
    model, ids = shared("llama", top_k=2), tokens(2, 460)
    cache, at = DynamicCache(), 0
    for count in (300, 20, *[1] * 9, last):
        with torch.no_grad():
            model(input_ids=ids[:, at : at + count], past_key_values=cache)
        at += count
    expected = whole(model, ids, torch.ones_like(ids))
    for count in (last, last + 5, last + 128, at):
        branch = copy.deepcopy(cache)
        branch.crop(-count)
        with torch.no_grad():
            out = model(input_ids=ids[:, at - count : at + 9], past_key_values=branch)
        rest = slice(at - count, at + 9)
        laws.close("taken back = never fed, logits", out.logits, expected.logits[:, rest], atol=CLOSE)
        laws.close(
            "taken back = never fed, routing", out.routing.weights, expected.routing.weights[:, rest], atol=CLOSE
        )
    with pytest.raises(ValueError, match=rf"^{last + 129} tokens cannot .* {last + 128} tokens ago"):
        cache.crop(-(last + 129))
    with pytest.raises(ValueError, match=rf"holds {at - last - 129} tokens, .* seen {at} of them"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_rows_that_were_repeated_or_selected_can_go_back_and_reordered_ones_cannot(laws):
    model, ids = shared("gemma3", top_k=2), tokens(2, 14)

    def filled():
        cache = rolling(model)
        for text in (ids[:, :9], tokens(2, 2, seed=7), tokens(2, 1, seed=8)):
            with torch.no_grad():
                model(input_ids=text, past_key_values=cache)
        return cache

    for change, rows in (
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ):
        cache = filled()
        change(cache)
        cache.crop(-3)
        out, expected = model(input_ids=ids[rows, 9:], past_key_values=cache), model(input_ids=ids[rows])
        laws.close("taken back = never fed, logits", out.logits, expected.logits[:, 9:], family="gemma3", atol=CLOSE)
        weights = expected.routing.weights[:, 9:]
        laws.close("taken back = never fed, routing", out.routing.weights, weights, family="gemma3", atol=CLOSE)
    cache = filled()
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"^1 token cannot .* stood 0 tokens ago"):
        cache.crop(-1)


# --- static, offloaded and quantised caches


@pytest.mark.parametrize(
    "family, mode",
    # In chunks, Transformers makes GPT-2's cache for two of its four heads, for the plain base too.
    [
        *((family, mode) for family in ATTENTION for mode in ("greedy", "without padding", "sampled", "beams")),
        *((family, "in chunks") for family in ATTENTION if family != "gpt2"),
    ],
)
def test_a_static_cache_decodes_as_none(laws, family, mode):
    model, (ids, mask) = shared(family, top_k=2), prompts()
    if mode == "without padding":  # then Transformers leaves the mask out where it can
        ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    options = {"beams": {"num_beams": 3}, "sampled": {"do_sample": True, "top_k": 0}}.get(mode, {})
    torch.manual_seed(3)
    if mode == "beams":
        expected = generate(model, ids, mask, use_cache=False, **options).sequences
    else:
        expected, _ = uncached(model, ids, mask, sample=mode == "sampled")
    if mode == "in chunks":
        options["prefill_chunk_size"] = 4
    torch.manual_seed(3)
    out = generate(model, ids, mask, cache_implementation="static", **options)
    laws.equal(f"static cache = uncached, {mode}", out.sequences, expected, family=family)
    assert_routing_is_of_the_result(laws, model, out, longer(mask, out.sequences), family)
    assert_varied(out.routing)


@pytest.mark.parametrize("family", ATTENTION)
def test_a_static_cache_is_as_new_after_its_reset(laws, family):
    model, (ids, mask) = shared(family, top_k=2), prompts()
    cache = StaticCache(config=model.base.config, max_cache_len=40)
    for order in ([0, 1, 2], [2, 0, 1]):
        text, real = ids[order], mask[order]
        out = generate(model, text, real, past_key_values=cache)
        laws.equal("static cache = uncached, greedy", out.sequences, uncached(model, text, real)[0], family=family)
        cache.reset()
        logits, weights = walk(model, "right 5, right 1, right 3", text, real, cache)
        expected, kept = whole(model, text, real), real.bool()
        laws.close("static cache = uncached, logits", logits[kept], expected.logits[kept], family=family, atol=CLOSE)
        laws.close("static cache = uncached, routing", weights, expected.routing.weights, family=family, atol=CLOSE)
        cache.reset()


class Stream:
    """A stream of a machine without any."""

    def __init__(self, *args):
        self.synchronize = self.wait_stream = lambda *args: None

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_offloaded_cache_decodes_as_none(laws, family, kind, monkeypatch):
    """Transformers needs CUDA's streams for it, for the plain base too; here they stand still."""
    monkeypatch.setattr("torch.Stream", Stream)
    monkeypatch.setattr("torch.cuda.default_stream", Stream)
    model, (ids, mask) = shared(family, top_k=2), prompts()
    out = generate(model, ids, mask, cache_implementation=kind)
    laws.equal("offloaded cache = uncached, greedy", out.sequences, uncached(model, ids, mask)[0], family=family)
    assert_routing_is_of_the_result(laws, model, out, longer(mask, out.sequences), family)


@pytest.mark.parametrize("expert", [None, "expert_1"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_quantised_cache_loses_what_it_loses_for_a_plain_model(laws, family, expert):
    model, (ids, mask) = shared(family, top_k=2), prompts()
    plain = tiny_base(family) if expert is None else copy.deepcopy(model).merge_and_unload(adapter_names=[expert])
    with model.route_to(expert):
        ours = generate(model, ids, mask, past_key_values=two_bit_cache(), max_new_tokens=20)
    theirs = generate(plain, ids, mask, past_key_values=two_bit_cache(), max_new_tokens=20)
    lossless = generate(plain, ids, mask, max_new_tokens=20)
    assert not torch.allclose(theirs.logits[3], lossless.logits[3], rtol=0, atol=10 * CLOSE)  # else nothing was lost
    laws.equal("quantised cache, one expert = plain model", ours.sequences, theirs.sequences, family=family)
    logits, expected = torch.stack(ours.logits, 1), torch.stack(theirs.logits, 1)
    laws.close("quantised cache, one expert = plain model, logits", logits, expected, family=family, atol=CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_router_at_the_embeddings_does_not_see_a_quantised_cache(laws, family):
    model, (ids, mask) = shared(family, top_k=2), prompts()
    out, used = used_by(model, lambda: generate(model, ids, mask, past_key_values=two_bit_cache(), max_new_tokens=20))
    assert not torch.equal(out.sequences, uncached(model, ids, mask, steps=20)[0])
    steps = out.sequences.shape[1] - 1
    laws.close("reported routing = used", out.routing.weights[:, :steps], used[:, :steps], family=family, atol=CLOSE)
    assert_routing_is_of_the_result(laws, model, out, longer(mask, out.sequences), family)


# --- going on from a cache


@pytest.mark.parametrize("turn", [0, 5], ids=["at once", "after a user's turn"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_going_on_from_a_returned_cache_is_generating_at_once(laws, family, kind, turn):
    model, (ids, mask) = shared(family, top_k=2), prompts()
    cache = StaticCache(config=model.base.config, max_cache_len=50) if kind == "static" else None
    first = generate(model, ids, mask, past_key_values=cache)
    text = torch.cat([first.sequences, tokens(3, turn, seed=6)], 1)
    expected, logits = uncached(model, text, longer(mask, text))
    only_new = text[:, first.past_key_values.get_seq_length() :]
    branch = copy.deepcopy(first.past_key_values)
    out = generate(model, text, longer(mask, text), past_key_values=first.past_key_values)
    laws.equal("continued = uncached, greedy", out.sequences, expected, family=family)
    laws.close("continued = uncached, logits", torch.stack(out.logits, 1), logits, family=family, atol=CLOSE)
    assert_routing_is_of_the_result(laws, model, out, longer(mask, out.sequences), family)
    short = generate(model, only_new, longer(mask, text), past_key_values=branch)
    laws.equal("continued by new ids = uncached", short.sequences[:, -NEW:], expected[:, -NEW:], family=family)
    assert getattr(short, "routing", None) is None  # what went before is not among the ids


@pytest.mark.parametrize("returned", ["returned", "passed in"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_follows_the_end_of_a_row_is_forgotten(laws, family, returned):
    """Reported: the padding behind a row that ended first stayed in the router's memory."""
    model, (ids, mask) = tiny_moe(family, top_k=2, router_half_life=8.0), prompts()
    end = int(generate(model, ids, mask).sequences[0, ids.shape[1] + 2])
    cache, options = DynamicCache(config=model.base.config), {"eos_token_id": end, "pad_token_id": 0}
    if returned == "returned":
        text = generate(model, ids, mask, past_key_values=cache, **options).sequences
    else:
        text = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, **options)
    real = longer(mask, text)
    ended = (text == end) & (torch.arange(text.shape[1]) >= ids.shape[1])
    real *= ended.cumsum(1) - ended.long() == 0
    assert (real[0] == 0).sum() > 4 and real[1].sum() > 6
    text = torch.cat([text, tokens(3, 5, seed=6)], 1)
    out, used = used_by(model, lambda: generate(model, text, longer(real, text), past_key_values=cache))
    expected, _ = uncached(model, text, longer(real, text))
    laws.equal("continued = uncached, greedy", out.sequences, expected, family=family)
    reported = out.routing.weights[:, -used.shape[1] - 1 : -1]
    laws.close("reported routing = used", reported, used, family=family, atol=CLOSE)


# --- every other way of generating


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 4}, {"position_ids": positions(prompts()[1]) + 3}],
    ids=["at once", "in chunks", "at positions of its own"],
)
@pytest.mark.parametrize("router", [*ROUTERS, {"granularity": "sequence"}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_the_reported_routing_is_what_the_steps_used(laws, family, router, options):
    """Reported: with learned positions and left padding, it was read at other positions than were used."""
    model, (ids, mask) = shared(family, **router), prompts()
    out, used = used_by(model, lambda: generate(model, ids, mask, **options))
    steps = out.sequences.shape[1] - 1
    laws.close("reported routing = used", out.routing.weights[:, :steps], used[:, :steps], family=family, atol=CLOSE)
    assert_varied(out.routing)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 1},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_p": 0.9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"guidance_scale": 1.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_every_mode_gives_the_same_with_and_without_a_cache(laws, family, options):
    model, (ids, mask) = shared(family, top_k=2), prompts()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(11)
        own = options if use_cache else {name: value for name, value in options.items() if "chunk" not in name}
        results.append(generate(model, ids, mask, use_cache=use_cache, **own))
    laws.equal("cached = uncached, every mode", results[0].sequences, results[1].sequences, family=family)
    rows = options.get("num_return_sequences", 1)
    mask = longer(mask.repeat_interleave(rows, 0), results[0].sequences)
    assert_routing_is_of_the_result(laws, model, results[0], mask, family)


@pytest.mark.parametrize("router", [{"top_k": 2}, {"granularity": "sequence"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_embeddings_decode_as_their_ids(laws, family, router):
    model, (ids, mask) = shared(family, **router), prompts()
    by_ids = generate(model, ids, mask)
    by_embeddings = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, max_new_tokens=NEW, do_sample=False
    )
    laws.equal("embeddings = ids, greedy", by_embeddings, by_ids.sequences[:, -NEW:], family=family)


@pytest.mark.parametrize("how", ["by name", "in place"])
def test_a_generation_config_counts_as_its_options(laws, how):
    """Reported: where it left the end and the padding to the model's own config, padding was taken for text."""
    model, (ids, mask) = tiny_moe("llama"), prompts()
    end = int(generate(model, ids, mask).sequences[0, ids.shape[1] + 2])
    expected = generate(model, ids, mask, eos_token_id=end, pad_token_id=0)
    for own in ({"eos_token_id": end, "pad_token_id": 0}, {}):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None if own else end, 0
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **own)
        out = model.generate(ids, config) if how == "in place" else model.generate(ids, generation_config=config)
        laws.equal("config = options, tokens", out.sequences, expected.sequences)
        laws.equal("config = options, routing", out.routing.weights, expected.routing.weights)
        assert not out.routing.mask.all()


def test_requests_packed_into_one_row_are_refused():
    """Reported: continuous batching came back with empty answers."""
    model = shared("llama")
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([[3, 4, 5], [7, 8]], GenerationConfig(max_new_tokens=2))
