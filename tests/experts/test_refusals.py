"""What cannot be routed is refused in one sentence that names it, before the base is touched."""

import pytest
import torch
from peft import LoraConfig, LoraRuntimeConfig
from peft.tuners.lora import LoraLayer
from reference.tiny import FAMILIES, LORA, force_path, tensors, tiny_base, tiny_moe, tokens
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from dylo_moe import DyLoRAMoE, RouterConfig

BAD_ROUTER = {
    "top_k": [0, -1, 1.5, "1", True, None],
    "router_layer": ["last", "embedding", -1, 0.0, 1.0, -0.5, True, None, float("nan"), [0]],
    "granularity": ["row", "", None, True],
    "router_half_life": [0, -1.0, float("inf"), float("nan"), "32", True],
    "temperature": [0, -1.0, float("inf"), float("nan"), "1", None],
    "z_loss_coefficient": [float("inf"), float("nan"), "0", None, True],
    "entropy_coefficient": [float("inf"), float("nan"), "0", None],
}
BAD_LORA = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "target_parameters": ["mlp.up_proj.weight"],
    "init_lora_weights": "pissa",
    "layer_replication": [(0, 2), (1, 2)],
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [5, 6],
}
BAD_INIT = ["pissa", "pissa_niter_4", "olora", "orthogonal"]


def snapshot(base):
    """What must not change: the tensors, the modules, the dropouts."""
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in base.named_modules()]
    dropouts = [getattr(module, "attention_dropout", None) for module in base.modules()]
    needs = [parameter.requires_grad for parameter in base.parameters()]
    return tensors, modules, dropouts, needs


def assert_untouched(base, before):
    tensors, *rest = before
    now, *others = snapshot(base)
    assert rest == others
    assert tensors.keys() == now.keys() and all(torch.equal(tensors[name], now[name]) for name in tensors)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


def refuse(match, *, base=None, **options):
    base = tiny_base("llama", attention_dropout=0.5) if base is None else base
    before = snapshot(base)
    with pytest.raises(ValueError, match=match) as caught:
        DyLoRAMoE.from_base(base, **options)
    assert_untouched(base, before)
    return str(caught.value)


# --- values out of range


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_ROUTER.items() for value in values]
)
def test_a_bad_router_value_is_named_with_its_rule(field, value):
    with pytest.raises(ValueError) as caught:
        RouterConfig(**{field: value})
    assert f"{field} is {value!r}; it must be" in str(caught.value)
    assert not [other for other in BAD_ROUTER if other != field and f"{other} is" in str(caught.value)]


def test_all_bad_router_values_are_in_one_message():
    values = {field: values[0] for field, values in BAD_ROUTER.items()}
    with pytest.raises(ValueError) as caught:
        RouterConfig(**values)
    for field, value in values.items():
        assert f"{field} is {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("router_layer", "expected"), [("embeddings", 0), (0, 0), (3, 3), (0.5, 2), (0.25, 1), (0.99, 3), (0.01, 0)]
)
def test_router_layer_of_four_layers(router_layer, expected):
    assert RouterConfig(router_layer=router_layer).layer_index(4) == expected


@pytest.mark.parametrize("router_layer", [4, 9])
def test_a_router_behind_the_last_layer_is_refused(router_layer):
    refuse(
        f"router_layer is {router_layer}.*4 layers",
        base=tiny_base(num_hidden_layers=4),
        router=RouterConfig(router_layer=router_layer),
    )


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"num_experts": 0}, ["num_experts is 0"]),
        ({"num_experts": -2}, ["num_experts is -2"]),
        ({"num_experts": 2.5}, ["num_experts is 2.5"]),
        ({"num_experts": "4"}, ["num_experts is '4'"]),
        ({"balance_coefficient": -1.0}, ["balance_coefficient is -1.0"]),
        ({"balance_coefficient": float("nan")}, ["balance_coefficient is nan"]),
        ({"balance_coefficient": float("inf")}, ["balance_coefficient is inf"]),
        ({"balance_coefficient": "0.1"}, ["balance_coefficient is '0.1'"]),
        ({"names": ["a", "a"]}, ["already an expert 'a'"]),
        ({"names": "sql"}, ["names is 'sql'"]),
        (
            {"names": ["a b", "base", "", "é", "a/b", "..", "x" * 65, 3, "-a"], "balance_coefficient": -1},
            ["'a b'", "'base'", "''", "'é'", "'a/b'", "'..'", "x" * 65, "is 3", "'-a'", "balance_coefficient is -1"],
        ),
        (
            {"num_experts": 2, "router": RouterConfig(top_k=3), "allow_expert_growth": True, "balance_coefficient": -1},
            ["top_k is 3", "2 experts", "allow_expert_growth", "balance_coefficient"],
        ),
    ],
    ids=str,
)
def test_bad_values_of_from_base_are_all_named_in_one_message(options, parts):
    message = refuse("", **options)
    for part in parts:
        assert part in message, message


