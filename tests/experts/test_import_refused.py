"""What `import_expert` cannot take is refused by name, and the model stays as it was."""

import json
import pickle

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, get_peft_model
from reference.stock import save_stock
from reference.tiny import padded, tensors, tiny_base, tiny_moe, tokens
from safetensors.torch import load_file, save_file

FEW = {"target_modules": ["q_proj", "down_proj"]}


def batch():
    ids, mask = padded([tokens(n, seed=n) for n in (11, 5, 8)], side="left")
    return {"input_ids": ids, "attention_mask": mask}


def plain(model):
    """What it holds; a linear that PEFT wrapped and left empty counts as the linear."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors(model).items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good adapter, and what it gives in a pool that nothing was refused in."""
    folder, model = save_stock(tmp_path_factory.mktemp("good") / "stock"), tiny_moe("llama", lora=FEW)
    model.import_expert("good", str(folder))
    with model.route_to("good"):
        return folder, model(**batch()).logits


@pytest.fixture
def refuse(laws, good):
    """The import is refused with `match`; the model is bit-equal, trains what it trained, and takes the next one."""

    def check(folder, match, *, name="new"):
        model = tiny_moe("llama", lora=FEW)
        before, kept, out = list(model.peft_config), plain(model), model(**batch())
        trains = {name.replace(".base_layer.", "."): p.requires_grad for name, p in model.named_parameters()}
        experts = list(model.experts)
        with pytest.raises(ValueError, match=match) as caught:
            model.import_expert(name, str(folder))
        assert list(model.experts) == experts and model.router.names == tuple(before) == tuple(model.peft_config)
        now = plain(model)
        assert now.keys() == kept.keys()
        law = "a refused import moves nothing"
        for key, tensor in kept.items():
            laws.equal(law, now[key], tensor)
        laws.equal(law, model(**batch()).logits, out.logits)
        laws.equal(law, model(**batch()).routing.weights, out.routing.weights)
        assert {name.replace(".base_layer.", "."): p.requires_grad for name, p in model.named_parameters()} == trains
        place, expected = good
        model.import_expert("good", str(place))
        with model.route_to("good"):
            laws.equal("a pool that refused one import takes the next", model(**batch()).logits, expected)
        return str(caught.value)

    return check


def rewrite(folder, change):
    """Change the tensors of a saved adapter."""
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def set_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# --- what an expert cannot be


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "reaches lm_head: only linears inside the decoder"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "reaches model.embed_tokens: only linears"),
        ({"use_dora": True}, "use_dora is True: DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
    ],
    ids=str,
)
def test_a_kind_of_adapter_that_cannot_be_routed(refuse, lora, match, tmp_path):
    folder = save_stock(tmp_path / "stock", **lora)
    assert str(folder) in refuse(folder, match)


def test_every_reason_is_in_one_message(refuse, tmp_path):
    folder = save_stock(tmp_path / "stock", use_dora=True, bias="all", target_modules=["q_proj", "lm_head"])
    message = refuse(folder, "cannot be an expert")
    assert all(part in message for part in ("use_dora", "bias is 'all'", "lm_head"))


def test_layers_below_the_router_are_named_by_their_numbers(tmp_path):
    layers = {"num_hidden_layers": 5}
    model = tiny_moe(tiny_base(**layers), router_layer=3)
    kept, before = plain(model), model(**batch()).logits
    folder = save_stock(tmp_path / "stock", base=layers, layers_to_transform=[0, 2, 3, 4], target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"below the router \(layers 0, 2\).*entering layer 3"):
        model.import_expert("new", str(folder))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in plain(model).items())
    assert torch.equal(model(**batch()).logits, before)
    allowed = save_stock(tmp_path / "allowed", base=layers, layers_to_transform=[3, 4], target_modules=["q_proj"])
    model.import_expert("new", str(allowed))
    assert model.experts.names[-1] == "new"


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (AdaLoraConfig(total_step=10, target_modules=["q_proj"]), "total_step is 10"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "is a IA3Config; experts are LoRA"),
    ],
    ids=["AdaLora", "IA3"],
)
def test_another_method_of_peft(refuse, other, match, tmp_path):
    get_peft_model(tiny_base(), other).save_pretrained(str(tmp_path / "stock"))
    refuse(tmp_path / "stock", match)


@pytest.mark.parametrize("name", ["expert_0", "base", "q_proj", "a.b", "", "update", "-a"])
def test_a_name_that_is_taken_or_bad(refuse, name, tmp_path):
    folder = save_stock(tmp_path / "stock")
    refuse(folder, f"expert '{name}'|name is '{name}'", name=name)


# --- another base


@pytest.mark.parametrize(
    ("base", "match"),
    [
        ({"hidden_size": 16}, r"down_proj.lora_B.weight has shape \[16, 3\], expected \[32, 3\]"),
        ({"intermediate_size": 40}, r"gate_proj.lora_B.weight has shape \[40, 3\], expected \[48, 3\]"),
        ({"num_hidden_layers": 3}, "layers.2.*does not belong in it"),
        ({"num_hidden_layers": 1}, "layers.1.*is missing"),
    ],
    ids=str,
)
def test_an_adapter_of_a_base_of_another_shape(refuse, base, match, tmp_path):
    targets = ["q_proj", "gate_proj", "down_proj"]
    refuse(save_stock(tmp_path / "stock", base=base, target_modules=targets), match)


