"""Tiny random bases beyond decoders of one kind of layer: mixtures, recurrent and hybrid layers, wrappers of images."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {
    "moe_intermediate_size": 24, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip
ROTATED = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 14, "hidden_size": 32}
QWEN_IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}

TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {"num_local_experts": 4}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
        },
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", {**SSM, "mamba_d_ssm": 64, "head_dim": 8}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **EXPERTS, "shared_expert_intermediate_size": 24, "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    "doge": ("DogeForCausalLM", "DogeConfig", {}),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "num_layers": 2, "n_routed_experts": 4, "moe_topk": 2,
            "zero_expert_num": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
            "v_head_dim": 8, "head_dim": 8,
        },
    ),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}),
    "git": ("GitForCausalLM", "GitConfig", {"vision_config": {**VISION, "model_type": "git_vision_model"}}),
    "hrm": ("HrmTextForCausalLM", "HrmTextConfig", {"num_hidden_layers": 4}),
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            "intermediate_size": [48, 48], "head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97, "laurel_rank": 4, "altup_num_inputs": 2, "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
}  # fmt: skip
"""Class, config class, and what the family needs beyond SHAPE and SPECIAL."""

IMAGES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"head_dim": 8},
        {
            "vision_config": VISION, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
            "mm_tokens_per_image": 4,
        },
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {"model_type": "gemma", "head_dim": 8},
        {"vision_config": {**VISION, "projection_dim": 32}, "image_token_index": 90, "projection_dim": 32},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"model_type": "llama"},
        {"vision_config": {**VISION, "model_type": "clip_vision_model"}, "image_token_index": 90},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"model_type": "mistral", "head_dim": 8},
        {"vision_config": {**VISION, "model_type": "pixtral"}, "image_token_index": 90},
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        TEXT["llama4"][2],
        {
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "image_size": 28, "patch_size": 14, "projector_input_dim": 32, "projector_output_dim": 32,
                "vision_output_dim": 32,
            }
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        ROTATED,
        {"vision_config": {**QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2}, **QWEN_IDS},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        ROTATED,
        {"vision_config": {**QWEN_VISION, "intermediate_size": 48, "out_hidden_size": 32}, **QWEN_IDS},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {**ROTATED, "head_dim": 8},
        {
            "vision_config": {
                **QWEN_VISION, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
            },
            **QWEN_IDS,
        },
    ),
}  # fmt: skip
"""Class, config class, what its text config needs beyond SHAPE, and the rest of its config. Every vision tower has as
many layers as the text decoder."""


def wide_base(family: str, **overrides: Any) -> PreTrainedModel:
    """A random base of `TEXT`, or of `IMAGES` for a name that ends with "+images", in eval mode; always the same."""
    torch.manual_seed(0)
    if family.endswith("+images"):
        model, config, text, rest = IMAGES[family.removesuffix("+images")]
        settings = {"text_config": {**SHAPE, **text, **overrides}, **rest}
    else:
        model, config, own = TEXT[family]
        settings = {**SHAPE, **SPECIAL, **own, **overrides}
        if family in ("ctrl", "mamba", "longcat_flash"):  # whose configs call some of these otherwise
            settings = {key: value for key, value in settings.items() if key in own or key not in ALIASED[family]}
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


ALIASED = {
    "ctrl": {*SHAPE} - {"vocab_size"},
    "mamba": {"intermediate_size", "num_attention_heads", "num_key_value_heads"},
    "longcat_flash": {"num_hidden_layers", "intermediate_size", "num_key_value_heads"},
}
