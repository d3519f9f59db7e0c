"""Who learns from a loss, and that recomputing layers in the backward pass changes nothing of it."""

import copy
import itertools

import pytest
import torch
from reference.tiny import FAMILIES, assert_same_gradients, force_path, gradients, padded, tiny_base, tiny_moe, tokens

NEVER = "expert_3"


def batch(seed=0):
    ids, mask = padded([tokens(n, seed=n + seed) for n in (14, 9)], side="right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def lm_backward(model, **inputs):
    return lambda: model(**(inputs or batch())).lm_loss.backward()


def shun(model, name=NEVER):
    """No token chooses this expert, but its probability stays above zero."""
    with torch.no_grad():
        model.router.gate_bias[name].fill_(-40.0)
    return model


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_selected_experts_and_their_gate_rows_learn_and_nothing_else(monkeypatch, top_k, path):
    """At k = 1 every gate row learns, through the full softmax; above, those that were selected."""
    force_path(monkeypatch, path)
    model = shun(tiny_moe("llama", num_experts=4, top_k=top_k)).train()
    used = model.route(batch()["input_ids"], batch()["attention_mask"]).weights.sum((0, 1)) > 0
    assert used.tolist() == [True, True, True, top_k == 4]
    found = gradients(model, lm_backward(model))
    for index, expert in enumerate(model.experts):
        for name in (f"router.gate.{expert.name}", f"router.gate_bias.{expert.name}"):
            assert found[name].any() == (bool(used[index]) or top_k == 1), name
        for name, _ in model.named_parameters():
            if f".{expert.name}." in name and "lora_" in name:
                gradient = found.pop(name, None)
                assert (gradient is not None and bool(gradient.any())) == bool(used[index]), name
    assert all(name.startswith("router.gate") for name in found)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("frozen", [(), ("expert_0",), ("expert_0", "expert_1", "expert_2")], ids=str)
def test_a_nascent_expert_makes_everyone_learn_but_the_frozen(frozen, temperature):
    model = tiny_moe("llama", top_k=1, temperature=temperature)
    model.add_expert("new")
    for name, parameter in model.named_parameters():
        if "lora_B.new" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.freeze(*frozen)
    found = gradients(model.train(), lm_backward(model))
    learning = {expert.name for expert in model.experts} - set(frozen)
    expected = {
        name
        for name, _ in model.named_parameters()
        if any((f".{expert}." in name and "lora_" in name) or name.endswith(f".{expert}") for expert in learning)
    }
    assert set(found) == expected
    for name, gradient in found.items():
        assert gradient.any(), name


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients_equal_finite_differences(monkeypatch, top_k, path):
    """Through the whole model; its norms compute in fp32 even where the rest is fp64, hence the tolerance."""
    force_path(monkeypatch, path)
    model = tiny_moe(
        tiny_base("llama", dtype=torch.float64), top_k=top_k, lora={"target_modules": ["v_proj", "up_proj"]}
    )
    direction = torch.randn_like(model(**batch()).logits)

    def value():
        return (model(**batch()).logits * direction).sum()

    found = gradients(model, lambda: value().backward())
    for name, parameter in model.named_parameters():
        if name not in found or "router" in name:
            continue
        way = torch.randn_like(parameter)
        with torch.no_grad():
            ahead = (parameter.add_(way, alpha=1e-3), value())[1]
            behind = (parameter.sub_(way, alpha=2e-3), value())[1]
            parameter.add_(way, alpha=1e-3)
        slope, scale = (ahead - behind) / 2e-3, found[name].norm() * way.norm()
        assert abs((found[name] * way).sum() - slope) < 1e-3 * scale, name


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("forced", [None, "expert_1", ["expert_2", None]], ids=str)
def test_forced_experts_learn_and_the_gate_does_not(monkeypatch, forced, path):
    force_path(monkeypatch, path)
    model = tiny_moe("llama").train()
    ids = batch()["input_ids"]
    with model.route_to(forced):
        loss = model(**batch()).loss
    wanted = {name for name in ([forced] if isinstance(forced, str) else forced or []) if name}
    if not wanted:
        assert not loss.requires_grad
        return
    found = gradients(model, loss.backward)
    assert {name for name in ("expert_0", "expert_1", "expert_2") if any(f".{name}." in key for key in found)} == wanted
    assert not any("router" in key for key in found) and all(gradient.any() for gradient in found.values())
    assert ids.shape[0] == 2


# --- gradient checkpointing


def checkpointed(model, on):
    model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()
    return model.train()


def both_ways(model, backward):
    """The gradients of `backward(model)` without and with recomputation; of copies, as each counts as a step."""
    twins = [checkpointed(copy.deepcopy(model), on) for on in (False, True)]
    return [gradients(twin, lambda twin=twin: backward(twin)) for twin in twins]


RECOMPUTED = [
    *itertools.product(["llama", "gemma3", "phi3", "gpt2", "gpt_neox"], [1, 2, 3], ["embeddings", 1], ["token"]),
    *itertools.product(["llama", "gemma3", "gpt2"], [2], ["embeddings", 1, "final"], ["sequence"]),
    *itertools.product(["llama", "gemma3", "gpt2"], [1], ["final"], ["token"]),
]


@pytest.mark.parametrize(("family", "top_k", "router_layer", "granularity"), RECOMPUTED)
def test_recomputation_gives_the_same_gradients(family, top_k, router_layer, granularity):
    model = tiny_moe(family, top_k=top_k, router_layer=router_layer, granularity=granularity, z_loss_coefficient=0.1)
    plain, recomputed = both_ways(model, lambda model: model(**batch()).loss.backward())
    assert any("lora_A" in name for name in plain) and "router.gate.expert_0" in plain
    assert_same_gradients(recomputed, plain, relative=1e-6)


def backward_outside_route_to(model):
    with model.route_to(["expert_1", "expert_2"]):
        loss = model(**batch()).loss
    loss.backward()


def backward_inside_another_route_to(model):
    loss = model(**batch()).loss
    with model.route_to("expert_1"):
        loss.backward()


def two_forwards_then_one_backward(model):
    first = model(**batch()).loss
    with model.route_to("expert_0"):
        second = model(**batch(seed=50)).loss
    (first + 2 * second + model(**batch(seed=90)).loss).backward()


def backward_after_eval_and_generate(model):
    loss = model(**batch()).loss
    model.eval()
    model.generate(input_ids=tokens(1, 4), max_new_tokens=2)
    model.route(tokens(2, 5))
    model.train()
    loss.backward()


def backward_after_the_pool_changed(model):
    loss = model(**batch()).loss
    before = [expert.mature for expert in model.experts]
    model.experts[0].mature = False
    loss.backward()
    model.experts[0].mature = before[0]


@pytest.mark.parametrize(
    "backward",
    [
        backward_outside_route_to,
        backward_inside_another_route_to,
        two_forwards_then_one_backward,
        backward_after_eval_and_generate,
        backward_after_the_pool_changed,
    ],
)
def test_recomputation_uses_the_routing_of_its_own_forward(backward):
    plain, recomputed = both_ways(tiny_moe("llama", top_k=2), backward)
    assert_same_gradients(recomputed, plain, relative=1e-6)


def test_recomputation_under_autocast_gives_the_same_gradients():
    def backward(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()

    plain, recomputed = both_ways(tiny_moe("llama"), backward)
    assert_same_gradients(recomputed, plain, relative=1e-6)


def test_routing_of_a_checkpointed_model_in_training_is_the_same():
    model, ids = tiny_moe("llama"), tokens(2, 9)
    expected = model.route(ids).weights
    assert torch.equal(checkpointed(model, True).route(ids).weights, expected)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False, "context_fn": None}], ids=str)
