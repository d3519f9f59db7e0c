"""Laws of the shared expert: every token computes it beside what it is routed to, and nothing else changes with it."""

import copy
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from reference.altered import rehash
from reference.checkpoints import contents, load
from reference.decoding import prompts, uncached
from reference.routed_linear import Delta, call, naive_routed_linear
from reference.tiny import (
    LORA,
    assert_same_gradients,
    base_tensors,
    force_path,
    gradients,
    padded,
    tensors,
    tiny_base,
    tiny_moe,
    tokens,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.experts.layer import RoutedLinear
from dylo_moe.experts.memory_layout import pack
from dylo_moe.model.checkpoint import CheckpointError
from dylo_moe.model.loading import load_into
from dylo_moe.routing.config import BASE, SHARED
from dylo_moe.routing.forward_context import ContextSlot
from dylo_moe.routing.router import Routing, force_routing, make_dispatch

NAMES = ("a", "b", "c", BASE)
"""`base` is a member without an adapter."""
RANKS = {"a": 2, "b": 3, "c": 2, SHARED: 5}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def moe(**options):
    """Three experts of rank 4 and a shared one of rank 6, all far from zero."""
    return tiny_moe(**{"shared_rank": 6, **options})


def without_shared(model):
    """The same experts and gate in a model without a shared expert."""
    other = tiny_moe(num_experts=len(model.experts), top_k=model.router_config.top_k)
    found = model.state_dict()
    other.load_state_dict({name: found[name] for name in other.state_dict()})
    return other


def delta(layer, name):
    """s B A of one expert in one routed linear."""
    return layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight


@torch.no_grad()
def by_hand(model, *experts):
    """The base with the deltas of these experts added to its weights."""
    base = tiny_base()
    for path, layer in model.experts.named_layers():
        weight = base.get_submodule(path).weight
        for name in experts:
            weight += delta(layer, name)
    return base


# --- one routed linear


def routed_linear():
    holder = nn.ModuleDict({"linear": nn.Linear(10, 7)})
    for name, rank in RANKS.items():
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=6, target_modules=["linear"]), holder, adapter_name=name)
    routed = holder["linear"]
    routed.__class__ = RoutedLinear
    for name in RANKS:
        nn.init.normal_(routed.lora_B[name].weight)
        for half in (routed.lora_A, routed.lora_B):
            half[name].requires_grad_(True)
    routed.base_layer.requires_grad_(False)
    routed.bind(ContextSlot(), NAMES, shared=SHARED)
    pack(routed)
    return routed


def naive(routed, x, weights, uses):
    """The sum over experts, token by token, in which the shared one has a column of its own."""
    experts = {
        name: Delta(routed.lora_A[name].weight, routed.lora_B[name].weight, routed.scaling[name]) for name in RANKS
    }
    return naive_routed_linear(
        x,
        weight=routed.base_layer.weight,
        bias=routed.base_layer.bias,
        experts=experts,
        names=[*NAMES, SHARED],
        weights=torch.cat([weights, uses[..., None].float()], -1),
    )


