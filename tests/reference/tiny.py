"""Tiny random bases of many families, and routed models whose experts and gate are far from zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe import DyLoRAMoE, RouterConfig

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED_LAYERS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": False}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8, "sliding_window": 6, "layer_types": MIXED_LAYERS}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": 6, "layer_types": MIXED_LAYERS},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 6}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
}
"""Class, config class, and what the family needs beyond COMMON. The last two pass their cache to a layer
in other ways than the rest, and GPT-2's linears are Conv1D."""

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def tiny_base(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random base, in eval mode; the same one for the same arguments."""
    model, config, own = FAMILIES[family]
    torch.manual_seed(seed)
    base = getattr(transformers, model)(getattr(transformers, config)(**{**COMMON, **own, **overrides}))
    return base.to(dtype).eval()


@torch.no_grad()
def scramble(model: DyLoRAMoE, *, seed: int = 5, up: float = 0.2, gate: float = 6.0) -> DyLoRAMoE:
    """Experts that do something, and a gate that sends neighbouring tokens to different ones."""
    torch.manual_seed(seed)
    for expert in model.experts.everyone:
        for name, parameter in model.named_parameters():
            if f"lora_B.{expert.name}." in name:
                parameter.copy_(torch.randn(parameter.shape) * up)
        if expert.name in model.router.names:
            model.router.gate[expert.name].copy_(torch.randn(model.router.gate[expert.name].shape) * gate)
    # Without their common part, features choose every expert for a fair part of the tokens.
    model.router.feature_mean.copy_(model.router_features(tokens(4, 64, seed=seed)).mean((0, 1)))
    return model


def tiny_moe(
    base: PreTrainedModel | str = "llama",
    *,
    num_experts: int = 3,
    lora: dict[str, Any] | None = None,
    balance_coefficient: float = 0.01,
    names: list[str] | None = None,
    shared_rank: int = 0,
    **router: Any,
) -> DyLoRAMoE:
    """A scrambled model in eval mode. Short half-life, so that routing changes along a text."""
    base = tiny_base(base) if isinstance(base, str) else base
    torch.manual_seed(1)
    model = DyLoRAMoE.from_base(
        base,
        num_experts=num_experts,
        names=names,
        shared_rank=shared_rank,
        lora=LoraConfig(**{**LORA, **(lora or {})}),
        router=RouterConfig(**{"router_half_life": 1.5, **router}),
        balance_coefficient=balance_coefficient,
    )
    return scramble(model).eval()


def tokens(*shape: int, seed: int = 0, low: int = 3, high: int = VOCAB) -> Tensor:
    """Random token ids without special ones."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], *, side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask) of rows of different length."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


def tensors(model: DyLoRAMoE) -> dict[str, Tensor]:
    """Copies of everything a routed model holds, buffers too."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def gradients(model: DyLoRAMoE, backward: Callable[[], None]) -> dict[str, Tensor]:
    """The gradients that `backward` leaves, by parameter name; the model is left without any."""
    model.zero_grad(set_to_none=True)
    backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, relative: float) -> None:
    """Every parameter's gradient agrees to `relative` of its own largest entry; one that is there only once is 0."""
    for name in ours.keys() ^ theirs.keys():  # of an expert that no token met, and that others met to no effect
        assert not (ours | theirs)[name].any(), name
    for name, gradient in theirs.items():
        if name not in ours:
            continue
        difference = (ours[name].double() - gradient.double()).abs().max()
        scale = gradient.double().abs().max()
        assert difference <= relative * scale + 1e-12, f"{name}: {difference:.3g} of {scale:.3g}"


def force_path(monkeypatch: Any, path: str) -> None:
    """Make every forward of a routed model take the "dense" or the "sparse" kernel path, where it has a choice."""
    monkeypatch.setattr(
        "dylo_moe.routing.dispatch.dense_is_quicker",
        lambda **shapes: path == "dense" or shapes["top_k"] >= shapes["num_experts"],
    )


def base_tensors(model: DyLoRAMoE) -> dict[str, Tensor]:
    """Copies of the base's parameters and buffers as a routed model holds them, under the base's own names."""
    return {
        name.replace(".base_layer.", "."): copy.deepcopy(tensor.detach())
        for name, tensor in model.base.state_dict(keep_vars=True).items()
        if ".lora_" not in name
    }
