"""Laws of routing that is decided once for each answer of a conversation, whose other tokens go to the base."""

import copy
import itertools
import pickle
from unittest import mock

import pytest
import torch
from reference.decoding import (
    assert_varied,
    drafting,
    generate,
    longer,
    positions,
    scripted,
    uncached,
    used_by,
    whole,
)
from reference.router import naive_causal_mean
from reference.tiny import assert_same_gradients, gradients, padded, tiny_base, tiny_moe, tokens
from reference.turns import TURNS, answering, chat, naive_openers, shared_answering
from transformers import StaticCache

from dylo_moe import DyLoRAMoE

CLOSE = 1e-4
LAYERS = ["embeddings", 1]
HALF_LIFE = 3.0
EXPERTS = ["expert_0", "expert_1", "expert_2"]


def chats(*, side="left", closed=True):
    """(ids, mask) of three conversations of two turns, one turn and three turns."""
    rows = [chat(5, 4, 3, 6, seed=1, closed=closed), chat(8, 5, seed=2, closed=closed)]
    return padded([*rows, chat(2, 3, 4, 1, 6, 2, seed=3, closed=closed)], side=side)


def asked(*, side="left"):
    """(ids, mask) of the same, but the last answer has only been opened."""
    rows = [chat(5, 4, 3, 0, seed=1, closed=False), chat(8, 0, seed=2, closed=False)]
    return padded([*rows, chat(2, 3, 4, 1, 6, 0, seed=3, closed=False)], side=side)


def openers(ids, mask):
    """int64 [batch, seq]: the column at which each token's answer begins; -1 where it belongs to none."""
    found = torch.full_like(ids, -1)
    for row, real in enumerate(mask.bool()):
        columns = real.nonzero()[:, 0]
        for column, opener in zip(columns, naive_openers(ids[row, real].tolist()), strict=True):
            found[row, column] = -1 if opener is None else columns[opener]
    return found


