"""A base that bitsandbytes holds in 4 or 8 bits: the same laws, and a base whose packed weights nothing touches."""

import copy
import importlib.util
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from reference.checkpoints import contents
from reference.decoding import generate, prompts, uncached
from reference.tiny import LORA, assert_same_gradients, gradients, padded, scramble, tiny_base, tiny_moe, tokens
from reference.turns import BY_ANSWER, chat
from torch import nn

from dylo_moe import CheckpointError, DyLoRAMoE
from dylo_moe.base.frozen import count_parameters
from dylo_moe.base.loading import four_bit, load_base
from dylo_moe.base.packaged_models import BaseUnavailableError
from dylo_moe.commands.plan.request import parse_plan
from dylo_moe.commands.plan.run import make_plan
from dylo_moe.commands.stream.request import parse_stream
from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.commands.train.request import parse_train, settings_of
from dylo_moe.experts.config import ExpertConfig
from dylo_moe.parsing.recipe import in_full
from dylo_moe.routing.config import RouterConfig
from dylo_moe.training.arguments import ModelArguments
from dylo_moe.training.build import build_model
from dylo_moe.training.resume import changes

CLOSE = {4: 1e-5, 8: 1e-2}
"""In 8 bits what goes in is rounded too, so that a difference in the last bit may become one of a whole step."""
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""A row of each linear holds whole blocks of 64, and CPUs that can pack the weights anew do."""
CONFIGS = {4: four_bit(torch.float32), 8: {"quant_method": "bitsandbytes", "load_in_8bit": True}}
BITS = pytest.mark.parametrize("bits", CONFIGS)
CHECKPOINT_WARNING = "recognised by its id and revision only"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the tiny base, not quantised."""
    pytest.importorskip("bitsandbytes")
    path = tmp_path_factory.mktemp("base")
    tiny_base(**WIDE).save_pretrained(str(path))
    return str(path)


def quantised(folder, bits=4):
    return load_base(folder, quantization_config=CONFIGS[bits], dtype=torch.float32)


