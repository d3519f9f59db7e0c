"""Laws of the routings that nothing is learned by: to all experts alike, and to experts drawn at random."""

import json
import re

import pytest
import torch
from peft import LoraConfig
from reference.runs import flags, tiny_run_folder
from reference.tiny import LORA, padded, scramble, tensors, tiny_base, tiny_moe, tokens
from transformers import DynamicCache

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.cli import main
from dylo_moe.training.metrics import Meter, gradient_norms
from dylo_moe.utils.errors import DyLoRAWarning

POLICIES = ["uniform", "random"]


def model_with(policy, **options):
    """Experts that do something, and the gate as it was drawn."""
    config = {"policy": policy} if policy == "uniform" else {"policy": policy, "router_half_life": 8.0}
    torch.manual_seed(1)
    model = DyLoRAMoE.from_base(
        tiny_base(), num_experts=4, lora=LoraConfig(**LORA), router=RouterConfig(**config, **options)
    )
    start = {name: row.detach().clone() for name, row in model.router.gate.items()}
    scramble(model)
    with torch.no_grad():
        for name, row in start.items():
            model.router.gate[name].copy_(row)
    return model.eval()


def uniform_by_hand(ids):
    """The deltas of the four experts, each at a quarter, added to the base's weights."""
    model = model_with("uniform")
    base = tiny_base()
    with torch.no_grad():
        for name, layer in model.base.named_modules():
            if hasattr(layer, "lora_A"):
                weight = base.get_submodule(name).weight
                for expert in layer.lora_A:
                    scale = LORA["lora_alpha"] / LORA["r"]
                    weight += 0.25 * scale * layer.lora_B[expert].weight @ layer.lora_A[expert].weight
    return base(input_ids=ids).logits


def test_uniform_is_the_mean_of_all_experts():
    ids = tokens(2, 30)
    out = model_with("uniform")(input_ids=ids)
    torch.testing.assert_close(out.logits, uniform_by_hand(ids), rtol=1e-4, atol=1e-4)
    assert (out.routing.weights == 0.25).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_random_takes_top_k_experts_alike(top_k):
    weights = model_with("random", top_k=top_k).route(tokens(3, 40)).weights
    assert ((weights > 0).sum(-1) == top_k).all()
    assert ((weights == 0) | (weights == 1 / top_k)).all()


def test_random_has_nothing_to_do_with_content():
    """Each kind of text uses all experts alike, and neighbours, or the same token elsewhere, choose independently.

    Bounds are five standard deviations of what chance gives.
    """
    model = model_with("random")
    for low, high in ((3, 30), (60, 97)):
        ids = tokens(16, 256, low=low, high=high)
        chosen = model.route(ids).weights.argmax(-1)
        count = chosen.numel()
        shares = chosen.flatten().bincount(minlength=4) / count
        assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / count) ** 0.5
        same = (chosen[:, 1:] == chosen[:, :-1]).float().mean()
        assert abs(same - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
        assert all(len(chosen[ids == token].unique()) == 4 for token in range(low, high))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_text_is_always_routed_alike_padded_or_cached(policy):
    model, rows = model_with(policy), [tokens(1, 40)[0], tokens(1, 25, seed=2)[0]]
    alone = [model(input_ids=row[None]) for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side=side)
        both = model.route(ids, mask).weights
        for place, out in enumerate(alone):
            assert torch.equal(both[place][mask[place].bool()], out.routing.weights[0])
        assert not both[mask == 0].any()
    cache, parts = DynamicCache(), []
    for start in range(0, 40, 5):
        out = model(input_ids=rows[0][None, start : start + 5], past_key_values=cache, use_cache=True)
        parts.append(out)
    assert torch.equal(torch.cat([out.routing.weights for out in parts], 1), alone[0].routing.weights)
    torch.testing.assert_close(torch.cat([out.logits for out in parts], 1), alone[0].logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_generation_equals_the_uncached_loop(policy):
    model, ids = model_with(policy), tokens(1, 12, seed=4)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
    )
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out.sequences, ids)
    assert torch.equal(out.routing.weights, model.route(ids).weights)
    assert out.routing.logits is None


