"""Laws of `import_expert`: a stock PEFT adapter gives the same in a pool, and changes nothing of the others there."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from reference.checkpoints import contents
from reference.paths import TESTS
from reference.stock import load_stock, save_stock
from reference.tiny import (
    FAMILIES,
    assert_same_gradients,
    base_tensors,
    force_path,
    gradients,
    padded,
    tensors,
    tiny_base,
    tiny_moe,
    tokens,
)
from safetensors.torch import load_file

from dylo_moe import DyLoRAMoE

EXACT = "an imported adapter gives stock PEFT's logits"
FEW = {"target_modules": ["q_proj", "down_proj"]}
"""The targets of a pool; the adapters below also have linears that no expert of it has."""
ADAPTERS = {
    "another rank": ("llama", {"r": 7}, {}),
    "rank-stabilised": ("llama", {"r": 6, "use_rslora": True}, {}),
    "rank-stabilised pool": ("llama", {"r": 6}, {"use_rslora": True}),
    "fewer targets": ("llama", {"target_modules": ["q_proj"]}, {}),
    "other targets": ("llama", {"target_modules": ["up_proj", "v_proj"]}, FEW),
    "more targets": ("llama", {}, FEW),
    "patterns": ("llama", {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 20, "up_proj": 1}}, {}),
    "patterns in the pool": ("llama", {}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 20}}),
    "a regular expression": ("llama", {"target_modules": r".*\.(q|down)_proj"}, {}),
    "full names": ("llama", {"target_modules": ["model.layers.1.self_attn.k_proj"]}, FEW),
    "one layer": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, {}),
    "one layer by number": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}, {}),
    "exclusions": ("llama", {"exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]}, {}),
    "excluded by expression": ("llama", {"exclude_modules": r".*layers\.0\..*"}, FEW),
    "no initialisation": ("llama", {"init_lora_weights": False}, {}),
    **{family: (family, {}, {}) for family in FAMILIES if family != "llama"},
    "part of GPT-2": ("gpt2", {"target_modules": ["c_proj"], "r": 2}, {"target_modules": ["c_attn"]}),
}


def batch():
    ids, mask = padded([tokens(n, seed=n) for n in (11, 5, 8)], side="left")
    return {"input_ids": ids, "attention_mask": mask}


def labelled():
    ids, mask = padded([tokens(n, seed=n) for n in (11, 5, 8)], side="right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def generated(model):
    """The tokens and the logits of cached greedy decoding."""
    out = model.generate(**batch(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_route_to_an_imported_expert_is_stock_peft(laws, adapter, tmp_path):
    """Logits with and without gradient, cached decoding, and the gradients of its own matrices."""
    family, lora, pool = ADAPTERS[adapter]
    stock = load_stock(save_stock(tmp_path / "stock", family, **lora), family)
    model = tiny_moe(family, lora=pool)
    model.import_expert("new", str(tmp_path / "stock"))
    expected = stock(**batch()).logits
    assert (expected - tiny_base(family)(**batch()).logits).abs().max() > 5e-3
    for parameter in (p for name, p in stock.named_parameters() if "lora_" in name):
        parameter.requires_grad_(True)
    theirs = gradients(stock, lambda: stock(**labelled()).loss.backward())
    theirs = {name.replace(".default.", ".new."): gradient for name, gradient in theirs.items()}
    with model.route_to("new"):
        laws.close(EXACT, model(**batch()).logits, expected, family=family, atol=1e-5)
        with torch.no_grad():
            laws.close(EXACT, model(**batch()).logits, expected, family=family, atol=1e-5)
        for ours, stocks in zip(generated(model), generated(stock), strict=True):
            laws.close(EXACT, ours, stocks, family=family, atol=1e-5)
        assert_same_gradients(gradients(model, lambda: model(**labelled()).lm_loss.backward()), theirs, relative=1e-4)


@pytest.mark.parametrize(
    ("files", "pool"),
    [
        ("bf16", "fp32"), ("bin", "fp32"), ("bf16 bin", "bf16"), ("fp32", "bf16"),
        ("fp32", "fp32 on a bf16 base"), ("bf16", "fp32 on a bf16 base"),
    ],
)  # fmt: skip
def test_files_of_any_kind_come_into_a_pool_of_any_dtype(laws, files, pool, tmp_path):
    """Every value is the file's, rounded at most once, to the pool's dtype; so are stock PEFT's logits."""
    dtype = torch.bfloat16 if "bf16" in files else torch.float32
    save_stock(tmp_path / "stock", dtype=dtype, safe="bin" not in files)
    assert (tmp_path / "stock" / "adapter_model.bin").exists() == ("bin" in files)
    base_dtype = torch.float32 if pool == "fp32" else torch.bfloat16
    model = tiny_moe(tiny_base(dtype=base_dtype))
    if pool == "bf16":
        model.to(torch.bfloat16)
    model.import_expert("new", str(tmp_path / "stock"))
    stock = load_stock(tmp_path / "stock", dtype=base_dtype)
    wanted = {n.replace(".default.", ".new."): p for n, p in stock.named_parameters() if "lora_" in n}
    ours = {name: p for name, p in model.named_parameters() if ".new." in name}
    kept = torch.bfloat16 if pool == "bf16" else torch.float32
    assert ours.keys() == wanted.keys() and {p.dtype for p in ours.values()} == {kept}
    for name, parameter in ours.items():
        law = "an imported matrix is the file's, rounded to the pool's dtype"
        laws.equal(law, parameter.to(base_dtype), wanted[name])
    with model.route_to("new"), torch.no_grad():
        bound = 1e-5 if pool == "fp32" else 0.05
        laws.close(f"{EXACT}, {pool}", model(**batch()).logits, stock(**batch()).logits, atol=bound)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("adapter", "top_k"), [("another rank", 2), ("other targets", 1), ("one layer", 2), ("gpt2", 1)]
)
def test_nobody_notices_an_imported_expert_that_no_token_chooses(laws, monkeypatch, adapter, top_k, path, tmp_path):
    """Nothing of the others moves a bit, and neither does their output; removed again, the checkpoint is the same."""
    force_path(monkeypatch, path)
    family, lora, pool = ADAPTERS[adapter]
    model = tiny_moe(family, lora=pool, num_experts=4, top_k=top_k)
    model.save_pretrained(str(tmp_path / "before"))
    before, kept = model(**batch()), tensors(model)
    expert = model.import_expert("new", str(save_stock(tmp_path / "stock", family, **lora)), skill="sql")
    assert (expert.rank, expert.mature, expert.trainable, expert.skill) == (lora.get("r", 3), False, True, "sql")
    assert (model(**batch()).routing.weights[batch()["attention_mask"].bool()] > 0).all()  # nascent: dense
    now = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors(model).items()}
    for name, tensor in kept.items():
        if name not in ("router.shares", "router.step_counts"):
            laws.equal("an import moves no other tensor", now[name.replace(".base_layer.", ".")], tensor, family=family)
    model.mature("new")
    with torch.no_grad():
        model.router.gate_bias["new"].fill_(-100.0)
    after = model(**batch())
    law = "an imported expert that no token chooses changes nothing"
    laws.equal(law, after.routing.logits[..., :4], before.routing.logits, family=family)
    laws.equal(law, after.routing.weights[..., :4], before.routing.weights, family=family)
    laws.equal(law, after.logits, before.logits, family=family)
    model.remove_expert("new")
    laws.equal("import and removal leave nothing behind", model(**batch()).logits, before.logits, family=family)
    model.save_pretrained(str(tmp_path / "after"))
    assert contents(tmp_path / "after") == contents(tmp_path / "before")