def packed(model):
    """Copies of the base's weights as they lie in memory, and of what they are unpacked with."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and not name.startswith("router"):
            found[name] = parameter.detach().clone()
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                found |= {f"{name}.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
    return found


def logits_of(model, ids, *, training=False):
    with torch.no_grad():
        return model.train(training)(input_ids=ids).logits


def plain_logits(folder, bits, ids):
    """Of the base alone, and of 4 bits in training mode, in which no CPU packs them anew; it has no dropout."""
    return logits_of(quantised(folder, bits), ids, training=bits == 4)


@BITS
def test_one_expert_is_stock_peft(laws, folder, tmp_path, bits):
    model, ids = tiny_moe(quantised(folder, bits)), tokens(3, 9)
    model.save_pretrained(str(tmp_path / "c"))
    adapter = str(tmp_path / "c" / "experts" / "expert_1")
    stock = PeftModel.from_pretrained(quantised(folder, bits), adapter, is_trainable=True).train()
    with model.route_to("expert_1"):
        ours, theirs = logits_of(model, ids), logits_of(stock, ids, training=bits == 4)
        law, family = "quantised base, one expert = stock PEFT", f"llama, {bits} bits"
        laws.close(law, ours, theirs, family=family, atol=CLOSE[bits])
        model.train(), stock.train()
        ours = gradients(model, lambda: model(input_ids=ids, labels=ids).lm_loss.backward())
    theirs = gradients(stock, lambda: stock(input_ids=ids, labels=ids).loss.backward())
    ours = {name.replace("expert_1", "default"): value for name, value in ours.items()}
    assert_same_gradients(ours, theirs, relative={4: 1e-4, 8: 5e-2}[bits])


@BITS
def test_without_experts_it_is_the_base(laws, folder, bits):
    ids, family = tokens(3, 9), f"llama, {bits} bits"
    expected = plain_logits(folder, bits, ids)
    model = DyLoRAMoE.from_base(quantised(folder, bits), lora=LoraConfig(**LORA))
    laws.equal("quantised base, B = 0", logits_of(model, ids), expected, family=family)
    scramble(model)
    assert not torch.equal(logits_of(model, ids), expected)
    with model.route_to(None):
        laws.equal("quantised base, route_to(None)", logits_of(model, ids), expected, family=family)


def test_a_base_in_four_bits_is_its_unpacked_self(laws, folder):
    """Mixed experts, forward and gradients, against a routed model on the weights that the four bits stand for."""
    ours = tiny_moe(quantised(folder), top_k=2)
    unpacked = tiny_base(**WIDE)
    unpacked.load_state_dict(quantised(folder).dequantize().state_dict())
    theirs = tiny_moe(unpacked, top_k=2)
    ids = tokens(3, 9)
    law = "base in 4 bits = its weights unpacked"
    laws.close(law, logits_of(ours, ids), logits_of(theirs, ids), atol=CLOSE[4])
    found = [gradients(model, model(input_ids=ids, labels=ids).loss.backward) for model in (ours, theirs)]
    assert_same_gradients(*found, relative=1e-3)


@BITS
def test_training_changes_the_experts_and_not_one_bit_of_the_base(folder, bits):
    """With an evaluation in between: where the CPU can, bitsandbytes 0.50 then packed the weights anew, and the
    training that followed had no gradients left below the top linear."""
    model, ids = tiny_moe(quantised(folder, bits)), tokens(3, 9)
    before = packed(model)
    experts = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        losses.append(float(model.train()(input_ids=ids, labels=ids).loss))
        found = gradients(model, lambda: model(input_ids=ids, labels=ids).loss.backward())
        logits_of(model, ids)
        again = gradients(model, lambda: model.train()(input_ids=ids, labels=ids).loss.backward())
        assert_same_gradients(again, found, relative=1e-6)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = packed(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in experts.items())


@pytest.mark.parametrize(("bits", "granularity"), [(4, "token"), (8, "token"), (4, "response")])
def test_cached_decoding_is_the_uncached_forward(laws, folder, bits, granularity):
    by_answer = granularity == "response"
    model = tiny_moe(quantised(folder, bits), **(BY_ANSWER if by_answer else {}))
    rows = [chat(5, 4, 3, 0, seed=1, closed=False), chat(6, 0, seed=2, closed=False)]
    ids, mask = padded(rows, side="left") if by_answer else prompts()
    ours, (expected, logits) = generate(model, ids, mask), uncached(model, ids, mask)
    assert (len(ours.turns[1]) if by_answer else 1) == 1
    family = f"llama, {bits} bits"
    laws.equal("quantised base, cached = uncached", ours.sequences, expected, family=family)
    law, found = "quantised base, cached = uncached, logits", torch.stack(ours.logits, 1)
    laws.close(law, found, logits, family=family, atol=CLOSE[bits])


# --- checkpoints and copies


@BITS
def test_a_checkpoint_loads_its_base_as_it_was(folder, tmp_path, bits):
    model, ids, path = tiny_moe(quantised(folder, bits)), tokens(3, 9), str(tmp_path / "c")
    model.save_pretrained(path)
    with pytest.warns(UserWarning, match=CHECKPOINT_WARNING):
        again = DyLoRAMoE.from_pretrained(path)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert packed(again).keys() == packed(model).keys()
    again.save_pretrained(str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(tmp_path / "c")


def test_a_quantised_base_is_recognised_by_id_and_revision(folder, tmp_path):
    path, ids = str(tmp_path / "c"), tokens(2, 7)
    tiny_moe(quantised(folder)).save_pretrained(path)
    other = quantised(folder)
    other.name_or_path = "somebody/else"
    with pytest.warns(UserWarning, match=CHECKPOINT_WARNING), pytest.raises(CheckpointError, match="somebody/else"):
        DyLoRAMoE.from_pretrained(path, other)
    # The same base held in another way is the same base.
    with pytest.warns(UserWarning, match=CHECKPOINT_WARNING):
        full = DyLoRAMoE.from_pretrained(path, load_base(folder))
    with full.route_to(None):
        assert torch.equal(logits_of(full, ids), logits_of(load_base(folder), ids))
    full.save_pretrained(str(tmp_path / "full"))
    assert json.loads((tmp_path / "full" / "dylora.json").read_text())["base"]["quantization"] is None
    with pytest.warns(UserWarning, match=CHECKPOINT_WARNING):
        DyLoRAMoE.from_pretrained(str(tmp_path / "full"), quantised(folder))


@BITS
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(folder, bits, copied):
    model, ids = tiny_moe(quantised(folder, bits)), tokens(3, 9)
    expected = logits_of(model, ids)
    twin = copied(model)
    assert torch.equal(logits_of(twin, ids), expected)
    scramble(twin, seed=8)
    assert torch.equal(logits_of(model, ids), expected)


@BITS
def test_unloaded_it_is_the_base_again(folder, bits):
    ids = tokens(3, 9)
    base = tiny_moe(quantised(folder, bits)).unload()
    assert torch.equal(logits_of(base, ids), plain_logits(folder, bits, ids))


def test_parameters_are_counted_as_the_numbers_they_stand_for(folder):
    assert count_parameters(quantised(folder).parameters()) == count_parameters(load_base(folder).parameters())


# --- what is refused


def test_a_base_that_was_packed_anew_is_refused(folder):
    base = quantised(folder)
    base.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked"):
        DyLoRAMoE.from_base(base)


def test_a_base_is_not_quantised_twice(folder, tmp_path):
    quantised(folder).save_pretrained(str(tmp_path / "four"))
    with pytest.raises(ValueError, match="is quantised already"):
        load_base(str(tmp_path / "four"), quantization_config=CONFIGS[8])


class Odd(nn.Module):
    """A product with a matrix that is none of the linears that PEFT knows."""

    def __init__(self, inside, outside):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(outside, inside))

    def forward(self, x):
        return x @ self.matrix.t()


def test_a_linear_that_peft_does_not_know_is_named():
    base = tiny_base()
    base.model.layers[1].mlp.up_proj = Odd(32, 48)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj \(Odd\), which cannot be routed"):
        DyLoRAMoE.from_base(base, lora=LoraConfig(r=2, target_modules=["up_proj"]))
    assert not any(".lora_" in name for name, _ in base.named_modules())


def test_where_there_is_no_linear_at_all_the_modules_are_named():
    base = tiny_base()
    for name, module in list(base.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            base.model.layers.set_submodule(name, Odd(module.in_features, module.out_features))
    with pytest.raises(ValueError, match=r"all-linear finds nothing .* model\.layers\.0\.self_attn\.q_proj \(Odd\)"):
        DyLoRAMoE.from_base(base)


def test_a_layer_of_peft_that_has_no_routed_class_is_named(monkeypatch):
    monkeypatch.setattr("dylo_moe.experts.layer.ROUTED_CLASSES", {})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj \(Linear\).* cannot be routed"):
        DyLoRAMoE.from_base(tiny_base(), lora=LoraConfig(r=2, target_modules=["gate_proj"]))


def test_where_bitsandbytes_is_missing_the_extra_is_named(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(ValueError, match=r"load_in_4bit .*pip install 'bitsandbytes>="):
        parse_train(["--load_in_4bit"])


def test_a_base_that_needs_a_missing_package_says_so(monkeypatch, tmp_path):
    def missing(*args, **kwargs):
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes")

    tiny_base().save_pretrained(str(tmp_path))
    monkeypatch.setattr("dylo_moe.base.loading.AutoModelForCausalLM.from_pretrained", missing)
    with pytest.raises(BaseUnavailableError, match=r"pip install 'bitsandbytes>="):
        load_base(str(tmp_path), quantization_config=CONFIGS[4])


# --- the command line


@pytest.mark.parametrize("bf16", [False, True])
def test_the_flag_makes_the_base_four_bits(folder, bf16):
    flags, experts, router = (
        ModelArguments(model=folder, load_in_4bit=True),
        ExpertConfig(num_experts=2),
        RouterConfig(),
    )
    model = build_model(flags, experts, router, bf16=bf16)
    expected = build_model(replace(flags, load_in_4bit=False), experts, router, bf16=bf16)
    assert model.base.is_loaded_in_4bit and not hasattr(expected.base, "is_loaded_in_4bit")
    config = model.base.hf_quantizer.quantization_config
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == model.base.dtype == dtype


def test_a_run_from_before_the_flag_goes_on():
    now = settings_of(parse_train(["--datasets", "cmake"]))
    before = {name: value for name, value in now.items() if name != "load_in_4bit"}
    full = in_full(before, TRAIN_CONFIGS)
    assert changes(full, now) == ([], [])
    assert changes(full, {**now, "load_in_4bit": True})[0] == ["load_in_4bit is True, was False"]


def test_options_that_cannot_apply_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="load_in_4bit was not tested with fp16"):
        parse_plan(["--load_in_4bit", "--fp16"])
    with pytest.raises(ValueError, match="--load_in_4bit cannot apply: the checkpoint says"):
        parse_stream(["--load_in_4bit", "--checkpoint", str(tmp_path), "--datasets", "cmake"])
    with pytest.raises(ValueError, match="4 bits cannot be estimated"):
        make_plan(parse_plan(["--load_in_4bit", "--model", folder]))


def test_importing_us_makes_no_layer_of_bitsandbytes():
    """PEFT imports bitsandbytes by itself where it is there; of its layers nothing is asked for."""
    code = "import sys, dylo_moe; print([name for name in sys.modules if name == 'peft.tuners.lora.bnb'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
