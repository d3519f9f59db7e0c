"""What a change of skill costs in a conversation: one cache for all experts, beside a cache for each adapter.

    python benchmarks/speed/one_cache.py

A conversation shares a context of 1,000 tokens and has eight turns, each of another skill. Three serve it in turns, in
one process: ours with granularity "response", whose prompts the base reads, so that one cache serves every expert; one
stock PEFT adapter a turn, which keeps a cache of its own and has to read what the others read and wrote; and the base
alone. What a turn adds is one forward to its first new token, and what answers hold is given, so that all read the
same tokens. Experts are random and far from zero: what they say is of no use, and what they cost is the same. The gate,
which learned nothing either, is told each turn whom to choose, and decides as ever.

A ratio is that of one repeat, and its median (least to most) is shown. Seconds are CPU time of one thread. Then the
prefill of the context alone is measured, ours over the base's, likewise. Nothing is written; the table is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from measured_work import give_back, keep_memory, seconds_of
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.data.sources.machine_text import read_machine_text
from dylo_moe.routing.cache import find_router_layer

OURS, ADAPTERS, BASE = "ours, one cache", "one PEFT adapter a turn", "the base"
KINDS = ("english_reference", "python_functions", "cpp_headers", "cmake")


class Turn(NamedTuple):
    """What one turn adds to a conversation."""

    prompt: Tensor
    """int64 [1, tokens]: the message, and the header of its answer."""
    answer: Tensor
    """int64 [1, tokens]: the answer and its end."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="whose template writes <|im_start|> and <|im_end|>")
    parser.add_argument("--data", help="a folder of tasks with train.jsonl (prompt, answer); default: machine text")
    parser.add_argument("--context", type=int, default=1000, help="tokens that all turns share")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--skills", type=int, default=8, help="experts, one a turn; fewer come again and again")
    parser.add_argument("--message", type=int, default=32, help="tokens of a message")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


# The conversation


