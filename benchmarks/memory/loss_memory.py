"""What the loss of a large vocabulary takes: all logits at once, as Transformers does it, against chunks.

    python benchmarks/memory/loss_memory.py [--hidden 2048] [--vocab 256000] [--tokens 1024] [--chunks 32 64 128 256]
                                     [--dtypes bfloat16 float32] [--rounds 3] [--device cpu]

Loss and backward through the output head alone, at CodeGemma-2B's sizes, the head frozen, every token predicted.
Peak memory is what a fresh process holds at most beyond what it held before the step: on the CPU its resident set
(the high-water mark is reset through /proc/self/clear_refs), on a GPU what PyTorch's allocator gave out. Time is CPU
time on one thread in a process that takes all variants in turns (device time on a GPU), the median of the rounds with
their range. Each variant runs once before anything is measured. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from dylo_moe.model.loss import chunked_loss

MB = 1e6


class Case:
    """A head, hidden states and labels, and the step on them."""

    def __init__(self, args: argparse.Namespace, dtype: str) -> None:
        kind, device = getattr(torch, dtype), torch.device(args.device)
        torch.manual_seed(0)
        self.head = nn.Linear(args.hidden, args.vocab, bias=False, device=device, dtype=kind).requires_grad_(False)
        self.hidden = torch.randn(1, args.tokens, args.hidden, device=device, dtype=kind).requires_grad_()
        self.labels = torch.randint(0, args.vocab, (1, args.tokens), device=device)

    def step(self, chunk: int | None) -> tuple[float, Tensor]:
        """Loss and gradient; `chunk` None: all logits."""
        self.hidden.grad = None
        count = torch.tensor(self.labels.shape[1] - 1, device=self.labels.device)
        if chunk is None:
            vocab = self.head.out_features
            loss = ForCausalLMLoss(self.head(self.hidden), self.labels, vocab, num_items_in_batch=count)
        else:
            loss = chunked_loss(self.hidden, self.head, self.labels, chunk_size=chunk).trained.sum() / count
        loss.backward()
        assert self.hidden.grad is not None
        return float(loss), self.hidden.grad


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak(args: argparse.Namespace, dtype: str, chunk: int | None) -> int:
    """Bytes of one step over what is there before; in this process, which should be fresh."""
    case = Case(args, dtype)
    small = argparse.Namespace(**{**vars(args), "tokens": 8, "vocab": 1000, "hidden": 64})
    Case(small, dtype).step(chunk)  # libraries, threads
    if args.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        case.step(chunk)
        return resident("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step(chunk)
    return torch.cuda.max_memory_allocated() - before


def seconds(args: argparse.Namespace, dtype: str, chunks: list[int | None]) -> dict[str, list[float]]:
    """Of each variant in each round, and under "errors" how far its loss and gradient are from all logits'."""
    case = Case(args, dtype)
    found: dict[str, list[float]] = {str(chunk): [] for chunk in chunks}
    loss, gradient = case.step(None)
    gradient = gradient.double()
    for chunk in chunks:
        other, mine = case.step(chunk)
        gap = (mine.double() - gradient).norm() / gradient.norm()
        found[f"errors {chunk}"] = [abs(other - loss) / loss, float(gap)]
    for _ in range(args.rounds):
        for chunk in chunks:
            if args.device == "cpu":
                started = time.process_time()
                case.step(chunk)
                found[str(chunk)].append(time.process_time() - started)
            else:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                case.step(chunk)
                end.record()
                torch.cuda.synchronize()
                found[str(chunk)].append(begin.elapsed_time(end) / 1000)
    return found


def in_a_fresh_process(words: list[str], what: str, dtype: str, chunk: int | None = None) -> object:
    """What `--child` prints."""
    done = subprocess.run(
        [sys.executable, __file__, *words, "--child", what, dtype, str(chunk)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=256_000)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants: list[int | None] = [None, *args.chunks]
    if args.child:
        what, dtype, chunk = args.child
        value = peak(args, dtype, None if chunk == "None" else int(chunk)) if what == "peak" else None
        print(json.dumps(seconds(args, dtype, variants) if value is None else value))
        return
    print(f"hidden {args.hidden}, vocabulary {args.vocab:,}, {args.tokens:,} tokens, {args.device}\n")
    print("| head | logits at once | peak, MB | of all | time, s | of all | loss, gradient differ by |")
    print("|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        times: dict[str, list[float]] = in_a_fresh_process(sys.argv[1:], "seconds", dtype)  # type: ignore[assignment]
        base_peak = base_time = 0.0
        for chunk in variants:
            taken = float(in_a_fresh_process(sys.argv[1:], "peak", dtype, chunk))  # type: ignore[arg-type]
            rounds = times[str(chunk)]
            median = statistics.median(rounds)
            if chunk is None:
                base_peak, base_time = taken, median
            errors = ", ".join(f"{error:.1e}" for error in times[f"errors {chunk}"]) if chunk else ""
            print(
                f"| {dtype} | {chunk or 'all'} | {taken / MB:,.0f} | {taken / base_peak:.3f} | {median:.2f} "
                f"({min(rounds):.2f} to {max(rounds):.2f}) | {median / base_time:.2f} | {errors} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
