"""Laws of adapters for vLLM: a padded one is the same adapter, bit for bit, and every one follows the rules."""

import json
import math
import random
import shlex

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference.stock import load_stock, save_stock
from reference.tiny import tiny_base, tokens
from safetensors.torch import load_file, save_file

from dylo_moe.commands.export.padded_adapter import padded, stored_alphas
from dylo_moe.commands.export.serving_rules import SERVER_RANKS, next_server_rank, rule_problems, serve_command
from dylo_moe.experts.adapter import read_adapter

MIXED = {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 11}}
LORAS = {
    "odd rank and scaling": {"r": 3, "lora_alpha": 5},
    "rank-stabilised": {"r": 12, "lora_alpha": 7, "use_rslora": True},
    "as vLLM has it": {"r": 8, "lora_alpha": 16},
    "rank-stabilised, as vLLM has it": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "a rank for each linear": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, "down_proj": 8}},
    "a rank and an alpha for each linear": {"r": 3, "lora_alpha": 5, **MIXED},
    "by a pattern": {"r": 5, "lora_alpha": 3, "target_modules": r"model\.layers\.1\..*\.(q_proj|up_proj)"},
    "some layers": {"r": 5, "lora_alpha": 3, "target_modules": ["k_proj"], "layers_to_transform": [1]},
}