NAMES_OF_MODULES = ["update", "keys", "values", "items", "pop", "type", "train", "eval", "float", "half", "training"]
NAMES_IN_KEYS = ["weight", "model", "layers", "self_attn", "q_proj", "mlp", "base_model", "lora_A", "lora_embedding_A"]


@pytest.mark.parametrize("name", [*NAMES_OF_MODULES, *NAMES_IN_KEYS])
def test_a_name_is_either_refused_or_kept_whole(name, tmp_path):
    """Reported: some names collided with attributes of torch's containers, others were cut out of every key
    when the expert was saved, and what came back was another model."""
    base = tiny_base("llama")
    before = snapshot(base)
    try:
        model = tiny_moe(base, names=["other", name])
    except ValueError as error:
        assert repr(name) in str(error)
        assert_untouched(base, before)
        return
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), tiny_base("llama"))
    for key, tensor in tensors(model).items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["update", "a.b", "expert_0", "base", ""])
def test_a_name_that_add_expert_refuses_leaves_the_model_as_it_was(name):
    model, ids = tiny_moe("llama"), tokens(2, 8)
    before, keys = model(input_ids=ids).logits, list(model.state_dict())
    with pytest.raises(ValueError, match=repr(name)):
        model.add_expert(name)
    assert list(model.state_dict()) == keys and model.experts.names == model.router.names
    assert torch.equal(model(input_ids=ids).logits, before)


# --- LoRA configs


@pytest.mark.parametrize("field", BAD_LORA)
def test_a_lora_field_that_cannot_be_routed_is_named(field):
    refuse(f"{field} is", lora=LoraConfig(**{**LORA, field: BAD_LORA[field]}))


@pytest.mark.parametrize("value", BAD_INIT)
def test_an_init_that_rewrites_the_base_is_named(value):
    refuse(f"init_lora_weights is '{value}'", lora=LoraConfig(**LORA, init_lora_weights=value))


def test_all_reasons_against_a_lora_config_are_in_one_message():
    message = refuse(
        "",
        lora=LoraConfig(
            r=4, use_dora=True, bias="all", init_lora_weights="pissa", target_modules=["q_proj", "lm_head"]
        ),
    )
    for part in ("use_dora", "bias", "init_lora_weights", "lm_head"):
        assert part in message


@pytest.mark.parametrize(
    "targets",
    [
        ["lm_head"],
        ["embed_tokens"],
        ["q_proj", "lm_head"],
        ["self_attn"],
        ["input_layernorm"],
        ["nothing"],
        r".*lm_head",
    ],
    ids=str,
)
def test_a_target_outside_the_decoders_linears_is_refused(targets):
    refuse("target_modules", lora=LoraConfig(r=4, target_modules=targets))


@pytest.mark.parametrize("lora", [{"r": 8}, "r=8", 8], ids=str)
def test_a_lora_config_of_another_kind_is_refused(lora):
    refuse(type(lora).__name__, lora=lora)


@pytest.mark.parametrize("r", [0, -1])
def test_a_rank_below_one_is_refused(r):
    refuse("r", lora=LoraConfig(r=r, target_modules="all-linear"))


