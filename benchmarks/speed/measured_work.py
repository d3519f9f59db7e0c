"""What is measured: the text, the kinds of work on it, their seconds and their memory."""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import itertools
import math
import pydoc
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peers import is_adapter
from torch import Tensor, nn

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_tokenizer
from dylo_moe.data.sources.machine_text import READERS

BATCH, SEQ = 2, 128
PROMPT, NEW_TOKENS = 32, 16
GATE_TOKENS = 64
KEPT_MEMORY = ((-1, -1), (-4, 0))
"""For `mallopt`: M_TRIM_THRESHOLD off, and M_MMAP_MAX 0, so that what is freed is reused with its pages in place."""

Work = Callable[[nn.Module, Tensor], object]


# The tokens


def real_text(model_name: str, batch: int = BATCH, seq: int = SEQ) -> Tensor:
    """[batch, seq] tokens: one half of the rows Python source and one English prose, so that routing has a choice."""
    tokenizer = load_tokenizer(model_name)
    kinds = [inspect.getsource(textwrap) + inspect.getsource(argparse), pydoc.getdoc(argparse) * 20]
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in kinds]
    rows = -(-batch // 2)
    return torch.cat([torch.tensor(kind[: rows * seq]).view(rows, seq) for kind in ids])[:batch]


def gate_text(model_name: str, count: int) -> list[dict[str, Tensor]]:
    """Other texts of 64 tokens, of four kinds in turn, to start the gate from."""
    tokenizer = load_tokenizer(model_name)
    kinds = []
    for read in READERS.values():
        text = "\n".join(p.response for p in read() if p.document not in ("textwrap.py", "argparse.py"))
        ids = tokenizer(text[: count * 400], add_special_tokens=False, verbose=False)["input_ids"]
        kinds.append(torch.tensor(ids[: len(ids) // GATE_TOKENS * GATE_TOKENS]).view(-1, GATE_TOKENS))
    rows = list(itertools.islice((row for turn in zip(*kinds, strict=False) for row in turn), count))
    if len(rows) < count:
        raise SystemExit(f"this machine has only {len(rows)} of {count} texts to start the gate from")
    return [{"input_ids": torch.stack(rows[start : start + 32])} for start in range(0, count, 32)]


# What is measured


def forward(model: nn.Module, ids: Tensor) -> None:
    """One forward in evaluation, logits of every token."""
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)


def training_step(model: nn.Module, ids: Tensor) -> None:
    """Forward with loss and backward; the plain base differentiates its activations only."""
    model.train()
    if any(parameter.requires_grad for parameter in model.parameters()):
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)
    else:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()


def generate(model: nn.Module, ids: Tensor, *, batch: int = 1) -> None:
    """Greedy, cached where the model can: 16 tokens from each of `batch` pieces of the text, of both kinds."""
    model.eval()
    pieces = ids.reshape(-1, PROMPT)
    prompt = pieces[torch.linspace(0, len(pieces) - 1, batch).long().to(ids.device)]
    mask = torch.ones_like(prompt)
    tokens = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    model.generate(input_ids=prompt, attention_mask=mask, do_sample=False, **tokens)


def seconds_of(work: Work, model: nn.Module, ids: Tensor) -> float:
    """CPU seconds; on a GPU, the device's own between the first and the last of its events."""
    if ids.device.type != "cuda":
        start = time.process_time()
        work(model, ids)
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    work(model, ids)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(
    variants: dict[str, nn.Module], work: Work, ids: Tensor, rounds: int, budget_seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; every round runs all variants in turn, and a first one warms up.

    Args:
        budget_seconds: rounds are fewer, but at least two, where they would take longer than this; where the first
            one does alone, it is the only one.
    """
    warm = {name: seconds_of(work, model, ids) for name, model in variants.items()}
    if sum(warm.values()) > budget_seconds:
        return {name: [value] for name, value in warm.items()}
    rounds = max(2, int(min(rounds, budget_seconds / sum(warm.values()))))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, model in variants.items():
            seconds[name].append(seconds_of(work, model, ids))
    return seconds


def memory_of_step(model: nn.Module, ids: Tensor) -> dict[str, int]:
    """Bytes: of all tensors of the model, of those of frozen adapters among them, and what a training step adds."""
    training_step(model, ids)
    tensors = itertools.chain(model.parameters(), model.buffers())
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)}
    frozen = sum(p.nbytes for path, p in model.named_parameters() if is_adapter(path) and not p.requires_grad)
    give_back()
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training_step(model, ids)
        step = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
        before = resident("VmRSS")
        training_step(model, ids)
        step = resident("VmHWM") - before
    return {"tensors": sum(storages.values()), "frozen": frozen, "step": step}


def resident(which: str) -> int:
    """Bytes, from Linux's own account of this process."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def give_back() -> None:
    """Free what nothing holds any more, back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def keep_memory() -> None:
    """From here on this process keeps what it frees (Linux)."""
    if sys.platform == "linux":
        for option, value in KEPT_MEMORY:
            ctypes.CDLL(None).mallopt(option, value)


@contextmanager
def random_routes(model: DyLoRAMoE) -> Iterator[None]:
    """Inside, every token goes to an expert at random, whatever the gate says."""
    routed = model.router.forward
    generator = torch.Generator().manual_seed(0)

    def scattered(features: Tensor, **given: Any) -> tuple[Any, Tensor]:
        routing, _ = routed(features, **given)
        shape = routing.weights.shape
        selected = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator).to(routing.weights.device)
        weights = torch.zeros_like(routing.weights).scatter(-1, selected, 1.0) * routing.mask[..., None]
        return routing._replace(weights=weights), selected

    model.router.forward = scattered
    try:
        yield
    finally:
        del model.router.forward
