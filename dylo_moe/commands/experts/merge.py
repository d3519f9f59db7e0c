"""The command `dylora experts merge`: write a checkpoint in which two experts have become one."""

from __future__ import annotations

from typing import Any

from dylo_moe.commands.experts.run import output_problems
from dylo_moe.experts.expert import check_name
from dylo_moe.experts.merging import LITTLE_KEPT, Merge
from dylo_moe.model.checkpoint import manifest_or_problem
from dylo_moe.model.manifest import expert_problem
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.model.saving import save_checkpoint
from dylo_moe.utils.screen import Screen


def merge(checkpoint: str, first: str, second: str, output: str, *, name: str | None, rank: int | None) -> None:
    """Write a checkpoint in which two experts have become one; the others stay bit-equal.

    Raises:
        ValueError: with all that names, flags and the manifest show to be wrong, before weights are read.
    """
    problems = output_problems(output)
    if first == second:
        problems.append(f"expert {first!r} is named twice; a merge takes two experts")
    if rank is not None and rank < 1:
        problems.append(f"rank is {rank}; it must be a whole number of at least 1")
    manifest = manifest_or_problem(checkpoint, problems, expert=first, or_base=False)
    problems = [found for found in (expert_problem(manifest, second, or_base=False),) if found]
    problems += pool_problems(manifest, checkpoint, [first, second], name)
    if problems:
        raise ValueError("; ".join(problems))
    model = DyLoRAMoE.from_pretrained(checkpoint)
    assert model.growth is not None
    is_reported = any({first, second} == set(pair.experts) for pair in model.growth.confusable())
    made = model.merge_experts(first, second, name=name, rank=rank)
    save_checkpoint(model, output)
    screen = Screen("experts")
    screen.say(made.in_words(first, second))
    for sentence in warnings_of(made, first, second, is_reported=is_reported):
        screen.warn(sentence)
    screen.result("checkpoint", output)


def pool_problems(manifest: dict[str, Any], checkpoint: str, experts: list[str], name: str | None) -> list[str]:
    """Why two experts of a checkpoint cannot be merged, or not under that name; none: they can."""
    problems = []
    if manifest.get("growth") is None:
        problems.append(f"{checkpoint} has no skill library that a merged expert's gate row could follow from")
    nascent = [entry["name"] for entry in manifest["experts"] if entry["name"] in experts and not entry["mature"]]
    problems += [f"expert {expert} is still learning, and only mature experts are merged" for expert in nascent]
    if name is not None and name not in experts:
        try:
            check_name(name, taken=[entry["name"] for entry in manifest["experts"]])
        except ValueError as error:
            problems.append(str(error))
    return problems


def warnings_of(made: Merge, first: str, second: str, *, is_reported: bool) -> list[str]:
    """What a user should know of a merge that may have lost much, in sentences.

    Args:
        is_reported: whether the detector takes skills of the two for each other.
    """
    found = []
    if made.kept < LITTLE_KEPT:
        found.append(
            f"The rank {made.rank} keeps only {made.kept:.0%} of the mean of {first} and {second}; --rank takes a "
            "larger one."
        )
    if not is_reported:
        found.append(
            f"The detector tells the skills of {first} from those of {second}, and in the mean of unlike experts each "
            "has but a part of what it learned: measure the merged checkpoint before you use it."
        )
    return found
