"""What is relied on of PEFT's layers beyond its public API; these fail when PEFT changes it."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from reference.tiny import LORA, VOCAB, tiny_base
from torch import nn
from transformers.pytorch_utils import Conv1D

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.experts.layer import ROUTED_CLASSES, RoutedLayer, RoutedLinear

READ = (
    "lora_A",
    "lora_B",
    "lora_dropout",
    "r",
    "scaling",
    "merged",
    "disable_adapters",
    "merged_adapters",
    "base_layer",
)
"""What a routed layer reads of the layer that PEFT has made."""


def stock_layers(family: str) -> list[nn.Module]:
    model = get_peft_model(tiny_base(family), LoraConfig(**LORA))
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


# --- the exchange of a layer's class


@pytest.mark.parametrize(("family", "linear"), [("llama", nn.Linear), ("gpt2", Conv1D)])
def test_peft_makes_exactly_the_class_that_is_exchanged(family, linear):
    layers = stock_layers(family)
    assert layers and {type(layer) for layer in layers} == {lora.Linear} == ROUTED_CLASSES.keys()
    assert {type(layer.base_layer) for layer in layers} == {linear}
    assert [name for name in READ if not hasattr(layers[0], name)] == []


def test_a_layer_of_another_class_keeps_all_that_peft_has_put_into_it():
    """Only classes of the same memory layout can be exchanged, and none may keep state that its __init__ would set."""
    layer = stock_layers("llama")[0]
    before = dict(vars(layer))
    layer.__class__ = RoutedLinear
    assert vars(layer) == before
    assert "__init__" not in vars(RoutedLinear) and "__init__" not in vars(RoutedLayer)
    assert RoutedLinear.__dictoffset__ == lora.Linear.__dictoffset__
    assert next(kind for kind in RoutedLinear.__mro__ if "forward" in vars(kind)) is RoutedLayer
    x = torch.randn(3, layer.in_features)
    layer.enable_adapters(False)  # a routed layer without its experts is PEFT's own
    layer_output = layer(x)
    layer.__class__ = lora.Linear
    assert torch.equal(layer_output, layer(x))


# --- the cast of a layer's input


def test_peft_casts_the_input_of_a_layer_by_the_method_that_a_routed_layer_calls(monkeypatch):
    assert list(inspect.signature(BaseTunerLayer._cast_input_dtype).parameters) == ["self", "x", "dtype"]
    cast, real = [], BaseTunerLayer._cast_input_dtype
    monkeypatch.setattr(
        BaseTunerLayer, "_cast_input_dtype", lambda self, x, dtype: cast.append(type(self)) or real(self, x, dtype)
    )
    layer = stock_layers("llama")[0]
    layer(torch.randn(3, layer.in_features))
    assert cast == [lora.Linear]


def test_the_switch_of_peft_reaches_a_routed_layer():
    """Its adapters are fp32 on a bf16 base: with the cast they compute; without it, the dtypes do not meet."""
    base = tiny_base(dtype=torch.bfloat16)
    model = DyLoRAMoE.from_base(base, num_experts=2, lora=LoraConfig(**LORA), router=RouterConfig(top_k=1))
    ids = torch.randint(3, VOCAB, (1, 5), generator=torch.Generator().manual_seed(0))
    assert next(model.experts.parameters(model.experts.names[0])).dtype == torch.float32
    assert model(input_ids=ids).logits.isfinite().all()
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(input_ids=ids)
