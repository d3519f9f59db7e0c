"""The options of `DyLoRAMoE.from_base`, checked before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

from dylo_moe.continual.config import GrowthConfig
from dylo_moe.experts.expert import check_name
from dylo_moe.routing.config import BALANCE_COEFFICIENT, RouterConfig
from dylo_moe.utils.checks import COUNT_OR_NONE, POSITIVE, range_problems
from dylo_moe.utils.words import counted

SHARED_RANGES = {"shared_rank": COUNT_OR_NONE, "shared_alpha": POSITIVE}


def pool_problems(
    *,
    router: RouterConfig,
    names: Any,
    num_experts: Any,
    shared_rank: Any,
    shared_alpha: Any,
    allow_expert_growth: bool,
    growth: GrowthConfig | None,
    balance_coefficient: Any,
) -> list[str]:
    """What is wrong with the options of a new pool, each problem in words; the arguments are those of `from_base`."""
    problems = _count_problems(names, num_experts, router.top_k, balance_coefficient)
    problems += range_problems({"shared_rank": shared_rank, "shared_alpha": shared_alpha}, SHARED_RANGES)
    if shared_alpha is not None and not shared_rank:
        problems.append(f"shared_alpha is {shared_alpha!r}, but without a shared_rank there is no shared expert")
    if shared_rank and allow_expert_growth:
        problems.append(
            f"shared_rank is {shared_rank!r}, but a pool that begins empty would never train a shared expert, which is "
            "frozen while a pool grows; train a pool with one jointly, and let that grow"
        )
    if allow_expert_growth and (names is not None or num_experts is not None):
        problems.append("with allow_expert_growth a pool begins without experts: leave num_experts and names out")
    elif growth is not None and not allow_expert_growth:
        problems.append("growth has no meaning with allow_expert_growth=False")
    if allow_expert_growth and not router.is_learned:
        problems.append(f"a pool that grows needs policy 'learned'; this router's is {router.policy!r}")
    if router.change_rate and not allow_expert_growth:
        problems.append(
            f"change_rate is {router.change_rate!r}, but the gate of a pool that does not grow is trained, and reads "
            "the mean alone; leave it out"
        )
    if not router.is_learned and balance_coefficient not in (0, BALANCE_COEFFICIENT):
        problems.append(
            f"balance_coefficient is {balance_coefficient!r}, but with policy {router.policy!r} nothing can be "
            "balanced; leave it out"
        )
    return problems


def _count_problems(names: Any, num_experts: Any, top_k: int, balance_coefficient: Any) -> list[str]:
    problems = []
    whole = isinstance(num_experts, int) and not isinstance(num_experts, bool)
    if num_experts is not None and (not whole or num_experts < 1):
        problems.append(f"num_experts is {num_experts!r}; it must be a whole number of at least 1")
    if isinstance(names, str):
        problems.append(f"names is {names!r}; it must be a list of names")
        names = []
    elif names is not None:
        names = list(names)
        if not names:
            problems.append("names is empty; a pool needs at least 1 expert")
    for index, name in enumerate(names or ()):
        try:
            check_name(name, taken=names[:index])
        except ValueError as error:
            problems.append(str(error))
    count = len(names) if names is not None else num_experts
    if isinstance(count, int) and 0 < count < top_k:
        problems.append(f"top_k is {top_k}, but the pool has only {counted(count, 'expert')}")
    if not isinstance(balance_coefficient, (int, float)) or not 0 <= balance_coefficient < math.inf:
        problems.append(f"balance_coefficient is {balance_coefficient!r}; it must be a finite number of at least 0")
    return problems
