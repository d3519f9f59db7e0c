"""Laws of a merge: it is the best of its rank for the mean of two experts, and nothing else moves."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference.tiny import LORA, tiny_base, tokens

from dylo_moe import DyLoRAMoE
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.experts.merging import Factors, approximate, check_merge
from dylo_moe.routing.config import BASE

WORDS = {"ant": 3, "bee": 25, "cat": 47}
"""The first of the token ids of each skill, which are its own."""


def sample(skill, *, seed=0, rows=32):
    generator = torch.Generator().manual_seed(WORDS[skill] + 100 * seed)
    ids = torch.randint(WORDS[skill], WORDS[skill] + 22, (rows, 40), generator=generator)
    return [{"input_ids": part} for part in ids.split(16)]


@torch.no_grad()
def grown(*, rows=(32, 32, 32), ranks=(None, None, None), family="llama", **lora):
    """A pool of three mature experts far from zero, each of which knows its skill from so many texts."""
    config = LoraConfig(**{**LORA, **lora})
    growth = GrowthConfig(known_skill="grow", start_from="fresh")
    model = DyLoRAMoE.from_base(tiny_base(family), lora=config, allow_expert_growth=True, growth=growth).eval()
    for skill, count, rank in zip(WORDS, rows, ranks, strict=True):
        model.add_skill(skill, sample(skill, rows=count), rank=rank)
        model.mature(skill)
        generator = torch.Generator().manual_seed(WORDS[skill])
        for parameter in model.experts.parameters(skill):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def deltas(model, name):
    """The whole delta of an expert in each routed linear, as [O, D]."""
    return [
        layer.adapters[name].shape.scaling * layer.adapters[name].up.weight @ layer.adapters[name].down.weight
        for layer in model.experts.layers
    ]


@torch.no_grad()
def keep_components(model, name, kept):
    """Leave an expert only some of its components."""
    for parameter in model.experts.parameters(name):
        axis = 0 if parameter.shape[0] == model.experts[name].rank else 1
        mask = torch.zeros(model.experts[name].rank)
        mask[kept] = 1
        parameter.mul_(mask[:, None] if axis == 0 else mask)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_an_experts_merge_with_its_twin_is_itself(laws, family):
    model = grown(family=family)
    model.experts.copy("ant", "bee")
    expected = deltas(model, "ant")
    merge = model.merge_experts("ant", "bee")
    for was, now in zip(expected, deltas(model, "ant"), strict=True):
        laws.close("an expert merged with its twin", now, was, atol=1e-6)
    assert merge.kept == pytest.approx(1, abs=1e-9) and merge.alike == pytest.approx(1, abs=1e-9)


@torch.no_grad()
def test_two_halves_of_a_rank_are_merged_exactly(laws):
    """Components 0 and 1 of one expert, 2 and 3 of the other: their mean has rank 4."""
    model = grown(rows=(32, 16, 32))
    keep_components(model, "ant", [0, 1])
    keep_components(model, "bee", [2, 3])
    expected = [(2 * one + other) / 3 for one, other in zip(deltas(model, "ant"), deltas(model, "bee"), strict=True)]
    merge = model.merge_experts("ant", "bee", name="both")
    assert merge.weights == pytest.approx((2 / 3, 1 / 3)) and merge.rank == 4
    for was, now in zip(expected, deltas(model, "both"), strict=True):
        laws.close("two halves of a rank, merged", now, was, atol=1e-6)
    assert merge.kept == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("rank", [None, 2, 8, 11])
@torch.no_grad()
def test_a_merge_is_that_of_peft(laws, tmp_path, rank):
    """PEFT's add_weighted_adapter makes the whole delta and cuts its full SVD; the same, by another way."""
    model = grown(ranks=(4, 3, 4))
    model.save_pretrained(str(tmp_path))
    stock = PeftModel.from_pretrained(tiny_base(), tmp_path / "experts" / "ant", adapter_name="ant")
    stock.load_adapter(tmp_path / "experts" / "bee", adapter_name="bee")
    stock.add_weighted_adapter(["ant", "bee"], [0.5, 0.5], "both", combination_type="svd", svd_rank=rank or 4)
    merge = model.merge_experts("ant", "bee", name="both", rank=rank)
    assert merge.rank == model.experts["both"].rank == (rank or 4)
    stock.set_adapter("both")
    ids = tokens(2, 12)
    with model.route_to("both"):
        laws.close("a merge against PEFT's", model(input_ids=ids).logits, stock(input_ids=ids).logits, atol=2e-5)


@torch.no_grad()
def test_what_a_merge_keeps_is_measured_against_the_mean_itself():
    model = grown()
    means = [(one + other) / 2 for one, other in zip(deltas(model, "ant"), deltas(model, "bee"), strict=True)]
    products = [(one * other).sum() for one, other in zip(deltas(model, "ant"), deltas(model, "bee"), strict=True)]
    norms = [torch.stack([delta.square().sum() for delta in deltas(model, name)]).sum() for name in ("ant", "bee")]
    merge = model.merge_experts("ant", "bee", rank=3)
    lost = [(mean - now).square().sum() for mean, now in zip(means, deltas(model, "ant"), strict=True)]
    energy = [mean.square().sum() for mean in means]
    shares = {
        path: float(1 - part / whole)
        for (path, _), part, whole in zip(model.experts.named_layers(), lost, energy, strict=True)
    }
    assert merge.kept == pytest.approx(float(1 - sum(lost) / sum(energy)), abs=1e-5)
    assert merge.worst_linear == min(shares, key=shares.__getitem__)
    assert merge.worst == pytest.approx(min(shares.values()), abs=1e-5)
    assert merge.alike == pytest.approx(float(sum(products) / (norms[0] * norms[1]).sqrt()), abs=1e-5)