def test_training_goes_on_and_moves_the_imported_expert_alone(tmp_path):
    save_stock(tmp_path / "stock", **ADAPTERS["other targets"][1])
    model = tiny_moe("llama", lora=FEW)
    names = model.experts.names
    model.import_expert("new", str(tmp_path / "stock"))
    model.freeze(*names)
    before = tensors(model)
    own = {name for name in before if ".new." in name or name.endswith(".new")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.train()(**labelled()).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved - {"router.shares", "router.step_counts"} == own
    pristine = tiny_base().state_dict()
    for name, tensor in base_tensors(model).items():
        assert torch.equal(tensor, pristine[name]), name


@pytest.mark.parametrize("adapter", ["patterns", "other targets", "rank-stabilised", "gpt2"])
def test_a_pool_with_an_imported_expert_is_saved_and_read_back(laws, adapter, tmp_path):
    """Its folder in the checkpoint is a stock adapter again: the same tensors, and the same logits in stock PEFT."""
    family, lora, pool = ADAPTERS[adapter]
    folder = save_stock(tmp_path / "stock", family, **lora)
    model = tiny_moe(family, lora=pool)
    model.import_expert("new", str(folder), skill="sql")
    model.remove_expert("expert_0")
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), tiny_base(family))
    assert list(loaded.experts) == list(model.experts)
    law = "a pool with an imported expert comes back"
    laws.equal(law, loaded(**batch()).logits, model(**batch()).logits, family=family)
    own = tmp_path / "saved" / "experts" / "new"
    written, given = (load_file(place / "adapter_model.safetensors") for place in (own, folder))
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        laws.equal("an imported adapter is written as it came", written[name], tensor, family=family)
    expected = load_stock(folder, family)(**batch()).logits
    laws.close(EXACT, load_stock(own, family)(**batch()).logits, expected, family=family, atol=0.0)
    with loaded.route_to("new"):
        laws.close(EXACT, loaded(**batch()).logits, expected, family=family, atol=1e-5)
    again = tiny_moe(family)
    again.import_expert("twice", str(own))
    with again.route_to("twice"):
        laws.close(EXACT, again(**batch()).logits, expected, family=family, atol=1e-5)


