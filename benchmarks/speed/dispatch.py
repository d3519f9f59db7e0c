"""Dense or grouped: what both forms of one routed linear cost over many shapes, and how well the rule chooses.

    python benchmarks/speed/dispatch.py [--device cpu] [--rounds 15] [--rank 16]

For each shape both forms do the same work in turns in one process, one thread: forward without gradients, and forward
with backward (all experts at hand learn). Wall time, median; device events on a GPU. The tokens are spread evenly over
the experts at hand, in random order, top-1. The last lines fit the two constants of `dispatch.dense_is_quicker` to the
measurements, and say what its choices cost over the better form of each shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dylo_moe.experts.layer import RoutedLinear
from dylo_moe.experts.memory_layout import pack
from dylo_moe.routing import dispatch as rule
from dylo_moe.routing.forward_context import ContextSlot, ForwardContext
from dylo_moe.routing.router import Routing, make_dispatch

WIDTHS = ((576, 576), (576, 1536), (2048, 2048))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
EXPERTS = (2, 3, 4, 6, 8, 16, 32, 64)


class Case(NamedTuple):
    """One shape and what it cost, in microseconds."""

    width: tuple[int, int]
    tokens: int
    experts: int
    learns: bool
    dense: float
    grouped: float


def routed_linear(width: tuple[int, int], *, num_experts: int, rank: int, device: str) -> RoutedLinear:
    """A packed routed linear with random experts."""
    holder = nn.ModuleDict({"linear": nn.Linear(*width, bias=False, device=device)})
    names = [f"expert_{index}" for index in range(num_experts)]
    for name in names:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=["linear"])
        inject_adapter_in_model(config, holder, adapter_name=name)
    routed = holder["linear"]
    routed.__class__ = RoutedLinear
    routed.base_layer.requires_grad_(False)
    for name in names:
        nn.init.normal_(routed.lora_B[name].weight, std=0.01)
        routed.lora_A[name].requires_grad_(True)
        routed.lora_B[name].requires_grad_(True)
    routed.bind(ContextSlot(), names)
    pack(routed)
    return routed


def runner(routed: RoutedLinear, x: Tensor, *, dense: bool, learns: bool) -> Callable[[], None]:
    """One call of the linear by one of the two forms."""
    names = tuple(routed.adapters)
    tokens = x.shape[1]
    generator = torch.Generator().manual_seed(tokens)
    selected = (torch.arange(tokens) % len(names))[torch.randperm(tokens, generator=generator)].to(x.device)
    weights = nn.functional.one_hot(selected, len(names)).float()[None].requires_grad_(learns)
    routing = Routing(names, weights, torch.ones(1, tokens, dtype=torch.bool, device=x.device), None)
    context, chosen = ForwardContext(), rule.dense_is_quicker
    context.num_tokens = tokens
    rule.dense_is_quicker = lambda **shapes: dense  # type: ignore[assignment]
    try:
        context.dispatch = make_dispatch(routing, selected[None, :, None], layouts=[routed.layout], dtype=x.dtype)
    finally:
        rule.dense_is_quicker = chosen
    leaves = [x, *(p for p in routed.parameters() if p.requires_grad)]

    def run() -> None:
        routed.context_slot.enter(context)
        with torch.set_grad_enabled(learns):
            y = routed(x)
        routed.context_slot.end()
        if learns:
            torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True, retain_graph=True)

    return run


def microseconds(run: Callable[[], None], *, device: str) -> float:
    """Of one call."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3


def measured(arguments: argparse.Namespace) -> Iterator[Case]:
    """Every shape, both ways, in turns."""
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    for width in WIDTHS:
        for experts in EXPERTS:
            routed = routed_linear(width, num_experts=experts, rank=arguments.rank, device=arguments.device).to(dtype)
            pack(routed)
            for tokens in [number for number in TOKENS if number >= experts]:
                x = torch.randn(1, tokens, width[0], device=arguments.device, dtype=dtype)
                for learns in (False, True):
                    x.requires_grad_(learns)
                    runs = {dense: runner(routed, x, dense=dense, learns=learns) for dense in (True, False)}
                    times: dict[bool, list[float]] = {True: [], False: []}
                    for _ in range(arguments.rounds + 2):
                        for dense, run in runs.items():
                            times[dense].append(microseconds(run, device=arguments.device))
                    dense_us, grouped_us = (statistics.median(times[form][2:]) for form in (True, False))
                    yield Case(width, tokens, experts, learns, dense_us, grouped_us)


def regret(cases: list[Case], *, fixed: float, each: float) -> list[float]:
    """What the rule's choice costs over the better form, as a share, for each case."""
    lost = []
    for case in cases:
        wasted = case.tokens * (case.experts - 1)
        taken = case.dense if wasted <= fixed + each * case.experts else case.grouped
        lost.append(taken / min(case.dense, case.grouped) - 1)
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = []
    print("| linear | tokens | experts at hand | forward: dense, us | grouped, us | with backward: dense | grouped |")
    print("|---|---|---|---|---|---|---|")
    for case in measured(arguments):
        cases.append(case)
        if not case.learns:
            continue
        plain = cases[-2]
        print(
            f"| {case.width[0]}x{case.width[1]} | {case.tokens} | {case.experts} | {plain.dense:.0f} | "
            f"{plain.grouped:.0f} | {case.dense:.0f} | {case.grouped:.0f} |",
            flush=True,
        )
    candidates = [(fixed, each) for fixed in range(0, 520, 8) for each in range(0, 64, 2)]
    fixed, each = min(candidates, key=lambda pair: statistics.mean(regret(cases, fixed=pair[0], each=pair[1])))
    for label, pair in (
        ("fitted", (fixed, each)),
        ("dispatch.py", (rule.GROUPING_TOKENS, rule.GROUP_TOKENS)),
        ("always dense", (1e9, 0)),
        ("always grouped", (-1, 0)),
    ):
        lost = regret(cases, fixed=pair[0], each=pair[1])
        print(f"{label} {pair}: {statistics.mean(lost):.1%} over the better form on average, {max(lost):.0%} at most")


if __name__ == "__main__":
    main()
