"""Laws of a whole model, over the families that people use: the base stays the base, one expert is stock PEFT."""

import copy

import pytest
import torch
from peft import PeftModel
from reference.tiny import (
    FAMILIES,
    assert_same_gradients,
    base_tensors,
    force_path,
    gradients,
    padded,
    tiny_base,
    tiny_moe,
    tokens,
)
from transformers import OPTConfig, OPTForCausalLM

DROPOUTS = {
    "llama": {"attention_dropout": 0.5},
    "gemma2": {"attention_dropout": 0.5},
    "gemma3": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
    "qwen3": {"attention_dropout": 0.5},
    "mistral": {"attention_dropout": 0.5},
    "phi3": {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
}
TIED = {"gemma2", "gemma3", "qwen2", "qwen3", "gpt2"}


def batch():
    ids, mask = padded([tokens(n, seed=n) for n in (11, 5, 8)], side="left")
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_delta_and_switched_off_equal_the_base_bit_for_bit(monkeypatch, family, path):
    force_path(monkeypatch, path)
    plain = tiny_base(family)(**batch()).logits
    model = tiny_moe(family, top_k=2)
    trained = model(**batch()).logits
    assert not torch.allclose(trained, plain, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, plain)
    with model.route_to(None):
        assert torch.equal(model(**batch()).logits, plain)
        with torch.no_grad():
            assert torch.equal(model(**batch()).logits, plain)
    assert torch.equal(model(**batch()).logits, trained)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert torch.equal(model(**batch()).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_equals_stock_peft_with_its_saved_folder(family, tmp_path):
    model = tiny_moe(family, lora={"r": 3, "lora_alpha": 7, "use_rslora": family == "llama"})
    model.add_expert("wide", rank=6)
    torch.nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B.wide" in n))
    model.save_pretrained(str(tmp_path / "saved"))
    for expert in model.experts:
        stock = PeftModel.from_pretrained(tiny_base(family), str(tmp_path / "saved" / "experts" / expert.name)).eval()
        expected = stock(**batch()).logits
        with model.route_to(expert.name):
            torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_means_frozen_and_a_tied_head_stays_tied(family):
    pristine = tiny_base(family).state_dict()
    model = tiny_moe(family).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    experts = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(3):
        optimizer.zero_grad()
        ids = tokens(2, 9, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, tensor in base_tensors(model).items():
        assert torch.equal(tensor, pristine.pop(name)), name
    assert not pristine
    embedding, head = model.base.get_input_embeddings().weight, model.base.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == (family in TIED)
    for name, parameter in model.named_parameters():
        if name in experts:
            assert not torch.equal(parameter, experts[name]), f"{name} did not train"


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_of_the_base_is_off_in_training(family):
    base = tiny_base(family, **DROPOUTS[family]).train()
    assert not torch.equal(base(**batch()).logits, base(**batch()).logits)  # it was on
    model = tiny_moe(base).train()
    first = model(**batch()).logits
    assert torch.equal(first, model(**batch()).logits)
    assert torch.equal(first, model.eval()(**batch()).logits)


def test_skipping_of_layers_is_off_in_training():
    """OPT skips whole layers at random in training, the routed one included."""
    config = OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        layerdrop=0.5,
        dropout=0.5,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    model = tiny_moe(OPTForCausalLM(config).eval()).train()
    ids = tokens(2, 7)
    outputs = [model(input_ids=ids).logits for _ in range(6)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_sparse_paths_agree_in_a_whole_model(monkeypatch, family):
    model, logits = tiny_moe(family, num_experts=4, top_k=2), {}
    for path in ("dense", "sparse"):
        force_path(monkeypatch, path)
        logits[path] = model(**batch()).logits
        with torch.no_grad():
            torch.testing.assert_close(model(**batch()).logits, logits[path], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits["sparse"], logits["dense"], rtol=1e-5, atol=1e-5)


def labelled():
    """The first token of a text is not predicted: what precedes it is padding, and may be anything."""
    mask = batch()["attention_mask"]
    return {**batch(), "labels": batch()["input_ids"].masked_fill(mask.cumsum(1) < 2, -100)}


LOW = {torch.bfloat16: 0.05, torch.float16: 0.01}
"""The largest error of logits, and five times less than that of a matrix's gradient, over the largest entry."""
SETTINGS = ["fp32 experts", "all", "autocast"]
SCALE = 1024.0
"""Of the loss, so that no gradient is too small for fp16; as a GradScaler does."""


@pytest.mark.parametrize(
    ("family", "setting", "top_k", "dtype"),
    [
        *(("llama", setting, top_k, dtype) for setting in SETTINGS for top_k in (1, 2) for dtype in LOW),
        *((family, "all", 2, torch.float16) for family in ("gpt2", "phi3", "gemma3")),
    ],
)
def test_low_precision_agrees_with_fp32(laws, monkeypatch, family, setting, top_k, dtype):
    """Same weights, rounded; the routing is forced to the fp32 one's, so only arithmetic differs."""
    precise = tiny_moe(family, num_experts=4, top_k=top_k, balance_coefficient=0.0)
    model = copy.deepcopy(precise)
    if setting != "autocast":
        base = tiny_base(family, dtype=dtype)
        model = tiny_moe(base, num_experts=4, top_k=top_k, balance_coefficient=0.0)
    if setting == "all":
        model.to(dtype)
    assert (next(model.experts.parameters("expert_0")).dtype == dtype) == (setting == "all")
    out, real = precise(**batch()), batch()["attention_mask"].bool()
    monkeypatch.setattr(model.router, "logits", lambda features: out.routing.logits.detach())
    expected = out.logits
    theirs = gradients(precise, lambda: (precise(**labelled()).loss * SCALE).backward())
    for path in ("dense", "sparse"):
        force_path(monkeypatch, path)

        def backward():
            with torch.autocast("cpu", dtype=dtype, enabled=setting == "autocast"):
                out = model(**labelled())
            assert out.logits.dtype == dtype
            error = (out.logits.float() - expected)[real] / expected[real].abs().max()
            law = f"{str(dtype).removeprefix('torch.')} agrees with fp32"
            laws.close(law, error, torch.zeros_like(error), family=family, atol=LOW[dtype])
            (out.loss * SCALE).backward()

        ours = gradients(model, backward)
        for name, gradient in theirs.items():
            if "lora_" in name:
                assert ours[name].dtype == model.get_parameter(name).dtype, name
                error = (ours[name].float() - gradient) / gradient.abs().max()
                law = f"{str(dtype).removeprefix('torch.')} gradients agree with fp32"
                laws.close(law, error, torch.zeros_like(error), family=family, atol=5 * LOW[dtype])


ROWS = ["expert_2", None, "expert_0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_list_of_experts_is_each_row_alone(laws, family):
    """One entry a row: logits with and without a gradient, and cached decoding."""
    model = tiny_moe(family)
    rows = [tokens(n, seed=n) for n in (11, 5, 8)]
    inputs = {**batch(), "position_ids": (batch()["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    options = {"max_new_tokens": 4, "do_sample": False}
    with model.route_to(ROWS):
        together = [model(**inputs).logits, torch.no_grad()(model)(**inputs).logits]
        made = model.generate(**batch(), **options)
    law = "a list of experts is each row alone"
    for index, (row, expert) in enumerate(zip(rows, ROWS, strict=True)):
        with model.route_to(expert):
            alone = model(input_ids=row[None]).logits[0]
            text = model.generate(input_ids=row[None], **options)
        for logits in together:
            laws.close(law, logits[index, -len(row) :], alone, family=family, atol=1e-5)
        laws.equal(law, made[index, 11:], text[0, len(row) :], family=family)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_eager_and_sdpa_attention_agree(laws, family):
    """On prompts padded on the left: logits and routing, the gradients, and cached decoding. Gemma 2 has no sdpa."""
    logits, weights, made, found = [], [], [], []
    for attention in ("eager", "sdpa"):
        model = tiny_moe(tiny_base(family, attn_implementation=attention), top_k=2, router_layer=1)
        assert model.base.config._attn_implementation == attention
        out = model(**batch())
        real = batch()["attention_mask"].bool()
        logits.append(out.logits[real])
        weights.append(out.routing.weights)
        found.append(gradients(model, lambda model=model: model(**labelled()).loss.backward()))
        made.append(model.generate(**batch(), max_new_tokens=5, do_sample=False))
    law = "eager and sdpa attention agree"
    laws.close(law, *logits, family=family, atol=1e-5)
    laws.close(law, *weights, family=family, atol=1e-5)
    laws.equal(law, *made, family=family)
    assert_same_gradients(*found, relative=1e-3)


def test_router_features_are_fp32_under_autocast():
    """Reported: the causal mean's product ran in bf16 under autocast, where a running sum is wrong."""
    model = tiny_moe("llama", router_half_life=32.0)
    ids = tokens(2, 40)
    precise = model.router_features(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.router_features(ids), precise)
        assert torch.equal(model.route(ids).logits, model.router.logits(precise))