def written(folder, adapter):
    """As an adapter's folder."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter.state.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def read(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def shapes_of(base):
    return {name: list(tensor.shape) for name, tensor in base.named_parameters()}


def loras(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("kind", LORAS)
def test_stock_peft_reads_a_padded_adapter_as_the_same_bit_for_bit(kind, tmp_path, laws):
    folder = save_stock(tmp_path / "adapter", **LORAS[kind])
    adapter = padded(*read(folder))
    assert rule_problems(adapter.config, adapter.state, base_shapes=shapes_of(tiny_base())) == []
    one, other = load_stock(folder), load_stock(written(tmp_path / "padded", adapter))
    assert loras(one).keys() == loras(other).keys() and len(loras(one)) > 0
    for name, layer in loras(one).items():
        twin = loras(other)[name]
        assert twin.r["default"] == adapter.config["r"] in SERVER_RANKS
        rank, factor = layer.r["default"], layer.scaling["default"] / twin.scaling["default"]
        assert factor == 2.0 ** round(math.log2(factor))  # a power of two moved into B, or 1
        (a, b), (wide_a, wide_b) = [
            (each.lora_A["default"].weight, each.lora_B["default"].weight) for each in (layer, twin)
        ]
        assert torch.equal(wide_a[:rank], a) and torch.equal(wide_b[:, :rank], b * factor)
        assert not wide_a[rank:].any() and not wide_b[:, rank:].any()
        laws.equal("a padded adapter's B A", twin.get_delta_weight("default"), layer.get_delta_weight("default"))
    ids = tokens(2, 11)
    laws.close("a padded adapter's logits", other(ids).logits, one(ids).logits, atol=1e-6)


def test_only_what_must_change_changes(tmp_path):
    config, state = read(save_stock(tmp_path / "adapter", **LORAS["as vLLM has it"]))
    adapter = padded(config, state)
    assert adapter.config == config and adapter.notes == [] and adapter.ranks == [8]
    assert all(torch.equal(adapter.state[name], state[name]) for name in state) and adapter.state.keys() == state.keys()
    ranks = padded(*read(save_stock(tmp_path / "ranks", **LORAS["a rank for each linear"])))
    assert ranks.config["alpha_pattern"] == {}  # scalings 4, 2 and 1: powers of two apart
    assert ranks.ranks == [2, 4, 8] and "from rank 2, 4, 8 to 8" in ranks.notes[0]
    alphas = padded(*read(save_stock(tmp_path / "alphas", **LORAS["a rank and an alpha for each linear"])))
    assert alphas.config["alpha_pattern"] and "does not read it" in alphas.notes[1]


def test_a_scaling_comes_back_as_the_same_number():
    """320 is no power of two, and some scalings cannot be stored there."""
    draw, used = random.Random(0), set()
    for _ in range(2000):
        scaling, at_least = (
            draw.choice((draw.uniform(1e-3, 90), draw.randint(1, 99) / draw.randint(1, 512))),
            draw.randint(1, 512),
        )
        rank, alphas = stored_alphas({scaling}, at_least=at_least)
        assert alphas[scaling] / rank == scaling and rank >= at_least and rank in SERVER_RANKS
        assert json.loads(json.dumps(alphas[scaling])) == alphas[scaling]
        used.add((next_server_rank(at_least), rank))
    assert {(320, 320), (320, 512)} <= used
    assert {pair for pair in used if pair[0] != pair[1]} == {(320, 512)}


def test_ranks_that_no_server_has(tmp_path):
    wide = get_peft_model(tiny_base(), LoraConfig(r=513, lora_alpha=1, target_modules=["q_proj"]))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="its rank is 513, above 512"):
        padded(*read(tmp_path / "wide"))
    assert [next_server_rank(rank) for rank in (1, 2, 8, 9, 257, 321, 512)] == [1, 8, 8, 16, 320, 512, 512]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"use_dora": True}, "vLLM takes no DoRA"),
        ({"modules_to_save": ["lm_head"]}, "vLLM takes no trained copies of base modules"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is set"),
        ({"target_modules": ".*q_proj"}, "must be a list of names"),
        ({"r": 12}, "r is 12; it must be one of 1, 8, 16, 32, 64, 128, 256, 320, 512"),
        ({"r": 16}, "r is 16, but these have another rank: base_model."),
    ],
)
def test_each_rule_refuses_what_breaks_it(change, reason, tmp_path):
    config, state = read(save_stock(tmp_path / "adapter", r=8, lora_alpha=8))
    assert rule_problems(config, state, base_shapes={}) == []
    assert any(reason in problem for problem in rule_problems({**config, **change}, state, base_shapes={}))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.experts.0.up_proj.lora_A.weight"])
def test_foreign_tensors_are_refused(name, tmp_path):
    config, state = read(save_stock(tmp_path / "adapter", r=8, lora_alpha=8))
    problems = rule_problems(config, {**state, f"base_model.model.{name}": torch.zeros(8, 8)}, base_shapes={})
    assert len(problems) == 1 and name in problems[0]


def test_an_adapter_without_a_b_is_refused(tmp_path):
    config, state = read(save_stock(tmp_path / "adapter"))
    del state[next(name for name in state if ".lora_B." in name)]
    with pytest.raises(ValueError, match=r"not pairs of A and B: base_model\.model\..*lora_A\.weight"):
        padded(config, state)


def test_the_command_names_each_expert_and_the_base(tmp_path):
    def flags(command):
        words = shlex.split(command.replace("\\\n", ""))  # as a shell joins lines
        assert words[:2] == ["vllm", "serve"]
        return words[2], words[3:]

    base, words = flags(serve_command("some/base", "v 1", experts=["sql", "c-1"], max_rank=9))
    assert base == "some/base"
    assert words == [
        *("--served-model-name", "base", "--revision", "v 1", "--enable-lora", "--max-loras", "2"),
        *("--max-lora-rank", "16", "--lora-modules", "sql=./sql", "c-1=./c-1"),
    ]
    folder = tmp_path / "my base"
    folder.mkdir()
    assert flags(serve_command(str(folder), None, experts=["a"], max_rank=1))[0] == str(folder)
    assert "resolve_base('smollm2-135m')" in serve_command("smollm2-135m", None, experts=["a"], max_rank=1)


def test_an_adapter_read_back_is_the_one_that_was_written(tmp_path):
    """In bf16 too, where a factor moved into B must not round."""
    folder = save_stock(tmp_path / "adapter", dtype=torch.bfloat16, **LORAS["a rank for each linear"])
    adapter = padded(*read(folder))
    config, state = read_adapter(str(written(tmp_path / "padded", adapter)))
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16} and config.r == 8
    assert all(torch.equal(state[name], adapter.state[name]) for name in adapter.state)
