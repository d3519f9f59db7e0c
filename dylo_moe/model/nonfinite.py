"""Weights of a model that hold NaN or infinity, named in words."""

from __future__ import annotations

from dylo_moe.experts.expert import ExpertPool
from dylo_moe.routing.router import Router


def broken_weights(pool: ExpertPool, router: Router) -> list[str]:
    """What holds NaN or infinity, in words: adapters, gate rows, what features are scaled by."""
    broken = [f"the weights of expert {name!r} ({parameter})" for name, parameter in pool.non_finite()]
    broken += [f"the gate row of expert {name!r}" for name in router.non_finite()]
    buffers = ("feature_mean", "feature_scale", "shares")
    return broken + [f"the router's {name}" for name in buffers if not getattr(router, name).isfinite().all()]