@pytest.mark.parametrize("path", ["dense", "sparse", "compiled"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_the_sum_and_its_gradients_equal_the_naive_ones_on_every_path(laws, monkeypatch, path, top_k, is_padded):
    force_path(monkeypatch, path)
    if path == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.manual_seed(0)
    routed, x = routed_linear(), torch.randn(3, 17, 10, requires_grad=True)
    mask = torch.ones(3, 17, dtype=torch.bool)
    if is_padded:
        mask[0, :9], mask[2, 15:] = False, False
    selected = None if top_k == len(NAMES) else torch.randn(3, 17, len(NAMES)).topk(top_k, -1).indices
    chosen = torch.ones(3, 17, len(NAMES)) if selected is None else torch.zeros(3, 17, len(NAMES))
    if selected is not None:
        chosen.scatter_(-1, selected, 1.0)
    chosen *= mask[..., None]
    raw = (torch.rand(3, 17, len(NAMES)) + 0.1).requires_grad_()
    leaves = [x, raw, *(half[name].weight for name in RANKS for half in (routed.lora_A, routed.lora_B))]

    def ours(weights):
        dispatch = make_dispatch(Routing(NAMES, weights, mask, None), selected, layouts=[routed.layout], dtype=x.dtype)
        return call(routed, x, dispatch)

    expected, found = naive(routed, x, raw * chosen, mask), ours(raw * chosen)
    law = "a shared expert beside routed ones equals the naive sum"
    laws.close(law, found, expected, atol=2e-5)
    direction = torch.randn(expected.shape)
    pairs = zip(*(torch.autograd.grad((y * direction).sum(), leaves) for y in (found, expected)), strict=True)
    for mine, theirs in pairs:
        laws.close("gradients with a shared expert equal the naive ones", mine, theirs, atol=2e-4)
    weights = chosen if top_k == 1 else raw.detach() * chosen
    with torch.no_grad():
        laws.close(law, ours(weights), naive(routed, x, weights, mask), atol=2e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("experts", [["a", None, SHARED], ["b", "b", "b"], [None] * 3, [SHARED] * 3], ids=str)
def test_forced_rows_have_it_and_those_of_the_base_alone_are_the_base_bit_for_bit(experts, grad):
    routed, x = routed_linear(), torch.randn(3, 6, 10, requires_grad=grad)
    mask = torch.ones(3, 6, dtype=torch.bool)
    with torch.no_grad():
        routed.lora_B["c"].weight.fill_(torch.nan)  # an expert that no row asked for
    routing, dispatch = force_routing(NAMES, experts, mask=mask, layouts=[routed.layout], dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        y, base = call(routed, x, dispatch), routed.base_layer(x)
    uses = torch.tensor([[name is not None] for name in experts]).expand_as(mask)
    with torch.no_grad():
        routed.lora_B["c"].weight.zero_()
    torch.testing.assert_close(y, naive(routed, x, routing.weights, uses), rtol=1e-4, atol=2e-5)
    assert torch.equal(y[~uses], base[~uses])
    assert (
        routing.weights[..., NAMES.index(BASE)] == mask * torch.tensor([[n in (None, SHARED)] for n in experts])
    ).all()


# --- a whole model


def test_it_is_beside_the_pool_and_scaled_as_the_others():
    model = moe(num_experts=2)
    assert model.experts.names == ("expert_0", "expert_1") == model.router.names == model.route(tokens(1, 4)).names
    shared, count = model.experts.shared, sum(p.numel() for p in model.experts.parameters(SHARED))
    assert (shared.name, shared.rank, shared.parameters, shared.trainable) == (SHARED, 6, count, True)
    assert count == model.experts[0].parameters * 6 // LORA["r"]
    scalings = {value for _, layer in model.experts.named_layers() for value in layer.scaling.values()}
    assert scalings == {LORA["lora_alpha"] / LORA["r"]}
    own = DyLoRAMoE.from_base(tiny_base(), lora=LoraConfig(**LORA), num_experts=1, shared_rank=3, shared_alpha=12)
    assert {layer.scaling[SHARED] for _, layer in own.experts.named_layers()} == {4.0}
    by_root = DyLoRAMoE.from_base(
        tiny_base(), lora=LoraConfig(**LORA, use_rslora=True), num_experts=1, shared_rank=16
    ).experts.named_layers()[0][1]
    assert by_root.scaling[SHARED] == pytest.approx(by_root.scaling["expert_0"])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_every_linear_of_a_model_is_the_naive_sum_of_the_routing_that_is_shown(laws, monkeypatch, path, top_k):
    force_path(monkeypatch, path)
    model, ids = moe(top_k=top_k), tokens(2, 12)
    seen = []
    handles = [
        layer.register_forward_hook(lambda layer, args, y: seen.append((layer, args[0], y)))
        for layer in model.experts.layers
    ]
    with torch.no_grad():
        routing = model(input_ids=ids).routing
    for handle in handles:
        handle.remove()
    assert len(seen) == len(model.experts.layers) and (routing.weights > 0).any(1).sum() > 2
    for layer, x, y in seen:
        experts = {name: Delta(layer.lora_A[name].weight, layer.lora_B[name].weight, 2.0) for name in layer.lora_A}
        names = [*routing.names, SHARED]
        weights = torch.cat([routing.weights, torch.ones(2, 12, 1)], -1)
        expected = naive_routed_linear(
            x, weight=layer.base_layer.weight, bias=layer.base_layer.bias, experts=experts, names=names, weights=weights
        )
        laws.close("every linear with a shared expert equals the naive sum", y, expected, atol=2e-5)


@torch.no_grad()
def test_forced_merged_and_disabled_models_are_the_base_with_those_deltas():
    model, ids = moe(), tokens(2, 12)
    expected = {name: by_hand(model, name, SHARED)(input_ids=ids).logits for name in model.experts.names}
    for name, logits in expected.items():
        with model.route_to(name):
            torch.testing.assert_close(model(input_ids=ids).logits, logits, **CLOSE)
    with model.route_to(SHARED):
        torch.testing.assert_close(model(input_ids=ids).logits, by_hand(model, SHARED)(input_ids=ids).logits, **CLOSE)
    with model.route_to(["expert_1", None]):
        both = model(input_ids=ids).logits
    torch.testing.assert_close(both[0], expected["expert_1"][0], **CLOSE)
    base = tiny_base()(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base)
    before = base_tensors(model)
    model.merge_adapter(["expert_2"])
    torch.testing.assert_close(model(input_ids=ids).logits, expected["expert_2"], **CLOSE)
    with model.route_to("expert_0"), pytest.raises(ValueError, match="'expert_2' is merged"):
        model(input_ids=ids)
    model.unmerge_adapter()
    torch.testing.assert_close(base_tensors(model), before, rtol=0, atol=1e-6)
    plain = model.merge_and_unload(adapter_names=["expert_1"])
    torch.testing.assert_close(plain(input_ids=ids).logits, expected["expert_1"], **CLOSE)


@torch.no_grad()
def test_routing_and_balance_are_those_of_the_model_without_it():
    model, ids = moe(top_k=2), tokens(3, 14)
    other = without_shared(model)
    for own in (model, other):
        own.train()
    ours, theirs = (own(input_ids=ids, labels=ids) for own in (model, other))
    for part in ("balance_loss", "z_loss", "entropy_loss", "aux_loss"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part)), part
    assert torch.equal(ours.routing.weights, theirs.routing.weights) and not torch.equal(ours.loss, theirs.loss)
    assert torch.equal(model.router.step_counts, other.router.step_counts)


@torch.no_grad()
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_at_zero_it_changes_no_bit(monkeypatch, path):
    force_path(monkeypatch, path)
    model, ids = moe(), tokens(2, 40)
    for layer in model.experts.layers:
        layer.lora_B[SHARED].weight.zero_()
    assert torch.equal(model(input_ids=ids).logits, without_shared(model)(input_ids=ids).logits)


@torch.no_grad()
def test_padded_and_packed_rows_equal_each_row_alone():
    model, rows = moe(), [tokens(1, 17)[0], tokens(1, 9, seed=2)[0]]
    alone = [model(input_ids=row[None]).logits[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side=side)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        for place, expected in enumerate(alone):
            torch.testing.assert_close(logits[place][mask[place].bool()], expected, **CLOSE)
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(input_ids=torch.cat(rows)[None], position_ids=places, use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("top_k", [1, 2])
def test_cached_decoding_equals_the_uncached_one(laws, top_k):
    model, (ids, mask) = moe(top_k=top_k), prompts()
    text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    laws.equal("cached decoding with a shared expert", text, uncached(model, ids, mask)[0])


def test_gradients_of_both_paths_agree_with_padding_and_checkpointing(monkeypatch):
    ids, mask = padded([tokens(n, seed=n) for n in (11, 5, 8)], side="right")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found = {}
    for path in ("dense", "sparse", "checkpointed"):
        force_path(monkeypatch, "dense" if path == "dense" else "sparse")
        model = moe(top_k=2).train()
        if path == "checkpointed":
            model.gradient_checkpointing_enable()
        found[path] = gradients(model, lambda model=model: model(**batch).loss.backward())
    assert sum(f".{SHARED}." in name for name in found["dense"]) == 2 * len(model.experts.layers)
    for path in ("sparse", "checkpointed"):
        assert_same_gradients(found[path], found["dense"], relative=1e-4)


class Products(TorchDispatchMode):
    """Counts the multiplications of all matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_it_costs_the_products_of_one_adapter(monkeypatch, path, top_k):
    """In the forward exactly; with the backward at most three times that: the first linears need no gradient of x."""
    force_path(monkeypatch, path)
    ids, counts = tokens(2, 30), []
    for model in (moe(top_k=top_k).train(), without_shared(moe(top_k=top_k)).train()):
        with Products() as products:
            loss = model(input_ids=ids, labels=ids).loss
            forward = products.count
            loss.backward()
        counts.append((forward, products.count))
    one = ids.numel() * moe().experts.shared.parameters
    (forward, whole), (forward_without, whole_without) = counts
    assert forward - forward_without == one
    assert 2 * one < whole - whole_without <= 3 * one


def test_it_is_frozen_and_unfrozen_by_its_name():
    model, ids = moe(), tokens(2, 9)
    own = list(model.experts.parameters(SHARED))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in own)
    learning = len(list(model.experts.learning()))
    model.freeze(SHARED)
    assert not any(p.requires_grad or p.grad is not None for p in own)
    assert len(list(model.experts.learning())) == learning - len(own)
    model.add_expert("more")  # PEFT resets what learns
    assert not any(p.requires_grad for p in own)
    model.unfreeze(SHARED)
    assert all(p.requires_grad for p in own)


def test_a_broken_one_is_named():
    model, ids = moe(), tokens(1, 5)
    list(model.experts.parameters(SHARED))[-1].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weights of expert 'shared'"):
        model(input_ids=ids)


def test_a_deep_copy_is_its_own():
    model, ids = moe(), tokens(2, 9)
    other, before = copy.deepcopy(model), model(input_ids=ids).logits
    assert torch.equal(other(input_ids=ids).logits, before)
    next(other.experts.parameters(SHARED)).data.zero_()
    assert torch.equal(model(input_ids=ids).logits, before) and not torch.equal(other(input_ids=ids).logits, before)


# --- checkpoints


def test_a_checkpoint_comes_back_bit_for_bit_and_stock_peft_reads_the_adapter(tmp_path):
    model, ids = moe(), tokens(2, 12)
    model.freeze(SHARED)
    model.save_pretrained(str(tmp_path / "c"))
    again = load(tmp_path / "c")
    assert again.experts.shared == model.experts.shared and again.experts.names == model.experts.names
    before = tensors(model)
    assert before.keys() == tensors(again).keys()
    assert all(torch.equal(before[name], value) for name, value in tensors(again).items())
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    again.save_pretrained(str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(tmp_path / "c")
    stock = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "c" / "experts" / SHARED)).eval()
    with model.route_to(SHARED):
        torch.testing.assert_close(stock(input_ids=ids).logits, model(input_ids=ids).logits, **CLOSE)
    other = moe()
    other.freeze(SHARED)
    with torch.no_grad():
        next(other.experts.parameters(SHARED)).zero_()
    load_into(other, tmp_path / "c")
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_checkpoint_with_one_and_a_model_without_are_told_apart(tmp_path):
    model = moe()
    model.save_pretrained(str(tmp_path / "with"))
    without_shared(model).save_pretrained(str(tmp_path / "without"))
    manifests = {name: json.loads((tmp_path / name / "dylora.json").read_text()) for name in ("with", "without")}
    assert [manifests[name]["format_version"] for name in manifests] == [2, 1]  # which older versions refuse, and read
    assert manifests["with"].keys() - manifests["without"].keys() == {"shared"}
    assert contents(tmp_path / "with").keys() - contents(tmp_path / "without").keys() == {
        f"experts/{SHARED}/{file}" for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    for folder, target in (("with", tiny_moe()), ("without", moe())):
        with pytest.raises(CheckpointError, match="its shared expert is"):
            load_into(target, tmp_path / folder)
    path = tmp_path / "with" / "dylora.json"
    path.write_text(json.dumps({**manifests["with"], "format_version": 1}))
    rehash(tmp_path / "with", files=())
    with pytest.raises(CheckpointError, match="has format 1"):
        load(tmp_path / "with")
    path.write_text(json.dumps({**manifests["with"], "shared": {**manifests["with"]["shared"], "name": "other"}}))
    rehash(tmp_path / "with", files=())
    with pytest.raises(CheckpointError, match="named 'other', which must be 'shared'"):
        load(tmp_path / "with")
    path.write_text(json.dumps(manifests["with"]))
    (tmp_path / "with" / "experts" / SHARED / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"experts/{SHARED}/adapter_model.safetensors has 0 bytes"):
        load(tmp_path / "with")


# --- growth


def batches(low, *, seed=0):
    return [{"input_ids": tokens(16, 30, seed=seed + part, low=low, high=low + 30)} for part in range(3)]


def growing():
    """A jointly trained pool of two experts and a shared one, that goes on growing."""
    model = moe(num_experts=2, router_half_life=32.0)
    model.initialize_router([*batches(3), *batches(33)])
    for name, low in (("low", 3), ("high", 33)):
        model.know_skill(name, batches(low))
    model.enable_growth(GrowthConfig())
    return model.eval()


@torch.no_grad()
def test_growth_freezes_it_and_it_goes_on_serving_all_bit_for_bit(monkeypatch, tmp_path):
    force_path(monkeypatch, "sparse")
    model = growing()
    assert not model.experts.shared.trainable
    with pytest.raises(ValueError, match="frozen while the pool grows"):
        model.unfreeze(SHARED)
    own = [p.clone() for p in model.experts.parameters(SHARED)]
    rows = [row[None] for low in (3, 33, 63) for row in batches(low, seed=9)[0]["input_ids"][:4]]
    seen = [model(input_ids=row) for row in rows]
    decision = model.add_skill("new", batches(63))
    assert decision.action == "grown" and not model.experts.shared.trainable
    model.train()
    with torch.enable_grad(), model.route_to("new"):
        out = model(input_ids=rows[-1], labels=rows[-1])
        found = gradients(model, out.loss.backward)
    assert found and all(".new." in name for name in found)
    for parameter in model.experts.parameters("new"):
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.mature("new")
    model.eval()
    assert all(map(torch.equal, own, model.experts.parameters(SHARED)))
    kept = 0
    for row, before in zip(rows, seen, strict=True):
        after = model(input_ids=row)
        was = torch.zeros_like(after.routing.weights)
        was[..., [after.routing.names.index(name) for name in before.routing.names]] = before.routing.weights
        if torch.equal(was, after.routing.weights):
            assert torch.equal(after.logits, before.logits)
            kept += 1
    assert kept
    with model.route_to("new"):
        expected = by_hand(model, "new", SHARED)(input_ids=rows[-1]).logits
        torch.testing.assert_close(model(input_ids=rows[-1]).logits, expected, **CLOSE)
    model.save_pretrained(str(tmp_path / "c"))
    again = load(tmp_path / "c")
    assert again.allow_expert_growth and not again.experts.shared.trainable
    assert torch.equal(again(input_ids=rows[0]).logits, model(input_ids=rows[0]).logits)


@torch.no_grad()
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_tokens_of_the_member_base_have_it_alone(monkeypatch, path):
    force_path(monkeypatch, path)
    model, ids = growing(), tokens(2, 11)
    model.router.set_row(BASE, torch.zeros(model.router.hidden_size), torch.tensor(1e4))
    out = model(input_ids=ids)
    assert out.routing.weights[..., out.routing.names.index(BASE)].eq(1).all()
    torch.testing.assert_close(out.logits, by_hand(model, SHARED)(input_ids=ids).logits, **CLOSE)
    with model.route_to(None):
        assert torch.equal(model(input_ids=ids).logits, tiny_base()(input_ids=ids).logits)


def test_removing_and_merging_experts_leaves_it():
    model, ids = growing(), tokens(2, 12)
    own = [p.clone() for p in model.experts.parameters(SHARED)]
    model.merge_experts("expert_0", "expert_1", name="both")
    assert model.experts.names == ("both",) and all(map(torch.equal, own, model.experts.parameters(SHARED)))
    with torch.no_grad(), model.route_to("both"):
        expected = by_hand(model, "both", SHARED)(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **CLOSE)
    model = moe()
    model.remove_expert("expert_0")
    with torch.no_grad(), model.route_to("expert_1"):
        expected = by_hand(model, "expert_1", SHARED)(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="there is no expert 'shared'"):
        model.remove_expert(SHARED)


# --- refusals


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shared_rank": -1}, "shared_rank is -1; it must be a whole number of at least 0"),
        ({"shared_rank": 2.5}, "shared_rank is 2.5; it must be a whole number"),
        ({"shared_alpha": 4}, "shared_alpha is 4, but without a shared_rank there is no shared expert"),
        ({"shared_rank": 4, "shared_alpha": 0}, "shared_alpha is 0; it must be a finite number above 0"),
        ({"shared_rank": 4, "allow_expert_growth": True}, "a pool that begins empty would never train a shared"),
        ({"names": [SHARED]}, "expert name is 'shared'"),
        (
            {"shared_rank": 2, "lora": LoraConfig(**LORA, rank_pattern={"q_proj": 2})},
            "rank 2 cannot apply: the pool's rank_pattern or alpha_pattern sets them by layer",
        ),
    ],
)
def test_what_cannot_apply_is_refused(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        DyLoRAMoE.from_base(tiny_base(), **{"router": RouterConfig(), **options})


def test_a_model_without_one_does_not_know_its_name():
    model = tiny_moe()
    for act in (model.freeze, model.unfreeze):
        with pytest.raises(ValueError, match="there is no expert 'shared'"):
            act(SHARED)
    with pytest.raises(ValueError, match="there is no expert 'shared'"), model.route_to(SHARED):
        pass
