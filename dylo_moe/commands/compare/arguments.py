"""The flags of `dylora compare`: all of `dylora train`, and what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.commands.parsing import Parser, parse, refusal_of, training_parser
from dylo_moe.commands.recipe import plain_settings, with_recipe
from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.evaluation.arguments import LOSSES, TASKS, EvalArguments
from dylo_moe.routing.config import LEARNED, RANDOM, UNIFORM
from dylo_moe.training.arguments import TrainArguments
from dylo_moe.training.run_folder import NEW_RUN
from dylo_moe.utils.errors import UsageError

BASE_ARM = "base"

OURS = "ours"

ARMS = {
    BASE_ARM: "the base",
    "lora_total": "one LoRA of equal total size",
    "lora_active": "one LoRA of equal active size",
    "uniform": "uniform routing",
    "random": "random routing",
    OURS: "ours",
}
"""What is compared, in the order of the table, with what people call it."""

NOT_OFFERED = {
    "seed": "give --seeds",
    "router_policy": "every policy is an arm of its own; --arms chooses",
    "resume_from_checkpoint": "type the same command again, and it goes on",
    "wandb_checkpoint_artifact": "type the same command again, and it goes on",
    "early_stopping_patience": "all arms train on the same tokens",
    "early_stopping_threshold": "all arms train on the same tokens",
    "load_best_model_at_end": "it would choose a checkpoint by the very rows that the arms are compared on",
    "eval_benchmark": "every arm is judged when it is trained: --tasks",
    "eval_benchmark_steps": "every arm is judged when it is trained: --tasks",
    "include_num_input_tokens_seen": "tokens are always counted here",
}
"""Flags of `dylora train` that would do nothing, or something wrong, here; each with the reason."""

OF_CODE = ("timeout_seconds", "memory_mib", "limit", "max_new_tokens")
"""Flags of `dylora eval` that have no meaning without a task that runs code."""

EVAL = {item.name: item for item in fields(EvalArguments)}


@dataclass
class CompareArguments:
    """Flags of `dylora compare` beside those of `dylora train`.

    Raises:
        ValueError: for values out of range; all problems in one message.
    """

    seeds: list[str] = field(
        default_factory=lambda: ["1", "2", "3"],
        metadata={"help": "Every arm is trained with each of these; a seed decides what is held out, too."},
    )
    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": "What is compared: " + ", ".join(ARMS) + "."}
    )
    tasks: list[str] = field(
        default_factory=lambda: [LOSSES], metadata={"help": "How: " + ", ".join(TASKS) + "; losses always."}
    )
    timeout_seconds: float = field(
        default=EvalArguments.timeout_seconds, metadata=dict(EVAL["timeout_seconds"].metadata)
    )
    memory_mib: int = field(default=EvalArguments.memory_mib, metadata=dict(EVAL["memory_mib"].metadata))
    limit: int | None = field(default=None, metadata=dict(EVAL["limit"].metadata))
    max_new_tokens: int = field(default=EvalArguments.max_new_tokens, metadata=dict(EVAL["max_new_tokens"].metadata))

    def __post_init__(self) -> None:
        problems = []
        for name in ("seeds", "arms", "tasks"):
            values = [part.strip() for item in getattr(self, name) for part in str(item).split(",") if part.strip()]
            setattr(self, name, list(dict.fromkeys(values)))
        if not self.seeds or not all(seed.isdigit() for seed in self.seeds):
            problems.append(f"seeds is {','.join(self.seeds) or 'empty'}; it must be whole numbers from 0 on")
        for name, known in (("arms", ARMS), ("tasks", TASKS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                problems.append(f"{name} has {', '.join(unknown)}; there are {', '.join(known)}")
        if not unknown and (OURS not in self.arms or len(self.arms) < 2):
            problems.append(f"arms is {','.join(self.arms)}; it must have {OURS}, and something to compare with")
        if problems:
            raise ValueError("; ".join(problems))
        self.arms = [arm for arm in ARMS if arm in self.arms]

    @property
    def benchmarks(self) -> list[str]:
        """The tasks that run code."""
        return [task for task in self.tasks if task != LOSSES]


class CompareRequest(NamedTuple):
    """What `dylora compare` was asked for."""

    output: Path
    options: CompareArguments
    settings: dict[str, Any]
    """Of every arm's training, as a recipe; without what the arms differ in, this is what they share."""
    evaluation: dict[str, Any]
    """Flags of `dylora eval`; empty where no task runs code."""
    batch_size: int
    """Rows of one forward where losses are measured."""


