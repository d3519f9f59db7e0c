"""Laws of a base that is not what its name loads: it is refused, kept, or told, and never found out too late."""

from __future__ import annotations

import warnings

import pytest
import torch
from reference.tiny import VOCAB, base_tensors, tensors, tiny_base, tiny_moe, tokens
from transformers import AutoModelForCausalLM

from dylo_moe import CheckpointError, DyLoRAMoE
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


def test_resized_embeddings_are_told_at_once_and_kept_by_saving_the_base(stored, tmp_path):
    base = resized(stored)
    with pytest.warns(DyLoRAWarning, match=f"resized from {VOCAB} to {VOCAB + 3} rows.* Save this base"):
        DyLoRAMoE.from_base(base, num_experts=2)
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


def test_a_model_is_not_saved_while_an_expert_is_merged(tmp_path):
    """The checkpoint would be of a base that is nowhere else."""
    model = tiny_moe("llama")
    model.merge_adapter(["expert_1"])
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) before saving"):
        model.save_pretrained(str(tmp_path / "saved"))
    assert not any(tmp_path.iterdir())