def naive_routing(model, ids, mask, *, family):
    """[batch, seq, experts]: for the tokens of an answer, the gate on the plain base's mean at its first token."""
    layer = {"embeddings": 0}.get(model.router_config.router_layer, model.router_config.router_layer)
    router, opened = model.router, openers(ids, mask)
    weights = torch.zeros(*ids.shape, len(model.experts))
    for row, real in enumerate(mask.bool()):
        with torch.no_grad():
            alone = tiny_base(family)(ids[row, real][None], output_hidden_states=True, use_cache=False)
        mean = naive_causal_mean(alone.hidden_states[layer], mask=torch.ones(1, int(real.sum())), half_life=HALF_LIFE)[
            0
        ]
        columns = real.nonzero()[:, 0].tolist()
        for column in columns:
            if opened[row, column] >= 0:
                feature = mean[columns.index(int(opened[row, column]))].float()
                feature = (feature - router.feature_mean) * router.feature_scale
                logits = torch.stack([router.gate[name] @ feature + router.gate_bias[name] for name in router.names])
                best = logits.topk(model.router_config.top_k)
                weights[row, column, best.indices] = best.values.softmax(-1).detach()
    return weights


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("router_layer", LAYERS)
@pytest.mark.parametrize("family, top_k", [("llama", 1), ("gpt2", 2)])
def test_an_answer_is_decided_as_it_begins_and_all_else_goes_to_the_base(laws, family, top_k, router_layer, side):
    model = shared_answering(family, router_layer=router_layer, top_k=top_k)
    ids, mask = chats(side=side)
    out = whole(model, ids, mask)
    expected = naive_routing(model, ids, mask, family=family)
    laws.close("answers routed as they begin = naive", out.routing.weights, expected, family=family, atol=CLOSE)
    laws.equal("routed tokens = answers", out.routing.mask, openers(ids, mask) >= 0, family=family)
    assert_varied(out.routing)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_a_prompt_is_read_by_the_base_bit_for_bit(laws, family):
    model, (ids, mask) = shared_answering(family, top_k=2), asked()
    ids, mask = ids[:, :-2], mask[:, :-2]  # the header, but for where the answer is recognised
    prompt = openers(ids, mask) < 0
    before = openers(ids, mask).cumsum(1) == -torch.arange(1, ids.shape[1] + 1)  # no answer yet
    with torch.no_grad():
        plain = tiny_base(family)(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    ours = whole(model, ids, mask).logits
    laws.equal("before an answer = plain base", ours[before & mask.bool()], plain[before & mask.bool()], family=family)
    assert not torch.allclose(ours[~before], plain[~before], atol=1e-2) and prompt.any()
    row, real = ids[1:2, mask[1].bool()], torch.ones(1, int(mask[1].sum()), dtype=torch.int64)
    with torch.no_grad():
        cache = model(input_ids=row, attention_mask=real, use_cache=True).past_key_values
        theirs = tiny_base(family)(row, attention_mask=real, use_cache=True).past_key_values
    for layer, other in zip(cache.layers, theirs.layers, strict=False):
        laws.equal("cache of a prompt = plain base's", layer.keys, other.keys, family=family)
        laws.equal("cache of a prompt = plain base's", layer.values, other.values, family=family)


def dispatches_of(model, ids):
    """What the routed linears read in one forward."""
    seen, read = [], model.context_slot.dispatch

    def recording(**call):
        seen.append(read(**call))
        return seen[-1]

    with mock.patch.object(model.context_slot, "dispatch", recording):
        whole(model, ids, torch.ones_like(ids))
    return seen


@pytest.mark.parametrize("options", [{"shared_rank": 2}, {"top_k": 2}], ids=str)
@pytest.mark.parametrize("is_nascent", [False, True])
def test_tokens_of_the_base_alone_meet_no_adapter(options, is_nascent):
    """Not with weight 0 in the dense form either, nor where a nascent expert makes the answers use all experts."""
    model, ids = answering(**options), chat(20, 4, seed=4)[None]
    if is_nascent:
        model.add_expert("young")
    for dispatch in dispatches_of(model, ids[:, :20]):
        assert not any(dispatch.parts.values()) and not any(dispatch.shared.values())
    answer = (openers(ids, torch.ones_like(ids)) >= 0)[0].nonzero()[:, 0].tolist()
    for dispatch in dispatches_of(model, ids):
        for part in (*dispatch.parts.values(), *dispatch.shared.values()):
            assert sorted(set(part.rows_N.tolist())) == answer and len(answer) == 6


@pytest.mark.parametrize("router_layer", LAYERS)
@pytest.mark.parametrize("family, top_k", [("llama", 1), ("gemma3", 2), ("gpt2", 2), ("gpt_neox", 2)])
def test_generation_is_the_uncached_forward(laws, family, router_layer, top_k):
    model, (ids, mask) = shared_answering(family, router_layer=router_layer, top_k=top_k), asked()
    expected, logits = uncached(model, ids, mask)
    out, used = used_by(model, lambda: generate(model, ids, mask))
    laws.equal("cached = uncached, greedy", out.sequences, expected, family=family)
    laws.close("cached = uncached, logits", torch.stack(out.logits, 1), logits, family=family, atol=CLOSE)
    expected = whole(model, out.sequences, longer(mask, out.sequences)).routing.weights
    laws.close("reported routing = one forward", out.routing.weights, expected, family=family, atol=CLOSE)
    laws.close("reported routing = used", out.routing.weights[:, :-1], used, family=family, atol=CLOSE)
    assert_varied(out.routing)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static"},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_every_way_of_generating_is_the_uncached_one(laws, options):
    model, (ids, mask) = shared_answering("gemma3", top_k=2), asked()
    torch.manual_seed(5)
    out = generate(model, ids, mask, **options)
    if options.keys() & {"prefill_chunk_size", "cache_implementation"}:
        options = {}
    torch.manual_seed(5)
    plain = generate(model, ids, mask, use_cache=False, **options)
    laws.equal("cached = uncached, every mode", out.sequences, plain.sequences, family="gemma3")
    rows = mask.repeat_interleave(options.get("num_return_sequences", 1), 0)
    expected = whole(model, out.sequences, longer(rows, out.sequences)).routing
    laws.close("reported routing = one forward", out.routing.weights, expected.weights, family="gemma3", atol=CLOSE)
    assert_varied(out.routing)


def test_drafts_that_are_taken_back_leave_no_trace(laws):
    model, ids = shared_answering("gemma3", top_k=2), chat(5, 4, 3, 0, seed=1, closed=False)[None]
    expected, _ = uncached(model, ids, torch.ones_like(ids), steps=20)
    out = generate(model, ids, torch.ones_like(ids), max_new_tokens=20, **drafting(scripted(expected), count=4))
    laws.equal("cached = uncached, assisted", out.sequences, expected, family="gemma3")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_a_conversation_that_goes_on_from_its_cache_is_the_same_read_anew(laws, family, kind):
    model, (ids, mask) = shared_answering(family, top_k=2), asked()
    cache = StaticCache(config=model.base.config, max_cache_len=80) if kind == "static" else None
    first = generate(model, ids, mask, past_key_values=cache)
    close = torch.tensor(TURNS.endings[0]).expand(3, -1)
    message = torch.stack([chat(6, 0, seed=row + 6, closed=False) for row in range(3)])
    text = torch.cat([first.sequences, close, message], 1)
    real = longer(mask, text)
    out = generate(model, text, real, past_key_values=first.past_key_values)
    anew = generate(model, text, real)
    laws.equal("conversation from its cache = anew", out.sequences, anew.sequences, family=family)
    laws.close(
        "conversation from its cache = anew, logits",
        torch.stack(out.logits, 1),
        torch.stack(anew.logits, 1),
        family=family,
        atol=CLOSE,
    )
    laws.close("its routing = anew", out.routing.weights, anew.routing.weights, family=family, atol=CLOSE)
    old, new = out.routing.weights[:, ids.shape[1]], out.routing.weights[:, -1]
    assert not torch.allclose(old, new, atol=0.1)  # another expert wrote the turn before
    laws.close(
        "earlier turns keep theirs",
        out.routing.weights[:, : ids.shape[1]],
        first.routing.weights[:, : ids.shape[1]],
        family=family,
        atol=CLOSE,
    )


def test_rows_that_ended_early_go_on_as_if_they_had_not_been_padded(laws):
    model, (ids, mask) = shared_answering("llama", top_k=2), asked()
    plain = generate(model, ids, mask)
    end = int(plain.sequences[1, ids.shape[1] + 3])
    first = generate(model, ids, mask, eos_token_id=end, pad_token_id=0)
    new = first.sequences[:, ids.shape[1] :]
    is_real = ((new == end).cumsum(1) - (new == end).long()) == 0
    real = torch.cat([mask, is_real.long()], 1)
    assert not real.all(1)[1]
    text = torch.cat([first.sequences, torch.tensor([93]).expand(3, -1), chat(4, 0, closed=False).expand(3, -1)], 1)
    real = longer(real, text)
    out = generate(model, text, real, past_key_values=first.past_key_values)
    laws.equal("ended early, from its cache = anew", out.sequences, generate(model, text, real).sequences)


@pytest.mark.parametrize("sizes", [(1,), (7, 2), (3, 40)], ids=str)
def test_a_cache_by_hand_is_one_forward(laws, sizes):
    """Every cut: within a header, at the token where an answer is recognised, and within an end of two tokens."""
    model, ids = shared_answering("llama", top_k=2), chat(4, 3, 5, 6, 2, 3, seed=5)[None]
    expected, place, parts, cache = whole(model, ids, torch.ones_like(ids)), 0, [], None
    for size in itertools.cycle(sizes):
        with torch.no_grad():
            parts.append(model(input_ids=ids[:, place : place + size], past_key_values=cache, use_cache=True))
            cache, place = parts[-1].past_key_values, place + size
            if place >= ids.shape[1]:
                break
            if place > 8 and len(sizes) > 1:  # wrong tokens, which open and close answers, and back
                model(input_ids=torch.tensor([[93, 90, 91, 5, 94, 95]]), past_key_values=cache)
                cache.crop(-6)
    logits = torch.cat([part.logits for part in parts], 1)
    weights = torch.cat([part.routing.weights for part in parts], 1)
    laws.close("cache by hand = one forward", logits, expected.logits, atol=CLOSE)
    laws.close("cache by hand = one forward, routing", weights, expected.routing.weights, atol=CLOSE)


def test_the_rows_of_a_cache_are_repeated_selected_and_reordered(laws):
    model, (ids, mask) = shared_answering("llama", top_k=2), asked()
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 4]))
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    text = torch.cat([ids[order], tokens(3, 4, high=90)], 1)
    real = longer(mask[order], text)
    with torch.no_grad():
        out = model(
            input_ids=text[:, -4:], attention_mask=real, position_ids=positions(real)[:, -4:], past_key_values=cache
        )
    laws.close("reordered cache = one forward", out.logits, whole(model, text, real).logits[:, -4:], atol=CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_one_cache_of_a_prompt_serves_every_expert_the_base_and_the_router(laws, family):
    model, (ids, mask) = shared_answering(family, top_k=2), asked()
    ids, mask = ids[:, :-2], mask[:, :-2]
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=True).past_key_values
    text = torch.cat([ids, torch.tensor([91, 92]).expand(3, -1)], 1)
    real, answers = longer(mask, text), []
    for expert in [*EXPERTS, None, "the router"]:
        with model.route_to(expert) if expert != "the router" else model._hooks.forcing(model._hooks.forced):
            out = generate(model, text, real, past_key_values=copy.deepcopy(cache))
            anew = generate(model, text, real)
        laws.equal("one cache under everyone = anew", out.sequences, anew.sequences, family=family)
        answers.append(out.sequences)
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == 5


