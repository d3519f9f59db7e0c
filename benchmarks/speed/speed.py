"""What routing costs by number of experts: forward, training step, cached generation, memory, against the plain base.

    python benchmarks/speed/speed.py [--num_experts 1 4 16 64 256] [--rounds 7] [--json speed.json] [--out speed.png]
    python benchmarks/speed/speed.py --device cuda --shape codegemma-2b --dtype bfloat16 --batch 8
        --seq 1024 --decode 1 8 64

One table on stdout, one chart, one JSON file with the seconds of every round; cost_chart.py puts together the parts of
a run that was split with --num_experts, --variants or --work. The base and a stock PEFT adapter stay in memory, and
every variant joins them in turn (peers.py builds it): each round runs all three on the same tokens, and a ratio is that
of one round. Seconds are CPU time of one thread; on a GPU, those between two events of the device. Adapters are on all
linears of all layers, rank 16, with random B. Up to 16 experts all train, of more the first one. Rounds are fewer, but
at least two, where they would take longer than --cell_seconds; where the first, a warm-up, does so alone, it counts.

Top-1 is measured as the router routes: started from other texts of this machine, on rows of two kinds. The worst case,
every token to an expert at random, is measured apart, at more and more tokens. On a shape tokens, weights and gate are
random. Memory is that of a fresh process for each: the bytes of all the model's tensors, and what a training step (the
second one) adds at its peak to the resident set, on a GPU to the memory allocated; one expert trains whatever N is, and
the bytes of frozen experts are taken off. While seconds are measured, freed memory is kept instead of going back to the
system, whose page faults cost the plain base up to 90 ms of a training step.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from cost_chart import MEMORY, RANDOM, Cell, chart, ratios, spread, table
from measured_work import (
    BATCH,
    NEW_TOKENS,
    PROMPT,
    SEQ,
    Work,
    forward,
    gate_text,
    generate,
    give_back,
    keep_memory,
    measure,
    memory_of_step,
    random_routes,
    real_text,
    training_step,
)
from peers import BASE, BUILD, DENSE, ONE, SPARSE, Pool, cannot, make_base, make_variant, remark
from torch import Tensor, nn

from dylo_moe import DyLoRAMoE

ALL_TRAIN = 16
"""Up to so many experts all train while a training step is timed."""
WORST_SHAPES = ((2, 128), (2, 512), (8, 512))


class Run:
    """What was asked for, and what was measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.dtype = getattr(torch, arguments.dtype)
        self.cells: list[Cell] = []
        self.started = time.monotonic()
        self.shape = f"{arguments.batch}x{arguments.seq}"
        self.ids = self.tokens(arguments.batch, arguments.seq)
        self.routed_to: dict[int, int] = {}
        """By N, how many experts the measured text goes to."""

    def tokens(self, batch: int, seq: int) -> Tensor:
        """The text that is measured."""
        arguments = self.arguments
        if arguments.shape is None:
            return real_text(arguments.model, batch, seq).to(arguments.device)
        return torch.randint(10, 1000, (batch, seq), generator=torch.Generator().manual_seed(0)).to(arguments.device)

    def build(self, variant: str, num_experts: int, num_trained: int) -> nn.Module:
        """A variant on a base of its own, its gate started."""
        arguments = self.arguments
        torch.manual_seed(0)
        base = make_base(arguments.model, shape=arguments.shape, device=arguments.device, dtype=self.dtype)
        model = make_variant(variant, base, Pool(num_experts, num_trained, arguments.lora_dropout))
        if isinstance(model, DyLoRAMoE):
            if arguments.shape is None:
                model.initialize_router(gate_text(arguments.model, max(64, 4 * num_experts)))
            if variant == SPARSE:
                self.routed_to[num_experts] = int((model.route(self.ids).weights > 0).flatten(0, 1).any(0).sum())
        return model

    def works(self) -> dict[str, tuple[str, Work]]:
        """By label: the kind of work, and how it is done."""
        found: dict[str, tuple[str, Work]] = {
            f"forward {self.shape}": ("forward", forward),
            f"training step {self.shape}": ("training", training_step),
        }
        for batch in self.arguments.decode:
            label = f"generate {NEW_TOKENS} from {PROMPT}, batch {batch}"
            found[label] = ("generate", partial(generate, batch=batch))
        return {label: entry for label, entry in found.items() if entry[0] in self.arguments.work}

    def note(self, cell: Cell, text: str) -> None:
        """Keep a cell and say so; what was measured before a run stopped is in its file."""
        self.cells.append(cell)
        minutes = (time.monotonic() - self.started) / 60
        what = f"{cell['variant']}, N {cell['num_experts']}, {cell['work']}"
        print(f"{minutes:6.1f} min  {what}: {text}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """The JSON file."""
        content = {"header": self.header(), "title": self.title(), "routed_to": self.routed_to}
        content |= {"arguments": {**vars(self.arguments), "out": None, "json": None}, "cells": self.cells}
        self.arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def title(self) -> str:
        """Of the chart."""
        arguments = self.arguments
        where = torch.cuda.get_device_name() if arguments.device == "cuda" else "one thread, CPU time"
        return f"{arguments.shape or arguments.model}, {arguments.dtype}, all linears, rank 16, {where}"

    def header(self) -> str:
        """What a reader of the table must know."""
        arguments = self.arguments
        text = "random weights, tokens and gate" if arguments.shape else "real text, rows of two kinds"
        texts = ", ".join(f"{chosen} of {count}" for count, chosen in sorted(self.routed_to.items()))
        return (
            f"{self.title()}, torch {torch.__version__}, transformers {transformers.__version__}; {text}; "
            f"lora_dropout {arguments.lora_dropout}; {arguments.rounds} rounds, fewer where one is long. "
            "Median (least–most)." + (f" Top-1 sends the {self.shape} tokens to {texts} experts." if texts else "")
        )

    # Memory

    def measure_memory(self) -> None:
        """Each variant in a process of its own."""
        rows = [(BASE, 1), (ONE, 1)]
        rows += [(variant, count) for count in self.arguments.num_experts for variant in self.arguments.variants]
        for variant, count in rows:
            cell: Cell = {"variant": variant, "num_experts": count, "work": MEMORY}
            cell["remark"] = cannot(variant, "memory") or remark(variant, "memory", Pool(count, 1, 0.0))
            if cannot(variant, "memory") is None:
                words = [sys.executable, __file__, *sys.argv[1:], "--hold", variant, str(count)]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode == 0:
                    cell["bytes"] = json.loads(done.stdout.splitlines()[-1])
                else:
                    cell["remark"] = self.failed(variant, done.stderr.strip().splitlines()[-1])
            self.note(cell, str(cell.get("bytes", cell["remark"])))

    def failed(self, variant: str, error: str) -> str:
        """What a cell says of a peer that broke off; what is a fault of ours is raised."""
        if "allocate memory" in error or "OutOfMemory" in error or "MemoryError" in error:
            return (
                f"not within {self.arguments.memory_gib:g} GiB" if self.arguments.device == "cpu" else "out of memory"
            )
        if variant in (DENSE, SPARSE, BASE, ONE) or not error.startswith(("RuntimeError", "ValueError")):
            raise RuntimeError(f"{variant}: {error}")
        return f"not done: {error[:120]}"

    # Time

    def measure_time(self) -> None:
        """Each variant and N beside the base and one adapter."""
        works = self.works()
        beside = {name: self.build(name, 1, 1) for name in (BASE, ONE)} if works else {}
        for count in self.arguments.num_experts if works else []:
            for variant in self.arguments.variants:
                self.time_variant(variant, count, works, beside)
                give_back()
        if "random" in self.arguments.work:
            self.time_worst(beside.get(BASE) or self.build(BASE, 1, 1))

    def time_variant(
        self, variant: str, count: int, works: dict[str, tuple[str, Work]], beside: dict[str, nn.Module]
    ) -> None:
        """One variant at one N, all kinds of work."""
        pool = Pool(count, count if count <= ALL_TRAIN else 1, self.arguments.lora_dropout)
        model: nn.Module | None = None
        for label, (kind, work) in works.items():
            cell: Cell = {"variant": variant, "num_experts": count, "work": label}
            cell["remark"] = cannot(variant, kind) or remark(variant, kind, pool)
            if cannot(variant, kind) is None:
                try:
                    model = model or self.build(variant, count, pool.num_trained)
                    models = {**beside, variant: model}
                    cell["seconds"] = measure(
                        models, work, self.ids, self.arguments.rounds, self.arguments.cell_seconds
                    )
                except (RuntimeError, MemoryError) as error:
                    cell["remark"] = self.failed(variant, f"{type(error).__name__}: {error}")
                    for each in (*beside.values(), *([model] if model else [])):
                        each.zero_grad(set_to_none=True)
            self.note(cell, spread(ratios(cell, BASE)) if "seconds" in cell else cell["remark"])

    def time_worst(self, base: nn.Module) -> None:
        """Every token to an expert at random, at more and more tokens."""
        count = self.arguments.worst_experts
        model = self.build(SPARSE, count, 1)
        assert isinstance(model, DyLoRAMoE)
        for batch, seq in WORST_SHAPES:
            cell: Cell = {"variant": SPARSE, "num_experts": count, "work": f"{RANDOM} {batch}x{seq}", "remark": ""}
            ids, rounds = self.tokens(batch, seq), self.arguments.rounds
            with random_routes(model):
                cell["seconds"] = measure(
                    {BASE: base, SPARSE: model}, forward, ids, rounds, self.arguments.cell_seconds
                )
            self.note(cell, spread(ratios(cell, BASE)))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["memory", "forward", "training", "generate", "random"]
    variants = [name for name in BUILD if name not in (BASE, ONE)]
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=["codegemma-2b", "tiny"], help="random weights of this shape, not a model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of base and adapters")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seq", type=int, default=SEQ)
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--worst_experts", type=int, default=64, help="N of the worst case")
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument("--work", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="0 leaves out masks, which cost all the same")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cell_seconds", type=float, default=120.0)
    parser.add_argument("--memory_gib", type=float, default=12.0, help="what one process may allocate, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("speed.png"))
    parser.add_argument("--json", type=Path, default=Path("speed.json"))
    parser.add_argument("--hold", nargs=2, metavar=("VARIANT", "N"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (int(arguments.memory_gib * 2**30), resource.RLIM_INFINITY))
    run = Run(arguments)
    if arguments.hold:
        variant, count = arguments.hold
        print(json.dumps(memory_of_step(run.build(variant, int(count), 1), run.ids)))
        return
    if "memory" in arguments.work:
        run.measure_memory()
    keep_memory()
    run.measure_time()
    run.write()
    print(f"{run.header()}\n\n{table(run.cells)}")
    chart(run.cells, arguments.out, title=run.title())


if __name__ == "__main__":
    main()
