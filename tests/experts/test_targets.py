"""Targets mean modules: the defaults adapt what can be adapted exactly, and stock PEFT reads the same of a config."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from reference.tiny import padded, scramble, tiny_base, tiny_moe, tokens
from reference.wide import IMAGES, wide_base
from torch import nn

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.base.stack import decoder_layers

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
FUSED = "mlp.experts.down_proj, mlp.experts.gate_up_proj, which is a raw parameter, no linear"

ADAPTED: dict[str, tuple[set[str], list[str]]] = {
    "mixtral": (ATTENTION, [FUSED]),
    "qwen2_moe": (
        ATTENTION | MLP | {f"mlp.shared_expert{name}" for name in ("_gate", *(part[3:] for part in MLP))},
        [FUSED],
    ),
    "qwen3_moe": (ATTENTION, [FUSED]),
    "deepseek_v3": (
        {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")},
        ["mlp.down_proj", "which PEFT takes for fused experts", "self_attn.kv_b_proj, which is fed cached", FUSED],
    ),
    "gpt_oss": (ATTENTION, [FUSED]),
    "phimoe": (ATTENTION, ["mlp.router, which is the router of a mixture", FUSED]),
    "llama4": (
        ATTENTION | {f"feed_forward.shared_expert.{name[4:]}" for name in MLP},
        ["feed_forward.router, which is the router of a mixture"],
    ),
    "jamba": (
        ATTENTION
        | {f"feed_forward.{name[4:]}" for name in MLP}
        | {f"mamba.{name}_proj" for name in ("in", "x", "out")},
        ["mamba.dt_proj, which is not called"],
    ),
    "mamba": ({"mixer.in_proj", "mixer.x_proj"}, ["mixer.out_proj, which PEFT refuses", "mixer.dt_proj"]),
    "falcon_h1": (
        ATTENTION | {f"feed_forward.{name[4:]}" for name in MLP} | {"mamba.in_proj"},
        ["mamba.out_proj, which PEFT refuses"],
    ),
    "qwen3_next": (
        ATTENTION
        | {f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")}
        | {"mlp.shared_expert_gate"},
        ["mlp.shared_expert.down_proj", "which PEFT takes for fused experts", FUSED],
    ),
    "doge": (ATTENTION | MLP, ["self_attn.dt_proj, which is fed cached"]),
    "longcat_flash": (
        {
            f"self_attn.{half}.{name}"
            for half in (0, 1)
            for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
        },
        ["self_attn.*.kv_b_proj, which is fed cached"],
    ),
    "ctrl": (
        {f"multi_head_attention.{name}" for name in ("Wq", "Wk", "Wv", "dense")} | {"ffn.0", "ffn.2"},
        [],
    ),
}
"""The linears of a layer that experts adapt by default, and what is said of the others."""


def kinds(model: nn.Module) -> set[str]:
    """The adapted linears, without the number of their layer."""
    prefix, _ = decoder_layers(model.base)
    names = [name for name, module in model.base.named_modules() if isinstance(module, LoraLayer)]
    assert all(name.startswith(f"{prefix}.") for name in names)
    return {name.removeprefix(f"{prefix}.").partition(".")[2] for name in names}


def fresh(family: str, **options: object) -> DyLoRAMoE:
    torch.manual_seed(1)
    lora = LoraConfig(r=2, lora_dropout=0.0)
    return DyLoRAMoE.from_base(wide_base(family), num_experts=2, lora=lora, **options).eval()


def assert_stock(model: DyLoRAMoE, family: str, folder: str) -> None:
    """Each expert gives in stock PEFT, read from its folder, the logits that it gives here."""
    ids, mask = padded([tokens(n, seed=n, high=90) for n in (7, 4)], side="left")
    batch = {"input_ids": ids, "attention_mask": mask}
    model.save_pretrained(folder)
    for expert in model.experts:
        stock = PeftModel.from_pretrained(wide_base(family), f"{folder}/experts/{expert.name}").eval()
        adapted = {name for name, module in stock.named_modules() if isinstance(module, LoraLayer)}
        assert adapted == {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        with model.route_to(expert.name), torch.no_grad():
            torch.testing.assert_close(
                model(**batch).logits[mask.bool()], stock(**batch).logits[mask.bool()], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("family", ADAPTED)
def test_the_defaults_adapt_all_that_can_be_adapted_exactly(family, tmp_path):
    expected, said = ADAPTED[family]
    model = fresh(family)
    assert kinds(model) == expected
    assert [part for part in said if part not in (model.left_out or "")] == []
    scramble(model)
    assert_stock(model, family, str(tmp_path / "saved"))
    ids = tokens(2, 6, high=90)
    with model.train().route_to("expert_1"):
        model(input_ids=ids, labels=ids).loss.backward()
    learning = {name: p for name, p in model.named_parameters() if ".expert_1." in name}
    assert learning and all(p.grad is not None and p.grad.any() for p in learning.values())


@pytest.mark.parametrize("family", [f"{name}+images" for name in IMAGES])
def test_a_wrapper_of_images_is_adapted_in_its_text_decoder_alone(family, tmp_path):
    """Reported: "all-linear" became last parts of names, which modules of the vision tower have too."""
    model = fresh(family)
    block = "feed_forward.shared_expert." if family.startswith("llama4") else "mlp."
    assert kinds(model) == ATTENTION | {block + name[4:] for name in MLP}
    assert all(len(layer.adapters) == 2 for layer in model.experts.layers)
    scramble(model)
    assert_stock(model, family, str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "experts" / "expert_0" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(part.rpartition(".")[2] for part in kinds(model))
    ids = tokens(2, 6, high=90)
    loaded = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), wide_base(family)).eval()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    loaded.add_expert("new")
    assert "new" in loaded.experts.layers[0].adapters


def test_experts_begin_at_the_router_in_a_wrapper_of_images_too():
    model = fresh("gemma3+images", router=RouterConfig(router_layer=1))
    names = [name for name, module in model.base.named_modules() if isinstance(module, LoraLayer)]
    assert len(names) == 7 and all(name.startswith("model.language_model.layers.1.") for name in names)


@pytest.mark.parametrize("router_layer", [0, 1])
def test_members_of_a_sequence_are_told_from_layers(router_layer):
    """Reported: linears called "0" and "2" in nn.Sequential are called as the decoder layers are."""
    base = tiny_base()
    for layer in base.model.layers:
        layer.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    model = DyLoRAMoE.from_base(base, router=RouterConfig(router_layer=router_layer))
    assert kinds(model) == ATTENTION | {"mlp.0", "mlp.2"}
    assert len(model.experts.layers) == 6 * (2 - router_layer)
    assert {"mlp.0", "mlp.2"} <= set(model.experts.lora.target_modules)


class Doubled(nn.Linear):
    """A linear with another forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Written(nn.Linear):
    """A linear whose forward is written anew, and is the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize(("kind", "is_adapted"), [(Doubled, False), (Written, True)])
def test_a_subclass_is_adapted_where_it_computes_what_a_linear_does(kind, is_adapted):
    base = tiny_base()
    for layer in base.model.layers:
        layer.mlp.up_proj = kind(32, 48)
    model = DyLoRAMoE.from_base(base)
    assert ("mlp.up_proj" in kinds(model)) == is_adapted
    assert (model.left_out is None) == is_adapted
    if not is_adapted:
        assert model.left_out == "mlp.up_proj, which is no plain product with its weights"
        with pytest.raises(ValueError, match=r"reaches mlp\.up_proj, which is no plain product"):
            DyLoRAMoE.from_base(base := tiny_moe("llama").unload(), lora=_reaching(base))


def _reaching(base: nn.Module) -> LoraConfig:
    for layer in base.model.layers:
        layer.mlp.up_proj = Doubled(32, 48)
    return LoraConfig(r=2, target_modules=["q_proj", "up_proj"])


# --- what a user names


def test_a_last_part_means_the_linears_inside_the_decoder():
    model = DyLoRAMoE.from_base(wide_base("gemma3+images"), lora=LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    assert kinds(model) == {"self_attn.q_proj", "mlp.up_proj"}
    assert model.left_out == "self_attn.q_proj, which lies outside the decoder layers"
    assert re.fullmatch(model.experts.lora.exclude_modules, "model.vision_tower.encoder.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "model.vision_tower.encoder.layers.0.self_attn.q_proj"],
        ["q_proj", "out_proj"],
        r".*vision_tower.*q_proj",
        ["q_proj", "lm_head"],
    ],
    ids=str,
)
def test_what_is_only_outside_the_decoder_is_refused(targets):
    with pytest.raises(ValueError, match="only linears inside the decoder layers"):
        DyLoRAMoE.from_base(wide_base("gemma3+images"), lora=LoraConfig(r=2, target_modules=targets))


def test_what_a_user_excludes_stays_excluded_beside_what_is_outside():
    for excluded in (["o_proj", "layers.1.self_attn.k_proj"], r".*(o_proj|layers\.1\.self_attn\.k_proj)"):
        lora = LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded)
        model = DyLoRAMoE.from_base(wide_base("gemma3+images"), lora=lora)
        assert kinds(model) == (ATTENTION | MLP) - {"self_attn.o_proj"}
        assert len(model.experts.layers) == 11


@pytest.mark.parametrize(
    "targets", [r".*layers\.1\..*(q_proj|o_proj)", ["layers.1.self_attn.q_proj", "1.self_attn.o_proj"]]
)
def test_a_pattern_stays_exact_where_peft_reads_it_otherwise(targets, tmp_path):
    """PEFT cuts patterns to last parts of names for some mixtures, which would adapt all layers."""
    torch.manual_seed(1)
    lora = LoraConfig(r=2, lora_dropout=0.0, target_modules=targets)
    model = scramble(DyLoRAMoE.from_base(wide_base("qwen3_moe"), num_experts=2, lora=lora).eval())
    names = [name for name, module in model.base.named_modules() if isinstance(module, LoraLayer)]
    assert names == [f"model.layers.1.self_attn.{name}_proj" for name in ("q", "o")]
    assert_stock(model, "qwen3_moe", str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("family", "targets", "why"),
    [
        ("deepseek_v3", ["o_proj", "gate_proj", "up_proj"], "which PEFT takes for fused experts"),
        ("deepseek_v3", ["o_proj", "kv_b_proj"], "kv_b_proj, which is fed cached tokens too"),
        ("phimoe", ["q_proj", "router"], "is the router of a mixture"),
        ("mamba", ["in_proj", "out_proj"], "which PEFT refuses"),
        ("llama4", ["q_proj", "feed_forward.router"], "is the router of a mixture"),
    ],
)
def test_what_the_defaults_leave_out_is_refused_where_it_is_named(family, targets, why):
    with pytest.raises(ValueError, match=why):
        DyLoRAMoE.from_base(wide_base(family), lora=LoraConfig(r=2, target_modules=targets))


def test_names_that_an_older_checkpoint_has_stay_as_they_are():
    """Configs of checkpoints are compared when a run is resumed."""
    for family, expected in (
        ("llama", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("gpt_neox", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
    ):
        lora = DyLoRAMoE.from_base(tiny_base(family), router=RouterConfig(router_layer=1)).experts.lora
        assert sorted(lora.target_modules) == expected
        assert lora.layers_to_transform == [1] and lora.exclude_modules is None
