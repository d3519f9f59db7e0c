"""The laws on the real small model and real text: what tiny random models cannot show."""

import inspect
import json
import pydoc_data.topics
import textwrap

import pytest
import torch
from peft import LoraConfig, PeftModel
from reference.tiny import scramble

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.base.packages import EMBEDDED_BASE

pytestmark = pytest.mark.end_to_end
FAMILY = "SmolLM2-135M"
NEW = 8


@pytest.fixture(scope="module")
def base():
    return load_base(EMBEDDED_BASE, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts():
    """Code, prose and a chat, left-padded."""
    tokenizer = load_tokenizer(EMBEDDED_BASE)
    texts = [
        inspect.getsource(json.dumps)[:300],
        pydoc_data.topics.topics["assert"][:180],
        "def add(a, b):\n    return",
    ]
    rows = [tokenizer(textwrap.dedent(text))["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def routed(base, **router):
    """Three experts that do something, and a gate that tells the texts' tokens apart."""
    model = DyLoRAMoE.from_base(
        base, num_experts=3, lora=LoraConfig(r=4, target_modules="all-linear"), router=RouterConfig(**router)
    )
    return scramble(model, up=0.01, gate=1.0).eval()


@pytest.fixture(scope="module")
def model(base):
    model = routed(base, top_k=2, router_half_life=8.0)
    yield model
    model.unload()


def test_every_cache_gives_the_tokens_of_none(model, prompts, laws):
    """No token of the tokenizer ends a row here, so that all rows continue to the last step."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    expected = model.generate(**prompts, use_cache=False, **options)
    used = expected.routing.weights[expected.routing.mask].mean(0)
    assert (used > 0.1).all(), used  # else the routing was never put to the test
    for implementation in ("dynamic", "static"):
        out = model.generate(**prompts, cache_implementation=implementation, **options)
        laws.equal(f"cached = uncached, {implementation} cache", out.sequences, expected.sequences, family=FAMILY)
        routing = model.route(out.sequences, out.routing.mask)
        laws.equal(".routing = one forward", out.routing.weights, routing.weights, family=FAMILY)


def test_assisted_decoding_gives_the_tokens_of_plain_decoding(model, prompts, laws):
    """The code's prompt: what is looked up in it is often right and often not."""
    ids = prompts["input_ids"][:1][:, prompts["attention_mask"][0].bool()]
    options = {"max_new_tokens": 2 * NEW, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=ids, **options)
    out = model.generate(input_ids=ids, prompt_lookup_num_tokens=4, **options)
    laws.equal("assisted = plain decoding", out, expected, family=FAMILY)


def test_rows_with_their_own_expert_equal_each_row_alone(model, prompts, laws):
    with model.route_to(["expert_2", None, "expert_0"]), torch.no_grad():
        together = model(**prompts).logits
    for row, expert in enumerate(["expert_2", None, "expert_0"]):
        real = prompts["attention_mask"][row].bool()
        with model.route_to(expert), torch.no_grad():
            alone = model(input_ids=prompts["input_ids"][row : row + 1, real]).logits
        laws.close("route_to a list = each row alone", together[row, real], alone[0], family=FAMILY, atol=2e-3)


def test_one_expert_equals_stock_peft(model, prompts, laws, tmp_path):
    model.save_pretrained(str(tmp_path / "saved"))
    with model.route_to("expert_1"), torch.no_grad():
        ours = model(**prompts).logits
    stock = PeftModel.from_pretrained(
        load_base(EMBEDDED_BASE, dtype=torch.float32), str(tmp_path / "saved/experts/expert_1")
    )
    with torch.no_grad():
        theirs = stock.eval()(**prompts).logits
    real = prompts["attention_mask"].bool()
    laws.close("one expert = stock PEFT", ours[real], theirs[real], family=FAMILY, atol=2e-3)


@pytest.mark.parametrize("router_layer", ["embeddings", "final"])
def test_a_sequence_is_decided_once(prompts, laws, router_layer):
    model = routed(load_base(EMBEDDED_BASE, dtype=torch.float32), granularity="sequence", router_layer=router_layer)
    model.initialize_router([{**prompts, "prompt_lengths": prompts["attention_mask"].sum(1)}])  # one expert a prompt
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    out, expected = (model.generate(**prompts, use_cache=cached, **options) for cached in (True, False))
    laws.equal("cached = uncached, sequence granularity", out.sequences, expected.sequences, family=FAMILY)
    lengths = prompts["attention_mask"].sum(1)
    routing = model.route(out.sequences, out.routing.mask, prompt_lengths=lengths)
    laws.equal(".routing = one forward, sequence granularity", out.routing.weights, routing.weights, family=FAMILY)
    assert len(out.routing.weights[:, -1].unique(dim=0)) == 3