@pytest.mark.parametrize(("theirs", "ours"), [(0.5, 0.0), (0.0, 0.5)])
def test_another_dropout_is_told_and_becomes_the_pools(theirs, ours, tmp_path):
    """The experts of a layer share one mask. In training, at the pool's dropout of 0, two forwards are the same."""
    save_stock(tmp_path / "stock", lora_dropout=theirs)
    model = tiny_moe("llama", lora={"lora_dropout": ours})
    with pytest.warns(UserWarning, match=rf"lora_dropout {theirs}; .*{ours}"):
        model.import_expert("new", str(tmp_path / "stock"))
    model.train()
    with model.route_to("new"):
        first, second = (model(**batch()).logits for _ in range(2))
    assert torch.equal(first, second) == (ours == 0.0)
    model.save_pretrained(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "experts" / "new" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == ours
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny_moe("llama", lora={"lora_dropout": theirs}).import_expert("new", str(tmp_path / "stock"))


OLDER = {
    "0.18": {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_alpha": 5, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.18.0",
        "qalora_group_size": 16, "r": 3, "rank_pattern": {}, "revision": None,
        "target_modules": ["v_proj", "up_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
        "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    },
    "first ones": {
        "base_model_name_or_path": "somewhere", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": 5, "lora_dropout": 0.0, "modules_to_save": None,
        "peft_type": "LORA", "r": 3, "target_modules": ["v_proj", "up_proj"], "task_type": "CAUSAL_LM",
    },
}  # fmt: skip
"""Configs as older PEFT wrote them: without the fields that came later."""


@pytest.mark.parametrize("version", OLDER)
def test_a_config_of_an_older_peft_means_the_same(laws, version, tmp_path):
    save_stock(tmp_path / "stock", target_modules=["v_proj", "up_proj"])
    expected = load_stock(tmp_path / "stock")(**batch()).logits
    (tmp_path / "stock" / "adapter_config.json").write_text(json.dumps(OLDER[version]))
    model = tiny_moe("llama")
    model.import_expert("new", str(tmp_path / "stock"))
    with model.route_to("new"):
        laws.close(EXACT, model(**batch()).logits, expected, atol=1e-5)


def test_a_field_that_only_a_newer_peft_knows_is_named(laws, tmp_path):
    save_stock(tmp_path / "stock")
    expected = load_stock(tmp_path / "stock")(**batch()).logits
    config = json.loads((tmp_path / "stock" / "adapter_config.json").read_text())
    (tmp_path / "stock" / "adapter_config.json").write_text(json.dumps({**config, "use_tomorrow": False}))
    model = tiny_moe("llama")
    with pytest.warns(UserWarning, match="use_tomorrow"):
        model.import_expert("new", str(tmp_path / "stock"))
    with model.route_to("new"):
        laws.close(EXACT, model(**batch()).logits, expected, atol=1e-5)


def test_a_folder_that_peft_0_18_wrote_is_read(laws):
    """Written by that PEFT itself, with tests/fixtures/make_peft_fixture.py; it knew less in its config."""
    folder = str(TESTS / "fixtures" / "peft-0.18")
    stock = PeftModel.from_pretrained(tiny_base("llama"), folder).eval()
    model = tiny_moe("llama")
    with pytest.warns(UserWarning, match=r"lora_dropout 0\.1"):
        expert = model.import_expert("old", folder)
    assert (expert.rank, expert.mature) == (2, False)
    with model.route_to("old"):
        laws.close(EXACT, model(**batch()).logits, stock(**batch()).logits, family="PEFT 0.18", atol=1e-5)