def test_a_delta_of_zero_stays_zero_and_can_still_learn():
    zero = torch.zeros(6, 2, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    found = approximate(Factors((zero[0], zero[0]), (zero[1], zero[1])), (0.5, 0.5), 2)
    assert not found.up.any() and bool((found.down.norm(dim=1) > 0.9).all()) and found.energy == 0


@torch.no_grad()
def test_stock_peft_loads_a_merged_expert_and_the_model_comes_back_bit_for_bit(laws, tmp_path):
    model = grown()
    expected = [(one + other) / 2 for one, other in zip(deltas(model, "ant"), deltas(model, "bee"), strict=True)]
    model.merge_experts("ant", "bee", name="both", rank=8)
    model.save_pretrained(str(tmp_path))
    loaded, ids = DyLoRAMoE.from_pretrained(str(tmp_path), base=tiny_base()), tokens(2, 12)
    laws.equal("a merged model loaded again", loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.library.record() == model.library.record() and list(loaded.experts) == list(model.experts)
    naive = tiny_base()
    for (path, _), delta in zip(model.experts.named_layers(), expected, strict=True):
        naive.get_submodule(path).weight.add_(delta)
    stock = PeftModel.from_pretrained(tiny_base(), tmp_path / "experts" / "both")
    with loaded.route_to("both"):
        found = loaded(input_ids=ids).logits
    laws.close("a merged expert against stock PEFT", found, stock(input_ids=ids).logits, atol=1e-5)
    laws.close(
        "a merged expert against the base plus the mean of the deltas", found, naive(input_ids=ids).logits, atol=2e-5
    )


@torch.no_grad()
def test_the_others_stay_bit_for_bit_and_library_and_gate_follow():
    model = grown()
    before, random = copy.deepcopy(model), torch.get_rng_state()
    model.merge_experts("ant", "bee", name="both")
    assert torch.equal(random, torch.get_rng_state())
    assert model.experts.names == ("cat", "both") and model.router.names == (BASE, "cat", "both")
    for was, now in zip(before.experts.parameters("cat"), model.experts.parameters("cat"), strict=True):
        assert torch.equal(was, now)
    assert {name: model.library[name].expert for name in model.library.skills} == {
        "ant": "both",
        "bee": "both",
        "cat": "cat",
    }
    for skill in WORDS:
        assert set(model.library[skill].shares) <= {BASE, "cat", "both"}
        assert sum(model.library[skill].shares.values()) == pytest.approx(1)
        assert torch.equal(model.library[skill].mean, before.library[skill].mean)
        owner = model.library[skill].expert
        routing = model.route(sample(skill, seed=1)[0]["input_ids"])
        assert float(routing.weights[:, 8:, routing.names.index(owner)].mean()) > 0.8, skill
    decision = model.add_skill("again", sample("bee", seed=2))
    assert not decision.novel and decision.nearest == "bee"


def test_what_cannot_be_merged_is_refused_and_nothing_changes():
    model = grown()
    model.add_expert("young")
    before = copy.deepcopy(model.state_dict()), model.library.record()
    for first, second, options, message in (
        ("ant", "ant", {}, "named twice"),
        ("ant", "nobody", {}, "there is no expert 'nobody'"),
        (BASE, "ant", {}, "there is no expert 'base'"),
        ("ant", "young", {}, "has no skill of young"),
        ("ant", "bee", {"name": "cat"}, "already an expert 'cat'"),
        ("ant", "bee", {"name": "a b"}, "expert name is 'a b'"),
        ("ant", "bee", {"rank": 0}, "rank is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.merge_experts(first, second, **options)
    model.experts["bee"].mature = False
    with pytest.raises(ValueError, match="'bee' is still learning"):
        model.merge_experts("ant", "bee")
    assert model.library.record() == before[1]
    assert all(torch.equal(before[0][name], value) for name, value in model.state_dict().items())


def test_experts_of_different_linears_are_refused(tmp_path):
    model = grown()
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj"]})
    get_peft_model(tiny_base(), config).save_pretrained(str(tmp_path))
    model.import_expert("narrow", str(tmp_path))
    model.mature("narrow")
    with pytest.raises(ValueError, match=r"adapt different linears: model\.layers\.0\.mlp\.down_proj"):
        check_merge(model.experts, "ant", "narrow", "ant")


def test_a_pool_that_was_trained_jointly_has_nothing_to_follow():
    model = DyLoRAMoE.from_base(tiny_base(), num_experts=2, lora=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="no skill library"):
        model.merge_experts("expert_0", "expert_1")


@torch.no_grad()
def test_the_last_two_become_one():
    model = grown()
    model.merge_experts("ant", "bee")
    model.merge_experts("cat", "ant", rank=5)
    assert model.experts.names == ("cat",) and model.experts["cat"].rank == 5
    assert {model.library[name].expert for name in model.library.skills} == {"cat"}
