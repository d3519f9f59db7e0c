"""What torch.compile gains: forward and training step, eager against compiled, of the plain base and of ours.

    python benchmarks/speed/compiled.py [--model smollm2-135m] [--num_experts 4] [--rounds 5] [--layers N]

Every variant does the same work on the same real text, in turns in one process, one thread, as CPU time; the table
gives the median ratio to the eager plain base of the same round (least to most), and the seconds that compiling took.
`fullgraph=True`: a break in the graph would be an error.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from measured_work import forward, gate_text, measure, real_text, training_step
from peers import lora_config, randomise
from torch import nn

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base

WORK = {"forward 2x128": forward, "training step 2x128": training_step}


def build(model_name: str, num_experts: int, layers: int | None) -> dict[str, nn.Module]:
    """The plain base and ours, top-1."""

    def base() -> nn.Module:
        options = {} if layers is None else {"num_hidden_layers": layers}
        return load_base(model_name, dtype=torch.float32, **options)

    ours = DyLoRAMoE.from_base(base(), num_experts=num_experts, lora=lora_config(0.0))
    randomise(ours)
    ours.initialize_router(gate_text(model_name, max(64, num_experts)))
    return {"base": base().requires_grad_(False), f"ours, top-1 of {num_experts}": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="only so many of the base's layers, for a quicker look")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids = real_text(arguments.model)
    variants = build(arguments.model, arguments.num_experts, arguments.layers)
    print(f"{arguments.model}, torch {torch.__version__}, one thread, {arguments.rounds} rounds")
    print("| | " + " | ".join(f"{name} | compiled | compiling, s" for name in variants) + " |")
    print("|---" * (1 + 3 * len(variants)) + "|")
    for label, work in WORK.items():
        both: dict[str, nn.Module] = {}
        taken = {}
        torch._dynamo.reset()
        for name, model in variants.items():
            both[name], both[f"{name}, compiled"] = model, torch.compile(model, fullgraph=True, dynamic=False)
            start = time.perf_counter()
            work(both[f"{name}, compiled"], ids)
            taken[name] = time.perf_counter() - start
        seconds = measure(both, work, ids, arguments.rounds)
        cells = []
        for name in both:
            ratios = [own / plain for own, plain in zip(seconds[name], seconds["base"], strict=True)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
            if name.endswith("compiled"):
                cells.append(f"{taken[name.removesuffix(', compiled')]:.0f}")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
