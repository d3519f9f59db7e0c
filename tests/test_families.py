"""Laws of a whole model, over the families that people use: the base stays the base, one expert is stock PEFT."""

import copy

import pytest
import torch
from peft import PeftModel
from reference.tiny import FAMILIES, base_tensors, force_path, padded, tiny_base, tiny_moe, tokens
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


@pytest.mark.parametrize("setting", ["bf16 base, fp32 experts", "bf16 base, bf16 experts", "autocast"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_low_precision_agrees_with_fp32(monkeypatch, setting, top_k):
    """Same weights, rounded; the routing is forced to the fp32 one's, so only arithmetic differs."""
    precise = tiny_moe("llama", num_experts=4, top_k=top_k)
    model = copy.deepcopy(precise)
    if setting != "autocast":
        model = tiny_moe(tiny_base("llama", dtype=torch.bfloat16), num_experts=4, top_k=top_k)
    if "bf16 experts" in setting:
        model.to(torch.bfloat16)
    assert (next(model.experts.parameters("expert_0")).dtype == torch.bfloat16) == ("bf16 experts" in setting)
    monkeypatch.setattr(model.router, "logits", lambda features: precise.route(**batch()).logits)
    expected = precise(**batch()).logits
    for path in ("dense", "sparse"):
        force_path(monkeypatch, path)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            out = model(**batch(), labels=batch()["input_ids"])
        assert out.logits.dtype == torch.bfloat16
        real = batch()["attention_mask"].bool()
        error = (out.logits.float() - expected)[real].abs().max() / expected[real].abs().max()
        assert error < 0.05
        out.loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) or parameter.grad.dtype == parameter.dtype, name


def test_router_features_are_fp32_under_autocast():
    """Reported: the causal mean's product ran in bf16 under autocast, where a running sum is wrong."""
    model = tiny_moe("llama", router_half_life=32.0)
    ids = tokens(2, 40)
    precise = model.router_features(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.router_features(ids), precise)
        assert torch.equal(model.route(ids).logits, model.router.logits(precise))
