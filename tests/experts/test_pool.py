"""Laws of the pool: what is added, matured, frozen or removed moves nothing else."""

import copy
import itertools
import pickle

import pytest
import torch
from reference.stock import load_stock
from reference.tiny import FAMILIES, force_path, gradients, padded, scramble, tensors, tiny_base, tiny_moe, tokens

from dylo_moe import DyLoRAMoE
from dylo_moe.experts.adapter import lora_config
from dylo_moe.experts.config import ExpertConfig, alpha_of_scale
from dylo_moe.experts.layer import RoutedLayer


def batch():
    ids, mask = padded([tokens(n, seed=n) for n in (11, 30, 8, 17)], side="left")
    return {"input_ids": ids, "attention_mask": mask}


def grow(model, name="new", *, bias=0.0):
    """A matured new expert that does something; `bias` says how much the gate likes it."""
    model.add_expert(name)
    model.mature(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        model.router.gate[name].copy_(torch.randn(model.router.gate[name].shape) * 6)
        model.router.gate_bias[name].fill_(bias)


def rows_without(routing, name):
    """Rows of the batch in which no token chose this expert."""
    return (routing.weights[..., routing.names.index(name)] > 0).any(1).logical_not()


def storage_ratio(model):
    """Bytes of the storages behind the experts, over the bytes of their matrices."""
    parameters = [p for expert in model.experts for p in model.experts.parameters(expert.name)]
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    return sum(held.values()) / sum(p.numel() * p.element_size() for p in parameters)


# --- growth


GROWN = [
    *itertools.product(["llama"], [1, 2], [True, False]),
    *((family, 1 + index % 2, index % 4 < 2) for index, family in enumerate(FAMILIES) if family != "llama"),
]
"""Family, top-k, and whether a gradient is recorded."""


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize(("family", "top_k", "grad"), GROWN)
def test_growth_leaves_rows_that_do_not_choose_the_new_expert_bit_equal(laws, monkeypatch, family, top_k, grad, path):
    """Also where other rows of the batch do choose it."""
    force_path(monkeypatch, path)
    with torch.set_grad_enabled(grad):
        model = tiny_moe(family, num_experts=4, top_k=top_k)
        before = model(**batch())
        grow(model, "shunned", bias=-100.0)
        after = model(**batch())
        assert rows_without(after.routing, "shunned").all()
        law = "growth moves nothing of rows that do not choose the new expert, on the same path"
        laws.equal(law, after.routing.logits[..., :4], before.routing.logits, family=family)
        laws.equal(law, after.routing.weights[..., :4], before.routing.weights, family=family)
        laws.equal(law, after.logits, before.logits, family=family)

        grow(model, "liked")
        with torch.no_grad():  # liked by the first row alone
            features = model.router_features(**batch())
            own = features[0, -1] - features[1:, -1].mean(0)
            model.router.gate["liked"].copy_(own)
            liking = model.route(**batch()).logits[..., -1].masked_fill(batch()["attention_mask"] == 0, float("-inf"))
            model.router.gate["liked"].mul_(1e3)
            model.router.gate_bias["liked"].fill_(-500 * float(liking[0].max() + liking[1:].max()))
        mixed = model(**batch())
        spared = rows_without(mixed.routing, "liked")
        assert 0 < int(spared.sum()) < 4
        laws.equal(law, mixed.logits[spared], before.logits[spared], family=family)


@pytest.mark.parametrize(("family", "top_k"), [("llama", 2), *((family, 1) for family in FAMILIES)])
def test_growth_changes_nothing_across_kernel_paths(laws, monkeypatch, family, top_k):
    for before, after in (("dense", "sparse"), ("sparse", "dense")):
        model = tiny_moe(family, num_experts=4, top_k=top_k)
        force_path(monkeypatch, before)
        old = model(**batch()).logits
        grow(model, "shunned", bias=-100.0)
        force_path(monkeypatch, after)
        new = model(**batch()).logits
        laws.close("growth moves next to nothing across paths", new, old, family=family, atol=1e-5)


def test_from_64_to_65_experts_nothing_moves(monkeypatch):
    """The gate's product is padded to 64 rows; the 65th expert widens it."""
    force_path(monkeypatch, "sparse")
    model = tiny_moe("llama", num_experts=63, lora={"r": 1, "target_modules": ["v_proj"]})
    before = model(**batch())
    for count in (64, 65):
        grow(model, f"shunned{count}", bias=-100.0)
        after = model(**batch())
        assert len(model.experts) == count
        assert torch.equal(after.routing.logits[..., :63], before.routing.logits)
        assert torch.equal(after.logits, before.logits)


def test_a_nascent_expert_makes_routing_dense_and_its_maturity_sparse_again():
    model = tiny_moe("llama", top_k=1, temperature=0.5)
    before = model(**batch())
    model.add_expert("new")
    assert [(e.name, e.mature) for e in model.experts][-1] == ("new", False)
    dense = model(**batch()).routing
    real = dense.mask
    assert (dense.weights[real] > 0).all()
    torch.testing.assert_close(dense.weights[real], (dense.logits[real] / 0.5).softmax(-1))
    model.add_expert("second")
    model.mature("new")
    assert (model(**batch()).routing.weights[real] > 0).all()
    model.mature("second")
    sparse = model(**batch()).routing
    assert ((sparse.weights > 0).sum(-1) == real).all()
    with torch.no_grad():
        model.router.gate_bias["new"].fill_(-100)
        model.router.gate_bias["second"].fill_(-100)
    torch.testing.assert_close(model(**batch()).logits, before.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_new_expert_has_no_delta_and_old_ones_stay(monkeypatch, path):
    force_path(monkeypatch, path)
    model = tiny_moe("llama")
    old = tensors(model)
    expert = model.add_expert("new", rank=6, skill="sql")
    assert (expert.rank, expert.mature, expert.skill, expert.trainable) == (6, False, "sql", True)
    assert expert.parameters == sum(p.numel() for n, p in model.named_parameters() if ".new." in n and "lora_" in n)
    for name, tensor in old.items():
        if name not in ("router.shares", "router.step_counts"):
            assert torch.equal(model.state_dict()[name], tensor), name
    with model.route_to("new"):
        torch.testing.assert_close(model(**batch()).logits, tiny_base("llama")(**batch()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "patterns", [{}, {"alpha_pattern": {"up_proj": 32}}, {"rank_pattern": {"down_proj": 2}}], ids=str
)
def test_another_rank_keeps_the_scaling_of_every_layer_or_is_refused(patterns, use_rslora):
    """Reported: alpha followed the rank for the layers without a pattern only."""
    model = tiny_moe("llama", lora={**patterns, "use_rslora": use_rslora})
    try:
        model.add_expert("wide", rank=9)
    except ValueError as error:
        assert patterns and next(iter(patterns)) in str(error)
        return
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedLayer):
            torch.testing.assert_close(
                layer.scaling["wide"], layer.scaling["expert_0"], msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank, alpha", [(4, 8), (3, 2.5)])
def test_the_options_give_the_scale_that_stock_peft_has(use_rslora, rank, alpha, tmp_path):
    config = ExpertConfig(num_experts=1, lora_r=rank, lora_alpha=alpha, lora_dropout=0.0, use_rslora=use_rslora)
    model = scramble(DyLoRAMoE.from_base(tiny_base(), num_experts=1, lora=lora_config(config))).eval()
    model.save_pretrained(str(tmp_path))
    stock = load_stock(tmp_path / "experts" / "expert_0")
    scales = [module.scaling["default"] for module in stock.modules() if hasattr(module, "lora_A")]
    assert set(scales) == {config.scale} == {alpha / rank ** (0.5 if use_rslora else 1)}
    torch.testing.assert_close(model(**batch()).logits, stock(**batch()).logits, rtol=1e-5, atol=1e-6)
    again = alpha_of_scale(config.scale, rank, use_rslora=use_rslora)
    assert again == pytest.approx(alpha, rel=1e-15) and (use_rslora or type(again) is type(alpha))


@pytest.mark.parametrize("rank", [0, -3, 2.5, "4"])
def test_a_bad_rank_is_refused_and_nothing_is_added(rank):
    model = tiny_moe("llama")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="rank is"):
        model.add_expert("new", rank=rank)
    assert list(model.state_dict()) == keys and "new" not in model.experts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_expert_added_to_a_converted_model_can_be_used(dtype):
    """Reported: PEFT made the new expert fp32 beside bf16 ones, and the first forward failed."""
    model = tiny_moe("llama").to(dtype)
    model.add_expert("new")
    assert {p.dtype for expert in model.experts for p in model.experts.parameters(expert.name)} == {dtype}
    assert model(**batch()).logits.dtype == dtype
    with model.route_to("new"), torch.no_grad():
        assert torch.equal(model(**batch()).logits, tiny_base("llama", dtype=dtype)(**batch()).logits)


# --- removal


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("removed", ["first", "middle", "last"])
def test_removing_restores_what_was_before_it_was_added(monkeypatch, removed, path):
    force_path(monkeypatch, path)
    whole = tiny_moe("llama", num_experts=4)
    names = {"first": "expert_0", "middle": "expert_1", "last": "expert_3"}
    kept = [name for name in whole.experts.names if name != names[removed]]
    with torch.no_grad():
        whole.router.gate_bias[names[removed]].fill_(-100.0)
    before = whole(**batch())
    whole.remove_expert(names[removed])
    after = whole(**batch())
    assert whole.experts.names == whole.router.names == after.routing.names == tuple(kept)
    columns = [before.routing.names.index(name) for name in kept]
    assert torch.equal(after.routing.logits, before.routing.logits[..., columns])
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    assert not [key for key in whole.state_dict() if names[removed] in key]
    generated = whole.generate(**batch(), max_new_tokens=3, do_sample=False)
    assert generated.shape == (4, 33)
    model = tiny_moe("llama")
    start = model(**batch()).logits
    model.add_expert("new")
    model.remove_expert("new")
    assert torch.equal(model(**batch()).logits, start)


def test_the_last_expert_and_unknown_ones_cannot_be_removed():
    model = tiny_moe("llama", num_experts=1)
    with pytest.raises(ValueError, match="'expert_0' is the only expert"):
        model.remove_expert("expert_0")
    for pool in (model, tiny_moe("llama")):
        before = pool(**batch()).logits
        for call in (pool.remove_expert, pool.mature, pool.freeze, pool.unfreeze):
            with pytest.raises(ValueError, match="no expert 'nobody'; the pool has expert_0"):
                call("nobody")
        assert torch.equal(pool(**batch()).logits, before)


@pytest.mark.parametrize(
    "removed", [["expert_0"], ["expert_3"], ["expert_1", "expert_2"], ["expert_3", "expert_0"]], ids=str
)
def test_a_removed_expert_gives_its_memory_back(removed):
    """Reported: what was left of a block still lay in order, so the whole block was kept."""
    model = tiny_moe("llama", num_experts=4)
    assert storage_ratio(model) == 1.0
    for name in removed:
        model.remove_expert(name)
        assert storage_ratio(model) <= 1.1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.add_expert("new", rank=9),
        lambda m: m.bfloat16(),
        copy.deepcopy,
        lambda m: m.freeze("expert_0"),
    ],
)
def test_experts_are_never_held_twice(change):
    model = tiny_moe("llama", num_experts=4)
    changed = change(model)
    model = changed if isinstance(changed, type(model)) else model
    assert storage_ratio(model) <= 1.1
    for _, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, RoutedLayer)):
        assert {id(adapter.down) for adapter in layer.adapters.values()} == {id(m) for m in layer.lora_A.values()}
        assert {id(adapter.up) for adapter in layer.adapters.values()} == {id(m) for m in layer.lora_B.values()}


