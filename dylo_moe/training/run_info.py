"""What a run was made of and on: versions, hardware, base, experts, data. Goes into run.json and the model card.

Nothing comes from the environment, and no user's or machine's name is asked for.
"""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dylo_moe import __version__
from dylo_moe.base.frozen import count_parameters, quantization
from dylo_moe.data.loading import LoadedData
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.utils.redact import without_secrets

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "numpy")


def run_facts(model: DyLoRAMoE, data: LoadedData) -> dict[str, Any]:
    """All that a reader needs to judge a run's numbers, as plain JSON values; sizes in bytes, shares in parts of 1.

    The names of datasets are kept as they were given, for the metrics are called by them.
    """
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = count_parameters(model.parameters())
    router = sum(parameter.numel() for parameter in model.router.parameters())
    experts = [
        {"name": expert.name, "rank": expert.rank, "parameters": expert.parameters, "skill": expert.skill}
        for expert in model.experts
    ]
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "base": {
            "id": _without_home(without_secrets(model.base_id)),
            "revision": model.base_revision,
            "quantization": quantization(model.base),
            "class": type(model.base).__name__,
            "parameters": total - router - sum(expert.parameters for expert in model.experts),
        },
        "experts": experts,
        "router": {"parameters": router, "top_k": model.router_config.top_k},
        "trainable": trainable,
        "frozen": total - trainable,
        "data": dataset_facts(data),
    }


def versions() -> dict[str, str]:
    """Of this package, Python, and what the numbers depend on; a package that is not installed is left out."""
    found = {"dylora": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine, without its name. What the system does not tell is None."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        memory = None
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "memory": properties.total_memory})
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory": memory,
        "gpus": gpus,
    }


def cpu_model() -> str | None:
    """As the kernel calls it; else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def dataset_facts(data: LoadedData) -> list[dict[str, Any]]:
    """Each dataset: where from, how many rows, its share of an epoch, its licence where it is known."""
    shares = {share.name: share for share in data.shares}
    sources = {reading.name: reading.source for reading in data.readings}
    facts = []
    for count in data.counts:
        share, source = shares[count.name], sources[count.name]
        facts.append(
            {
                "name": count.name,
                "origin": _without_home(without_secrets(data.origins[count.name])),
                "train": count.train,
                "evaluation": count.evaluation,
                "share": share.share,
                "token_share": share.token_share,
                "licence": source.licence if source is not None else None,
            }
        )
    return facts


def _without_home(text: str) -> str:
    """A path below the home folder tells a user's name."""
    home = str(Path.home())
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text