def test_options_that_would_lose_the_router_are_refused(options):
    model = tiny_moe("llama")
    for enable in (model.gradient_checkpointing_enable, model.activation_checkpointing_enable):
        with pytest.raises(ValueError, match=r"use_reentrant|context_fn"):
            enable(options)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_switched_on_behind_our_back_is_never_silently_wrong(family):
    model = tiny_moe(family).train()
    plain = gradients(model, lm_backward(model))
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        model.base.gradient_checkpointing_enable(options)
        try:
            found = gradients(model, lm_backward(model))
        except RuntimeError as error:
            assert "gradient" in str(error), error
            model.zero_grad(set_to_none=True)
        else:
            assert_same_gradients(found, plain, relative=1e-6)
        model.base.gradient_checkpointing_disable()
    assert_same_gradients(gradients(model, lm_backward(model)), plain, relative=1e-6)


def test_a_failed_forward_leaves_nothing_behind(recwarn):
    model, ids = tiny_moe("llama"), tokens(2, 9)
    expected = model(input_ids=ids).logits
    bad = [
        {"input_ids": ids, "attention_mask": torch.ones(2, 1, 9, 9)},
        {"input_ids": ids, "attention_mask": {"full_attention": None}},
        {"input_ids": ids + 1000},
    ]
    for inputs, again in itertools.product(bad, range(2)):
        with pytest.raises((ValueError, IndexError)):
            model(**inputs)
        if again:
            assert torch.equal(model(input_ids=ids).logits, expected)
    with pytest.raises(RuntimeError, match="outside a forward"):
        model.base.model.layers[0].mlp(torch.zeros(1, 1, 32))
    assert not [warning for warning in recwarn if "silenced" in str(warning.message)]
