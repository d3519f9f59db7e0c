"""Experts that act on answers alone are PEFT's aLoRA adapters: in a checkpoint, and taken into a pool."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from reference.stock import load_stock, save_stock
from reference.tiny import padded, tiny_base, tiny_moe, tokens
from reference.turns import TURNS, answering, chat, shared_answering

from dylo_moe import DyLoRAMoE
from dylo_moe.utils.errors import DyLoRAWarning

EXPERTS = ["expert_0", "expert_1", "expert_2"]
EXACT = "an aLoRA adapter in stock PEFT = the expert, single-turn"


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2", "gpt_neox"])
def saved(request, tmp_path_factory):
    """A family, a model that decides once an answer, and its checkpoint."""
    folder = tmp_path_factory.mktemp("alora") / "saved"
    model = shared_answering(request.param)
    model.save_pretrained(str(folder))
    return request.param, model, folder


def stock(family, folder):
    return PeftModel.from_pretrained(tiny_base(family), str(folder)).eval()


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask).logits


def one_turn():
    """(ids, mask) of three conversations of one answer that is not closed, the last of them only opened."""
    return padded([chat(5, 6, seed=1, closed=False), chat(9, 2, closed=False), chat(3, 0, closed=False)], side="left")


def test_stock_peft_adapts_what_the_expert_adapts(laws, saved):
    family, model, folder = saved
    for expert in EXPERTS:
        theirs, (ids, mask) = stock(family, folder / "experts" / expert), one_turn()
        assert theirs.peft_config["default"].alora_invocation_tokens == [91, 92]
        with model.route_to(expert):
            laws.close(EXACT, logits(theirs, ids, mask), logits(model, ids, mask), family=family, atol=1e-5)
            base = logits(tiny_base(family), ids, mask)
            assert not torch.allclose(logits(theirs, ids, mask)[:, -1], base[:, -1], atol=1e-2)
            options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
            options["suppress_tokens"] = list(range(90, 96))  # of which an answer would be closed
            ours = model.generate(ids, **options)
            laws.equal("aLoRA in stock PEFT = the expert, generated", theirs.generate(ids, **options), ours)


def test_where_stock_peft_differs(laws, tmp_path):
    """What docs/serving.md says of it: turns before, tokens behind an end, and a header that is not whole."""
    model, plain = shared_answering("llama"), tiny_base("llama")
    model.save_pretrained(str(tmp_path / "saved"))
    theirs = stock("llama", tmp_path / "saved/experts/expert_1")
    two = chat(5, 4, 3, 2, closed=False)[None]
    last = two.shape[1] - 2 - 2  # of the header: the token at which the last answer is recognised
    closed = torch.cat([chat(5, 4), tokens(3, high=90)])[None]
    half = chat(5, 0, closed=False)[None, :-1]
    with model.route_to("expert_1"):
        ours, found = logits(model, two), logits(theirs, two)
        laws.equal("before the last answer, stock PEFT = the base", found[:, :last], logits(plain, two)[:, :last])
        assert not torch.allclose(found[:, 8:last], ours[:, 8:last], atol=1e-2)
        end = 5 + 3 + 4 + 1
        ours, found = logits(model, closed), logits(theirs, closed)
        laws.close(EXACT, found[:, : end - 1], ours[:, : end - 1], atol=1e-5)
        assert not torch.allclose(found[:, end - 1 :], ours[:, end - 1 :], atol=1e-2)
        laws.equal("half a header, stock PEFT = the base", logits(theirs, half), logits(plain, half))
        assert not torch.allclose(logits(model, half)[:, -1], logits(plain, half)[:, -1], atol=1e-2)


def test_a_checkpoint_with_invocations_is_read_and_others_have_none(laws, saved, tmp_path):
    family, model, folder = saved
    ids, mask = one_turn()
    new = DyLoRAMoE.from_pretrained(str(folder), tiny_base(family))
    laws.equal("a checkpoint of aLoRA adapters = its model", logits(new, ids, mask), logits(model, ids, mask))
    assert not any(config.alora_invocation_tokens for config in new.peft_config.values())
    token = tiny_moe(family)
    token.save_pretrained(str(tmp_path / "token"))
    values = json.loads((tmp_path / "token/experts/expert_0/adapter_config.json").read_text())
    assert values["alora_invocation_tokens"] is None


# --- adapters from elsewhere


@pytest.mark.parametrize("invocation", [[91, 92], [91]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_with_the_header_s_invocation_comes_in(laws, family, invocation, tmp_path):
    model, (ids, mask) = answering(family), one_turn()
    folder = save_stock(tmp_path / "stock", family, task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DyLoRAWarning)
        model.import_expert("new", str(folder))
    with model.route_to("new"):
        ours = logits(model, ids, mask)
    laws.close(
        "an imported aLoRA adapter gives stock PEFT's logits",
        ours,
        logits(load_stock(folder, family), ids, mask),
        atol=1e-5,
    )
    model.save_pretrained(str(tmp_path / "saved"))
    laws.close(EXACT, logits(stock(family, tmp_path / "saved/experts/new"), ids, mask), ours, atol=1e-5)


@pytest.mark.parametrize("invocation", [[90, 91, 92], [90, 91]], ids=str)
def test_an_invocation_that_begins_earlier_comes_in_and_is_told(laws, invocation, tmp_path):
    model, (ids, mask) = answering(), one_turn()
    folder = save_stock(tmp_path / "stock", task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    with pytest.warns(DyLoRAWarning, match=r"acts from its invocation \[90, 91.*\] on, 1 token before an expert does"):
        model.import_expert("new", str(folder))
    theirs = logits(load_stock(folder), ids, mask)
    with model.route_to("new"):
        ours = logits(model, ids, mask)
    assert not torch.allclose(ours, theirs, atol=1e-2)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": list(TURNS.adapted)}))
    laws.close("one token later, it is the same adapter", logits(load_stock(folder), ids, mask), ours, atol=1e-5)


def test_a_plain_adapter_comes_in_and_is_told(tmp_path):
    model, folder = answering(), save_stock(tmp_path / "stock")
    with pytest.warns(DyLoRAWarning, match=r"plain LoRA adapter.*here the base reads every prompt"):
        model.import_expert("new", str(folder))


@pytest.mark.parametrize("invocation", [[92], [90], [5, 6], [91, 92, 5], [90, 91, 92, 93], [92, 91], []], ids=str)
def test_any_other_invocation_is_refused(invocation, tmp_path):
    model = answering()
    folder = save_stock(tmp_path / "stock", task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    with pytest.raises(ValueError, match=r"part of that header which holds this token") as caught:
        model.import_expert("new", str(folder))
    assert f"alora_invocation_tokens is {invocation}: it acts" in str(caught.value)
    assert "from token 91 on of [90, 91, 92], with which an answer begins" in str(caught.value)
    assert list(model.experts.names) == EXPERTS


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_model_without_answers_refuses_it(granularity, tmp_path):
    model = tiny_moe(granularity=granularity)
    folder = save_stock(tmp_path / "stock", task_type="CAUSAL_LM", alora_invocation_tokens=[91, 92], use_dora=False)
    with pytest.raises(ValueError, match=rf"\[91, 92\].*with granularity '{granularity}' an expert acts on every"):
        model.import_expert("new", str(folder))
    with pytest.raises(ValueError, match=r"alora_invocation_tokens is \[91, 92\]: which tokens .* is the router's"):
        tiny_moe(lora={"alora_invocation_tokens": [91, 92], "task_type": "CAUSAL_LM"})