def test_route_to_writes_the_next_answer_and_leaves_the_turns_before(laws):
    model, (ids, mask) = shared_answering("llama"), asked()
    free = generate(model, ids, mask)
    opened = openers(ids, mask)
    last = opened == opened[:, -1:]
    for experts in ("expert_1", ["expert_2", None, "expert_0"]):
        with model.route_to(experts):
            (out, used) = used_by(model, lambda: generate(model, ids, mask))
            cached = generate(model, ids, mask, past_key_values=None, use_cache=False)
        laws.equal("forced last answer, cached = uncached", out.sequences, cached.sequences)
        laws.close("reported routing = used", out.routing.weights[:, :-1], used, atol=CLOSE)
        prompt = out.routing.weights[:, : ids.shape[1]]
        laws.equal("earlier turns = the router's", prompt[~last], free.routing.weights[:, : ids.shape[1]][~last])
        wanted = [experts] * 3 if isinstance(experts, str) else experts
        told = [turns[-1].experts for turns in out.turns]
        assert told == [{} if name is None else {name: 1.0} for name in wanted]
    assert not torch.equal(free.sequences, out.sequences)
    with model.route_to("expert_1"):  # a forward has no end of a prompt: all answers in it
        weights = whole(model, ids, mask).routing.weights
    laws.equal("forced forward = all its answers", weights[..., 1] == 1, opened >= 0)


