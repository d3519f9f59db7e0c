"""What fails while adapters are injected leaves no trace: not in the base, the pool, the gate or the skill library."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from reference.tiny import LORA, tensors, tiny_base, tiny_moe, tokens
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.continual.growth import Growth
from dylo_moe.experts.expert import ExpertPool
from dylo_moe.model.routing_hooks import RoutingHooks
from dylo_moe.routing.router import Router

DROPOUTS = {"attn_pdrop": 0.5, "resid_pdrop": 0.25, "embd_pdrop": 0.125}


class Stop(BaseException):
    """Like KeyboardInterrupt, no Exception; the latter would end the test run."""


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, call: int = 1, after: bool = False) -> None:
    """Let one call of a method raise; those before it, and those after it, work."""
    theirs, calls = getattr(owner, name), iter(range(1, 10**6))

    def method(*args: Any, **kwargs: Any) -> Any:
        is_that_one = next(calls) == call
        if is_that_one and not after:
            raise Stop
        result = theirs(*args, **kwargs)
        if is_that_one:
            raise Stop
        return result

    monkeypatch.setattr(owner, name, method)


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a refusal could leave behind: classes, attributes, hooks, settings, values, configs and random state."""
    parts = {}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        sizes = {key: len(value) for key, value in vars(module).items() if hasattr(value, "__len__")}
        parts[name] = (type(module), plain, sizes, list(vars(module)))
    config = getattr(model, "base", model).config.to_dict()
    needs = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"parts": parts, "config": config, "needs": needs, "values": values, "random": torch.get_rng_state()}


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in ("parts", "config", "needs"):
        assert now[key] == before[key], key
    assert list(now["values"]) == list(before["values"])
    for name, value in before["values"].items():
        assert torch.equal(now["values"][name].nan_to_num(), value.nan_to_num()), name
    assert torch.equal(now["random"], before["random"])


STEPS = {
    "the first linear": (LoraModel, "_create_and_replace", {}),
    "a linear in the middle": (LoraModel, "_create_and_replace", {"call": 3, "after": True}),
    "the second expert": (LoraModel, "_create_and_replace", {"call": 12}),
    "the shared expert": (ExpertPool, "add_shared", {"after": True}),
    "the second expert's classes": (ExpertPool, "refresh", {"call": 3}),
    "memory": (ExpertPool, "pack", {"after": True}),
    "the gate": (Router, "add_row", {"call": 2}),
    "the hooks": (RoutingHooks, "__init__", {"after": True}),
}


@pytest.mark.parametrize(("family", "step"), [*(("llama", step) for step in STEPS), ("gpt2", "the hooks")])
def test_from_base_that_is_interrupted_leaves_the_base_as_it_was(monkeypatch, family, step):
    base = tiny_base(family, **(DROPOUTS if family == "gpt2" else {"attention_dropout": 0.5})).train()
    base.get_input_embeddings().requires_grad_(False)
    base.config.pretraining_tp = 2  # which PEFT sets to 1
    handle = base.get_input_embeddings().register_forward_hook(lambda *args: None)
    owner, name, how = STEPS[step]
    before = picture(base)
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, **how)
        with pytest.raises(Stop):
            DyLoRAMoE.from_base(base, num_experts=3, shared_rank=2)
    assert_same(picture(base), before)
    handle.remove()
    assert not base.get_input_embeddings()._forward_hooks
    expected = tiny_moe(tiny_base(family))
    ids = tokens(2, 7)
    assert torch.equal(tiny_moe(base)(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_pool_that_cannot_begin_to_grow_leaves_the_base_as_it_was(monkeypatch):
    base = tiny_base()
    before = picture(base)
    with monkeypatch.context() as patch:
        interrupt(patch, Growth, "enable", after=True)
        with pytest.raises(Stop):
            DyLoRAMoE.from_base(base, allow_expert_growth=True)
    assert_same(picture(base), before)
    DyLoRAMoE.from_base(base, allow_expert_growth=True)


def test_a_checkpoint_that_does_not_fit_leaves_the_base_as_it_was(tmp_path, monkeypatch):
    tiny_moe("llama").save_pretrained(str(tmp_path / "saved"))
    base = tiny_base("llama")
    before = picture(base)
    with monkeypatch.context() as patch:
        interrupt(patch, Router, "load_state_dict")
        with pytest.raises(Stop):
            DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), base)
    assert_same(picture(base), before)
    DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), base)


