"""Merge two experts into one: what it costs, where the two are alike and where they are not.

    python benchmarks/continual/merging.py --output FOLDER [--alike python --unlike tcl] [--rows 32] [--held_out 16]

One skill is cut into two halves, which a pool with `known_skill="grow"` learns as two experts; a second skill, unlike
it, becomes a third one. Then the two halves' experts are merged, and in another copy of the pool an expert of a half
with the unlike one. The script prints nats per token of the held-out rows of both skills, routed, before and after, and
beside them those of one expert that was trained on both halves; the share of the energy that each merge keeps, the
cosine of the two deltas, and whether the library reported the pair.

It is done twice: with new experts that start as a copy of the nearest one, and with fresh ones. What was trained is
kept in the folder and not trained again. One seed, one thread, about ten minutes on a core that nothing else uses.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from continual_baselines import RANK, lora_config, loss_of
from many_skills import SEED, Folder, learn
from skills import Skill, read_skill

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.continual.config import FRESH, GROW, NEAREST, GrowthConfig


def pool(arguments: argparse.Namespace, start_from: str) -> DyLoRAMoE:
    """An empty pool that grows with every skill."""
    growth = GrowthConfig(known_skill=GROW, start_from=start_from)
    base = load_base(arguments.model, dtype=arguments.dtype)
    return DyLoRAMoE.from_base(base, lora=lora_config(RANK), allow_expert_growth=True, growth=growth)


def halves_of(skill: Skill, num_rows: int) -> list[Skill]:
    """A skill's rows as two skills, with the same held-out rows."""
    parts = [slice(num_rows), slice(num_rows, 2 * num_rows)]
    return [
        Skill(f"{skill.name}_{part + 1}", skill.train.take(rows), skill.held_out) for part, rows in enumerate(parts)
    ]


def learned(arguments: argparse.Namespace, name: str, start_from: str, skills: list[Skill]) -> Path:
    """The checkpoint of a pool that has learned some skills in turn."""
    path = arguments.output / name
    folder = Folder(path, {name: value for name, value in vars(arguments).items() if name != "output"})
    model = pool(arguments, start_from)
    for skill in skills:
        print(skill.name, learn(model, skill, folder, num_rows=len(skill.train.labels)), flush=True)
    for pair in model.growth.confusable():
        print(pair.in_words(), flush=True)
    model.save_pretrained(str(path / "pool"))
    return path / "pool"


def losses(model: DyLoRAMoE, held_out: list[Skill]) -> list[float]:
    """Nats per token of each skill's held-out rows, routed."""
    return [loss_of(model, skill.held_out) for skill in held_out]


def merged(arguments: argparse.Namespace, start: str, checkpoint: Path, held_out: list[Skill], **options: Any) -> str:
    """A row of the table: a merge of two experts of a checkpoint, measured."""
    model = loaded(arguments, checkpoint)
    reported = any({options["first"], options["second"]} == set(pair.experts) for pair in model.growth.confusable())
    merge = model.merge_experts(**options, seed=SEED)
    cells = [start, f"{options['first']} + {options['second']}, rank {merge.rank}", "yes" if reported else "no"]
    cells += [f"{merge.kept:.3f} / {merge.worst:.3f}", f"{merge.alike:.3f}"]
    return "| " + " | ".join([*cells, *(f"{loss:.4f}" for loss in losses(model, held_out))]) + " |"


def table(arguments: argparse.Namespace) -> list[str]:
    """Train what is not trained yet, and measure."""
    tokenizer = load_tokenizer(arguments.model)
    counts = {"num_train": 2 * arguments.rows, "num_held_out": arguments.held_out}
    alike, unlike = (read_skill(name, tokenizer, **counts) for name in (arguments.alike, arguments.unlike))
    halves, held_out = halves_of(alike, arguments.rows), [alike, unlike]
    other = unlike._replace(train=unlike.train.take(slice(arguments.rows)))
    lines = [f"| start | experts | reported | energy kept, all / worst | cosine | {alike.name} | {unlike.name} |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    one = learned(arguments, "whole", FRESH, [alike, other])
    for start in (NEAREST, FRESH):
        checkpoint = learned(arguments, start, start, [*halves, other])
        model = loaded(arguments, checkpoint)
        if start == NEAREST:
            with model.route_to(None):
                lines.append(row("the base", losses(model, held_out)))
            lines.append(row("one expert of both halves", losses(loaded(arguments, one), held_out)))
        lines.append(row("two experts of the halves", losses(model, held_out), start))
        for half in halves:
            with model.route_to(half.name):
                lines.append(row(f"{half.name} alone", [loss_of(model, alike.held_out)], start))
        first, second = (half.name for half in halves)
        for rank in (RANK, 2 * RANK):
            lines.append(merged(arguments, start, checkpoint, held_out, first=first, second=second, rank=rank))
        lines.append(merged(arguments, start, checkpoint, held_out, first=first, second=other.name))
    return lines


def loaded(arguments: argparse.Namespace, checkpoint: Path) -> DyLoRAMoE:
    """A pool as it was saved."""
    return DyLoRAMoE.from_pretrained(str(checkpoint), base=load_base(arguments.model, dtype=arguments.dtype))


def row(what: str, found: list[float], start: str = "") -> str:
    """A row of the table that no merge belongs to."""
    cells = [f"{loss:.4f}" for loss in found] + [""] * (2 - len(found))
    return "| " + " | ".join([start, what, "", "", "", *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--alike", default="python", help="the skill that is cut into halves")
    parser.add_argument("--unlike", default="tcl", help="the other skill")
    parser.add_argument("--rows", type=int, default=32, help="rows of 256 tokens that each expert is trained on")
    parser.add_argument("--held_out", type=int, default=16, help="held-out rows of 256 tokens, a skill")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(table(arguments)))


if __name__ == "__main__":
    main()
