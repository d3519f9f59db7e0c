"""A weight that is NaN is named before it does harm, and reaches no row that does not use it."""

import copy
import itertools

import pytest
import torch
from reference.checkpoints import contents
from reference.tiny import FAMILIES, force_path, gradients, padded, tensors, tiny_base, tiny_moe, tokens
from reference.turns import answering

NAN = float("nan")


def batch():
    ids, mask = padded([tokens(n, seed=n) for n in (12, 7)], side="right")
    return {"input_ids": ids, "attention_mask": mask}


def named(model, part):
    """The first parameter or buffer whose name has this part."""
    return next(p for name, p in itertools.chain(model.named_parameters(), model.named_buffers()) if part in name)


BROKEN = {
    "an expert's A": (
        "layers.1.self_attn.v_proj.lora_A.expert_1",
        (0, 0),
        "weights of expert 'expert_1' (model.layers.1",
    ),
    "an expert's B": ("layers.0.mlp.up_proj.lora_B.expert_1", (-1, -1), "weights of expert 'expert_1' (model.layers.0"),
    "a gate row": ("router.gate.expert_1", 3, "the gate row of expert 'expert_1'"),
    "a gate bias": ("router.gate_bias.expert_2", (), "the gate row of expert 'expert_2'"),
    "the router's mean": ("router.feature_mean", 5, "the router's feature_mean"),
    "the base": ("layers.0.mlp.down_proj.base_layer.weight", (7, 1), "the base's model.layers.0.mlp.down_proj.weight"),
    "a norm of the base": ("layers.1.input_layernorm.weight", 0, "the base's model.layers.1.input_layernorm.weight"),
    "a row of the head": ("lm_head.weight", (50, 3), "the base's lm_head.weight"),
}
"""What becomes NaN: a tensor, which of its entries, and what the error must say."""


def forward(model):
    model(**batch())


def forward_without_gradient(model):
    with torch.no_grad():
        model(**batch())


def training_step(model):
    ids = batch()["input_ids"]
    model.train()
    try:
        model(**batch(), labels=ids).loss.backward()
    finally:
        model.eval()


def generate(model):
    model.generate(**batch(), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    ("what", "path", "value"),
    [
        *((what, "dense", NAN) for what in BROKEN),
        *((what, "sparse", NAN) for what in ("an expert's B", "a gate row", "a gate bias")),
        *((what, "sparse", float("inf")) for what in ("an expert's A", "a gate bias", "the router's mean", "the base")),
    ],
)
def test_it_is_named_everywhere_and_nothing_else_changes(laws, monkeypatch, what, path, value, tmp_path):
    """Reported: a gate row at top-1 without gradients, a row of the head, and infinity in the base went unseen."""
    force_path(monkeypatch, path)
    part, entry, message = BROKEN[what]
    model = tiny_moe("llama", num_experts=4)
    model.save_pretrained(str(tmp_path / "saved"))
    good, expected = contents(tmp_path / "saved"), model(**batch()).logits
    tensor = named(model, part).data
    before, tensor[entry] = tensor[entry].clone(), value
    poisoned = tensors(model)
    for call in (forward, forward_without_gradient, training_step, generate):
        with pytest.raises(ValueError) as caught:
            call(model)
        assert message in str(caught.value), call.__name__
    if "base" not in message:  # which is never saved
        with pytest.raises(ValueError, match="nothing was written") as caught:
            model.save_pretrained(str(tmp_path / "saved"))
        assert message in str(caught.value)
    assert contents(tmp_path / "saved") == good
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    law = "a weight that is NaN changes no other"
    for name, kept in poisoned.items():
        laws.equal(law, model.state_dict()[name].nan_to_num(), kept.nan_to_num())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    tensor[entry] = before
    laws.equal("a repaired model is as before", model(**batch()).logits, expected)