def texts(data: str | None) -> list[list[tuple[str, str]]]:
    """Pairs of a message and its answer, of each kind of text."""
    if data is None:
        passages = [[passage.response for passage in read_machine_text(kind)[0]] for kind in KINDS]
        return [list(zip(kind[::2], kind[1::2], strict=False)) for kind in passages]
    found = []
    for file in sorted(Path(data).glob("*/train.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found.append([(line["prompt"], line["answer"]) for line in lines])
    return found


def conversation(arguments: argparse.Namespace) -> list[Turn]:
    """The turns of a conversation of real text, each of another kind than the one before; the first has the context."""
    tokenizer, kinds = load_tokenizer(arguments.model), texts(arguments.data)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    asks, answers, closes = ids("<|im_start|>user\n"), ids("<|im_start|>assistant\n"), ids("<|im_end|>")
    shared = ids("\n\n".join(message for message, _ in kinds[0][-60:]))[: arguments.context]
    assert len(shared) == arguments.context, "the data has too little text for the context"
    turns = []
    for index in range(arguments.turns):
        pairs = kinds[index % len(kinds)]
        message, answer = (ids(" ".join(part)) for part in zip(*pairs[index * 9 : index * 9 + 9], strict=True))
        prompt = [*asks, *(shared if index == 0 else []), *message[: arguments.message], *closes, *ids("\n"), *answers]
        parts = (prompt, [*answer[: arguments.answer], *closes])
        turns.append(Turn(*(torch.tensor([part], device=arguments.device) for part in parts)))
    return turns


# Who serves it


def read(model: nn.Module, ids: Tensor, cache: Cache) -> None:
    """One forward to the token behind `ids`; the cache holds them then."""
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


class Served:
    """A model, and the caches that a conversation leaves with it."""

    def __init__(self, model: nn.Module, choose: Callable[[int], str] | None = None) -> None:
        self.model = model
        self.choose = choose
        """Makes the model answer with the expert of a turn; returns whose cache it uses. None: all share one."""
        self.caches: dict[str, DynamicCache] = {}
        self.num_prefilled: list[int] = []
        """The tokens that each turn read before its first new one."""

    def turn(self, index: int, turns: list[Turn]) -> float:
        """Serve one turn; returns the seconds to its first new token."""
        owner = self.choose(index) if self.choose else BASE
        cache = self.caches.setdefault(owner, DynamicCache(config=self.model.config))
        whole = torch.cat([part for turn in turns[:index] for part in turn] + [turns[index].prompt], 1)
        new = whole[:, cache.get_seq_length() :]
        self.num_prefilled.append(new.shape[1])
        seconds = seconds_of(lambda model, ids: read(model, ids, cache), self.model, new)
        read(self.model, turns[index].answer, cache)
        return seconds

    def num_bytes(self) -> int:
        """Of all keys and values, and of what the router remembers."""
        total = 0
        for cache in self.caches.values():
            held = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
            memory = find_router_layer(cache)
            if memory is not None and memory.state is not None:
                memory.state.each(held.append)
            total += sum(part.nbytes for part in held)
        return total


def build(arguments: argparse.Namespace) -> tuple[DyLoRAMoE, PeftModel, nn.Module]:
    """Ours, stock PEFT with the same experts as plain adapters, and the base, each on weights of its own."""
    names = [f"expert_{index}" for index in range(arguments.skills)]
    lora = LoraConfig(r=arguments.rank, lora_alpha=4 * arguments.rank, lora_dropout=0.0, target_modules="all-linear")
    torch.manual_seed(0)
    base = [load_base(arguments.model, dtype=torch.float32) for _ in range(3)]
    router = RouterConfig(granularity="response")
    ours = DyLoRAMoE.from_base(base[0], num_experts=len(names), names=names, lora=lora, router=router)
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(f"{folder}/ours")
        stock = None
        for name in names:
            path = Path(folder, "ours", "experts", name)
            config = LoraConfig.from_pretrained(str(path))
            config.alora_invocation_tokens = None  # as an adapter that was trained in the ordinary way
            if stock is None:
                stock = PeftModel.from_pretrained(base[1], str(path), adapter_name=name, config=config)
            else:
                config.save_pretrained(str(path))
                stock.load_adapter(str(path), name)
    assert stock is not None
    models = (ours, stock, base[2])
    return tuple(model.to(arguments.device).eval().requires_grad_(False) for model in models)  # type: ignore[return-value]


def choosing(model: DyLoRAMoE, skills: int) -> Callable[[int], str]:
    """The gate prefers the turn's expert, and decides by itself; all share one cache."""

    def choose(index: int) -> str:
        for place, name in enumerate(model.router.names):
            model.router.gate_bias[name].data.fill_(1e4 if place == index % skills else 0.0)
        return BASE

    return choose


def switching(model: PeftModel, skills: int) -> Callable[[int], str]:
    """The turn's adapter becomes the active one, and goes on from its own cache."""

    def choose(index: int) -> str:
        name = f"expert_{index % skills}"
        model.set_adapter(name)
        return name

    return choose


# The figures


def spread(values: list[float]) -> str:
    """The median (least to most)."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def prefills(ours: nn.Module, base: nn.Module, ids: Tensor, repeats: int) -> list[float]:
    """The seconds of a prefill, ours over the base's."""
    ratios = []
    for place in range(2 * repeats + 1):
        taken = {}
        for model in (ours, base)[:: (-1) ** place]:
            cache = DynamicCache(config=base.config)
            taken[model] = seconds_of(lambda model, ids, cache=cache: read(model, ids, cache), model, ids)
        ratios.append(taken[ours] / taken[base])
    return ratios[1:]  # the first one warms up


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    keep_memory()
    turns = conversation(arguments)
    ours, stock, base = build(arguments)
    chooses = {OURS: (ours, choosing(ours, arguments.skills)), ADAPTERS: (stock, switching(stock, arguments.skills))}
    seconds: dict[str, list[list[float]]] = {name: [] for name in (*chooses, BASE)}
    for _ in range(arguments.repeats):
        served = {name: Served(*given) for name, given in chooses.items()} | {BASE: Served(base)}
        for found in seconds.values():
            found.append([])
        for index in range(len(turns)):
            order = list(served)[index % 3 :] + list(served)[: index % 3]
            for name in order:
                seconds[name][-1].append(served[name].turn(index, turns))
        give_back()
        print(
            *(f"{name}: {values[-1][-1]:.3f} s at the last turn" for name, values in seconds.items()),
            sep=", ",
            flush=True,
        )
    whole = sum(part.shape[1] for turn in turns for part in turn)
    print(
        f"\n{arguments.model}, {arguments.skills} experts of rank {arguments.rank}, fp32, {arguments.device}, "
        f"a context of {arguments.context} tokens, {len(turns)} turns, {whole} tokens in all, "
        f"{arguments.repeats} repeats\n"
    )
    new = served[BASE].num_prefilled
    print(
        "| | tokens prefilled | of them again | bytes of caches "
        "| seconds to the first token, turn 1 | turn 2 | last turn |"
    )
    for name, each in served.items():
        at = [statistics.median(values[turn] for values in seconds[name]) for turn in (0, 1, -1)]
        again = sum(each.num_prefilled) - sum(new)
        times = " | ".join(f"{value:.3f}" for value in at)
        print(f"| {name} | {sum(each.num_prefilled):,} | {again:,} | {each.num_bytes():,} | {times} |")
    for name in (ADAPTERS, BASE):
        for turn, called in (
            (0, "first"),
            (-1, "last"),
            *(((slice(1, None), "second to last"),) if name == BASE else ()),
        ):
            cut = turn if isinstance(turn, slice) else slice(turn, turn + 1 or None)
            pairs = zip(seconds[OURS], seconds[name], strict=True)
            ratios = [
                ours_ / other for mine, theirs in pairs for ours_, other in zip(mine[cut], theirs[cut], strict=True)
            ]
            print(f"to the first token of the {called} turn, ours over {name}: {spread(ratios)}")
    context = turns[0].prompt[:, : arguments.context]
    print(f"prefill of the context, ours over the base: {spread(prefills(ours, base, context, arguments.repeats))}")


if __name__ == "__main__":
    main()
