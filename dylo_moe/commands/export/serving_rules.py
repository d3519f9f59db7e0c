"""The rules of vLLM for adapters, and the flags that its server needs for them.

The rules were read in the source of vLLM 0.33.0: vllm/lora/peft_helper.py, lora_model.py, utils.py, and
vllm/config/lora.py."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.base.packages import PACKAGED_MODELS
from dylo_moe.routing.config import BASE
from dylo_moe.utils.words import listed

VLLM_VERSION = "0.33.0"
"""The version of vLLM whose rules these are."""

SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank can have. An adapter's rank may be any up to it; vLLM pads it with zeros in
memory."""

NOT_SERVED = {
    "use_dora": "DoRA",
    "modules_to_save": "trained copies of base modules",
    "lora_bias": "biases of adapters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "adapters on raw parameters",
}
"""Fields of an adapter's config that vLLM refuses when they are set, and what they stand for."""


def next_server_rank(rank: int) -> int:
    """The smallest value of --max-lora-rank that is at least `rank`.

    Raises:
        ValueError: for a rank above the largest value.
    """
    found = next((allowed for allowed in SERVER_RANKS if allowed >= rank), None)
    if found is None:
        raise ValueError(f"rank {rank} is above {SERVER_RANKS[-1]}, the largest that vLLM serves")
    return found


def rule_problems(
    config: Mapping[str, Any], state: Mapping[str, Tensor], *, base_shapes: Mapping[str, Sequence[int]]
) -> list[str]:
    """List the reasons why vLLM would refuse an adapter or serve it wrongly; empty where there are none.

    Args:
        config: the content of the adapter's adapter_config.json.
        state: the tensors of the adapter's adapter_model.safetensors.
        base_shapes: the shapes of the base's tensors, by their names.
    """
    problems = [
        f"{name} is {config[name]!r}: vLLM takes no {what}" for name, what in NOT_SERVED.items() if config.get(name)
    ]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}: vLLM takes no biases of adapters")
    if _transposed(state, base_shapes):
        problems.append("its linears are Conv1D, as in GPT-2, whose class in vLLM takes no adapters; use --to merged")
    if config.get("rank_pattern"):
        problems.append("rank_pattern is set: older versions of vLLM read r for every linear")
    if not isinstance(config.get("target_modules"), list):
        problems.append(f"target_modules is {config.get('target_modules')!r}; it must be a list of names")
    if config["r"] not in SERVER_RANKS:
        problems.append(f"r is {config['r']}; it must be one of {', '.join(map(str, SERVER_RANKS))}")
    foreign = [name for name in state if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign:
        problems.append(f"the adapter has tensors other than A and B of a linear: {listed(foreign)}")
    fused = [name for name in state if ".experts." in name]
    if fused:
        verb = "is" if len(fused) == 1 else "are"
        problems.append(f"{listed(fused)} {verb} inside a mixture-of-experts block, whose names vLLM reads differently")
    ranks = {
        name: tensor.shape[0 if ".lora_A." in name else 1] for name, tensor in state.items() if name not in foreign
    }
    other = [f"{name} (rank {rank})" for name, rank in ranks.items() if rank != config["r"]]
    if other:
        problems.append(f"r is {config['r']}, but these have another rank: {listed(other)}")
    return problems


def _transposed(state: Mapping[str, Tensor], base_shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the base stores its linears as [in, out]; adapter configs need not say so."""
    for name, tensor in state.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rows, columns = (*base_shapes.get(f"{module}.weight", ()), 0, 0)[:2]
            if rows == tensor.shape[1] != columns > 0:
                return True
    return False


def serve_command(base: str, revision: str | None, *, experts: Sequence[str], max_rank: int) -> str:
    """Write the command that serves a base as `base`, and its experts under their own names.

    The command is for a POSIX shell, in the folder that has a folder for each expert, named as the expert.

    Args:
        base: the base, as a checkpoint names it.
        revision: the revision of the base on the hub.
        experts: the names of the experts.
        max_rank: the largest rank among the experts.
    """
    name = shlex.quote(str(Path(base).resolve()) if Path(base).is_dir() else base)
    if base in PACKAGED_MODELS:  # vLLM does not know this name, so the command resolves it to a folder
        code = f"from dylo_moe.base.packaged_models import resolve_base; print(resolve_base('{base}'))"
        name = f'"$(python -c "{code}")"'
    lines = [f"vllm serve {name} --served-model-name {BASE}"]
    if revision is not None:
        lines.append(f"--revision {shlex.quote(revision)}")
    lines.append(f"--enable-lora --max-loras {len(experts)} --max-lora-rank {next_server_rank(max_rank)}")
    lines.append("--lora-modules " + " ".join(f"{expert}=./{expert}" for expert in experts))
    return " \\\n    ".join(lines)
