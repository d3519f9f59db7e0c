"""Laws of a pool that grows where each answer is routed as a whole: skills are told apart by their prompts alone."""

import pytest
import torch
from peft import LoraConfig
from reference.tiny import LORA, tiny_base, tokens
from reference.turns import TURNS, chat

from dylo_moe import DyLoRAMoE
from dylo_moe.continual.base_texts import as_prompts
from dylo_moe.routing.config import BASE, GrowingRouterConfig
from dylo_moe.routing.turns import find_answers

SKILLS = ("ant", "bee", "cat")
PROMPT = 20
"""Tokens of a prompt."""


def asked(skill, *, rows=24, seed=0):
    """Conversations of one turn, int64 [rows, tokens], with prompts of a skill's own words and answers of all words."""
    low = 3 + 28 * SKILLS.index(skill)
    prompts = [
        tokens(PROMPT, seed=1000 * SKILLS.index(skill) + seed + row, low=low, high=low + 17) for row in range(rows)
    ]
    return torch.stack([torch.cat([prompt, chat(0, 4, seed=seed + row)]) for row, prompt in enumerate(prompts)])


@pytest.fixture(scope="module")
def grown():
    router = GrowingRouterConfig(granularity="response", turns=TURNS, router_half_life=6.0)
    model = DyLoRAMoE.from_base(tiny_base(), lora=LoraConfig(**LORA), router=router, allow_expert_growth=True).eval()
    for skill in SKILLS:
        assert model.add_skill(skill, [{"input_ids": asked(skill)}]).action == "grown"
        model.mature(skill)
    return model


def test_answers_go_to_the_expert_of_their_prompt(grown):
    for skill in SKILLS:
        routing = grown.route(asked(skill, seed=500))
        to_own = routing.weights[routing.mask][:, routing.names.index(skill)]
        assert to_own.mean() > 0.9 and len(to_own) == 24 * 6
        decision = grown.add_skill(f"{skill} again", [{"input_ids": asked(skill, seed=700)}])
        assert not decision.novel and decision.nearest == skill


def test_each_turn_of_a_conversation_goes_to_the_expert_of_its_own_prompt(grown):
    turns = [asked(skill, rows=12, seed=800) for skill in ("cat", "ant", "bee")]
    text = torch.cat(turns, 1)
    weights = grown.route(text).weights
    length = turns[0].shape[1]
    for place, skill in enumerate(("cat", "ant", "bee")):
        weights_of_turn = weights[:, place * length : (place + 1) * length]
        assert not weights_of_turn[:, :PROMPT].any()
        sent = weights_of_turn[:, PROMPT + 1].argmax(-1)
        assert (sent == grown.router.names.index(skill)).float().mean() > 0.8


def test_a_prompt_of_no_skill_is_answered_by_the_base(grown):
    plain = torch.stack([torch.cat([tokens(PROMPT, seed=row, high=90), chat(0, 4, seed=row)]) for row in range(24)])
    routing = grown.route(plain)
    assert (routing.weights[routing.mask].argmax(-1) == grown.router.names.index(BASE)).float().mean() > 0.6


def test_plain_text_counts_as_a_prompt_and_a_conversation_as_it_is():
    ids = torch.stack([tokens(9, seed=1, high=90), torch.cat([chat(2, 0, closed=False), tokens(4, seed=2, high=90)])])
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    batch = as_prompts({"input_ids": ids, "attention_mask": mask}, TURNS)
    openings = find_answers(batch["input_ids"], mask=batch["attention_mask"].bool(), turns=TURNS).tokens
    assert openings[0].nonzero().tolist() == [[10]] and openings[1].nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7]