def test_the_turns_of_a_result_say_where_each_answer_stands_and_who_wrote_it():
    model, (ids, mask) = shared_answering("llama", top_k=2), asked()
    out = generate(model, ids, mask)
    opened = openers(out.sequences, longer(mask, out.sequences))
    assert [len(turns) for turns in out.turns] == [2, 1, 3]
    for row, turns in enumerate(out.turns):
        for turn in turns:
            assert (opened[row] == turn.start).nonzero()[[0, -1], 0].tolist() == [turn.start, turn.stop - 1]
            weights = out.routing.weights[row, turn.stop - 1]
            assert turn.experts == {EXPERTS[at]: weights[at].item() for at in weights.nonzero()[:, 0].tolist()}


def test_a_text_in_which_no_answer_begins_is_the_bases(laws):
    """The list of its answers was once an error."""
    model, (ids, mask) = shared_answering("llama"), padded([chat(4, 0, closed=False), tokens(9, high=90)], side="left")
    out = generate(model, ids, mask, suppress_tokens=[91, 93, 95])
    with model.route_to(None):
        base = generate(model, ids, mask, suppress_tokens=[91, 93, 95])
    assert [len(turns) for turns in out.turns] == [1, 0]
    laws.equal("a text without an answer = plain base", out.sequences[1], base.sequences[1])
    assert not torch.equal(out.sequences[0], base.sequences[0])


