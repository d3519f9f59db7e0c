"""The laws on Gemma 3 270M, where it is: its terms have to be accepted, so that no test fetches it.

`DYLORA_ACCEPT_GEMMA_TERMS=1 python -c "from dylo_moe import load_base; load_base('gemma3-270m')"` does, for who accepts
them.
"""

import hashlib
import pydoc_data.topics

import pytest
import torch
from peft import LoraConfig, PeftModel
from reference.tiny import scramble

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.base.packaged_models import is_here
from dylo_moe.base.packages import GEMMA

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(not is_here(GEMMA), reason="Gemma 3 270M is not here, and its terms must be accepted first"),
]

WEIGHTS_SHA256 = "8fd507a27bf7f2079f9c6d3e7271efbe1d2ff49f19fd0dc3775a5750a4422c1a"
"""Over names and fp32 bytes of all tensors in name order, taken from a load of the GGUF itself."""
PROSE = " ".join(pydoc_data.topics.topics["execmodel"].split())


@pytest.fixture(scope="module")
def base():
    return load_base(GEMMA, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts():
    """Two pieces of English of different length, left-padded."""
    tokenizer = load_tokenizer(GEMMA)
    inputs = tokenizer([PROSE[:400], PROSE[1000:1250]], return_tensors="pt", padding=True, padding_side="left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def test_weights_and_tokenizer_are_those_of_the_file(base):
    digest = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS_SHA256
    assert not hasattr(base.config, "quantization_config")

    tokenizer = load_tokenizer(GEMMA)
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"][:, :256]
    assert ids[0, 0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1
    assert tokenizer.decode(ids[0, 1:]) == PROSE[: len(tokenizer.decode(ids[0, 1:]))]
    with torch.no_grad():
        assert base(input_ids=ids, labels=ids).loss.exp() < 30  # English, to a model of this size


def test_the_laws_hold(laws, base, prompts, tmp_path):
    torch.manual_seed(0)
    model = DyLoRAMoE.from_base(
        base,
        num_experts=2,
        lora=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        router=RouterConfig(router_half_life=2.0),
    )
    model = scramble(model, up=0.02, gate=2.0).eval()
    model.save_pretrained(str(tmp_path))
    with torch.no_grad(), model.route_to("expert_1"):
        ours = model(**prompts).logits
    stock = PeftModel.from_pretrained(load_base(GEMMA, dtype=torch.float32), str(tmp_path / "experts/expert_1")).eval()
    with torch.no_grad():
        laws.close("one expert equals stock PEFT", ours, stock(**prompts).logits, family="Gemma 3 270M", atol=1e-4)
    del stock

    start, mask, positions = 40, prompts["attention_mask"], prompts["position_ids"]
    with torch.no_grad():
        whole = model(**prompts, use_cache=False)
        assert len(whole.routing.weights[mask.bool()].argmax(-1).unique()) == 2
        out, steps = None, []
        for begin, end in [(0, start), *((place, place + 1) for place in range(start, mask.shape[1]))]:
            out = model(
                input_ids=prompts["input_ids"][:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=None if out is None else out.past_key_values,
                use_cache=True,
            )
            steps.append(out.logits[:, -1])
    laws.close(
        "cache by hand = one forward",
        torch.stack(steps, 1),
        whole.logits[:, start - 1 :],
        family="Gemma 3 270M",
        atol=1e-3,
    )