def test_an_adapter_of_another_family(refuse, tmp_path):
    folder = save_stock(tmp_path / "stock", "gpt2")
    refuse(folder, "target_modules .*c_attn.* matches nothing in LlamaForCausalLM")


# --- files that are not whole


def nan(state):
    state[next(name for name in state if "up_proj" in name)][0, 0] = float("nan")


def infinity(state):
    state[next(name for name in state if "up_proj" in name)][-1, -1] = float("-inf")


def cut(state):
    name = next(name for name in state if "q_proj.lora_B" in name)
    state[name] = state[name][:-1].clone()


def thinner(state):
    for name in list(state):
        state[name] = (state[name][:2] if "lora_A" in name else state[name][:, :2]).clone()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (nan, "up_proj.*holds values that are not finite"),
        (infinity, "up_proj.*holds values that are not finite"),
        (cut, r"q_proj.lora_B.weight has shape \[31, 3\], expected \[32, 3\]"),
        (thinner, r"has shape \[2, 32\], expected \[3, 32\]"),
        (lambda state: state.pop(sorted(state)[-1]), "is missing"),
        (lambda state: state.clear(), "is missing"),
        (lambda state: state.update({"foreign.weight": torch.zeros(1)}), "foreign.weight does not belong in it"),
    ],
    ids=["NaN", "infinity", "cut", "another rank", "one missing", "empty", "foreign"],
)
def test_tensors_that_do_not_fit_are_named(refuse, change, match, tmp_path):
    """The pool has no expert with these linears yet, but their tensors are checked all the same."""
    folder = save_stock(tmp_path / "stock")
    rewrite(folder, change)
    assert str(folder) in refuse(folder, match)


def test_a_value_that_the_pools_dtype_cannot_hold(tmp_path):
    """Reported: 1e5 became infinity in an fp16 pool."""
    folder = save_stock(tmp_path / "stock")
    rewrite(folder, lambda state: state[sorted(state)[0]].view(-1)[5].fill_(1e5))
    model = tiny_moe(tiny_base(dtype=torch.float16)).to(torch.float16)
    kept = plain(model)
    with pytest.raises(ValueError, match=r"holds values that are not finite in torch\.float16"):
        model.import_expert("new", str(folder))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in plain(model).items())
    model.to(torch.bfloat16).import_expert("new", str(folder))
    assert model.experts.names[-1] == "new"


class Malicious:
    def __reduce__(self):
        return (print, ("this must never run",))


def break_bin(file, content):
    (file.parent / "adapter_model.safetensors").unlink()
    file.with_suffix(".bin").write_bytes(content)


BROKEN = {
    "weights cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "weights of no bytes": lambda file: file.write_bytes(b""),
    "weights of noise": lambda file: file.write_bytes(bytes(range(256)) * 9),
    "weights missing": lambda file: file.unlink(),
    "bin of no bytes": lambda file: break_bin(file, b""),
    "bin of noise": lambda file: break_bin(file, bytes(range(256)) * 9),
    "bin of another pickle": lambda file: break_bin(file, pickle.dumps(Malicious())),
    "bin of a list": lambda file: (break_bin(file, b""), torch.save([1, 2], file.with_suffix(".bin"))),
    "config missing": lambda file: (file.parent / "adapter_config.json").unlink(),
    "config cut": lambda file: (file.parent / "adapter_config.json").write_text("{"),
    "config of no object": lambda file: (file.parent / "adapter_config.json").write_text("[]"),
    "config without its kind": lambda file: (file.parent / "adapter_config.json").write_text('{"r": 3}'),
    "config of an unknown kind": lambda file: set_config(file.parent, peft_type="TOMORROW"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_an_error_that_names_the_adapter(refuse, monkeypatch, capsys, case, tmp_path):
    """Reported: PEFT's, safetensors', pickle's and the hub's own errors came through, some of them no ValueError.
    A `.bin` file is read without running what it holds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = save_stock(tmp_path / "stock")
    BROKEN[case](folder / "adapter_model.safetensors")
    assert str(folder) in refuse(folder, "adapter .*stock")
    assert "this must never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "values",
    [
        {"rank_pattern": {"down_proj": 0}},
        {"rank_pattern": None},
        {"lora_alpha": None},
        {"lora_alpha": "five"},
        {"alpha_pattern": {"down_proj": "five"}},
        {"target_modules": None},
        {"target_modules": "(("},
        {"target_modules": "all-linear"},
        {"target_modules": []},
        {"r": 0},
        {"r": "3"},
        {"layers_to_transform": [7]},
    ],
    ids=str,
)
def test_a_config_with_a_value_that_cannot_be(refuse, values, tmp_path):
    """Reported: PEFT found out in the middle of the layers, and those before it kept half an adapter."""
    folder = save_stock(tmp_path / "stock", target_modules=["q_proj", "down_proj", "up_proj"])
    set_config(folder, **values)
    refuse(folder, "adapter .*stock cannot be an expert")


def test_a_folder_that_is_not_there(refuse, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse(tmp_path / "nowhere", "adapter .*nowhere")
