"""Laws of a checkpoint: it comes back bit for bit, whole or not at all, and only onto its own base."""

import copy
import hashlib
import itertools
import json
import os
import shutil

import pytest
import torch
from reference.tiny import tensors, tiny_base, tiny_moe, tokens
from safetensors.torch import load_file, save_file

from dylo_moe import CheckpointError, DyLoRAMoE, RouterConfig, checkpoint

FILES = [
    "dylora.json",
    "experts/expert_0/adapter_config.json",
    "experts/expert_0/adapter_model.safetensors",
    "experts/wide/adapter_model.safetensors",
    "router.safetensors",
]
HASHED = FILES[1:]


def grown(base="llama", **router):
    """Experts of several ranks, one nascent, one frozen, one with a skill; trained a step, so buffers are not new."""
    model = tiny_moe(base, num_experts=2, top_k=2, balance_coefficient=0.07, **router)
    model.add_expert("wide", rank=7, skill="sql")
    model.add_expert("young", rank=1)
    model.mature("wide")
    model.freeze("expert_1")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for seed in range(2):
        ids = tokens(3, 9, seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    model, folder = grown(), tmp_path_factory.mktemp("original") / "saved"
    model.save_pretrained(str(folder))
    return model, folder


@pytest.fixture
def saved(original, tmp_path):
    """A model and its checkpoint, the test's own."""
    model, folder = original
    shutil.copytree(folder, tmp_path / "saved")
    return copy.deepcopy(model), tmp_path / "saved"


def load(folder, base=None):
    return DyLoRAMoE.from_pretrained(str(folder), tiny_base() if base is None else base)


def rehash(folder, change=lambda manifest: None):
    """Makes the manifest agree with the files as they are now, as a careful forger would."""
    manifest = json.loads((folder / "dylora.json").read_text())
    change(manifest)
    for name, entry in manifest["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    (folder / "dylora.json").write_text(json.dumps(manifest))


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


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
    loaded.save_pretrained(str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(tmp_path / "saved")


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
        {name: value for m in one.modules() if hasattr(m, "expert_shapes") for name, _, value in m.expert_shapes}
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
    assert set(contents(folder)) == names | {"dylora.json", "router.safetensors"}
    for expert in experts:
        state = load_file(folder / "experts" / expert / "adapter_model.safetensors")
        assert state and all(".lora_A." in name or ".lora_B." in name for name in state)


# --- files that are not what they were


def flip_byte(folder, name, position):
    data = bytearray((folder / name).read_bytes())
    data[position] ^= 1
    (folder / name).write_bytes(bytes(data))


@pytest.mark.parametrize("where", [0, 0.3, 0.7, -1])
@pytest.mark.parametrize("name", HASHED)
def test_one_altered_byte_is_named(saved, name, where):
    _, folder = saved
    flip_byte(folder, name, int(where * (folder / name).stat().st_size) if where >= 0 else -1)
    with pytest.raises(CheckpointError, match=f"{name} was altered"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 0.5, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(saved, name, keep):
    _, folder = saved
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(keep * len(data))] if keep >= 0 else data[:-2])
    with pytest.raises(CheckpointError, match=name):
        load(folder)


@pytest.mark.parametrize("name", [*FILES, "experts/young"])
def test_a_missing_file_is_named(saved, name):
    _, folder = saved
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.* is missing"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["notes.txt", "experts/expert_0/optimizer.pt", "experts/other/adapter_config.json", "pytorch_model.bin"]
)
def test_an_extra_file_is_named(saved, name):
    _, folder = saved
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name} does not belong"):
        load(folder)


