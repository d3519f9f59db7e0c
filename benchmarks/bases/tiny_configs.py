"""A part of families.py: any family of Transformers as a tiny random model.

A config is shrunk by the names of its fields: each width, count, window and rank that is known here becomes small, and
each list with one entry a layer keeps every kind of layer once. OVERRIDES has what a family needs beyond that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB = 97
HIDDEN, INNER, HEADS, HEAD, KV_HEADS, LAYERS, WINDOW = 32, 48, 4, 8, 2, 2, 6

TINY: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "attention_hidden_size", "lru_width"), HIDDEN),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "embedding_size", "embedding_dim"), HIDDEN),
    **dict.fromkeys(("backbone_hidden_size", "word_embed_proj_dim", "hidden_size_global", "projection_dim"), HIDDEN),
    **dict.fromkeys(("text_hidden_size", "out_hidden_size", "adapter_in_dim", "adapter_out_dim", "embed_dim"), HIDDEN),
    "adapter_input_size": HIDDEN,
    "index_kpool": 4,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), INNER),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_hidden_size", "feed_forward_size", "d_inner", "mlp_dim"), INNER),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "prefix_dense_intermediate_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("n_mamba_heads", "linear_num_key_heads", "swa_num_key_value_heads", "indexer_n_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "kv_channels", "attention_head_size", "swa_head_dim"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "indexer_head_dim"), HEAD),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank", "gated_norm_rank", "d_rel"), 8),
    **dict.fromkeys(("adapter_rank", "laurel_rank", "hidden_size_per_layer_input", "dim_model_base"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 2 * HIDDEN // HEADS),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups", "o_groups", "n_group", "topk_group"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "block_multiple_of", "index_block_size"), 8),
    **dict.fromkeys(("attention_chunk_size", "index_topk", "centroid_intermediate_top_k"), 8),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("local_attention", "local_attention_window_len"), WINDOW),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("num_kv_shared_layers", "num_mtp_layers", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("max_target_positions", "position_bias_max_distance", "original_max_position_embeddings"), 512),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),  # as large as fits such widths, so that errors show
    **dict.fromkeys(("altup_num_inputs", "compress_ratio"), 2),
    "rotary_dim": 4,
    "index_n_heads": 16,  # with few, scores are often 0 alike, and rounding decides which tokens are attended to
    "mamba_d_ssm": 2 * HIDDEN,
    "kv_n_heads": KV_HEADS,
    "lsh_attn_chunk_length": 8,
    "local_attn_chunk_length": 8,
    "image_size": 28,
    "patch_size": 14,
    "num_centroids": 16,
    "ngram_vocab_size_base": 200,
    "encoder_hash_byte_group_vocab": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""What a field becomes, where it has a value."""

KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "indexer_kv_heads")
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "block_types", "compress_rates")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

HYBRIDS = {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4}
SLIDING = {f"swa_{name}": HEAD for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
INDEXER = {"n_heads": KV_HEADS, "kv_heads": 1, "head_dim": HEAD, "budget": 8, "compress_ratio": 2}

SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
READS_PLACES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "paddleocr_vl",
    "qwen2_5_omni",
    "ernie4_5_vl_moe",
)
"""Families whose positions have three parts."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": SLIDING
    | {"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_head_dim": 16},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 2 * HIDDEN // HEADS},
    "ministral": {"head_dim": HEAD},
    "moshi": {"sliding_window": 512},  # with a short one its own cached decoding is inexact
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen2_5_omni_thinker": {"vision_start_token_id": VOCAB - 5},  # read without being a field
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCAB - 5},
    "qwen4_exp_text": {f"indexer_{name}": value for name, value in INDEXER.items()},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "emu3": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "hunyuan_vl_text": {"head_dim": HEAD},
    **{f"{family}_text": {"rope_parameters": SECTIONS} for family in READS_PLACES},
    "zamba": HYBRIDS | {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS},
    "zamba2": HYBRIDS,
}
"""Fields of the configs of one `model_type`; a name with a dot is a field of a config inside it."""


def families() -> dict[str, str]:
    """The causal language models of the installed Transformers: family -> class."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def wrappers() -> dict[str, str]:
    """The models that also read images and are in no list of causal language models: family -> class."""
    return {
        family: name
        for family, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if families().get(family) != name
    }


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The smallest config that has every kind of layer of this family."""
    return _shrunk(CONFIG_MAPPING[family], changes)


def tiny_model(family: str, *, wrapper: bool = False, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of this family in fp32, in eval mode.

    Args:
        wrapper: the family's model for images and text, not its causal language model.
        changes: fields of its config.
    """
    torch.manual_seed(seed)
    kind = getattr(transformers, (wrappers() if wrapper else families())[family])
    config = tiny_config(family, **changes)
    if not isinstance(config, kind.config_class):  # the language model alone, as AutoModelForCausalLM makes it
        parts = [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
        config = next((part for part in parts if isinstance(part, kind.config_class)), config)
    model = kind(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what a family leaves as it finds the memory
            if not parameter.isfinite().all() or parameter.abs().max() > 1e3:
                parameter.normal_(std=0.2)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def _shrunk(kind: type[PretrainedConfig], own: dict[str, Any]) -> PretrainedConfig:
    own = {**OVERRIDES.get(kind.model_type, {}), **own}
    default = kind()
    default.allow_global_per_layer_attribute_access = True
    values: dict[str, Any] = {}
    token = VOCAB - 1
    for field in dataclasses.fields(kind):
        name, value = field.name, getattr(default, field.name, None)
        if isinstance(value, PretrainedConfig):
            inner = {key.split(".", 1)[1]: item for key, item in own.items() if key.startswith(f"{name}.")}
            values[name] = _shrunk(type(value), inner)
        elif value is None:
            continue
        elif name in PER_LAYER and isinstance(value, (list, tuple)):
            values[name] = list(dict.fromkeys(value))
        elif name in KEY_VALUE_HEADS:
            heads = next(
                (getattr(default, key, 0) for key in ("num_attention_heads", "n_head") if hasattr(default, key)), 0
            )
            values[name] = HEADS if value == heads else min(value, KV_HEADS)
        elif name in TINY and not isinstance(value, (bool, list, tuple, dict)):
            values[name] = min(value, TINY[name]) if "experts_per_tok" in name or name == "moe_topk" else TINY[name]
        elif name in TINY and name == "eos_token_id":
            values[name] = None
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            values[name], token = token, token - 1
    _align(values, default)
    values |= {name: value for name, value in own.items() if "." not in name}
    return kind(**values)


def _align(values: dict[str, Any], default: PretrainedConfig) -> None:
    """As many layers as the longest list of kinds has, and each list as long."""
    lists = [name for name in values if name in PER_LAYER]
    if not lists:
        return
    num_layers = max(LAYERS, *(len(values[name]) for name in lists))
    for name in lists:
        values[name] += values[name][-1:] * (num_layers - len(values[name]))
    values |= {name: num_layers for name in LAYER_COUNTS if name in values}