def build_compare_parser(*, show_all: bool = False) -> Parser:
    """The parser of `dylora compare`."""
    return training_parser(
        "dylora compare",
        (*TRAIN_CONFIGS, CompareArguments, TrainArguments),
        description="Train and evaluate on the same data, tokens and seeds: the base, one LoRA of equal total "
        "parameters, one of equal active parameters, uniform routing, random routing, and ours; one table says whether "
        "ours wins. Killed, it goes on where it was when it is started again.",
        refusal=compare_refusal,
        show_all=show_all,
    )


def compare_refusal(name: str) -> str | None:
    """Why `dylora compare` does not offer a flag of that name; None where it does."""
    return NOT_OFFERED.get(name) or refusal_of(name)


def parse_compare(argv: Sequence[str]) -> CompareRequest:
    """Read the command line and the recipe it names.

    Raises:
        UsageError: for an unknown or refused flag, a value out of range, or a model that nothing can be compared with.
    """
    parser = build_compare_parser()
    words = with_recipe(argv, parser, compare_refusal)
    model, experts, router, data, options, train = parse(parser, words, compare_refusal)
    if train.output_dir == NEW_RUN:
        raise UsageError("output_dir is not given; name a folder, so that the same command can go on where it was")
    if experts.num_experts < 2:
        raise UsageError(f"num_experts is {experts.num_experts}; with one there is no routing to compare")
    if router.top_k > experts.num_experts:
        raise UsageError(f"top_k is {router.top_k}, but num_experts is {experts.num_experts}")
    settings = _without(plain_settings((model, experts, router, data), train, compare_refusal), LEAVE)
    evaluation = _evaluation(options, train, {word.split("=")[0].removeprefix("--") for word in words})
    return CompareRequest(Path(train.output_dir), options, settings, evaluation, train.per_device_eval_batch_size)


def _evaluation(options: CompareArguments, train: TrainArguments, given: set[str]) -> dict[str, Any]:
    """The flags of `dylora eval`; none where no task runs code."""
    if not options.benchmarks:
        useless = sorted(given & {*OF_CODE, *LEAVE})
        if useless:
            raise UsageError(f"{', '.join(useless)} would change nothing: no task runs code (--tasks)")
        return {}
    if not train.allow_code_execution:
        raise UsageError(
            f"{' and '.join(options.benchmarks)} run programs that the model writes: add --allow_code_execution to let "
            "each of them run, isolated from your files and the network (--sandbox: how)"
        )
    flags = {name: getattr(options, name) for name in OF_CODE} | {"allow_code_execution": True}
    return flags | ({} if train.sandbox is None else {"sandbox": train.sandbox})


def settings_of_arm(arm: str, settings: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """The recipe of one arm's training.

    Both single LoRAs have the scale of ours, alpha / rank; `lora_total` is as large as all experts together,
    `lora_active` as large as those that one token uses. What has no meaning for an arm is left out.

    Args:
        arm: of `ARMS`, but for the base.
        settings: of ours.
    """
    own = {**settings, "seed": seed, "include_num_input_tokens_seen": "non_padding"}
    num_experts, top_k = settings["num_experts"], settings["top_k"]
    if arm in ("lora_total", "lora_active"):
        times = num_experts if arm == "lora_total" else top_k
        own |= {"num_experts": 1, "lora_r": times * settings["lora_r"], "lora_alpha": times * settings["lora_alpha"]}
        own = _without(own, ("top_k", "granularity", "router_half_life", *OF_GATE))
    elif arm == "uniform":
        own = _without(own, ("top_k", "granularity", "router_half_life", *OF_GATE)) | {"router_policy": UNIFORM}
    elif arm == "random":
        own = _without(own, OF_GATE) | {"router_policy": RANDOM}
    else:
        own["router_policy"] = LEARNED
    if own["router_layer"] == "final" and arm in ("lora_total", "lora_active", "uniform"):
        own = _without(own, ("router_layer",))  # nothing is read there, and all layers carry experts all the same
    return own


LEAVE = ("allow_code_execution", "sandbox")
"""Flags that are for the tasks, not for the training."""

OF_GATE = ("balance_coefficient", "z_loss_coefficient", "entropy_coefficient")
"""Settings that shape how a gate learns."""


def _without(settings: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
