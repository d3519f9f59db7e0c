"""What the processes of a stream agree on: how data is judged, and the bits of all that follows from it."""

from __future__ import annotations

from dylo_moe.continual.config import GROWN
from dylo_moe.continual.growth import SkillDecision
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.utils import distributed
from dylo_moe.utils.words import listed


def agreed(model: DyLoRAMoE, data: str, decision: SkillDecision) -> SkillDecision:
    """Take the first process's decision, and its bits of what followed from it: expert, gate rows, library.

    Every process has decided for itself from the same rows, because the decision needs no more than a pass up to the
    router. On machines that are alike the bits are the same already.

    Args:
        data: the name of the data, for the message.

    Returns:
        The first process's decision; the numbers in it may differ from this one's by rounding.

    Raises:
        ValueError: where a process decided otherwise, because its base computes other features.
    """
    others = distributed.differing((decision.skill, decision.novel, decision.nearest, decision.action, decision.expert))
    if others:
        raise ValueError(
            f"process {listed([str(rank) for rank in others])} of this stream judges {data} otherwise than process 0; "
            "all of them need the same base, in the same dtype, on devices of one kind"
        )
    if decision.action == GROWN and decision.expert is not None:
        distributed.copy_from_first(model.experts.parameters(decision.expert))
    share_knowledge(model)
    return distributed.value_of_first(decision)


def share_knowledge(model: DyLoRAMoE) -> None:
    """Give the router and the skill library of each process the bits that they have on the first one."""
    distributed.copy_from_first([*model.router.parameters(), *model.router.buffers()])
    if model.growth is not None:
        model.growth.library = distributed.value_of_first(model.growth.library)