def test_packed_texts_are_each_as_alone(laws):
    model, rows = shared_answering("llama", top_k=2), [chat(4, 3, seed=1, closed=False), chat(5, 2, 1, 4, seed=2)]
    ids = torch.cat(rows)[None]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=places, use_cache=False)
        alone = [model(input_ids=row[None], use_cache=False) for row in rows]
    laws.close("packed = alone", packed.logits, torch.cat([each.logits for each in alone], 1), atol=CLOSE)
    weights = torch.cat([each.routing.weights for each in alone], 1)
    laws.close("packed = alone, routing", packed.routing.weights, weights, atol=CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_are_the_same_when_activations_are_recomputed(laws, family):
    model, (ids, mask) = answering(family, top_k=2).train(), chats(side="right")
    labels = ids.masked_fill(openers(ids, mask) < 0, -100)

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


def test_a_batch_without_an_answer_has_a_backward_pass():
    model, ids = answering().train(), tokens(2, 8, high=90)
    found = gradients(model, lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert not any(gradient.any() for gradient in found.values())


def test_router_losses_are_over_the_answers(laws):
    model, (ids, mask) = answering(top_k=2).train(), chats(side="right")
    labels = ids.masked_fill(openers(ids, mask) < 0, -100)
    routed = model.routed_tokens({"input_ids": ids, "attention_mask": mask})
    laws.equal("routed tokens = answers", routed, openers(ids, mask) >= 0)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, num_tokens_in_batch=routed.sum())
    p = out.routing.probabilities[routed].mean(0)
    laws.close("balance loss = over the answers", out.balance_loss, 3 * (p / 3).sum(), atol=1e-5)
    entropy = -torch.special.entr(out.routing.probabilities[routed]).sum(-1).mean()
    laws.close("entropy = over the answers", -out.entropy_loss, entropy, atol=1e-5)


@pytest.mark.parametrize("knows_tokens", [True, False])
def test_a_step_in_pieces_gives_the_gradient_of_the_whole(laws, knows_tokens):
    """The router's losses too; one of the pieces holds no answer. Labels are on prompts as well."""
    model = answering(tiny_base("llama", dtype=torch.float64), top_k=2, balance_coefficient=0.5, z_loss_coefficient=0.3)
    rows = [*(row[real.bool()] for row, real in zip(*chats(side="right"), strict=True)), tokens(7, high=90)]

    def batch(*chosen):
        ids, mask = padded(list(chosen), side="right")
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    whole_batch = batch(*rows)
    totals = {"num_items_in_batch": int((whole_batch["labels"][:, 1:] != -100).sum())}
    if knows_tokens:
        totals["num_tokens_in_batch"] = int(model.routed_tokens(whole_batch).sum())
    losses = {}

    def backward(name, batches):
        parts = [model(**each, **totals).loss for each in batches]
        losses[name] = sum(parts)
        losses[name].backward()

    model.train()
    whole_one = gradients(model, lambda: backward("whole", [whole_batch]))
    pieces = gradients(model, lambda: backward("pieces", [batch(rows[0], rows[1]), batch(rows[3]), batch(rows[2])]))
    laws.close("a step in pieces, answers routed", losses["pieces"], losses["whole"], atol=1e-6)
    assert_same_gradients(pieces, whole_one, relative=1e-5)


@pytest.mark.parametrize("way", ["save", "deepcopy", "pickle"])
def test_a_copy_decides_as_the_original(laws, way, tmp_path):
    model, (ids, mask) = shared_answering("llama", top_k=2), chats()
    if way == "save":
        model.save_pretrained(str(tmp_path / "saved"))
        other = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), tiny_base("llama"))
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert other.router_config == model.router_config and other.router_config.turns == TURNS
    ours, theirs = (whole(each, ids, mask) for each in (other, model))
    laws.equal("copy = original, logits", ours.logits, theirs.logits)
    laws.equal("copy = original, routing", ours.routing.weights, theirs.routing.weights)


def test_a_nascent_expert_makes_each_decision_dense_and_the_base_still_reads(laws):
    model, (ids, mask) = answering("llama", temperature=2.0, top_k=2), asked()
    model.add_expert("young")
    out = generate(model, ids, mask)
    laws.equal("nascent, cached = uncached", out.sequences, uncached(model, ids, mask)[0])
    assert (out.routing.weights[:, -1] > 0).all()
    assert not out.routing.weights[:, : ids.shape[1]][openers(ids, mask) < 0].any()


def test_the_gate_starts_at_the_features_that_it_will_decide_on(laws):
    kinds = [torch.cat([tokens(8, seed=i, low=3 + 30 * (i % 3), high=5 + 30 * (i % 3)), chat(0, 3)]) for i in range(18)]
    ids = torch.stack(kinds)
    model, other = (answering(router_half_life=32.0) for _ in range(2))
    model.initialize_router([{"input_ids": ids}])
    features = other.router_features(ids)[openers(ids, torch.ones_like(ids)) == 9]
    firsts = other.router_features(ids)[:, 9]
    other.router.initialize([row[None] for row in firsts], seed=0)
    assert len(features) > len(firsts)
    for (name, ours), theirs in zip(model.router.state_dict().items(), other.router.state_dict().values(), strict=True):
        laws.equal(f"gate's start = at the answers, {name.split('.')[0]}", ours, theirs)
    chosen = model(input_ids=ids).routing.weights[:, 10].argmax(-1).tolist()
    assert len({(i % 3, expert) for i, expert in enumerate(chosen)}) == 3


# --- refusals


def test_what_cannot_apply_is_refused():
    model, ids = shared_answering("llama"), chat(5, 3)[None]
    with pytest.raises(ValueError, match="needs input_ids; inputs_embeds alone cannot be routed"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="prompt_lengths has no meaning with granularity='response'"):
        model(input_ids=ids, prompt_lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"prompts go to the base alone.*route_to"):
        model.merge_adapter(["expert_1"])
    with pytest.raises(ValueError, match=r"no text with an answer, as RouterConfig\.turns finds them"):
        model.initialize_router([{"input_ids": tokens(4, 8, high=90)}])
    with pytest.raises(ValueError, match="router_layer is 'final', which granularity 'response' cannot have"):
        answering(router_layer="final")
    with pytest.raises(ValueError, match=r"this base does not say where its tokenizer is from.*find_turn_tokens"):
        tiny_moe(granularity="response")