@pytest.mark.parametrize("policy", POLICIES)
def test_experts_learn_and_the_gate_does_not(policy):
    model, ids = model_with(policy), tokens(4, 20)
    before = tensors(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        out = model(input_ids=ids, labels=ids)
        assert out.aux_loss == 0 and torch.equal(out.loss, out.lm_loss)
        out.loss.backward()
        assert gradient_norms(model).keys() == {expert.name for expert in model.experts}
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    assert {name.rsplit(".", 2)[1] for name in changed} == {expert.name for expert in model.experts}


def test_freezing_and_unfreezing_leaves_the_gate_frozen():
    model = model_with("random")
    model.freeze("expert_0")
    model.unfreeze("expert_0")
    assert not any(parameter.requires_grad for parameter in model.router.parameters())
    assert all(parameter.requires_grad for parameter in model.experts.parameters("expert_0"))


def test_the_meter_counts_where_the_tokens_went():
    model, ids = model_with("uniform"), tokens(2, 10)
    out = model(input_ids=ids)
    meter = Meter(["a"], model.router.names)
    meter.add(losses=torch.zeros(2, 10), labels=ids, routing=out.routing, domain=torch.zeros(2, dtype=torch.int64))
    reading = meter.read()
    assert reading.shares == {f"expert_{index}": 0.25 for index in range(4)}
    with pytest.raises(ValueError, match="policy"):
        _ = out.routing.probabilities


@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpoint_comes_back_with_its_policy(policy, tmp_path):
    model, ids = model_with(policy), tokens(2, 30)
    model.save_pretrained(str(tmp_path / "c"))
    again = DyLoRAMoE.from_pretrained(str(tmp_path / "c"), base=tiny_base())
    assert again.router_config == model.router_config
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not any(parameter.requires_grad for parameter in again.router.parameters())
    words = {"uniform": "all of them alike", "random": "drawn at random"}[policy]
    assert words in (tmp_path / "c" / "README.md").read_text()


def test_a_checkpoint_from_before_policies_is_learned(tmp_path):
    model, ids = tiny_moe(), tokens(2, 20)
    model.save_pretrained(str(tmp_path / "c"))
    manifest = json.loads((tmp_path / "c" / "dylora.json").read_text())
    assert manifest["router"].pop("policy") == "learned"
    del manifest["checksum"]  # which came later
    (tmp_path / "c" / "dylora.json").write_text(json.dumps(manifest))
    with pytest.warns(DyLoRAWarning, match="older version"):
        again = DyLoRAMoE.from_pretrained(str(tmp_path / "c"), base=tiny_base())
    assert again.router_config == model.router_config and again.router_config.policy == "learned"
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert all(parameter.requires_grad for parameter in again.router.parameters())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"policy": "Uniform"}, "policy is 'Uniform'; it must be"),
        ({"policy": "uniform", "top_k": 2}, "top_k is 2, which has no meaning with policy 'uniform'"),
        ({"policy": "uniform", "granularity": "sequence"}, "granularity is 'sequence'"),
        ({"policy": "uniform", "router_half_life": 3.0}, "router_half_life is 3.0"),
        ({"policy": "uniform", "router_layer": "final"}, "router_layer is 'final'"),
        ({"policy": "random", "z_loss_coefficient": 0.1}, "z_loss_coefficient is 0.1"),
        ({"policy": "random", "entropy_coefficient": 0.1}, "entropy_coefficient is 0.1"),
        ({"policy": "random", "temperature": 2.0}, "temperature is 2.0"),
    ],
)
def test_what_cannot_apply_is_refused(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        RouterConfig(**options)


def test_a_pool_that_grows_needs_a_gate_that_learns():
    router = RouterConfig(policy="random")
    with pytest.raises(ValueError, match="a pool that grows needs policy 'learned'"):
        DyLoRAMoE.from_base(tiny_base(), router=router, allow_expert_growth=True)
    with pytest.raises(ValueError, match="nothing can be balanced"):
        DyLoRAMoE.from_base(tiny_base(), router=router, balance_coefficient=0.5)
    model = model_with("random")
    before = tensors(model)
    batch = [{"input_ids": tokens(8, 10)}]
    for call in (
        lambda: model.add_expert("more"),
        lambda: model.import_expert("more", "nowhere"),
        lambda: model.add_skill("more", batch),
        lambda: model.initialize_router(batch),
        model.enable_growth,
    ):
        with pytest.raises(ValueError, match="needs a gate that learns, and this router's policy is 'random'"):
            call()
    after = tensors(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_with_a_policy_trains_experts_and_leaves_the_gate(policy, tmp_path, capsys):
    folder = tiny_run_folder(tmp_path)
    assert main(["train", *flags(folder, tmp_path / "run", "--router_policy", policy, "--max_steps", "3")]) == 0
    model = DyLoRAMoE.from_pretrained(str(tmp_path / "run" / "checkpoint"))
    assert model.router_config.policy == policy
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["gate_drift_expert_0"] for line in log if "gate_drift_expert_0" in line} == {0.0}
    assert {line["balance_loss"] for line in log if "balance_loss" in line} == {0.0}
    capsys.readouterr()
    stream = ["stream", "--model", str(folder / "base"), "--datasets", str(folder / "low.jsonl")]
    assert main([*stream, "--router_policy", policy, "--output_dir", str(tmp_path / "s")]) == 2
    assert "router_policy is not offered: a pool that grows needs a gate that learns" in capsys.readouterr().err
