"""The tables of docs/sizes.md: what parts weigh, what one GPU holds, and what several GPUs send each other.

    python benchmarks/deployment/sizes.py [--tables parts checkpoints nodes]

Nothing is trained and no weights are read: parameters are counted, and the memory of a step is found, by the functions
that `dylora plan` calls (docs/plan.md). MB and GB are 10^6 and 10^9 bytes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from dylo_moe.commands.plan.memory_account import ADAM_STATES, MemoryAccount, components
from dylo_moe.commands.plan.outline import Outline, outline
from dylo_moe.commands.plan.per_process import base_share
from dylo_moe.commands.plan.step_activations import StepActivations
from dylo_moe.commands.plan.workload import Batch
from dylo_moe.commands.train.request import parse_train

BASES = (
    "HuggingFaceTB/SmolLM2-135M",
    "google/codegemma-2b",
    "mistralai/Mistral-7B-v0.1",
    "meta-llama/Meta-Llama-3-8B",
    "Qwen/Qwen2.5-14B",
)
NUM_EXPERTS = (4, 16, 64)
RANKS = (8, 16, 64)
GPUS_GB = (24, 40, 48, 80, 141)
FREE_SHARE = 0.1
"""Of a GPU's memory, left to the CUDA context, the kernels' workspaces and the allocator's rounding: a guess."""
BATCHES = (Batch(1, 512), Batch(8, 512), Batch(8, 2048), Batch(1, 8192))
USUAL = Batch(8, 512)
SKILL_ROWS = 512
"""That a stream looks at before it learns a skill: the default of --skill_examples."""
FOLLOWED_EXPERTS, FOLLOWED_RANK = 4, 16
"""Of the model whose step is followed. Each token visits one expert, so that more of them take hardly more."""
FP32, BF16 = 4, 2
TRAINED = FP32 * (2 + ADAM_STATES)
"""Bytes for each trained number: itself, its gradient, AdamW's states."""
NF4 = 1 / 2 + 1 / 64 + FP32 / (64 * 256)
"""Bytes of a weight in 4 bits: itself, a byte for each block of 64, and an fp32 number for 256 of those bytes."""
MB, GB = 1e6, 1e9


class Shape(NamedTuple):
    """What of a base the sizes follow from; numbers, not bytes."""

    parameters: int
    linears: int
    """Of these, in linears that `load_in_4bit` packs: all but the output head."""
    largest_linear: int
    layer: int
    """One decoder layer."""
    num_layers: int
    hidden: int
    """Width of what the router reads."""
    expert: int
    """One expert of rank 1 on all linears."""
    router_row: int
    """What one expert adds to the router."""
    widest: int
    """The largest width of a linear, in or out."""


def outlined(name: str, *more: str) -> Outline:
    """The model of `dylora train --bf16 true`.

    Args:
        more: flags.
    """
    return outline(parse_train(["--model", name, "--bf16", "true", "--use_cpu", "true", *more]))


@cache
def shape(name: str) -> Shape:
    """Counted on the model."""
    of = outlined(name, "--num_experts", "2", "--lora_r", "1")
    base, one, router = components(of)
    weights = {key: item for key, item in of.whole.base.named_parameters() if ".lora_" not in key}
    packed = [item for key, item in weights.items() if key.endswith(".base_layer.weight")]
    return Shape(
        parameters=base.parameters,
        linears=sum(item.numel() for item in packed),
        largest_linear=max(item.numel() for item in packed),
        layer=sum(item.numel() for key, item in weights.items() if ".layers.0." in key),
        num_layers=of.whole.base.config.num_hidden_layers,
        hidden=of.whole.router.hidden_size,
        expert=one.parameters,
        router_row=router.parameters // 2,
        widest=max(max(item.shape) for item in packed),
    )


@cache
def step(name: str, checkpointing: bool) -> MemoryAccount:
    """A step with a few experts, all training."""
    more = ("--gradient_checkpointing", "true") if checkpointing else ()
    pool = ("--num_experts", str(FOLLOWED_EXPERTS), "--lora_r", str(FOLLOWED_RANK))
    return MemoryAccount(outlined(name, *pool, *more), device="cuda")


@cache
def activations(name: str, batch: Batch, checkpointing: bool) -> StepActivations:
    """What it computes."""
    return step(name, checkpointing).training(batch, checkpointing=checkpointing)


def base_bytes(of: Shape, *, four_bit: bool = False) -> float:
    """The base's weights in bf16, or its linears in 4 bits and the largest of them unpacked beside."""
    if not four_bit:
        return BF16 * of.parameters
    return BF16 * (of.parameters - of.linears + of.largest_linear) + NF4 * of.linears


def peak_bytes(name: str, num_trained: int, rank: int, batch: Batch, checkpointing: bool, **more: int | bool) -> float:
    """The peak of a run on a GPU: of a step, or of a look at new data in a stream, which holds its features twice.

    A joint run starts its router before the model goes to the GPU.

    Args:
        more: `num_frozen` experts beside those that train; `four_bit`, of the base.
    """
    of, seen = shape(name), activations(name, batch, checkpointing)
    trained = num_trained * (rank * of.expert + of.router_row)
    frozen = int(more.get("num_frozen", 0)) * (rank * of.expert + of.router_row)
    held = base_bytes(of, four_bit=bool(more.get("four_bit"))) + FP32 * (frozen + trained)
    states = FP32 * ADAM_STATES * trained
    # A product with the experts' matrices casts and stacks those of one linear.
    stacked = 2 * BF16 * of.widest * max(num_trained * rank - FOLLOWED_EXPERTS * FOLLOWED_RANK, 0)
    features = 2 * FP32 * of.hidden * SKILL_ROWS * batch.seq if "num_frozen" in more else 0
    return held + max(states + stacked + max(seen.forward, FP32 * trained + seen.backward), features)


