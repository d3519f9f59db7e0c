"""The adapters of an export, one for each expert: as vLLM serves them, or as stock PEFT loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dylo_moe.commands.export.arguments import VLLM
from dylo_moe.commands.export.padded_adapter import PaddedAdapter, padded, ranks_of
from dylo_moe.commands.export.record import Export, of_prompts, of_quantised, origin
from dylo_moe.commands.export.serving_rules import VLLM_VERSION, next_server_rank, rule_problems, serve_command
from dylo_moe.model.checkpoint import ADAPTER_FILES
from dylo_moe.routing.config import BASE, SHARED
from dylo_moe.routing.turn_tokens import TurnTokens


def stock_adapters(export: Export) -> dict[str, PaddedAdapter]:
    """Every expert as it is in the checkpoint, or together with the shared one, where there is one."""
    shared = read_adapter_files(export, SHARED) if SHARED in export.manifest else None
    turns, found = export.manifest["router"].get("turns"), {}
    for entry in served(export):
        config, state = read_adapter_files(export, entry["name"])
        if turns is not None:  # which checkpoints of older versions do not say
            config["alora_invocation_tokens"] = list(TurnTokens(**turns).adapted)
        if shared is not None and entry["name"] != SHARED:
            found[entry["name"]] = padded(config, state, shared=shared)
        else:
            found[entry["name"]] = PaddedAdapter(config, state, ranks_of(state), [])
    return found


def padded_adapters(export: Export) -> dict[str, PaddedAdapter]:
    """Prepare every expert for vLLM, each together with the shared one, where there is one.

    Raises:
        ValueError: with every reason why some cannot be served.
    """
    found, problems = {}, []
    shapes = export.base["fingerprint"]["tensors"]
    shared = read_adapter_files(export, SHARED) if SHARED in export.manifest else None
    for entry in served(export):
        beside = None if entry["name"] == SHARED else shared
        try:
            config, state = read_adapter_files(export, entry["name"])
            adapter = padded({**config, "alora_invocation_tokens": None}, state, shared=beside)
            reasons = rule_problems(adapter.config, adapter.state, base_shapes=shapes)
        except ValueError as error:
            reasons = [str(error)]
        problems += [f"{entry['name']}: {reason}" for reason in reasons]
        if not reasons:
            found[entry["name"]] = adapter
    if problems:
        raise ValueError(f"checkpoint {export.checkpoint} cannot be served by vLLM: " + "; ".join(problems))
    return found


def read_adapter_files(export: Export, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter's config and its tensors."""
    folder = export.checkpoint / "experts" / name
    config = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    return config, load_file(folder / ADAPTER_FILES[1])


def served(export: Export) -> list[dict[str, Any]]:
    """The entries of the experts that become adapters: all that a request may be sent to. The shared one is one of them
    if `base` is a member of the pool, of whose requests it computes all there is."""
    manifest = export.manifest
    has_base = BASE in (manifest.get("growth") or {"members": []})["members"]
    return [*manifest["experts"], *([manifest[SHARED]] if SHARED in manifest and has_base else [])]


def adapters_record(export: Export, adapters: Mapping[str, PaddedAdapter]) -> dict[str, Any]:
    """Make the content of dylora_export.json for adapters, except for their files and losses."""
    base, max_rank = export.base, max(adapter.config["r"] for adapter in adapters.values())
    experts = []
    for entry in served(export):
        adapter = adapters[entry["name"]]
        experts.append(
            {
                "name": entry["name"],
                "folder": entry["name"],
                "rank": adapter.config["r"],
                "original_ranks": adapter.ranks,
                "lora_alpha": adapter.config["lora_alpha"],
                "targets": sorted({key.split(".")[-3] for key in adapter.state}),
                "skill": entry["skill"],
                "state": "mature" if entry["mature"] else "nascent",
                "notes": adapter.notes,
            }
        )
    if export.options.to != VLLM:
        invocation = next(iter(adapters.values())).config.get("alora_invocation_tokens")
        notes = of_quantised(export, "load the base in the same way, or in full, which differs by that rounding")
        return {**origin(export, "peft"), "invocation": invocation, "experts": experts, "notes": notes}
    command = serve_command(base["id"], base["revision"], experts=list(adapters), max_rank=max_rank)
    return {
        **origin(export, "vllm"),
        "vllm": {"rules_of": VLLM_VERSION, "max_lora_rank": next_server_rank(max_rank), "max_loras": len(adapters)},
        "serve_command": command,
        "experts": experts,
        "notes": [
            *of_quantised(export, "vLLM serves the base unquantised unless --quantization says otherwise"),
            *of_prompts(export, "vLLM applies an adapter to the whole request"),
        ],
    }
