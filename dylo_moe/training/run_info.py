"""The facts of a run for run.json and the model card: versions, hardware, base, experts and data.

Nothing is read from the environment, and neither the user's nor the machine's name is recorded.
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
    """The facts that a reader needs to judge a run's numbers, as JSON values: sizes in bytes, shares as fractions.

    Datasets keep the names they were given, because the metrics use them.
    """
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = count_parameters(model.parameters())
    router = sum(parameter.numel() for parameter in model.router.parameters())
    experts = [
        {"name": expert.name, "rank": expert.rank, "parameters": expert.parameters, "skill": expert.skill}
        for expert in model.experts
    ]
    shared = model.experts.shared
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "base": {
            "id": _without_home(without_secrets(model.base_id)),
            "revision": model.base_revision,
            "quantization": quantization(model.base),
            "class": type(model.base).__name__,
            "parameters": total - router - sum(expert.parameters for expert in model.experts.everyone),
        },
        "experts": experts,
        **({} if shared is None else {"shared": {"rank": shared.rank, "parameters": shared.parameters}}),
        "router": {"parameters": router, "top_k": model.router_config.top_k},
        "trainable": trainable,
        "frozen": total - trainable,
        "data": dataset_facts(data),
    }


def versions() -> dict[str, str]:
    """The versions of this package, of Python, and of the installed packages that the numbers depend on."""
    found = {"dylora": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine, without its name; None stands for what the system does not report."""
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
    """The processor's model as the kernel reports it, else as Python does; None where neither knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def dataset_facts(data: LoadedData) -> list[dict[str, Any]]:
    """Each dataset: its origin, its rows, its share of an epoch, the columns that nothing reads with the number of rows
    that have them, and its licence where that is known."""
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
                "search": count.search,
                "share": share.share,
                "token_share": share.token_share,
                "unread": data.unread[count.name],
                "licence": source.licence if source is not None else None,
            }
        )
    return facts


def _without_home(text: str) -> str:
    """Replace the home folder by ~, for its path holds the user's name."""
    home = str(Path.home())
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text
