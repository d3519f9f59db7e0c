"""A frozen base draws no random numbers in training, wherever its families have dropout, jitter or skipped layers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig
from reference.tiny import tiny_base, tokens
from torch import nn

from dylo_moe import DyLoRAMoE, RouterConfig

SHAPE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SHAPE, "intermediate_size": 48}
BOTH = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
NOISY = {
    "Falcon": {**SHAPE, **BOTH},
    "Persimmon": {**WIDE, **BOTH},
    "Mixtral": {**WIDE, "num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.3},
    "Phimoe": {**WIDE, "num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.1},
    "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, **BOTH},
    "StableLm": {**WIDE, **BOTH, "num_key_value_heads": 4},
    "Phi": {**WIDE, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
    "GPTNeoX": {**WIDE, **BOTH},
    "XGLM": {
        "vocab_size": 97, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "dropout": 0.3,
        "attention_dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.3,
    },
    "OPT": {
        **SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.3,
        "attention_dropout": 0.3, "layerdrop": 0.3,
    },
}  # fmt: skip


def noisy(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**NOISY[family])
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("family", NOISY)
def test_training_computes_the_same_twice_and_what_evaluation_computes(family):
    """Reported: numbers that layers read of their config at each forward stayed, and so did the jitter of routers."""
    base, ids = noisy(family).train(), tokens(2, 9)
    assert any(not torch.equal(base(input_ids=ids).logits, base(input_ids=ids).logits) for _ in range(3))
    plain, config = base.eval()(input_ids=ids).logits, base.config.to_dict()
    lora = LoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear")
    model = DyLoRAMoE.from_base(base.train(), num_experts=2, lora=lora, router=RouterConfig(router_layer=1))
    for mode in ("as it was made", "training", "checkpointing", "a copy"):
        if mode == "checkpointing":
            model.gradient_checkpointing_enable()
        model = copy.deepcopy(model) if mode == "a copy" else model
        model = model if mode == "as it was made" else model.train()
        logits = [model(input_ids=ids).logits for _ in range(3)]
        assert all(torch.equal(logits[0], other) for other in logits), mode
        assert torch.equal(model.router_features(ids), model.router_features(ids))
    assert torch.equal(logits[0], model.eval()(input_ids=ids).logits)
    torch.testing.assert_close(logits[0], plain, rtol=1e-5, atol=1e-6)
    assert model.base.config.to_dict() == config


def test_the_base_that_is_written_has_the_dropouts_of_its_config(tmp_path):
    model = DyLoRAMoE.from_base(noisy("Falcon"), num_experts=1, lora=LoraConfig(r=2, target_modules="all-linear"))
    model.merge_and_unload(adapter_names=["expert_0"]).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["hidden_dropout"] == saved["attention_dropout"] == 0.3


def test_layers_are_recomputed_and_experts_have_their_dropout_in_training():
    """Both ask whether a module is in training, which the rest of the base is not."""
    lora = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules="all-linear")
    model, ids, calls = DyLoRAMoE.from_base(noisy("Falcon"), num_experts=1, lora=lora).train(), tokens(2, 9), []
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.gradient_checkpointing_enable()
    model.base.transformer.h[1].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    loss = model(input_ids=ids, labels=ids).loss
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


class Blurred(nn.Module):
    """A block that drops values whatever it is told."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.inner(x), 0.1, training=True)


def test_random_numbers_that_cannot_be_switched_off_are_refused_with_their_place():
    base = tiny_base()
    base.model.layers[1].mlp = Blurred(base.model.layers[1].mlp)
    names, modes = [name for name, _ in base.named_modules()], [module.training for module in base.modules()]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"draws random numbers .* in model\.layers\.1\.mlp \(Blurred\)"):
        DyLoRAMoE.from_base(base)
    assert [name for name, _ in base.named_modules()] == names
    assert [module.training for module in base.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_base_may_draw_numbers_that_change_nothing():
    """As those do that would skip a layer with probability 0."""
    base, drawn = tiny_base(), []

    def draw(module: nn.Module, args: tuple) -> None:
        drawn.append(torch.rand(3))

    base.model.register_forward_pre_hook(draw)
    DyLoRAMoE.from_base(base)
    assert drawn
