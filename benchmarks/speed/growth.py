"""What does it cost to add a skill to a pool of many?

    python benchmarks/speed/growth.py [--model smollm2-135m] [--skills 64] [--rank 8] [--rounds 3]

Times `model.add_skill` (novelty, the new expert, library, gate row; training apart) as the pool grows, and stock PEFT's
`add_adapter` on the same base beside it. A skill is 100 texts of 64 tokens from a stretch of the vocabulary of its own;
only the time is measured here, not what is learned.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base

TEXTS, TOKENS, WORDS = 100, 64, 400


def texts_of(skill: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Batches of a skill's texts."""
    generator = torch.Generator().manual_seed(skill)
    low = 100 + skill * WORDS % (vocabulary - WORDS - 100)
    ids = torch.randint(low, low + WORDS, (TEXTS, TOKENS), generator=generator)
    return [{"input_ids": part} for part in ids.split(20)]


def lora(rank: int) -> LoraConfig:
    """All linears."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")


def grow_ours(model_id: str, rank: int, count: int) -> list[float]:
    """Seconds of each skill."""
    base = load_base(model_id, dtype=torch.bfloat16)
    model = DyLoRAMoE.from_base(base, lora=lora(rank), allow_expert_growth=True)
    vocabulary = base.get_input_embeddings().num_embeddings

    def add(skill: int) -> None:
        decision = model.add_skill(f"skill-{skill}", texts_of(skill, vocabulary), seed=skill)
        if decision.action != "grown":
            raise RuntimeError(f"skill {skill} was taken for a known one: {decision}")
        model.mature(f"skill-{skill}")

    return [timed(add, skill) for skill in range(1, count + 1)]


def grow_peft(model_id: str, rank: int, count: int) -> list[float]:
    """Seconds of each adapter, the first one apart."""
    model = get_peft_model(load_base(model_id, dtype=torch.bfloat16), lora(rank), adapter_name="skill-1")
    return [
        0.0,
        *(timed(lambda skill: model.add_adapter(f"skill-{skill}", lora(rank)), n) for n in range(2, count + 1)),
    ]


def timed(call: Callable[[int], object], skill: int) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(skill)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--skills", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="in turns; the median of each figure is shown")
    arguments = parser.parse_args()
    shown = [place for place in (2, 4, 8, 16, 32, 64, 128, 256) if place <= arguments.skills]
    rounds: dict[str, list[list[float]]] = {"ours": [], "PEFT's add_adapter": []}
    for _ in range(arguments.rounds):
        for name, grow in (("ours", grow_ours), ("PEFT's add_adapter", grow_peft)):
            rounds[name].append(grow(arguments.model, arguments.rank, arguments.skills))
    print(
        f"{arguments.model}, rank {arguments.rank}, seconds for the skill of that number, median of {arguments.rounds}"
    )
    print("| | " + " | ".join(str(place) for place in shown) + f" | {shown[-1]} over 2 |")
    print("|---|" + "---|" * (len(shown) + 1))
    for name, times in rounds.items():
        # one skill's time jitters: the median of it and its neighbours
        medians = [statistics.median(t for run in times for t in run[max(place - 2, 1) : place + 1]) for place in shown]
        ratio = statistics.median(
            statistics.median(run[shown[-1] - 3 : shown[-1]]) / statistics.median(run[1:4]) for run in times
        )
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in medians) + f" | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
