"""Laws of what is seen of a base before experts are put on it: which linears a router can serve, and which bases."""

import copy

import pytest
import torch
from reference.tiny import COMMON, FAMILIES, tiny_base
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    ReformerConfig,
    ReformerModelWithLMHead,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from dylo_moe.base.stack import decoder_layers
from dylo_moe.model.probe import probe
from dylo_moe.routing.config import RouterConfig

LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT_ATTENTION = {**COMMON, **LATENT, **EXPERTS, "num_key_value_heads": 4, "moe_intermediate_size": 24}
SLIDING = ["sliding_attention", "full_attention"]
NANO = {
    **COMMON,
    "head_dim": 8,
    "intermediate_size": [48, 48],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "sliding_window": 6,
    "layer_types": SLIDING,
    "activation_sparsity_pattern": [0.0, 0.0],
}
MINIMAX = {**COMMON, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}
OWN_FAMILIES = {
    "bert": lambda: BertLMHeadModel(BertConfig(**COMMON)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT_ATTENTION)),
    "doge": lambda: DogeForCausalLM(DogeConfig(**COMMON)),
    "gemma3n": lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**NANO)),
    "gpt": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4)),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=48)
    ),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "minimax": lambda: MiniMaxForCausalLM(MiniMaxConfig(**MINIMAX)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
        )
    ),
    "reformer": lambda: ReformerModelWithLMHead(ReformerConfig(vocab_size=97, is_decoder=True)),
    "rwkv": lambda: RwkvForCausalLM(
        RwkvConfig(vocab_size=97, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    ),
    "xlnet": lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48)),
}


def made(family):
    torch.manual_seed(0)
    return OWN_FAMILIES[family]().eval() if family in OWN_FAMILIES else tiny_base(family)


def seen(base, layer="embeddings"):
    return probe(base, router=RouterConfig(router_layer=layer, granularity="sequence"))


@pytest.mark.parametrize("layer", ["embeddings", 1, "final"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt", "llama4"])
def test_an_ordinary_base_feeds_all_of_its_linears(family, layer):
    assert seen(made(family), layer) == (1 if layer == 1 else 0, 32, False, None, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_rounding_is_not_taken_for_another_order(family, dtype):
    assert seen(tiny_base(family, dtype=dtype)) == (0, 32, False, None, {})


@pytest.mark.parametrize(
    ("family", "name", "what"),
    [
        ("doge", "self_attn.dt_proj", "is fed cached tokens too, 6 in a forward of 2"),
        ("deepseek_v3", "self_attn.kv_b_proj", "is fed cached tokens too, 6 in a forward of 2"),
        ("mamba", "mixer.dt_proj", "is not called for a short text"),
    ],
)
def test_linears_that_read_other_tokens_than_those_of_a_forward_are_found(family, name, what):
    """Reported: while decoding, they gave every cached token the expert of the newest."""
    base = made(family)
    prefix, layers = decoder_layers(base)
    assert seen(base).misfed == {f"{prefix}.{index}.{name}": what for index in range(len(layers))}


class Strange(nn.Module):
    """A feed-forward network whose linears are fed the tokens in another way."""

    def __init__(self, inner, fed):
        super().__init__()
        self.inner, self.fed = inner, fed

    def forward(self, hidden):
        return self.fed(self.inner, hidden)


def half(inner, hidden):
    return torch.cat([inner(hidden[:, :1]), inner(hidden[:, 1:])], 1)


def tokens_first(inner, hidden):
    return inner(hidden.transpose(0, 1)).transpose(0, 1)


def summed(inner, hidden):
    return inner(hidden.cumsum(1)).flip(0)


def in_pairs(inner, hidden):
    return inner(hidden.repeat(1, 2, 1))[:, : hidden.shape[1]]


@pytest.mark.parametrize(
    ("fed", "what"),
    [(half, "is fed 2 tokens in a forward of 6"), (tokens_first, "another order"), (in_pairs, "fed 12 tokens")],
)
def test_cropped_merged_and_repeated_tokens_are_found(fed, what):
    base = made("llama")
    base.model.layers[1].mlp = Strange(base.model.layers[1].mlp, fed)
    misfed = seen(base).misfed
    assert [name.rpartition(".mlp.inner.")[2] for name in misfed] == ["gate_proj", "up_proj", "down_proj"]
    assert all(what in text for text in misfed.values())


def test_a_base_whose_rows_see_each_other_is_refused():
    base = made("llama")
    base.model.layers[1].mlp = Strange(base.model.layers[1].mlp, summed)
    with pytest.raises(ValueError, match="of other rows, so that it is no causal language model"):
        seen(base)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("bert", "lets a token change what it computes of earlier ones"),
        ("gemma3n", r"gives \[2, 2, 3, 32\] to its layer 0 for 2 rows of 3 tokens"),
        ("reformer", r"gives \[1, \d+, 256\] to its layer 0 for a text of 67 tokens"),
        ("xlnet", r"gives \[3, 2, 32\] to its layer 0"),
    ],
)
def test_bases_that_no_router_could_follow_are_refused_by_name(family, said):
    with pytest.raises(ValueError, match=said) as refusal:
        seen(made(family))
    assert str(refusal.value).startswith(type(made(family)).__name__) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(("family", "name"), [("minimax", None), ("rwkv", "state"), ("gpt", None)])
def test_what_a_base_keeps_between_calls_is_found(family, name):
    assert seen(made(family)).foreign_state == name


def test_last_hidden_states_may_be_narrower():
    """Reported: with the projection of OPT-350m, the first forward failed."""
    assert seen(made("opt"), "final").hidden_size == 16
    assert seen(made("opt"), "embeddings").hidden_size == 32


def test_nothing_of_the_base_changes():
    base = made("llama").train()
    base.model.layers[0].eval()
    before = [(name, module.training, len(module._forward_pre_hooks)) for name, module in base.named_modules()]
    state = copy.deepcopy(base.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    seen(base)
    assert torch.equal(torch.rand(1), expected)
    assert before == [(name, module.training, len(module._forward_pre_hooks)) for name, module in base.named_modules()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


def test_a_base_without_weights_shows_its_shapes():
    base = made("deepseek_v3").to("meta", torch.bfloat16)  # the product over experts has no shape in fp32
    assert set(seen(base).misfed) == {f"model.layers.{index}.self_attn.kv_b_proj" for index in range(2)}
    assert seen(made("opt").to("meta"), "final").hidden_size == 16
