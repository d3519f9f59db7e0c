"""Laws of bases whose layers keep a recurrent state instead of keys and values, or both kinds side by side."""

import functools

import pytest
import torch
from reference.decoding import assert_varied, used_by
from reference.tiny import tiny_moe, tokens
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from dylo_moe.utils.errors import DyLoRAWarning

CLOSE = 1e-4
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
MIXED = ["linear_attention", "linear_attention", "full_attention"]
BASES = {
    "qwen3_5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**COMMON, **LINEAR, layer_types=MIXED)),
    "recurrent_gemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            **COMMON, lru_width=32, attention_window_size=64, block_types=["recurrent", "recurrent", "attention"]
        )
    ),
    "lfm2": lambda: Lfm2ForCausalLM(
        Lfm2Config(**COMMON, layer_types=["conv", "conv", "full_attention"], block_multiple_of=8)
    ),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(**COMMON, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
    ),
    "minimax": lambda: MiniMaxForCausalLM(
        MiniMaxConfig(**COMMON, num_local_experts=4, layer_types=MIXED[::-1], block_size=8)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=4, eos_token_id=None)
    ),
}
PLACES = [*((family, layer) for family in ("qwen3_5", "recurrent_gemma", "lfm2") for layer in (0, 1, 2))]
PLACES += [("falcon_h1", 1), ("mamba", 0), ("minimax", 0), ("minimax", 1)]


@functools.cache
def model_on(family, layer):
    torch.manual_seed(0)
    base = BASES[family]().eval()
    for name, parameter in base.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    targets = {"mamba": ["in_proj", "x_proj"], "falcon_h1": ["q_proj", "v_proj", "in_proj"]}.get(family, "all-linear")
    return tiny_moe(base, lora={"target_modules": targets}, router_layer=layer)


def without_positions(model, ids):
    return model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize(("family", "layer"), PLACES)
def test_a_loop_that_keeps_the_cache_is_one_forward(laws, family, layer):
    """Reported: Transformers' cache was asked for the length of a layer that has none."""
    model, ids = model_on(family, layer), tokens(2, 12, seed=3)
    name = "cache_params" if family == "mamba" else "past_key_values"

    @torch.no_grad()
    def loop():
        cache = MiniMaxCache() if family == "minimax" else DynamicCache(config=model.base.config)
        parts = ids.split([5, *[1] * 7], 1)
        return torch.cat([model(input_ids=part, use_cache=True, **{name: cache}).logits for part in parts], 1)

    logits, weights = used_by(model, loop)
    expected = without_positions(model, ids)
    laws.close("cache by hand = one forward", logits, expected.logits, family=family, atol=CLOSE)
    laws.close("cache by hand = one forward, routing", weights, expected.routing.weights, family=family, atol=CLOSE)
    assert_varied(expected.routing)


@pytest.mark.parametrize(("family", "layer"), PLACES)
def test_what_is_generated_with_the_cache_is_what_is_generated_without(laws, family, layer):
    model, ids = model_on(family, layer), tokens(2, 6, seed=4)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    made = model.generate(input_ids=ids, **options)
    plain = model.generate(input_ids=ids, use_cache=False, **options)
    laws.equal("cached = uncached, greedy", made.sequences, plain.sequences, family=family)
    expected = without_positions(model, made.sequences).routing
    laws.close("reported routing = one forward", made.routing.weights, expected.weights, family=family, atol=CLOSE)


@pytest.mark.parametrize("family", ["mamba", "qwen3_5"])
def test_a_cache_that_another_model_filled_is_refused(family):
    model, ids = model_on(family, 0), tokens(1, 6)
    cache = DynamicCache(config=model.base.config)
    name = "cache_params" if family == "mamba" else "past_key_values"
    with torch.no_grad():
        foreign = BASES[family]().eval()(input_ids=ids, use_cache=True, **{name: cache})[name]
        with pytest.raises(ValueError, match=r"the router has seen (none|0) of them"):
            model(input_ids=ids[:, :1], use_cache=True, **{name: foreign})


def test_a_base_whose_state_is_no_cache_reads_the_whole_text_again(laws):
    """Reported: the router began anew at every token of RWKV, without a word."""
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=97, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=None
    )
    base, ids = RwkvForCausalLM(config).eval(), tokens(2, 9)
    for parameter in base.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    kept = base(input_ids=ids, use_cache=True).state
    model = tiny_moe(base)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    with pytest.warns(DyLoRAWarning, match="keeps its state in a way that the router cannot follow"):
        made = model.generate(input_ids=ids, **options)
    plain = model.generate(input_ids=ids, use_cache=False, **options)
    laws.equal("cached = uncached, greedy", made.sequences, plain.sequences, family="rwkv")
    assert_varied(made.routing)
    with torch.no_grad(), pytest.raises(ValueError, match="state is given, a list that the router cannot follow"):
        model(input_ids=ids[:, -1:], state=kept)