def test_every_problem_is_in_one_message(saved):
    _, folder = saved
    flip_byte(folder, HASHED[0], 3)
    (folder / HASHED[1]).unlink()
    (folder / HASHED[3]).write_bytes(b"short")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for name in (HASHED[0], HASHED[1], HASHED[3], "notes.txt"):
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["experts/wide/adapter_model.safetensors", "router.safetensors"])
@pytest.mark.parametrize(
    ("alter", "part"),
    [
        (lambda state, key: state.update({key: torch.zeros(3, 5)}), "shape [3, 5]"),
        (lambda state, key: state.pop(key), "is missing"),
        (lambda state, key: state.update(foreign=torch.zeros(2)), "foreign does not belong"),
        (lambda state, key: state[key].view(-1)[0].fill_(float("nan")), "not finite"),
        (lambda state, key: state[key].view(-1)[-1].fill_(float("inf")), "not finite"),
    ],
    ids=["shape", "missing", "extra", "nan", "inf"],
)
def test_tensors_that_do_not_fit_are_named_though_the_hashes_agree(saved, name, alter, part):
    _, folder = saved
    state = load_file(folder / name)
    key = sorted(key for key, tensor in state.items() if tensor.is_floating_point() and tensor.dim())[0]
    alter(state, key)
    save_file(state, folder / name)
    rehash(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert name in message and part in message and (key in message or "foreign" in message)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda m: m.update(format_version=99), "99"),
        (lambda m: m["files"].pop("router.safetensors"), "router.safetensors"),
        (lambda m: m["router"].update(top_k=0), "top_k is 0"),
        (lambda m: m["router"].update(surprise=1), "surprise"),
        (lambda m: m.pop("experts"), "experts"),
        (lambda m: m.update(experts=[]), "experts"),
        (lambda m: m.pop("balance_coefficient"), "balance_coefficient"),
        (lambda m: m["experts"][1].pop("mature"), "mature"),
        (lambda m: m["experts"][1].pop("skill"), "skill"),
        (lambda m: m["experts"][1].pop("trainable"), "trainable"),
        (lambda m: m["base"].pop("revision"), "revision"),
        (lambda m: m["base"]["fingerprint"].pop("samples"), "samples"),
        (lambda m: m["experts"].reverse(), "gate order"),
        (lambda m: m["experts"].append(dict(m["experts"][0])), "expert_0"),
    ],
    ids=[
        "version",
        "unlisted",
        "bad value",
        "unknown field",
        "no experts",
        "empty",
        "no balance",
        "no mature",
        "no skill",
        "no trainable",
        "no revision",
        "no samples",
        "order",
        "twice",
    ],
)
def test_a_manifest_that_does_not_add_up_is_an_error_of_the_checkpoint(saved, change, part):
    """Either it says what is wrong, or (the order of experts) what comes back is still consistent."""
    model, folder = saved
    rehash(folder, change)
    try:
        loaded = load(folder)
    except CheckpointError as error:
        assert part in str(error), error
        return
    assert part == "gate order"
    assert loaded.experts.names == loaded.router.names == tuple(reversed(model.experts.names))
    ids = tokens(2, 9)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"dylora\.json is missing"):
        load(tmp_path)


# --- the base


def test_another_base_is_refused_by_the_tensor_that_differs(saved):
    _, folder = saved
    name = "model.layers.1.mlp.up_proj.weight"
    other = tiny_base()
    with torch.no_grad():
        other.get_parameter(name).mul_(1 + 0.02 * torch.randn(other.get_parameter(name).shape))
    with pytest.raises(CheckpointError, match=f"another base.*: {name} has other values$"):
        load(folder, other)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2.* is only in this base"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is only in the base it was trained on"),
        ({"intermediate_size": 40}, r"mlp.down_proj.weight has shape \[32, 40\], was \[32, 48\]"),
        ({"vocab_size": 98}, "lm_head.weight has shape"),
        ({"tie_word_embeddings": True}, "lm_head.weight is only in the base it was trained on"),
        ({"seed": 1}, "has other values.*more$"),
    ],
    ids=str,
)
def test_a_base_of_another_shape_is_refused(saved, overrides, part):
    _, folder = saved
    with pytest.raises(CheckpointError, match=part):
        load(folder, tiny_base(**overrides))


@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_base_in_another_dtype_is_accepted(saved_dtype, dtype, tmp_path):
    """A base published in one dtype and loaded in another; what was lost in between cannot come back."""
    published = tiny_base()
    tiny_moe(copy.deepcopy(published).to(saved_dtype)).save_pretrained(str(tmp_path / "saved"))
    assert load(tmp_path / "saved", copy.deepcopy(published).to(dtype)).base.dtype == dtype


def test_weights_too_small_for_fp16_do_not_make_another_base(tmp_path):
    """Reported: fingerprints were compared as bit patterns, and fp16 has few bits below 6e-5 and none below 6e-8."""
    published = tiny_base()
    with torch.no_grad():
        published.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e-4)
    tiny_moe(copy.deepcopy(published)).save_pretrained(str(tmp_path / "saved"))
    assert load(tmp_path / "saved", copy.deepcopy(published).half()).base.dtype == torch.float16


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
    renames, real_rename, real_save = [], os.rename, checkpoint._save_tensors

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
    monkeypatch.setattr(checkpoint, "_save_tensors", save)
    if moment == "manifest":
        monkeypatch.setattr(checkpoint.json, "dumps", crash)
    if moment == "removal":
        monkeypatch.setattr(checkpoint.shutil, "rmtree", crash)
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
