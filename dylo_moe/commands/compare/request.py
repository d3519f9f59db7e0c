"""A command line of `dylora compare`, read with its recipe, and the training of each arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.commands.compare.arguments import COMPARE_LINE, OF_CODE, CompareArguments, compare_refusal
from dylo_moe.parsing.parser import Parser, build_parser, parse, typed_flags
from dylo_moe.parsing.recipe import plain_settings, with_recipe
from dylo_moe.routing.config import LEARNED, RANDOM, UNIFORM
from dylo_moe.training.preflight import Configs
from dylo_moe.training.run_folder import NEW_RUN
from dylo_moe.training.trainer_arguments import TrainArguments
from dylo_moe.utils.errors import UsageError

LEAVE = ("allow_code_execution", "sandbox")
"""Flags that concern the evaluation, not the training."""

OF_GATE = ("router_top_p", "balance_coefficient", "z_loss_coefficient", "entropy_coefficient")
"""Settings that have a meaning only where a gate learns."""


class CompareRequest(NamedTuple):
    """What `dylora compare` was asked for."""

    output: Path
    options: CompareArguments
    settings: dict[str, Any]
    """The settings of our arm's training, as a recipe; `settings_of_arm` derives the other arms' from them."""
    evaluation: dict[str, Any]
    """Flags of `dylora eval`; empty where no task runs code."""
    batch_size: int
    """The number of rows in one forward where losses are measured."""
    configs: Configs
    """The configs of our arm's training."""


def build_compare_parser(*, show_all: bool = False) -> Parser:
    """The parser of `dylora compare`."""
    return build_parser(COMPARE_LINE, TrainArguments, show_all=show_all)


def parse_compare(argv: Sequence[str]) -> CompareRequest:
    """Read the command line and the recipe that it names.

    Raises:
        UsageError: for an unknown or refused flag, a value out of range, or a model without routing to compare.
    """
    parser = build_compare_parser()
    words = with_recipe(argv, parser, compare_refusal)
    model, experts, router, data, options, train = parse(parser, words, compare_refusal)
    if train.output_dir == NEW_RUN:
        raise UsageError("output_dir is not given; name a folder, so that the same command can resume where it was")
    if experts.num_experts < 2:
        raise UsageError(f"num_experts is {experts.num_experts}; with one there is no routing to compare")
    settings = _without(plain_settings((model, experts, router, data), train, compare_refusal), LEAVE)
    evaluation = _evaluation(options, train, typed_flags(words))
    for arm in options.arms:
        settings_of_arm(arm, settings, seed=0)  # raises for an arm whose settings cannot be
    configs = (model, experts, router, data, train)
    return CompareRequest(
        Path(train.output_dir), options, settings, evaluation, train.per_device_eval_batch_size, configs
    )


def _evaluation(options: CompareArguments, train: TrainArguments, given: set[str]) -> dict[str, Any]:
    """The flags of `dylora eval`; none where no task runs code."""
    if not options.benchmarks:
        useless = sorted(given & {*OF_CODE, *LEAVE})
        if useless:
            raise UsageError(f"{', '.join(useless)} would change nothing: no task runs code (--tasks)")
        return {}
    if not train.allow_code_execution:
        verb = "runs" if len(options.benchmarks) == 1 else "run"
        raise UsageError(
            f"{' and '.join(options.benchmarks)} {verb} programs that the model writes: add --allow_code_execution to "
            "let each of them run, isolated from your files and the network (--sandbox: how)"
        )
    flags = {name: getattr(options, name) for name in OF_CODE} | {"allow_code_execution": True}
    return flags | ({} if train.sandbox is None else {"sandbox": train.sandbox})


def settings_of_arm(arm: str, settings: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """The recipe of one arm's training.

    Both single LoRAs have the scale of ours, alpha / rank; `lora_total` is as large as all experts together,
    `lora_active` as large as those that one token uses, a shared one too. Settings that have no meaning for an arm are
    left out.

    Args:
        arm: one of `ARMS` other than the base.
        settings: the settings of our arm's training.
    """
    own = {**settings, "seed": seed, "include_num_input_tokens_seen": "non_padding"}
    num_experts, top_k = settings["num_experts"], settings["top_k"]
    if arm in ("lora_total", "lora_active"):
        times = num_experts if arm == "lora_total" else top_k
        rank = times * settings["lora_r"] + settings["shared_r"]
        own |= {"num_experts": 1, "lora_r": rank, "lora_alpha": alpha_at(rank, settings)}
        own = _without(own, ("shared_r", "shared_alpha", "top_k", "granularity", "router_half_life", *OF_GATE))
    elif arm == "uniform":
        own = _without(own, ("top_k", "granularity", "router_half_life", *OF_GATE)) | {"router_policy": UNIFORM}
    elif arm == "random":
        own = _without(own, OF_GATE) | {"router_policy": RANDOM}
    else:
        own["router_policy"] = LEARNED
    if own["router_layer"] == "final" and arm in ("lora_total", "lora_active", "uniform"):
        own = _without(
            own, ("router_layer",)
        )  # without a learned router no layer is read, and experts are in all layers anyway
    return own


def alpha_at(rank: int, settings: dict[str, Any]) -> int:
    """The alpha with which a LoRA of another rank has the scale of the routed experts.

    Raises:
        UsageError: where no whole number has.
    """
    alpha, rest = divmod(rank * settings["lora_alpha"], settings["lora_r"])
    if rest:
        raise UsageError(
            f"a LoRA of rank {rank} has no whole lora_alpha with the scale of the experts, lora_alpha "
            f"{settings['lora_alpha']} over lora_r {settings['lora_r']}; choose others, or another shared_r"
        )
    return alpha


def _without(settings: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
