"""`dylora export` of a model that decides once an answer: aLoRA adapters for PEFT, plain ones that read prompts."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from reference.runs import tiny_run_folder
from reference.tiny import scramble
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.cli import main
from dylo_moe.commands.export.losses import BY_BASE, PER_REQUEST, PLAIN, ROUTED
from dylo_moe.commands.export.request_routing import expert_for
from dylo_moe.routing.turn_tokens import TurnTokens

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w80 w81 w82 {{ m['content'] }} </s> "
    "{% else %}w84 {{ m['content'] }} w85 {% endif %}{% endfor %}{% if add_generation_prompt %}w80 w81 w82 {% endif %}"
)
TURNS = TurnTokens(opening=(84, 85, 86), adapted_from=1, endings=((2,),))
NAMES = ["expert_0", "expert_1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose template has answers, a checkpoint of experts that are far apart, and questions with answers."""
    folder = tiny_run_folder(tmp_path_factory.mktemp("answers"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    router = RouterConfig(granularity="response", turns=TURNS, router_half_life=3.0)
    model = scramble(DyLoRAMoE.from_base(str(folder / "base"), num_experts=2, router=router))
    asked = [{"input_ids": torch.tensor([[88, *range(word, word + 5), 89, 84, 85, 86]])} for word in range(4, 80)]
    with torch.no_grad():  # so that answers choose both experts
        model.router.feature_mean.copy_(torch.cat(model.text_features(asked)).mean(0))
    model.save_pretrained(str(folder / "checkpoint"))
    with open(folder / "asked.jsonl", "w") as file:
        for row in range(40):
            words = [f"w{(7 * row + place * (row % 5 + 1)) % 78}" for place in range(9 + row % 4)]
            file.write(json.dumps({"prompt": " ".join(words[:5]), "response": " ".join(words[5:])}) + "\n")
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """The three kinds of export, by kind, and what each said."""

    def export(kind, *more):
        words = ["--datasets", str(folder / "asked.jsonl"), "--eval_subset", "100", "--output", str(folder / kind)]
        assert main(["export", str(folder / "checkpoint"), "--to", kind, *more, *words]) == 0
        return folder / kind

    return {"peft": export("peft"), "vllm": export("vllm"), "merged": export("merged", "--expert", "expert_1")}


def record_of(folder):
    return json.loads((folder / "dylora_export.json").read_text())


def loss(exported, kind, way):
    return record_of(exported[kind])["measured"]["ways"][way]["loss"]["datasets"]["asked"]["value"]


def stock(folder, path):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), path).eval()


def loop_loss(folder, logits_of):
    """Nats per token of the answers and their ends, over the rows that the exports measured."""
    from dylo_moe.evaluation.held_out import held_out

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    asked = [str(folder / "asked.jsonl")]
    rows = held_out(folder / "checkpoint", tokenizer, datasets=asked, eval_subset=100, seed=42).rows["asked"]
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        first = int((labels != -100).nonzero()[0])
        assert row["input_ids"][first - 3 : first] == [84, 85, 86]
        with torch.no_grad():
            losses = F.cross_entropy(logits_of(ids, first)[0, :-1], labels[1:], reduction="none", ignore_index=-100)
        total, count = total + float(losses.sum()), count + int((labels[1:] != -100).sum())
    return total / count


def test_peft_gets_alora_adapters_whose_logits_are_the_expert_s(folder, exported, laws):
    model = DyLoRAMoE.from_pretrained(str(folder / "checkpoint"))
    assert record_of(exported["peft"])["invocation"] == [85, 86]
    ids = torch.tensor([[88, 5, 9, 40, 89, 84, 85, 86, 11, 12, 60]])
    adapters = {name: stock(folder, exported["peft"] / name) for name in NAMES}
    for name, theirs in adapters.items():
        with torch.no_grad(), model.route_to(name):
            laws.close("an exported aLoRA adapter in stock PEFT", theirs(ids).logits, model(ids).logits, atol=1e-5)

    def requested(ids, first):
        return adapters[expert_for(model, ids[0, :first].tolist())](ids).logits

    assert loss(exported, "peft", PER_REQUEST) == pytest.approx(loop_loss(folder, requested), rel=1e-5)
    assert loss(exported, "peft", PER_REQUEST) == pytest.approx(loss(exported, "peft", ROUTED), rel=1e-5)
    assert record_of(exported["peft"])["measured"]["requests"]["asked"].keys() == set(NAMES)
    page = (exported["peft"] / "README.md").read_text()
    assert "`alora_invocation_tokens` is [85, 86]" in page and "earlier answer to the expert that wrote it" in page
    assert record_of(exported["peft"])["notes"] == []


def test_vllm_gets_plain_adapters_and_the_loss_with_prompts_adapted(folder, exported):
    model = DyLoRAMoE.from_pretrained(str(folder / "checkpoint"))
    adapters = {name: stock(folder, exported["vllm"] / name) for name in NAMES}
    assert all(each.peft_config["default"].alora_invocation_tokens is None for each in adapters.values())

    def requested(ids, first):
        return adapters[expert_for(model, ids[0, :first].tolist())](ids).logits

    adapted = loss(exported, "vllm", PER_REQUEST)
    assert adapted == pytest.approx(loop_loss(folder, requested), rel=1e-5)
    by_base = loss(exported, "vllm", f"{PER_REQUEST}, {BY_BASE}")
    assert by_base == loss(exported, "peft", PER_REQUEST) and abs(adapted - by_base) > 1e-3
    assert loss(exported, "vllm", "expert_0, always") == pytest.approx(
        loop_loss(folder, lambda ids, first: adapters["expert_0"](ids).logits), rel=1e-5
    )
    (note,) = record_of(exported["vllm"])["notes"]
    assert "behind prompts that the base reads" in note and "vLLM applies an adapter to the whole request" in note
    page = (exported["vllm"] / "README.md").read_text()
    assert note in page and f"| {PER_REQUEST}, {BY_BASE} | " in page


def test_a_merged_model_says_that_it_reads_prompts_too(folder, exported):
    adapters = stock(folder, exported["vllm"] / "expert_1")
    plain = loss(exported, "merged", PLAIN)
    assert plain == pytest.approx(loop_loss(folder, lambda ids, first: adapters(ids).logits), rel=1e-4)
    by_base = stock(folder, exported["peft"] / "expert_1")
    found = loss(exported, "merged", f"expert_1, {BY_BASE}")
    assert found == pytest.approx(loop_loss(folder, lambda ids, first: by_base(ids).logits), rel=1e-5) != plain
    (note,) = record_of(exported["merged"])["notes"]
    assert "merged weights are the same for every token" in note
    assert note in (exported["merged"] / "README.md").read_text()


def test_it_is_said_on_the_terminal(folder, tmp_path, capsys):
    words = ["export", str(folder / "checkpoint"), "--no_measure"]
    for kind, says in (("vllm", True), ("peft", False), ("merged", True)):
        more = ["--expert", "expert_0"] if kind == "merged" else []
        assert main([*words, "--to", kind, *more, "--output", str(tmp_path / kind)]) == 0
        assert ("here they read the prompts too" in capsys.readouterr().err) == says


def test_a_request_without_a_header_is_the_base_s(folder):
    model = DyLoRAMoE.from_pretrained(str(folder / "checkpoint"))
    assert expert_for(model, [88, 5, 9, 89]) == "base"
    assert {expert_for(model, [88, word, word, 89, 84, 85, 86]) for word in range(4, 80)} == set(NAMES)
