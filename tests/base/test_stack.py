"""The stack of decoder layers is the one that tokens run through, with weights or without."""

import copy

import pytest
import torch
from reference.tiny import tiny_base, tokens
from reference.wide import IMAGES, TEXT, wide_base
from torch import nn

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.base.stack import decoder_layers

STACKS = {
    "longcat_flash": "model.layers",
    "git": "git.encoder.layer",
    "mamba": "backbone.layers",
    "ctrl": "transformer.h",
    "llama4+images": "language_model.model.layers",
    **{f"{name}+images": "model.language_model.layers" for name in IMAGES if name != "llama4"},
}


@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize("family", STACKS)
def test_the_stack_is_that_of_the_text_decoder(family, has_weights):
    """Reported: any list of as many modules as there are layers was taken, vision towers and parts of layers too."""
    base = wide_base(family)
    if not has_weights:
        base = base.to("meta")
    name, layers = decoder_layers(base)
    assert name == STACKS[family] and layers is base.get_submodule(name) and len(layers) == 2
    again = copy.deepcopy(base)
    assert decoder_layers(again)[1] is again.get_submodule(name)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_lists_beside_the_stack_do_not_count(place):
    """As long, as nested, and inside the decoder; only some are run at all."""
    base = tiny_base()
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(2))
    inner = base.model
    modules = dict(inner._modules)
    modules = {"blocks": blocks, **modules} if place == "before" else {**modules, "blocks": blocks}
    inner._modules.clear()
    inner._modules.update(modules)
    expected = tiny_base()(input_ids=tokens(1, 5)).logits
    assert decoder_layers(base)[0] == "model.layers"
    model = DyLoRAMoE.from_base(base, router=RouterConfig())
    assert torch.equal(model.eval()(input_ids=tokens(1, 5)).logits, expected)
    assert not any(".lora_" in name for name, _ in model.named_parameters() if "blocks" in name)


class Twice(nn.Module):
    """A decoder layer that runs another one."""

    def __init__(self, layer: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.layer, self.others = layer, [other]
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return self.others[0](self.layer(hidden_states, **kwargs), **kwargs)


def looped():
    base = tiny_base()
    base.model.layers[1] = Twice(base.model.layers[1], base.model.layers[0])
    return base


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: wide_base("hrm"), "HrmTextForCausalLM runs tokens through its layers repeatedly.*L_module"),
        (looped, "LlamaForCausalLM runs tokens through its layers repeatedly"),
        (lambda: wide_base("gemma3n"), r"gives \[2, 2, 3, 32\] to its layer 0"),
    ],
    ids=["two stacks by turns", "one layer twice", "4-d"],
)
def test_layers_that_cannot_be_routed_are_refused_by_name(make, match):
    base = make()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=match):
        DyLoRAMoE.from_base(base)
    assert [name for name, _ in base.named_modules()] == names


def test_every_family_of_the_tests_has_two_layers_that_are_seen():
    assert {*STACKS} <= {*TEXT, *(f"{name}+images" for name in IMAGES)}
