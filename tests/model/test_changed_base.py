"""Laws of a base that is not what its name loads: it is refused, kept, or told, and never found out too late."""

from __future__ import annotations

import warnings

import pytest
import torch
from reference.tiny import VOCAB, base_tensors, tensors, tiny_base, tiny_moe, tokens
from transformers import AutoModelForCausalLM

from dylo_moe import CheckpointError, DyLoRAMoE
from dylo_moe.base.stored import changes_since_loading
from dylo_moe.utils.errors import DyLoRAWarning


@pytest.fixture
def stored(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def resized(folder):
    base = load(folder)
    base.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    return base


def test_a_base_with_weights_on_disk_is_refused(stored, tmp_path):
    """It was accepted, and its first forward failed on experts that had no values."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {
        f"model.layers.{layer}": "disk" if layer == 1 else "cpu"
        for layer in range(load(stored).config.num_hidden_layers)
    }
    base = load(stored, device_map=places, offload_folder=str(tmp_path / "offload"))
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"on disk \(model\.layers\.1\..* and .* more\), .*; load all of it onto"):
        DyLoRAMoE.from_base(base, num_experts=2)
    assert [name for name, _ in base.named_modules()] == names
    assert base(input_ids=tokens(1, 4)).logits.shape == (1, 4, VOCAB)


def changed_a_little(folder):
    """As an adapter that was merged changes it."""
    base = load(folder)
    with torch.no_grad():
        base.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    return base


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (resized, rf"lm_head\.weight has shape \[{VOCAB + 3}, 32\], was \[{VOCAB}, 32\]; model\.embed_tokens"),
        (changed_a_little, r"model\.layers\.1\.self_attn\.q_proj\.weight has other values\. "),
    ],
)
def test_a_base_that_is_not_what_its_name_loads_is_told_at_once(stored, change, said):
    for halved in (False, True):
        base = change(stored)
        with pytest.warns(DyLoRAWarning, match=rf"no longer what {stored} loads: {said}.*Save this base"):
            DyLoRAMoE.from_base(base.bfloat16() if halved else base, num_experts=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_base_that_is_what_its_name_loads_is_not_warned_of(stored, tmp_path, dtype, shards):
    load(stored, dtype=dtype).save_pretrained(tmp_path / "again", max_shard_size=shards)
    assert (tmp_path / "again" / "model.safetensors.index.json").exists() == (shards == "20KB")
    for other in (torch.float32, torch.bfloat16, torch.float16):
        assert changes_since_loading(load(tmp_path / "again", dtype=other)) == []


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "gpt_neox", "phi3", "qwen2"])
def test_no_family_s_own_way_of_storing_weights_is_taken_for_a_change(tmp_path, family):
    tiny_base(family).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    assert changes_since_loading(base) == []
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.01)
    assert [text.split()[1:] for text in changes_since_loading(base)] == [["has", "other", "values"]]


def test_resized_embeddings_are_kept_by_saving_the_base(stored, tmp_path):
    resized(stored).save_pretrained(tmp_path / "wider")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DyLoRAWarning)
        DyLoRAMoE.from_base(load(stored), num_experts=2)
        model = DyLoRAMoE.from_base(load(tmp_path / "wider"), num_experts=2)
        model.save_pretrained(str(tmp_path / "saved"))
    loaded = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"))
    assert all(torch.equal(value, tensors(loaded)[name]) for name, value in tensors(model).items())
    with pytest.raises(CheckpointError, match=rf"had {VOCAB + 3} rows, here they have {VOCAB}: if they were resized"):
        DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), load(stored))


@pytest.mark.parametrize("call", ["resize_token_embeddings", "set_input_embeddings", "set_output_embeddings"])
def test_parts_of_the_frozen_base_cannot_be_exchanged(call):
    model = tiny_moe("llama")
    before = {name: value.clone() for name, value in base_tensors(model).items()}
    with pytest.raises(ValueError, match=r"would change the frozen base.*; change the base first"):
        getattr(model, call)(VOCAB + 3)
    assert all(torch.equal(value, before[name]) for name, value in base_tensors(model).items())


def test_a_base_that_was_changed_since_is_told_when_it_is_saved(tmp_path):
    model = tiny_moe("llama")
    with torch.no_grad():
        model.base.lm_head.weight.add_(0.5)
    with pytest.warns(DyLoRAWarning, match=r"changed since the model was made: lm_head\.weight has other values\."):
        model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has other values"):
        DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), tiny_base("llama"))
    same = tiny_base("llama")
    with torch.no_grad():
        same.lm_head.weight.add_(0.5)
    loaded = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), same)
    assert all(torch.equal(value, tensors(loaded)[name]) for name, value in tensors(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [0, 2])
def test_a_merged_model_is_not_saved_and_unmerging_brings_the_base_back_bit_for_bit(tmp_path, dtype, shared):
    """The checkpoint would be of a base that is nowhere else; and what was added and subtracted again was another
    base, so that a checkpoint saved afterwards did not load."""
    base = tiny_base("llama").to(dtype)
    model = tiny_moe(base, shared_rank=shared)
    before = base_tensors(model)
    model.merge_adapter(["expert_1"])
    assert not all(torch.equal(value, before[name]) for name, value in base_tensors(model).items())
    with pytest.raises(
        ValueError, match=r"cannot save .*'expert_1' is merged into the base; unmerge_adapter\(\) first"
    ):
        model.save_pretrained(str(tmp_path / "saved"))
    assert not any(tmp_path.iterdir())
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in base_tensors(model).items())
    with warnings.catch_warnings():
        warnings.simplefilter("error", DyLoRAWarning)
        model.save_pretrained(str(tmp_path / "saved"))
    DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), tiny_base("llama").to(dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.merge_adapter(["expert_0"]),
        lambda model: model.merge_adapter(["expert_1"]),
        lambda model: model.merge_and_unload(adapter_names=["expert_0"]),
        lambda model: model.unload(),
        lambda model: model.add_expert("new"),
        lambda model: model.remove_expert("expert_1"),
    ],
    ids=["another", "the same", "another for good", "unload", "add", "remove"],
)
def test_nothing_is_merged_on_top_and_the_pool_stays_while_an_expert_is_merged(change):
    """A second expert was merged on top of the first; a new one had PEFT unmerge the base without a word."""
    model, ids = tiny_moe("llama"), tokens(2, 9)
    before = base_tensors(model)
    model.merge_adapter(["expert_1"])
    was, merged = model(input_ids=ids).logits, base_tensors(model)
    with pytest.raises(ValueError, match=r"'expert_1' is merged into the base; unmerge_adapter\(\) first"):
        change(model)
    assert torch.equal(model(input_ids=ids).logits, was)
    assert all(torch.equal(value, merged[name]) for name, value in base_tensors(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in base_tensors(model).items())


def test_a_merge_that_fails_leaves_the_base(monkeypatch):
    """PEFT's safe_merge stops at the first linear with values that are not finite; those before it were merged."""
    model = tiny_moe("llama")
    before = base_tensors(model)
    with torch.no_grad():
        model.experts.layers[-1].lora_B["expert_1"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(["expert_1"], safe_merge=True)
    assert all(torch.equal(value, before[name]) for name, value in base_tensors(model).items())
    model.merge_adapter(["expert_0"])
    model.unmerge_adapter()
