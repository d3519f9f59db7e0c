"""The ways to have N experts that speed.py measures, and how each is built.

    python benchmarks/speed/peers.py [--model smollm2-135m] [--num_experts 4 16 64] [--rounds 3]

shows that the peers built here give the logits of PEFT's own bit for bit (three experts, PEFT's built from files by its
own calls), and what building a pool takes, loading the base left out: ours by `from_base`, PEFT's by its own
`add_adapter`, over N times building one.

PEFT walks over a whole model to add an adapter, so that the 64th takes 2 s. Here the adapters that are there are out of
its sight meanwhile; what it makes is the same.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import ArrowConfig, LoraLayer
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.xlora import model as xlora
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, PreTrainedModel

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base
from dylo_moe.experts.expert import adapters_set_aside

GEMMA_SHAPES: dict[str, dict[str, int]] = {
    "codegemma-2b": {
        **{"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "vocab_size": 256000},
        **{"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256},
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1000},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    },
}
"""CodeGemma-2B's published sizes, and a small one on which the same code can be tried."""


def make_base(model: str, *, shape: str | None, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A base of its own for one variant: a real one, or random weights of a shape, made on the device."""
    if shape is None:
        return load_base(model, dtype=dtype).to(device)
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(GemmaConfig(**GEMMA_SHAPES[shape]), dtype=dtype).eval()


def lora_config(dropout: float = 0.05) -> LoraConfig:
    """The same targets, rank and dropout for every variant."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def randomise(model: nn.Module) -> nn.Module:
    """Non-zero B, so that every expert changes the result."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The adapted linears."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def adapters_of(model: nn.Module, names: Sequence[str], config: Callable[[], LoraConfig]) -> PeftModel:
    """Stock adapters on a base, the first one active."""
    peft = get_peft_model(model, config(), adapter_name=names[0])
    layers = lora_layers(peft)
    for name in names[1:]:
        with adapters_set_aside(layers):
            peft.add_adapter(name, config())
    return peft


def is_adapter(path: str) -> bool:
    """Whether a parameter of that name is a matrix of an adapter."""
    return ".lora_A." in path or ".lora_B." in path


def train_only(model: nn.Module, names: Sequence[str]) -> None:
    """These adapters train and no others."""
    for path, parameter in model.named_parameters():
        if is_adapter(path):
            parameter.requires_grad_(path.split(".")[-2] in names)


class Pool(NamedTuple):
    """What a variant is made of."""

    num_experts: int
    num_trained: int
    """So many train, the first ones; the others are frozen."""
    dropout: float

    def names(self, prefix: str) -> list[str]:
        """One for each expert."""
        return [f"{prefix}{index}" for index in range(self.num_experts)]

    def lora(self) -> LoraConfig:
        """PEFT writes into the configs it is given, so each adapter gets its own."""
        return lora_config(self.dropout)


# The variants. Each takes a base of its own.


def plain(base: PreTrainedModel, pool: Pool) -> nn.Module:
    """The base, frozen."""
    return base.requires_grad_(False)


def one_adapter(base: PreTrainedModel, pool: Pool) -> nn.Module:
    """Stock PEFT with one adapter."""
    return randomise(get_peft_model(base, pool.lora()))


def all_active(base: PreTrainedModel, pool: Pool) -> nn.Module:
    """Stock PEFT with N adapters active: their plain sum."""
    names = pool.names("expert_")
    model = adapters_of(base, names, pool.lora)
    model.base_model.set_adapter(names)
    train_only(model, names[: pool.num_trained])
    return randomise(model)


def arrow(base: PreTrainedModel, pool: Pool) -> nn.Module:
    """PEFT's Arrow over N adapters, top-1. What `create_arrow_model` does, but for reading files."""
    names = pool.names("task_")
    model = randomise(adapters_of(base, names, pool.lora))
    config = ArrowConfig(top_k=1, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = names, []
    targets = sorted({path.rsplit(".", 1)[-1] for path, part in model.named_modules() if isinstance(part, LoraLayer)})
    model.add_adapter("arrow_router", LoraConfig(arrow_config=config, target_modules=targets, r=16))
    model.set_adapter("arrow_router")
    return model


def x_lora(base: PreTrainedModel, pool: Pool) -> nn.Module:
    """PEFT's X-LoRA over N adapters, by its defaults dense with one gate; all experts train, or else its gate alone."""
    layers: list[LoraLayer] = []

    def make(lora_model: Any, adapter_name: str, **kwargs: Any) -> None:
        """In place of reading a file."""
        with adapters_set_aside(layers):
            lora_model.peft_config[adapter_name] = pool.lora()
            lora_model.inject_adapter(lora_model.model, adapter_name)
        layers[:] = layers or lora_layers(lora_model)

    names = pool.names("")
    trained = names if pool.num_trained == pool.num_experts else []
    with mock.patch.object(xlora, "_load_adapter_into_lora_model", make):
        model = get_peft_model(base, x_lora_config(base, dict.fromkeys(names, ""), trains=bool(trained)))
    train_only(model, trained)
    return randomise(model)


def x_lora_config(base: PreTrainedModel, adapters: dict[str, str], *, trains: bool) -> XLoraConfig:
    """X-LoRA's defaults, for a base whose cache is off: it takes no other."""
    base.config.use_cache = False
    return XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters=adapters,
        use_trainable_adapters=trains,
    )


def ours(base: PreTrainedModel, pool: Pool, *, dense: bool) -> nn.Module:
    """Our pool; dense while its experts are nascent. The gate rows of those that train do too."""
    model = DyLoRAMoE.from_base(base, num_experts=pool.num_experts, lora=pool.lora())
    for expert in model.experts:
        expert.mature = not dense
    model.freeze(*model.experts.names[pool.num_trained :])
    return randomise(model)


BASE, ONE, ARROW, X_LORA = "base", "PEFT, 1 adapter", "PEFT Arrow", "PEFT X-LoRA"
SPARSE, DENSE = "ours, top-1", "ours, dense"
BUILD: dict[str, Callable[[PreTrainedModel, Pool], nn.Module]] = {
    BASE: plain,
    ONE: one_adapter,
    "PEFT, N active": all_active,
    ARROW: arrow,
    X_LORA: x_lora,
    DENSE: partial(ours, dense=True),
    SPARSE: partial(ours, dense=False),
}


def make_variant(variant: str, base: PreTrainedModel, pool: Pool) -> nn.Module:
    """A variant with its adapters random and in the base's dtype."""
    model = BUILD[variant](base, pool)
    for path, parameter in model.named_parameters():
        if is_adapter(path):
            parameter.data = parameter.data.to(base.dtype)
    if isinstance(model, DyLoRAMoE):
        model.experts.pack()
    return model


def cannot(variant: str, work: str) -> str | None:
    """Why a variant does not do a kind of work at all."""
    if variant == ARROW and work in ("training", "memory"):
        return "not trainable: no gradient reaches it"
    return None


def remark(variant: str, work: str, pool: Pool) -> str:
    """What must be said beside a figure."""
    if variant == X_LORA and work == "generate":
        return "its cache is off"
    if variant == X_LORA and work in ("training", "memory") and pool.num_trained < pool.num_experts:
        return "its gate alone trains, it cannot train one of many"
    return ""


# What can be said of the building itself.


def by_peft(variant: str, base: PreTrainedModel, folders: Sequence[str]) -> nn.Module:
    """The same peer from adapters in files, by PEFT's own calls alone."""
    if variant == ARROW:
        return create_arrow_model(base, list(folders), ArrowConfig(top_k=1, rng_seed=0))
    if variant == X_LORA:
        adapters = {str(index): folder for index, folder in enumerate(folders)}
        return get_peft_model(base, x_lora_config(base, adapters, trains=False))
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="expert_0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=f"expert_{index}")
    model.base_model.set_adapter([f"expert_{index}" for index in range(len(folders))])
    return model


@torch.no_grad()
def is_pefts_own(variant: str, fresh: Callable[[], PreTrainedModel], num_experts: int) -> bool:
    """Whether a peer as it is built here has the names and, given the same values, the logits of PEFT's own."""
    pool = Pool(num_experts, num_trained=1, dropout=0.0)
    ids = torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        all_active(fresh(), pool).save_pretrained(folder)
        theirs = by_peft(variant, fresh(), [f"{folder}/expert_{index}" for index in range(num_experts)])
    here = BUILD[variant](fresh(), pool)
    here.load_state_dict(theirs.state_dict())
    return torch.equal(here.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def seconds_to_build(build: Callable[[PreTrainedModel], object], base: PreTrainedModel) -> float:
    """CPU seconds; the base is loaded already."""
    gc.collect()
    start = time.process_time()
    build(base)
    return time.process_time() - start


def pool_of(num_experts: int) -> Callable[[PreTrainedModel], object]:
    """Ours, at once."""
    return lambda base: DyLoRAMoE.from_base(base, num_experts=num_experts, lora=lora_config())


def stock_of(num_experts: int) -> Callable[[PreTrainedModel], object]:
    """Stock PEFT: one adapter, and `add_adapter` for each more."""

    def build(base: PreTrainedModel) -> object:
        model = get_peft_model(base, lora_config(), adapter_name="expert_0")
        for index in range(1, num_experts):
            model.add_adapter(f"expert_{index}", lora_config())
        return model

    return build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3, help="in turns; the median of each figure is shown")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def fresh() -> PreTrainedModel:
        return load_base(arguments.model, dtype=torch.float32)

    for variant in ("PEFT, N active", ARROW, X_LORA):
        same = is_pefts_own(variant, fresh, 3)
        print(
            f"{variant}, 3 experts: logits {'equal' if same else 'DIFFER from'} those of PEFT's own calls", flush=True
        )
    print("\n| building, CPU seconds | one | " + " | ".join(map(str, arguments.num_experts)) + " |")
    print("|---" * (2 + len(arguments.num_experts)) + "|")
    for label, build in (("ours", pool_of), ("PEFT's add_adapter", stock_of)):
        seconds = {
            count: statistics.median(seconds_to_build(build(count), fresh()) for _ in range(arguments.rounds))
            for count in (1, *arguments.num_experts)
        }
        cells = [
            f"{seconds[count]:.2f} ({seconds[count] / (count * seconds[1]):.2f} of {count} times one)"
            for count in arguments.num_experts
        ]
        print(f"| {label} | {seconds[1]:.2f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
