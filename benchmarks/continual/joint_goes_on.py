"""A pool that was trained jointly goes on to learn a new skill: which gate rows serve it best?

    python benchmarks/continual/joint_goes_on.py [--joint python tcl] [--new javascript] [--rows 32] [--held_out 12]

Two experts are trained together with their gate, on two kinds of text; then the pool is told what they know, may grow,
and learns a third kind. Once its trained gate rows stay and only the new one is fitted to them (`gate_rows="frozen"`),
once all rows are computed from the skill library. Experts are the same in both. Nats per token of held-out rows, the
share of tokens whose first choice is the expert that knows the text, and beside it what the own expert alone gives.
One seed, one thread, about ten minutes.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from continual_baselines import BATCH_ROWS, RANK, lora_config, loss_of, train
from many_skills import share_right
from peft import set_peft_model_state_dict
from skills import Rows, Skill, read_skill
from torch import Tensor

from dylo_moe import DyLoRAMoE, GrowthConfig
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.continual.config import FROZEN, LIBRARY

SEED, RATE = 0, 2e-3


def sample(rows: Rows) -> list[dict[str, Tensor]]:
    """Batches as the router and the library read them."""
    return [{"input_ids": ids} for ids in rows.input_ids.split(BATCH_ROWS)]


def joint_model(arguments: argparse.Namespace, skills: Sequence[Skill]) -> DyLoRAMoE:
    """A pool of as many experts as skills, trained on all of them at once, gate included."""
    base = load_base(arguments.model, dtype=getattr(torch, arguments.dtype))
    torch.manual_seed(SEED)
    model = DyLoRAMoE.from_base(base, num_experts=len(skills), lora=lora_config(RANK))
    rows = Rows(*(torch.cat(parts) for parts in zip(*(skill.train for skill in skills), strict=True)))
    model.initialize_router(sample(rows), seed=SEED)
    train(model, rows, high_rate=RATE, seed=SEED)
    return model.eval()


def grow(model: DyLoRAMoE, skill: Skill, gate_rows: str, trained: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Let the pool learn a skill; returns the new expert's weights, which are trained where they are not given."""
    model.enable_growth(GrowthConfig(gate_rows=gate_rows), seed=SEED)
    name = skill.name
    decision = model.add_skill(name, sample(skill.train), seed=SEED)
    if decision.action != "grown":
        raise ValueError(f"{name} is no new skill to this pool: {decision}")
    if trained is None:
        with model.route_to(name):
            train(model, skill.train, high_rate=RATE, seed=SEED)
        trained = {key: value.clone() for key, value in model.experts.state(name).items()}
    else:
        set_peft_model_state_dict(model, trained, adapter_name=name)
    model.mature(name)
    return trained


def cells(model: DyLoRAMoE, skills: Sequence[Skill]) -> list[str]:
    """Of each skill: routed nats / share of tokens sent to its own expert / nats of its own expert alone."""
    found = []
    for skill in skills:
        expert = model.library[skill.name].expert
        with model.route_to(expert):
            own = loss_of(model, skill.held_out)
        right = share_right(model, skill.held_out, expert)
        found.append(f"{loss_of(model, skill.held_out):.4f} / {right:.3f} / {own:.4f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--joint", nargs="+", default=["python", "tcl"], help="kinds of text of the jointly trained pool"
    )
    parser.add_argument("--new", default="javascript", help="the kind that comes later")
    parser.add_argument("--rows", type=int, default=32, help="training rows of 256 tokens of each kind")
    parser.add_argument("--held_out", type=int, default=12)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(arguments.model)
    counts = {"num_train": arguments.rows, "num_held_out": arguments.held_out}
    skills = [read_skill(name, tokenizer, **counts) for name in (*arguments.joint, arguments.new)]
    model = joint_model(arguments, skills[:-1])
    for skill in skills[:-1]:
        expert = model.know_skill(skill.name, sample(skill.train), seed=SEED)
        print(f"{skill.name} is known by {expert}: {model.library[skill.name].shares}", flush=True)
    print(f"| gate rows | {' | '.join(skill.name for skill in skills)} |\n|---|{'---|' * len(skills)}")
    trained = None
    for name, gate_rows in (("trained ones stay", FROZEN), ("all from the library", LIBRARY)):
        grown = copy.deepcopy(model)
        trained = grow(grown, skills[-1], gate_rows, trained)
        follows = (
            "" if gate_rows == FROZEN or grown.growth.rows_follow_library else " (not possible: trained ones stay)"
        )
        print(f"| {name}{follows} | {' | '.join(cells(grown, skills))} |", flush=True)


if __name__ == "__main__":
    main()
