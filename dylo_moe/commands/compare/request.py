"""A command line of `dylora compare`, read with its recipe, and the training of each arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.commands.compare.arguments import (
    COMPARE_LINE,
    OF_CODE,
    REPLACED_BY,
    SEARCH_SUBSET,
    CompareArguments,
    compare_refusal,
)
from dylo_moe.commands.compare.grid import OWN_CELL, Cell
from dylo_moe.experts.config import alpha_of_scale, whole_if_it_is
from dylo_moe.parsing.parser import Parser, build_parser, parse, typed_flags
from dylo_moe.parsing.recipe import as_words, plain_settings, split_recipe, with_recipe
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
    model, experts, router, data, options, train = _parse(words, parser, _typed(argv, parser))
    if train.output_dir == NEW_RUN:
        raise UsageError("output_dir is not given; name a folder, so that the same command can resume where it was")
    if experts.num_experts < 2:
        raise UsageError(f"num_experts is {experts.num_experts}; with one there is no routing to compare")
    searched = [one for many, ones in REPLACED_BY.items() if getattr(options, many) for one in ones]
    settings = _without(plain_settings((model, experts, router, data), train, compare_refusal), (*LEAVE, *searched))
    evaluation = _evaluation(options, train, typed_flags(words))
    configs = (model, experts, router, data, train)
    return CompareRequest(
        Path(train.output_dir), options, settings, evaluation, train.per_device_eval_batch_size, configs
    )


def _typed(argv: Sequence[str], parser: Parser) -> set[str]:
    """The flags that are on the command line itself, not in its recipe."""
    return typed_flags(parser.with_values(split_recipe(argv)[1]))


def _parse(words: Sequence[str], parser: Parser, typed: set[str]) -> tuple[Any, ...]:
    """Read the flags, with the first cell's and the last budget's values in place of those that each training gets.

    Raises:
        UsageError: with all problems, also where both a list of values and the one value that it replaces are given.
    """
    given, problems = typed_flags(words), []
    for many, ones in REPLACED_BY.items():
        for one in ones:
            if many in given and one in given and (one in typed or many not in typed):
                problems.append(f"{one} is given with {many}, which replaces it; leave one of them out")
    try:
        configs = parse(parser, words, compare_refusal)
    except UsageError as error:
        raise UsageError("; ".join([*problems, str(error)])) from error
    data, options = configs[3:5]
    if bool(data.search_subset) != options.has_grid and (data.search_subset or "search_subset" in given):
        problems.append(
            f"search_subset is {data.search_subset:g}; a grid (--learning_rates, --scales) needs rows to be searched "
            "on, and without one they would change nothing"
        )
    if problems:
        raise UsageError("; ".join(problems))
    values = _values(options.cells[0], options.steps[-1], rank=configs[1].lora_r, use_rslora=configs[1].use_rslora)
    if options.has_grid and not data.search_subset:
        values["search_subset"] = SEARCH_SUBSET
    return parse(parser, [*words, *as_words(values)], compare_refusal) if values else configs


def _values(cell: Cell, steps: int | None, *, rank: int, use_rslora: bool) -> dict[str, Any]:
    """The settings of a training that its cell and its budget decide.

    Args:
        rank: the rank of the adapters of its arm.
    """
    values: dict[str, Any] = {}
    if cell.learning_rate is not None:
        values["learning_rate"] = cell.learning_rate
    if cell.scale is not None:
        values["lora_alpha"] = alpha_of_scale(cell.scale, rank, use_rslora=use_rslora)
    if steps is not None:
        values["max_steps"] = steps
    return values


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


def settings_of_arm(
    arm: str, settings: dict[str, Any], *, seed: int, steps: int | None = None, cell: Cell = OWN_CELL
) -> dict[str, Any]:
    """The recipe of one arm's training.

    `lora_total` is as large as all experts together, `lora_active` as large as those that one token uses, a shared
    one too. Without a scale in the cell both have that of ours, alpha / rank, or with `use_rslora` the alpha of ours,
    by which the scale follows the rank. Settings that have no meaning for an arm are left out.

    Args:
        arm: one of `ARMS` other than the base.
        settings: the settings of our arm's training.
        steps: the budget; None: as in the settings.
        cell: the learning rate and the scale, where they are not those of the settings.
    """
    own = {**settings, "seed": seed, "include_num_input_tokens_seen": "non_padding"}
    num_experts, top_k = settings["num_experts"], settings["top_k"]
    if arm in ("lora_total", "lora_active"):
        times = num_experts if arm == "lora_total" else top_k
        rank = times * settings["lora_r"] + settings["shared_r"]
        own |= {"num_experts": 1, "lora_r": rank}
        if cell.scale is None and not settings["use_rslora"]:
            own["lora_alpha"] = whole_if_it_is(rank * settings["lora_alpha"] / settings["lora_r"])
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
    return own | _values(cell, steps, rank=own["lora_r"], use_rslora=settings["use_rslora"])


def _without(settings: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
