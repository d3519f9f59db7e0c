"""Laws at the edges: packed texts, single tokens, the context's end, one-sided routing."""

import pytest
import torch
from reference.tiny import (
    FAMILIES,
    assert_same_gradients,
    force_path,
    gradients,
    padded,
    scramble,
    tiny_base,
    tiny_moe,
    tokens,
)


def batch():
    ids, mask = padded([tokens(n, seed=n) for n in (14, 5, 9)], side="right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# --- packed texts


@pytest.mark.parametrize(
    ("family", "path", "router"),
    [
        *((family, "sparse", {}) for family in FAMILIES),
        ("llama", "dense", {}), ("gpt2", "dense", {}), ("llama", "dense", {"router_layer": 1}),
        ("llama", "sparse", {"router_layer": "final"}), ("llama", "sparse", {"granularity": "sequence"}),
    ],
)  # fmt: skip
def test_packed_texts_are_each_text_alone(laws, monkeypatch, family, path, router):
    """Logits, routing, and the loss, for which no cache has to be switched off by hand."""
    force_path(monkeypatch, path)
    texts = [tokens(n, seed=n) for n in (7, 5, 9)]
    ids = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    base = tiny_base(family)
    apart = torch.cat([base(input_ids=text[None]).logits for text in texts], 1)
    torch.testing.assert_close(base(ids, position_ids=positions, use_cache=False).logits, apart, rtol=0, atol=1e-5)
    model = tiny_moe(family, top_k=2, **router)
    alone = [model(input_ids=text[None], labels=text[None]) for text in texts]
    labels = torch.cat([torch.cat([torch.tensor([-100]), text[1:]]) for text in texts])[None]
    if router.get("granularity") == "sequence":  # else where each text's labels begin would be its prompt's end
        labels = ids.clone()
    law = "packed texts are each text alone"
    for options in ({"use_cache": False}, {"labels": labels}):
        packed = model(input_ids=ids, position_ids=positions, **options)
        laws.close(law, packed.logits, torch.cat([out.logits for out in alone], 1), family=family, atol=1e-5)
        weights = torch.cat([out.routing.weights for out in alone], 1)
        laws.close(law, packed.routing.weights, weights, family=family, atol=1e-5)
    if router.get("granularity") != "sequence":
        summed = sum(out.lm_loss * (len(text) - 1) for out, text in zip(alone, texts, strict=True))
        laws.close(law, packed.lm_loss, summed / (ids.shape[1] - 3), family=family, atol=1e-5)


# --- single tokens, and the context's end


@pytest.mark.parametrize(
    ("family", "path"), [*((family, "sparse") for family in FAMILIES), ("llama", "dense"), ("gpt2", "dense")]
)
def test_a_text_of_one_token(laws, monkeypatch, family, path):
    """It is the first token of any longer text, alone, in a batch of longer rows, and as a prompt."""
    force_path(monkeypatch, path)
    model, ids = tiny_moe(family, top_k=2), tokens(3, 8)
    whole = model(input_ids=ids)
    for rows in (ids[:, :1], ids[:1, :1]):
        out = model(input_ids=rows)
        law = "a text of one token is the first of any longer one"
        laws.close(law, out.logits, whole.logits[: len(rows), :1], family=family, atol=1e-5)
        laws.close(law, out.routing.weights, whole.routing.weights[: len(rows), :1], family=family, atol=1e-5)
    for side in ("left", "right"):
        texts, mask = padded([ids[0], ids[1, :1]], side=side)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = model(input_ids=texts, attention_mask=mask, position_ids=positions)
        place = -1 if side == "left" else 0
        law = "a row of one token beside longer ones"
        laws.close(law, out.logits[1, place], whole.logits[1, 0], family=family, atol=1e-5)
        laws.close(law, out.routing.weights[1, place], whole.routing.weights[1, 0], family=family, atol=1e-5)
    text = ids[:, :1]
    for _ in range(4):
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    made = model.generate(input_ids=ids[:, :1], max_new_tokens=4, do_sample=False)
    laws.equal("a prompt of one token decodes as without a cache", made, text, family=family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_text_as_long_as_the_context(laws, family):
    """All of its tokens, and generated up to the last one; GPT-2 has learned positions up to there and no further.

    Reported: one token more, and what had been generated was lost to an IndexError in reading its routing."""
    model = tiny_moe(tiny_base(family, max_position_embeddings=64), top_k=2)
    ids = tokens(2, 64)
    whole, part = model(input_ids=ids), model(input_ids=ids[:, :50])
    law = "the first tokens of a full context are those of a shorter text"
    laws.close(law, whole.logits[:, :50], part.logits, family=family, atol=1e-5)
    made = model.generate(input_ids=ids[:, :59], max_length=64, do_sample=False, return_dict_in_generate=True)
    assert made.sequences.shape == (2, 64)
    again = model(input_ids=made.sequences)
    law = "decoding up to the context's end"
    laws.equal(law, made.sequences[:, 59:], again.logits[:, 58:-1].argmax(-1), family=family)
    laws.close(law, made.routing.weights, again.routing.weights, family=family, atol=1e-5)
    behind = model.generate(input_ids=ids[:, :59], max_length=65, do_sample=False, return_dict_in_generate=True)
    laws.equal(law, behind.sequences[:, :64], made.sequences, family=family)
    laws.close(law, behind.routing.weights[:, :64], made.routing.weights, family=family, atol=1e-5)
    assert behind.routing.mask[:, 64].any() == (family != "gpt2")  # a token that GPT-2 can say and not read


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("router_layer", ["embeddings", 1])
def test_learned_positions_of_padded_prompts_are_the_routers_too(laws, router_layer, granularity):
    """Reported: the routing that `generate` returned, and what a sequence was decided on, counted padding as text."""
    model = tiny_moe("gpt2", router_layer=router_layer, granularity=granularity)
    rows = [tokens(n, seed=n) for n in (9, 3, 6)]
    ids, mask = padded(rows, side="left")
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)
    for index, row in enumerate(rows):
        alone = model.generate(input_ids=row[None], **options)
        law = "a padded prompt decodes as it does alone"
        laws.equal(law, together.sequences[index, 9:], alone.sequences[0, len(row) :], family="gpt2")
        ours = together.routing.weights[index, 9 - len(row) :]
        laws.close(law, ours, alone.routing.weights[0], family="gpt2", atol=1e-5)


# --- one-sided routing


def bias(model, name, value):
    with torch.no_grad():
        model.router.gate_bias[name].fill_(value)
    return model


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize(("family", "top_k"), [("llama", 1), ("llama", 2), ("gemma3", 1), ("gpt2", 2)])
def test_an_expert_that_no_token_chooses_is_as_if_it_were_not_there(laws, monkeypatch, family, top_k, path):
    """It gets no gradient, and the others' losses and gradients are those of a pool without it."""
    force_path(monkeypatch, path)
    model = bias(tiny_moe(family, num_experts=4, top_k=top_k, balance_coefficient=0.0), "expert_3", -1e4).train()
    losses = []

    def backward():
        losses.append(model(**batch()).loss)
        losses[-1].backward()

    found = gradients(model, backward)
    for name in [name for name in found if "expert_3" in name]:
        gradient = found.pop(name)
        law = "an expert that no token chooses gets no gradient"
        laws.equal(law, gradient, torch.zeros_like(gradient), family=family)
    model.remove_expert("expert_3")
    without = gradients(model, backward)
    laws.close("an expert that no token chooses is not there for the others", *losses, family=family, atol=1e-6)
    assert_same_gradients(found, without, relative=1e-4)


@pytest.mark.parametrize(
    ("family", "mode", "path"),
    [
        *((family, "top 1", "sparse") for family in FAMILIES),
        *(("llama", mode, "dense") for mode in ("top 1", "top 2", "nascent")), ("gemma3", "top 2", "sparse"),
    ],
)  # fmt: skip
def test_all_tokens_on_one_expert_is_route_to(laws, monkeypatch, family, mode, path):
    force_path(monkeypatch, path)
    model = tiny_moe(family, num_experts=4, top_k=2 if mode == "top 2" else 1, balance_coefficient=0.0)
    if mode == "nascent":
        model.add_expert("new")
        scramble(model)
    bias(model, "expert_2", 1e5)
    inputs = batch()
    real = inputs["attention_mask"].bool()
    chosen = model(**inputs)
    with model.route_to("expert_2"):
        forced = model(**inputs)
        theirs = gradients(model, lambda: model(**inputs).loss.backward())
    law = "all tokens on one expert is route_to"
    laws.equal(law, chosen.routing.weights, forced.routing.weights, family=family)
    laws.close(law, chosen.logits[real], forced.logits[real], family=family, atol=1e-5)
    ours = gradients(model, lambda: model(**inputs).loss.backward())
    assert_same_gradients({name: ours[name] for name in theirs}, theirs, relative=1e-4)