# --- a model that is there already


@functools.cache
def grown() -> DyLoRAMoE:
    """A model whose library knows a skill of each of its two experts."""
    torch.manual_seed(0)
    model = DyLoRAMoE.from_base(
        tiny_base(), allow_expert_growth=True, lora=LoraConfig(**LORA), growth=GrowthConfig(known_skill="grow")
    )
    model.know_base([{"input_ids": tokens(4, 12, seed=9)}])  # else the base would write some text, which takes long
    for seed, name in enumerate(("one", "two")):
        model.add_skill(name, texts(seed))
        model.mature(name)
    return model


def texts(seed: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(4, 12, seed=seed, low=3 + 30 * seed, high=33 + 30 * seed)}]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that has linears which the pool of these tests has not."""
    folder = str(tmp_path_factory.mktemp("stock"))
    get_peft_model(tiny_base(), LoraConfig(r=3, target_modules=["q_proj", "down_proj"])).save_pretrained(folder)
    return folder


@functools.cache
def pooled() -> DyLoRAMoE:
    return tiny_moe("llama", lora={"target_modules": ["q_proj", "v_proj"]})


CHANGES = {
    "add_expert": (
        pooled,
        lambda model, stock: model.add_expert("new"),
        ["a linear", "PEFT's end", "the classes", "memory", "the gate"],
    ),
    "import_expert": (
        pooled,
        lambda model, stock: model.import_expert("new", stock),
        ["a linear", "the classes", "memory", "the gate"],
    ),
    "add_skill": (grown, lambda model, stock: model.add_skill("new", texts(2)), ["a linear", "the gate's rows"]),
    "merge_experts": (
        grown,
        lambda model, stock: model.merge_experts("one", "two", name="new"),
        ["memory", "the gate's rows"],
    ),
}
BREAKS = {
    "a linear": (LoraModel, "_create_and_replace", {"call": 3}),
    "PEFT's end": (PeftModel, "add_adapter", {"after": True}),
    "the classes": (ExpertPool, "refresh", {"after": True}),
    "memory": (ExpertPool, "pack", {"after": True}),
    "the gate": (Router, "add_row", {"after": True}),
    "the gate's rows": (Growth, "set_rows", {"after": True}),
}


@pytest.mark.parametrize(("change", "step"), [(change, step) for change in CHANGES for step in CHANGES[change][2]])
def test_a_change_of_the_pool_that_is_interrupted_leaves_the_model_as_it_was(
    monkeypatch, tmp_path, stock, change, step
):
    make, act, _ = CHANGES[change]
    model, ids = copy.deepcopy(make()), tokens(2, 8)
    owner, name, how = BREAKS[step]
    experts = repr(model.experts)
    logits = model.eval()(input_ids=ids).logits
    model.train()
    before = picture(model)
    library = None if model.growth is None else model.library.skills
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, **how)
        with pytest.raises(Stop):
            act(model, stock)
    assert_same(picture(model), before)
    assert repr(model.experts) == experts
    assert library is None or model.library.skills == library
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.equal(model.eval()(input_ids=ids).logits, logits)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), tiny_base())
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in tensors(model).items())
    act(model, stock)
    assert "new" in model.experts.names


# --- what PEFT itself refuses


def mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4))


@pytest.mark.parametrize("targets", [["in_proj", "out_proj"]], ids=str)
def test_what_peft_refuses_in_the_middle_leaves_the_base_usable(targets):
    base = mamba().eval()
    before = picture(base)
    with pytest.raises(ValueError, match="out_proj"):
        DyLoRAMoE.from_base(base, lora=LoraConfig(r=2, target_modules=targets))
    assert_same(picture(base), before)
    DyLoRAMoE.from_base(base, lora=LoraConfig(r=2, target_modules=["in_proj", "x_proj"]), router=RouterConfig())
