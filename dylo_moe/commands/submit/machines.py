"""The machine types of Vertex AI that are known here, and the accelerators that come with them.

Sources: "Configure compute resources for custom training" of Vertex AI, and "Accelerator-optimized machine family" and
"GPU machine types" of Compute Engine. A type that is not in these tables is passed on as typed, and the service
decides."""

from __future__ import annotations

import re
from typing import NamedTuple

BUILT_IN = {
    "a2-highgpu": "NVIDIA_TESLA_A100",
    "a2-megagpu": "NVIDIA_TESLA_A100",
    "a2-ultragpu": "NVIDIA_A100_80GB",
    "a3-highgpu": "NVIDIA_H100_80GB",
    "a3-megagpu": "NVIDIA_H100_MEGA_80GB",
    "a3-ultragpu": "NVIDIA_H200_141GB",
    "a4-highgpu": "NVIDIA_B200",
    "g2-standard": "NVIDIA_L4",
}
"""Families whose accelerators are part of the machine, each with the type of its accelerator."""

G2_COUNTS = {4: 1, 8: 1, 12: 1, 16: 1, 24: 2, 32: 1, 48: 4, 96: 8}
"""The number of L4s in a g2-standard machine, by its vCPUs; names of other families end in the number, as in -8g."""

ATTACHED_COUNTS = {
    "NVIDIA_TESLA_T4": (1, 2, 4),
    "NVIDIA_TESLA_P4": (1, 2, 4),
    "NVIDIA_TESLA_P100": (1, 2, 4),
    "NVIDIA_TESLA_V100": (1, 2, 4, 8),
}
"""Accelerators that can be added to a machine, which must be an N1, and the allowed numbers of each."""

GENERAL = re.compile(r"(n1|n2|n2d|n4|e2|c2|c2d|c3|c3d|c4|m1|m2|m3)-")
"""Families that have no accelerators of their own."""


class Machine(NamedTuple):
    """A machine and its accelerators."""

    machine_type: str
    accelerator_type: str | None
    """The type of the accelerators; None: the machine has none, and training runs on its CPUs."""
    accelerator_count: int


def resolve(machine_type: str, accelerator_type: str | None, accelerator_count: int | None) -> Machine:
    """Complete a machine from its flags; accelerators that are not given are those of the machine type.

    Raises:
        ValueError: for a machine that does not exist, with the rule.
    """
    if accelerator_count is not None and accelerator_count < 1:
        raise ValueError(f"accelerator_count is {accelerator_count}; it must be at least 1")
    if accelerator_type is not None and accelerator_type.startswith("TPU"):
        raise ValueError(f"accelerator_type is {accelerator_type}; training runs on NVIDIA GPUs, not on TPUs")
    family = machine_type.rpartition("-")[0]
    if family in BUILT_IN:
        return _with_built_in(machine_type, BUILT_IN[family], accelerator_type, accelerator_count)
    if accelerator_type is None:
        if accelerator_count is not None:
            raise ValueError(f"accelerator_count is {accelerator_count}, but accelerator_type is not given")
        return Machine(machine_type, None, 0)
    homes = [name for name, kind in BUILT_IN.items() if kind == accelerator_type]
    count = accelerator_count or 1
    if homes and GENERAL.match(machine_type):
        raise ValueError(
            f"machine_type is {machine_type}, but {accelerator_type} comes only with {' and '.join(homes)} machines"
        )
    if accelerator_type in ATTACHED_COUNTS:
        if not machine_type.startswith("n1-"):
            raise ValueError(f"machine_type is {machine_type}, but {accelerator_type} can be added to n1 machines only")
        allowed = ATTACHED_COUNTS[accelerator_type]
        if count not in allowed:
            numbers = ", ".join(map(str, allowed))
            raise ValueError(f"accelerator_count is {count}; of {accelerator_type} it must be one of {numbers}")
    return Machine(machine_type, accelerator_type, count)


def _with_built_in(machine_type: str, kind: str, accelerator_type: str | None, count: int | None) -> Machine:
    if accelerator_type not in (None, kind):
        raise ValueError(f"accelerator_type is {accelerator_type}, but {machine_type} comes with {kind}")
    end = machine_type.rpartition("-")[2]
    numbered = re.fullmatch(r"(\d+)g", end)
    built_in = int(numbered[1]) if numbered else G2_COUNTS.get(int(end)) if end.isdigit() else None
    if built_in is not None and count not in (None, built_in):
        raise ValueError(f"accelerator_count is {count}, but {machine_type} comes with {built_in} {kind}")
    if built_in is None and count is None:
        raise ValueError(f"machine_type {machine_type} is not known here: add --accelerator_count")
    return Machine(machine_type, kind, built_in or count or 1)
