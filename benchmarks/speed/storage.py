"""How the experts lie in memory: what one costs, and what a decoded token costs when all are mixed.

    python benchmarks/speed/storage.py [--model smollm2-135m] [--num_experts 4 16] [--rounds 9]

Three ways, on the same model, in turns, one thread, CPU time, as a ratio to the plain base:

  packed   ours: each expert's matrices are views of one block per layer; nothing is copied, nothing is doubled
  cat      separate matrices, concatenated in every call
  cached   separate matrices and a concatenated copy that is kept: twice the memory

Memory is what each expert adds to a fresh process, beside the bytes of its matrices: held, as tensors and
Python objects; and resident, which also counts what the allocator keeps of memory that was given back.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable

import torch
from measured_work import real_text
from peers import lora_config, randomise
from transformers import DynamicCache

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base
from dylo_moe.experts import kernels as mixture

PROMPT, TOKENS = 32, 12


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_after(model_name: str, num_experts: int, how: str) -> list[int]:
    """Resident and held bytes of a fresh process that has the base and so many experts."""
    words = [sys.executable, __file__, "--model", model_name, "--hold", str(num_experts), how]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return [int(word) for word in output[-2:]]


def hold(model_name: str, num_experts: int, how: str) -> None:
    """What `memory_after` runs: make the experts; print the resident set, and tensors plus Python objects."""
    base = load_base(model_name, dtype=torch.float32)
    tracemalloc.start()
    model = DyLoRAMoE.from_base(base, num_experts=num_experts if how == "at once" else 1, lora=lora_config())
    while len(model.experts) < num_experts:
        model.add_expert(f"more_{len(model.experts)}")
    gc.collect()
    objects = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    storages = {
        storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, model.parameters())
    }
    print(resident_bytes(), sum(storages.values()) + objects)


@torch.no_grad()
def decode(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """CPU seconds per decoded token, batch 1, cached."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:1, :PROMPT], past_key_values=cache, use_cache=True)
    start = time.process_time()
    for position in range(PROMPT, PROMPT + TOKENS):
        model(input_ids=ids[:1, position : position + 1], past_key_values=cache, use_cache=True)
    return (time.process_time() - start) / TOKENS


@torch.no_grad()
def unpack(model: DyLoRAMoE) -> None:
    """Give every matrix memory of its own."""
    for expert in model.experts:
        for parameter in model.experts.parameters(expert.name):
            parameter.data = parameter.data.clone()


def with_cached_stacks(work: Callable[[], float]) -> float:
    """Run `work` with `torch.cat` of the same matrices answered from memory after its first call."""
    kept: dict[tuple[int, ...], torch.Tensor] = {}
    original = mixture.stacked

    def remembered(matrices: list[torch.Tensor]) -> torch.Tensor:
        key = tuple(matrix.data_ptr() for matrix in matrices)
        if key not in kept:
            kept[key] = torch.cat(matrices)
        return kept[key]

    mixture.stacked = remembered
    try:
        work()
        return work()
    finally:
        mixture.stacked = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hold", nargs=2, metavar=("N", "HOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        return hold(arguments.model, int(arguments.hold[0]), arguments.hold[1])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids = real_text(arguments.model)
    base = load_base(arguments.model, dtype=torch.float32).eval()
    model = DyLoRAMoE.from_base(load_base(arguments.model, dtype=torch.float32), num_experts=1, lora=lora_config())
    print("| experts | packed | cat | cached |")
    print("|---|---|---|---|")
    for target in arguments.num_experts:
        while len(model.experts) < target:
            model.add_expert(f"more_{len(model.experts)}")
        randomise(model).eval()
        ratios: dict[str, list[float]] = {"packed": [], "cat": [], "cached": []}
        for round_index in range(arguments.rounds + 1):
            plain = decode(base, ids)
            model.experts.pack()
            found = {"packed": decode(model, ids)}
            unpack(model)
            found["cat"] = decode(model, ids)
            found["cached"] = with_cached_stacks(lambda: decode(model, ids))
            model.experts.pack()
            if round_index > 0:
                for name, seconds in found.items():
                    ratios[name].append(seconds / plain)
        cells = [f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})" for values in ratios.values()]
        print(f"| {target}, all mixed | " + " | ".join(cells) + " |", flush=True)
    count = max(arguments.num_experts)
    matrices = model.experts[0].parameters * 4 / 1e6
    for how in ("at once", "one by one"):
        one, many = (memory_after(arguments.model, number, how) for number in (1, count))
        resident, held = ((after - before) / (count - 1) / 1e6 for before, after in zip(one, many, strict=True))
        print(
            f"memory per expert, {count} made {how}: matrices {matrices:.2f} MB; held (matrices and Python objects) "
            f"{held:.2f} MB, ratio {held / matrices:.3f}; resident {resident:.2f} MB, ratio {resident / matrices:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