def test_what_may_be_set_is_not_refused():
    model = tiny_moe(
        "llama",
        lora={
            "use_rslora": True,
            "init_lora_weights": "gaussian",
            "exclude_modules": ["o_proj"],
            "alpha_pattern": {"up_proj": 32},
            "rank_pattern": {"down_proj": 2},
            "runtime_config": LoraRuntimeConfig(),
        },
    )
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    ranks = {
        name.split(".lora_")[0].rsplit(".", 1)[-1]: p.shape[0]
        for name, p in model.named_parameters()
        if ".lora_A" in name
    }
    assert ranks["down_proj"] == 2 and ranks["up_proj"] == 4


# --- where adapters go


@pytest.mark.parametrize(("router_layer", "first"), [("embeddings", 0), (1, 1), (0.5, 2), (3, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_below_the_router_carry_no_adapters_and_the_rest_all(family, router_layer, first):
    base = tiny_base(family, num_hidden_layers=4, **({"layer_types": None} if family.startswith("gemma") else {}))
    model = DyLoRAMoE.from_base(base, num_experts=2, router=RouterConfig(router_layer=router_layer))
    linears = {
        name.removesuffix(".base_layer")
        for name, module in model.base.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if ".lora_" not in name and not name.endswith(("lm_head", "embed_out"))
    }
    adapted = {name for name, module in model.base.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == {name for name in linears if int(name.split(".")[2]) >= first}
    assert len(adapted) % (4 - first) == 0 and adapted


@pytest.mark.parametrize("targets", [["q_proj"], r".*layers\.[0-3]\..*q_proj"], ids=str)
def test_an_explicit_layer_below_the_router_is_refused(targets):
    layers = {} if isinstance(targets, str) else {"layers_to_transform": [0, 2], "layers_pattern": "layers"}
    message = refuse(
        "below the router",
        base=tiny_base(num_hidden_layers=4),
        router=RouterConfig(router_layer=1),
        lora=LoraConfig(r=4, target_modules=targets, **layers),
    )
    assert "layers.0" in message


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("router_layer", ["embeddings", 1, 0.5])
def test_what_the_router_reads_is_the_base_alone(monkeypatch, router_layer, path):
    force_path(monkeypatch, path)
    plain, ids = tiny_base(num_hidden_layers=4), tokens(2, 9)
    hidden = plain(ids, output_hidden_states=True).hidden_states
    model = tiny_moe(tiny_base(num_hidden_layers=4), router_layer=router_layer)
    first = model.router_config.layer_index(4)
    ours = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in range(5):
        assert torch.equal(ours[layer], hidden[layer]) == (layer <= first)


# --- bases


def test_what_cannot_be_a_base_is_refused():
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    refuse("decoder-only", base=encoder_decoder)
    refuse("decoder-only", base=tiny_base("llama").model)
    for other in (nn.Linear(2, 2), 3, None):
        with pytest.raises(ValueError, match=f"base is a {type(other).__name__}"):
            DyLoRAMoE.from_base(other)
    with pytest.raises(ValueError, match="already carries adapters"):
        DyLoRAMoE.from_base(tiny_moe("llama").base)
    checkpointing = tiny_base("llama")
    checkpointing.gradient_checkpointing_enable()
    refuse("gradient checkpointing", base=checkpointing)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.add_adapter("x", LoraConfig(r=4)),
        lambda model: model.delete_adapter("expert_0"),
        lambda model: model.set_adapter("expert_0"),
        lambda model: model.load_adapter("somewhere", "x"),
        lambda model: model.add_weighted_adapter(["expert_0", "expert_1"], [0.5, 0.5], "x"),
        lambda model: model(input_ids=tokens(1, 3), adapter_names=["expert_0"]),
    ],
    ids=["add_adapter", "delete_adapter", "set_adapter", "load_adapter", "add_weighted_adapter", "adapter_names"],
)
def test_what_peft_would_do_past_the_router_is_refused(call):
    model, ids = tiny_moe("llama"), tokens(2, 8)
    before = model(input_ids=ids).logits
    with pytest.raises(ValueError, match="use"):
        call(model)
    assert torch.equal(model(input_ids=ids).logits, before)
