"""Laws of a checkpoint that is not what it was, or not for this base: an error that names what is wrong."""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from reference.checkpoints import load
from reference.tiny import tiny_base, tiny_moe, tokens
from safetensors.torch import load_file, save_file

from dylo_moe import CheckpointError
from dylo_moe.utils.typed_json import checksum

FILES = [
    "dylora.json",
    "experts/expert_0/adapter_config.json",
    "experts/expert_0/adapter_model.safetensors",
    "experts/wide/adapter_model.safetensors",
    "router.safetensors",
]
HASHED = FILES[1:]


def rehash(folder, change=lambda manifest: None):
    """Makes the manifest agree with the files as they are now, as a careful forger would."""
    manifest = json.loads((folder / "dylora.json").read_text())
    change(manifest)
    for name, entry in manifest["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    manifest["checksum"] = checksum(manifest, leave_out="checksum")
    (folder / "dylora.json").write_text(json.dumps(manifest))


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