def most(fits: Callable[[int], bool]) -> int:
    """The largest number, from 0 on, for which it holds."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# The tables.


def row(*cells: str) -> str:
    """A line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def head(*titles: str) -> list[str]:
    """The first two lines of one."""
    return [row(*titles), "|" + "---|" * len(titles)]


def short(name: str) -> str:
    """A model's name without its owner's."""
    return name.rpartition("/")[2]


def parts() -> Iterator[str]:
    """What base and experts weigh."""
    yield from head("base", "parameters", "bf16, MB", "4 bits, MB", "expert of rank 16", "frozen, MB", "training, MB")
    for name in BASES:
        of = shape(name)
        four, expert = NF4 * of.linears + BF16 * (of.parameters - of.linears), 16 * of.expert
        sizes = (BF16 * of.parameters, four, FP32 * expert, TRAINED * expert)
        bf16, bits, frozen, training = (f"{size / MB:,.1f}" for size in sizes)
        yield row(short(name), f"{of.parameters:,}", bf16, bits, f"{expert:,}", frozen, training)


def checkpoints() -> Iterator[str]:
    """What lies on the disk."""
    yield from head(
        "base, rank 16", *(f"{count} experts, MB" for count in NUM_EXPERTS), *(f"{n} + optimizer" for n in NUM_EXPERTS)
    )
    for name in BASES:
        expert = FP32 * 16 * shape(name).expert / MB
        final = [f"{count * expert:,.0f}" for count in NUM_EXPERTS]
        whole = [f"{(1 + ADAM_STATES) * count * expert:,.0f}" for count in NUM_EXPERTS]
        yield row(short(name), *final, *whole)


def batches() -> Iterator[str]:
    """What a step computes and keeps, without and with gradient checkpointing."""
    yield from head("base", *(f"{batch.rows} x {batch.seq}" for batch in BATCHES))
    for name in BASES:
        cells = []
        for batch in BATCHES:
            pair = (max(activations(name, batch, checkpointing)) / GB for checkpointing in (False, True))
            cells.append(" / ".join(f"{size:,.1f}" for size in pair))
        yield row(short(name), *cells)


def training() -> Iterator[str]:
    """The peak of joint training, and the smallest GPU for it."""
    titles = [f"{count} of rank {rank}" for rank in RANKS[1:] for count in NUM_EXPERTS]
    yield from head("base", *titles)
    for name in BASES:
        yield row(short(name), *(peak_cell(name, count, rank) for rank in RANKS[1:] for count in NUM_EXPERTS))


def peak_cell(name: str, num_experts: int, rank: int) -> str:
    """Peak in GB without and with gradient checkpointing, and the GPU for each."""
    sizes = [peak_bytes(name, num_experts, rank, USUAL, checkpointing) for checkpointing in (False, True)]
    return " / ".join(f"{size / GB:,.1f} ({card(size)})" for size in sizes)


def card(num_bytes: float) -> str:
    """The smallest GPU that holds so much."""
    return next((str(size) for size in GPUS_GB if num_bytes <= (1 - FREE_SHARE) * size * GB), "none")


def one_gpu() -> Iterator[str]:
    """The largest pools: all training, and one training beside frozen ones; base in bf16 and in 4 bits."""
    yield from head("base", "", *(f"{size} GB" for size in GPUS_GB))
    for name in BASES:
        for four_bit in (False, True):
            cells = [pools(name, size * GB, four_bit) for size in GPUS_GB]
            yield row(short(name), "4 bits" if four_bit else "bf16", *cells)


def pools(name: str, gpu_bytes: float, four_bit: bool) -> str:
    """Most experts of rank 16 that train together, and most that are frozen while one trains."""
    room = (1 - FREE_SHARE) * gpu_bytes
    joint = most(lambda n: peak_bytes(name, n, 16, USUAL, True, four_bit=four_bit) <= room)
    if not joint:
        return "none"
    frozen = most(lambda n: peak_bytes(name, 1, 16, USUAL, True, num_frozen=n, four_bit=four_bit) <= room)
    return f"{joint:,} / {frozen:,}"


def nodes() -> Iterator[str]:
    """What each of several GPUs holds and sends in a step: DDP, and a base in parts."""
    yield from head(
        "base, 4 experts of rank 16",
        "GPUs",
        "gradients sent, MB",
        "base held, MB",
        "base held in parts, MB",
        "base gathered, MB a forward",
    )
    for name in BASES:
        of, base = shape(name), outlined(name).whole.base
        trained = 4 * (16 * of.expert + of.router_row)
        for count in (2, 8, 32):
            others, share = (count - 1) / count, base_share(base, count, reshard_after_forward=True)
            sizes = (
                2 * others * FP32 * trained,
                BF16 * of.parameters,
                share.kept + share.gathered,
                others * BF16 * of.parameters,
            )
            yield row(short(name), str(count), *(f"{size / MB:,.0f}" for size in sizes))


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "parts": parts,
    "checkpoints": checkpoints,
    "batches": batches,
    "training": training,
    "one_gpu": one_gpu,
    "nodes": nodes,
}


def main() -> None:
    """Print the tables that are asked for, all unless said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in parser.parse_args().tables:
        print(f"\n{name}\n", flush=True)
        for line in TABLES[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