# --- trainability


def test_freezing_takes_an_expert_and_its_gate_row_out_of_training():
    model = tiny_moe("llama", top_k=2).train()
    ids = tokens(2, 20)

    def learning():
        found = gradients(model, lambda: model(input_ids=ids, labels=ids).lm_loss.backward())
        return {expert.name for expert in model.experts if any(expert.name in name.split(".") for name in found)}, found

    everyone, all_gradients = learning()
    assert everyone == {"expert_0", "expert_1", "expert_2"}
    model.freeze("expert_1")
    assert [expert.trainable for expert in model.experts] == [True, False, True]
    rest, kept = learning()
    assert rest == {"expert_0", "expert_2"}
    for name, gradient in kept.items():
        torch.testing.assert_close(gradient, all_gradients[name], rtol=1e-5, atol=1e-7)
    with model.disable_adapter(), model.route_to(None):
        pass
    model.eval().train()
    model.add_expert("new")
    assert learning()[0] == {"expert_0", "expert_2", "new"}
    model.remove_expert("expert_0")
    assert learning()[0] == {"expert_2", "new"}
    model.unfreeze("expert_1")
    assert learning()[0] == {"expert_1", "expert_2", "new"}
    model.freeze("expert_1", "expert_2", "new")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_training_one_new_expert_leaves_the_frozen_ones_bit_equal():
    model = tiny_moe("llama")
    old, names = tensors(model), model.experts.names
    model.freeze(*names)
    model.add_expert("new")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.train()
    for seed in range(3):
        ids = tokens(2, 12, seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in old.items():
        if name not in ("router.shares", "router.step_counts"):
            assert torch.equal(model.state_dict()[name], tensor), name
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B.new" in n)


# --- leaving the pool: what is merged or unloaded is a plain model again


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_one_expert_equals_routing_to_it(laws, family):
    model, law = tiny_moe(family), "merging one expert is routing to it"
    with model.route_to("expert_1"):
        expected = model(**batch()).logits
    model.merge_adapter(["expert_1"])
    laws.close(law, model(**batch()).logits, expected, family=family, atol=1e-5)
    model.unmerge_adapter()
    with model.route_to("expert_1"):
        laws.close(law, model(**batch()).logits, expected, family=family, atol=1e-5)
    merged = model.merge_and_unload(adapter_names=["expert_1"])
    laws.close(law, merged(**batch()).logits, expected, family=family, atol=1e-5)


def test_an_unloaded_base_is_the_base_and_can_carry_a_new_pool():
    """Reported: the router's hooks stayed on the base."""
    base = tiny_moe("llama").unload()
    assert torch.equal(base(**batch()).logits, tiny_base("llama")(**batch()).logits)
    again, fresh = tiny_moe(base), tiny_moe("llama")
    assert torch.equal(again(**batch()).logits, fresh(**batch()).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(**batch(), **options), fresh.generate(**batch(), **options))


# --- copies


def train_a_step(model):
    ids = tokens(2, 12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("duplicate", "used"),
    [
        *itertools.product([copy.deepcopy, pickled], ["fresh", "grown", "after generate", "tied"]),
        (copy.deepcopy, "checkpointing"),  # Transformers' own models do not pickle with it
    ],
)
def test_a_copy_is_bit_equal_and_goes_its_own_way(duplicate, used):
    model = tiny_moe("gemma3" if used == "tied" else "llama", top_k=2)
    if used == "grown":
        model.add_expert("new", rank=2)
        model.remove_expert("expert_0")
        scramble(model)
    if used == "checkpointing":
        model.gradient_checkpointing_enable()
        train_a_step(model)
    if used == "after generate":
        model.generate(**batch(), max_new_tokens=2)
    before, old = model(**batch()).logits, tensors(model)
    twin = duplicate(model)
    assert torch.equal(twin(**batch()).logits, before)
    train_a_step(twin)
    assert torch.equal(model(**batch()).logits, before)
    assert not torch.equal(twin(**batch()).logits, before)
    twin.add_expert("other")
    twin.mature("other")
    twin.remove_expert("expert_1")
    with twin.route_to("other"):
        assert torch.equal(model(**batch()).logits, before)
    for name, tensor in old.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    if used == "tied":
        assert twin.base.get_input_embeddings().weight is twin.base.get_output_embeddings().weight


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_holds_its_experts_once_and_behind_one_another(duplicate):
    """Reported: every matrix came out of a pickle with the whole block of its layer behind it, and a copy was
    concatenated again at every call."""
    twin = duplicate(tiny_moe("llama", num_experts=4))
    assert storage_ratio(twin) <= 1.1
    for name, layer in twin.named_modules():
        if isinstance(layer, RoutedLayer):
            weights = [module.weight for kind in (layer.lora_A, layer.lora_B) for module in kind.values()]
            assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 2, name


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_state_dict_carries_everything(laws, family, assign):
    """Into a model with other experts and another gate: logits, routing, decoding, and the next step are the same."""
    model, other = tiny_moe(family, top_k=2), scramble(tiny_moe(family, top_k=2), seed=9)
    train_a_step(model)
    before = other(**batch()).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert other.load_state_dict(state, assign=assign) == ([], [])
    other.apply_trainable()
    law = "a state dict carries everything"
    options = {"max_new_tokens": 4, "do_sample": False}
    for step in range(2):
        ours, theirs = other(**batch()), model(**batch())
        assert not torch.equal(ours.logits, before)
        laws.close(law, ours.logits, theirs.logits, family=family, atol=1e-5 if assign else 0.0)
        laws.equal(law, ours.routing.weights, theirs.routing.weights, family=family)
        laws.equal(law, other.generate(**batch(), **options), model.generate(**batch(), **options), family=family)
        if step == 0:
            for one in (model, other):
                one.zero_grad()
                train_a_step(one)


def test_freezing_drops_gradients_and_zero_grad_forgets_all():
    """Trainers forget gradients every step; that must not walk through frozen experts, nor leave anything behind."""
    model, ids = tiny_moe("llama", num_experts=3), tokens(2, 9)
    with model.route_to(["expert_0", "expert_1"]):
        model(input_ids=ids, labels=ids).loss.backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[-2] for name in names} == {"expert_0", "expert_1"}
    model.freeze("expert_0")
    left = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None and ".lora_" in name}
    assert left == {"expert_1"}
    model.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_the_mode_reaches_everything_that_heeds_it():
    model = tiny_moe("llama", lora={"lora_dropout": 0.5})
    ids, expected = tokens(2, 9), {}
    for mode in (True, False, True):
        model.train(mode)
        assert model.training == mode and all(layer.training == mode for layer in model.experts.layers)
        first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
        assert torch.equal(first, second) != mode
        expected.setdefault(mode, first)
    assert not torch.equal(expected[True], expected[False])
