"""Laws of a checkpoint: it is restored bit for bit, and is written atomically."""

import copy
import itertools
import json
import os
import shutil

import pytest
import torch
from reference.checkpoints import contents, grown, load
from reference.tiny import tensors, tiny_base, tiny_moe, tokens
from safetensors.torch import load_file

from dylo_moe import CheckpointError, DyLoRAMoE, RouterConfig
from dylo_moe.model import saving
from dylo_moe.utils import whole_folders

# --- there and back


@pytest.mark.parametrize("router_layer", ["embeddings", 1])
def test_what_comes_back_is_bit_equal(router_layer, tmp_path):
    model = grown(router_layer=router_layer, router_half_life=3.5, temperature=0.7, z_loss_coefficient=0.01)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded, ids = load(tmp_path / "saved"), tokens(3, 9)
    assert tensors(loaded).keys() == tensors(model).keys()
    for name, tensor in tensors(model).items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert list(loaded.experts) == list(model.experts)
    assert [(e.rank, e.mature, e.trainable, e.skill) for e in loaded.experts] == [
        (4, True, True, None),
        (4, True, False, None),
        (7, True, True, "sql"),
        (1, False, True, None),
    ]
    assert loaded.router_config == model.router_config and loaded.balance_coefficient == model.balance_coefficient
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == trains
    ours, theirs = loaded(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.routing.weights, theirs.routing.weights)


def test_the_same_experts_are_written_as_the_same_bytes(saved, tmp_path):
    """Reported: the targets were written in the order of a set, which is another one in every process."""
    _, folder = saved
    load(folder).save_pretrained(str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(folder)
    config = json.loads((folder / "experts" / "wide" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("removed", [[], ["expert_0"], ["expert_0", "expert_1"]], ids=str)
def test_what_comes_back_grows_as_before(saved, tmp_path, removed):
    """The next expert has the pool's rank and scaling, whichever expert is the first one saved."""
    model, _ = saved
    for name in removed:
        model.remove_expert(name)
    model.save_pretrained(str(tmp_path / "again"))
    loaded = load(tmp_path / "again")
    for one in (model, loaded):
        one.add_expert("next")
        one.add_expert("wider", rank=8)
    assert list(loaded.experts) == list(model.experts)
    scaling = [
        {name: value for m in one.modules() if hasattr(m, "layout") for name, _, value in m.layout.shapes}
        for one in (model, loaded)
    ]
    assert scaling[0] == scaling[1]


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("expert_dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_comes_back_bit_equal(base_dtype, expert_dtype, tmp_path):
    """Reported: bf16 experts came back as fp32 ones, which compute otherwise."""
    model = tiny_moe(tiny_base(dtype=base_dtype))
    if expert_dtype is not None:
        for expert in model.experts:
            for parameter in model.experts.parameters(expert.name):
                parameter.data = parameter.data.to(expert_dtype)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded, ids = load(tmp_path / "saved", tiny_base(dtype=base_dtype)), tokens(2, 9)
    for name, tensor in tensors(model).items():
        assert torch.equal(loaded.state_dict()[name].to(tensor.dtype), tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_base_and_pickles_are_never_in_it(saved):
    _, folder = saved
    experts = ["expert_0", "expert_1", "wide", "young"]
    names = {f"experts/{e}/{f}" for e in experts for f in ("adapter_config.json", "adapter_model.safetensors")}
    assert set(contents(folder)) == names | {"dylora.json", "router.safetensors", "README.md"}
    for expert in experts:
        state = load_file(folder / "experts" / expert / "adapter_model.safetensors")
        assert state and all(".lora_A." in name or ".lora_B." in name for name in state)


# --- writing


@pytest.mark.parametrize("name", ["notes.txt", "sub/results.csv"])
def test_saving_over_other_files_is_refused(tmp_path, name):
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        tiny_moe().save_pretrained(str(folder))
    assert contents(folder) == {name: b"precious"}
    with pytest.raises(ValueError, match="it is a file"):
        tiny_moe().save_pretrained(str(folder / name))


def test_saving_over_a_checkpoint_never_deletes_other_files_in_it(saved):
    """Reported: a folder with a manifest was replaced whole, and what a person had put there was gone."""
    model, folder = saved
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        model.save_pretrained(str(folder))
    assert (folder / "notes.txt").read_text() == "precious"


def test_saving_over_an_older_checkpoint_replaces_it(saved):
    model, folder = saved
    model.remove_expert("wide")
    model.save_pretrained(str(folder))
    assert load(folder).experts.names == ("expert_0", "expert_1", "young")
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def crash(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("moment", "old"),
    [
        *itertools.product(["first tensors", "router", "manifest", "first rename"], [True, False]),
        ("second rename", True),
        ("removal", True),
    ],
)
def test_a_save_that_is_interrupted_leaves_a_whole_checkpoint_and_nothing_else(
    original, tmp_path, monkeypatch, moment, old
):
    model, folder = copy.deepcopy(original[0]), tmp_path / "saved"
    if old:
        shutil.copytree(original[1], folder)
    before = contents(tmp_path)
    model.remove_expert("wide")
    renames, real_rename, real_save = [], os.rename, saving.save_tensors

    def rename(source, target):
        renames.append(target)
        if len(renames) == (2 if moment == "second rename" else 1) and "rename" in moment:
            raise KeyboardInterrupt
        real_rename(source, target)

    def save(state, path):
        if moment == "first tensors" or (moment == "router" and path.name == "router.safetensors"):
            raise KeyboardInterrupt
        real_save(state, path)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(whole_folders, "exchange", lambda one, other: False)  # the way of systems that have none
    monkeypatch.setattr(saving, "save_tensors", save)
    if moment == "manifest":
        monkeypatch.setattr(saving.json, "dumps", crash)
    if moment == "removal":
        monkeypatch.setattr(whole_folders.shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(str(folder))
    monkeypatch.undo()
    if moment == "removal":
        assert load(folder).experts.names == ("expert_0", "expert_1", "young")
        return
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["saved"] if old else [])
    if old:
        assert load(folder).experts.names == ("expert_0", "expert_1", "wide", "young")


def test_options_that_cannot_apply_are_refused(saved):
    model, folder = saved
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(str(folder), safe_serialization=False)
    with pytest.raises(ValueError, match="dtype"):
        DyLoRAMoE.from_pretrained(str(folder), tiny_base(), dtype=torch.float16)
    with pytest.raises(CheckpointError, match="pass base="):
        DyLoRAMoE.from_pretrained(str(folder))


def test_a_base_that_the_checkpoint_names_is_found_again(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    model = DyLoRAMoE.from_base(str(tmp_path / "base"), num_experts=2, router=RouterConfig(top_k=2))
    model.save_pretrained(str(tmp_path / "saved"))
    loaded, ids = DyLoRAMoE.from_pretrained(str(tmp_path / "saved")), tokens(1, 7)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