@pytest.mark.parametrize("what", ["the base", "a row of the head"])
def test_where_answers_are_routed_it_is_named_on_a_prompt_too(what):
    """Only answers were looked at, so that a prompt under a broken base gave NaN without a word."""
    part, entry, message = BROKEN[what]
    model, ids = answering(), tokens(2, 6, high=90)
    model(input_ids=ids)
    named(model, part).data[entry] = NAN
    with pytest.raises(ValueError) as caught:
        model(input_ids=ids)
    assert message in str(caught.value)


LINEARS = {"gpt2": "c_attn", "phi3": "qkv_proj", "gpt_neox": "query_key_value"}


@pytest.mark.parametrize(
    ("family", "kind", "grad"), [*((family, "lora_A", True) for family in FAMILIES), ("llama", "lora_B", False)]
)
def test_it_does_not_spread_to_rows_that_do_not_use_it(laws, family, kind, grad):
    """Under route_to, with a list, another expert, or the base alone. The head shows what the error keeps back."""
    model, ids, kept = tiny_moe(family), tokens(4, 7), []
    rows = ["expert_0", "expert_1", None, "expert_2"]
    spared = [0, 2, 3]
    model.base.get_output_embeddings().register_forward_hook(lambda module, args, logits: kept.append(logits))
    law = "NaN in an expert does not reach rows that do not use it"
    with torch.set_grad_enabled(grad), model.route_to(rows):
        model(input_ids=ids)
        named(model, f"{LINEARS.get(family, 'v_proj')}.{kind}.expert_1").data[0, 0] = NAN
        with pytest.raises(ValueError, match="weights of expert 'expert_1'"):
            model(input_ids=ids)
    expected, found = kept
    assert found[1].isnan().any()
    laws.equal(law, found[spared], expected[spared], family=family)
    for index in spared:
        with torch.set_grad_enabled(grad), model.route_to(rows[index]):
            model(input_ids=ids[index : index + 1])
        laws.close(law, kept[-1][0], expected[index], family=family, atol=1e-5)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_broken_expert_can_be_removed(laws, monkeypatch, path):
    """Removing the broken expert, as the error advises, leaves what a pool without it gives."""
    force_path(monkeypatch, path)
    model = tiny_moe("llama", num_experts=4)
    healthy = copy.deepcopy(model)
    named(model, "q_proj.lora_B.expert_1").data.fill_(NAN)
    model.router.gate["expert_1"].data.fill_(NAN)
    for one in (model, healthy):
        one.remove_expert("expert_1")
    laws.equal("a pool freed of a broken expert", model(**batch()).logits, healthy(**batch()).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("router_layer", ["embeddings", 1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_routing_never_reads_an_embedding_of_padding(laws, family, router_layer, side):
    """The base itself does: its attention multiplies what stands on padding by zero, so that its output is NaN."""
    model = tiny_moe(family, router_layer=router_layer)
    ids, mask = padded([tokens(n, seed=n) for n in (9, 4)], side=side)
    expected = model.route(ids, mask)
    model.base.get_input_embeddings().weight.data[0] = NAN
    plain = tiny_base(family)
    plain.get_input_embeddings().weight.data[0] = NAN
    assert plain(input_ids=ids, attention_mask=mask).logits[mask.bool()].isnan().any()
    if router_layer == "embeddings":
        found = model.route(ids, mask)
        law = "the routing does not read padding"
        laws.equal(law, found.weights, expected.weights, family=family)
        laws.equal(law, found.logits[mask.bool()], expected.logits[mask.bool()], family=family)
    with pytest.raises(ValueError, match=r"the base's (model.embed_tokens|transformer.wte).weight"):
        model(input_ids=ids, attention_mask=mask)


def test_an_embedding_that_is_not_used_does_no_harm(laws):
    model = tiny_moe("llama")
    ids = tokens(2, 9)
    expected = model(input_ids=ids, labels=ids)
    theirs = gradients(model, lambda: model(input_ids=ids, labels=ids).loss.backward())
    model.base.get_input_embeddings().weight.data[1] = NAN  # below `tokens`' range
    found = model(input_ids=ids, labels=ids)
    law = "an unused embedding has no influence"
    laws.equal(law, found.logits, expected.logits)
    laws.equal(law, found.loss, expected.loss)
    ours = gradients(model, lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
