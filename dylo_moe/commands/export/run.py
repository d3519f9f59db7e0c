"""The command `dylora export`: write a checkpoint for engines that do not route each token, and what that loses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.commands.export import losses
from dylo_moe.commands.export.arguments import MEASURED, MERGED, ExportArguments, mixture_weights
from dylo_moe.commands.export.losses import (
    PER_REQUEST,
    PLAIN,
    Measured,
    loss_in_words,
    measure_requests,
    measure_routed,
    routed_shares,
)
from dylo_moe.commands.export.merged import bake
from dylo_moe.commands.export.padded_adapter import PaddedAdapter, padded
from dylo_moe.commands.export.page import NOT_MEASURED, merged_page, vllm_page
from dylo_moe.commands.export.request import ExportRequest
from dylo_moe.commands.export.serving_rules import VLLM_VERSION, next_server_rank, rule_problems, serve_command
from dylo_moe.evaluation.held_out import HeldOut, held_out
from dylo_moe.evaluation.losses import measure
from dylo_moe.model.checkpoint import ADAPTER_FILES, named_base, read_manifest
from dylo_moe.model.manifest import expert_problem
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.model.saving import save_tensors
from dylo_moe.routing.config import BASE, SHARED
from dylo_moe.utils.atomic_files import check_free, listing, sha256, write_json
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.markdown import Markdown, markdown_table
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.whole_folders import whole_folder
from dylo_moe.utils.write_errors import as_os_errors

EXPORT_FORMAT_VERSION = 1

RECORD, PAGE = "dylora_export.json", "README.md"


class Export(NamedTuple):
    """One call of `dylora export`: its checkpoint, flags and output."""

    checkpoint: Path
    manifest: dict[str, Any]
    options: ExportArguments
    output: Path
    screen: Screen

    @property
    def base(self) -> dict[str, Any]:
        """The entry of the manifest that describes the base."""
        return self.manifest["base"]


def export(request: ExportRequest) -> Path:
    """Export as the flags say, and print what is lost; returns the output folder.

    Raises:
        CheckpointError: for an incomplete checkpoint.
        ValueError: for an output folder that is not empty, adapters that vLLM does not serve, an unknown expert, or
            data that is not available.
    """
    transformers_logging.disable_progress_bar()
    options, output = request.options, Path(request.options.output)
    manifest = read_manifest(request.checkpoint)
    check_free(output)
    export = Export(Path(request.checkpoint), manifest, options, output, Screen("export"))
    named_base(request.checkpoint, manifest)
    if options.to == MERGED:
        export_merged(export)
    else:
        export_adapters(export)
    export.screen.result("exported to", output)
    return output


# One adapter for each expert.


def export_adapters(export: Export) -> None:
    """Export one adapter for each expert, for `--to vllm`."""
    adapters = padded_adapters(export)
    measured = None
    if not export.options.no_measure:
        model, tokenizer, held = ready(export)
        measured = measure_requests(model, held, tokenizer, batch_size=export.options.batch_size, screen=export.screen)
    with whole_folder(export.output) as folder:
        for name, adapter in adapters.items():
            (folder / name).mkdir()
            save_tensors(adapter.state, folder / name / ADAPTER_FILES[1])
            text = json.dumps(adapter.config, indent=2, sort_keys=True) + "\n"
            (folder / name / ADAPTER_FILES[0]).write_text(text, encoding="utf-8")
        record = {**adapters_record(export, adapters), "measured": told(export, measured)}
        record["files"] = listing(folder)
        write_json(folder / RECORD, record)
        page = vllm_page(record, page_of_losses(export, measured, PER_REQUEST))
        (folder / PAGE).write_text(page, encoding="utf-8")
    show_export_losses(export, measured, PER_REQUEST)
    for note in [f"{item['name']}: {note}" for item in record["experts"] for note in item["notes"]] + record["notes"]:
        export.screen.note(note)
    export.screen.say("To serve them (README.md there says how to ask):")
    export.screen.copyable(f"cd {shlex.quote(str(export.output))}\n{record['serve_command']}")


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
            adapter = padded(*read_adapter_files(export, entry["name"]), shared=beside)
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
    command = serve_command(base["id"], base["revision"], experts=list(adapters), max_rank=max_rank)
    return {
        **origin(export, "vllm"),
        "vllm": {"rules_of": VLLM_VERSION, "max_lora_rank": next_server_rank(max_rank), "max_loras": len(adapters)},
        "serve_command": command,
        "experts": experts,
        "notes": of_quantised(export, "vLLM serves the base unquantised unless --quantization says otherwise"),
    }


# One plain model.


def export_merged(export: Export) -> None:
    """Export one plain model, for `--to merged`."""
    options, names = export.options, [entry["name"] for entry in export.manifest["experts"]]
    if problem := expert_problem(export.manifest, options.expert, or_base=False):
        raise ValueError(problem)
    weights = {} if options.expert is None else {options.expert: 1.0}
    if options.mixture not in (None, MEASURED):
        weights = mixture_weights(str(options.mixture), names)
    measured, held = None, None
    if not options.no_measure:
        model, tokenizer, held = ready(export)
        ways = measure_routed(model, held, tokenizer, batch_size=options.batch_size, screen=export.screen)
        measured = Measured(ways, list(held.notes), {})
        weights = weights or routed_shares(model, held, tokenizer, batch_size=options.batch_size)
        del model
    with whole_folder(export.output) as folder:
        write_merged(export, folder, weights)
        if measured is not None and held is not None:
            measured.ways[PLAIN] = losses_of_plain(folder, held, export)
        record = {
            **origin(export, "merged"),
            "weights": {**weights, **({SHARED: 1.0} if SHARED in export.manifest else {})},
            "dtype": json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"],
            "notes": of_quantised(
                export, "here they are merged into the unquantised weights, which differ by that rounding"
            ),
            "measured": told(export, measured),
            "files": listing(folder),
        }
        write_json(folder / RECORD, record)
        (folder / PAGE).write_text(merged_page(record, page_of_losses(export, measured, PLAIN)), encoding="utf-8")
    mixed = ", ".join(f"{name} {weight:.3g}" for name, weight in record["weights"].items())
    export.screen.file("merged", f"{mixed}, in {record['dtype']}")
    show_export_losses(export, measured, PLAIN)


def write_merged(export: Export, folder: Path, weights: Mapping[str, float]) -> None:
    """Write the plain model and its tokenizer into a folder."""
    base, dtype = export.base, export.options.dtype
    loaded = load_base(base["id"], revision=base["revision"], dtype="auto")
    model = DyLoRAMoE.from_pretrained(str(export.checkpoint), base=loaded)
    plain = bake(model, weights, dtype=None if dtype is None else getattr(torch, dtype))
    with as_os_errors(folder):
        plain.save_pretrained(str(folder))
    load_tokenizer(base["id"], revision=base["revision"]).save_pretrained(str(folder))


def losses_of_plain(folder: Path, held: HeldOut, export: Export) -> dict[str, Any]:
    """Measure the held-out losses of the plain model in a folder."""
    plain = load_base(str(folder), dtype="auto")
    smallest = LoraConfig(r=1, lora_alpha=1, lora_dropout=0.0, target_modules="all-linear")
    model = DyLoRAMoE.from_base(plain, num_experts=1, lora=smallest).to(device())  # `measure` runs only a DyLoRAMoE
    with model.route_to(None):
        tokenizer, size = load_tokenizer(str(folder)), export.options.batch_size
        return measure(model, held, tokenizer, batch_size=size, screen=export.screen, what="the merged model")


# Shared by both kinds of export.


def ready(export: Export) -> tuple[DyLoRAMoE, PreTrainedTokenizerBase, HeldOut]:
    """Load the model as it was trained, and the rows to measure it on.

    The rows are read first, because they may be missing, and loading the model takes longer.
    """
    options, base = export.options, export.base
    tokenizer = load_tokenizer(base["id"], revision=base["revision"])
    try:
        held = held_out(
            export.checkpoint,
            tokenizer,
            datasets=options.datasets or None,
            data_dir=options.data_dir,
            eval_subset=options.eval_subset,
            seed=options.seed,
        )
    except ValueError as error:
        raise ValueError(f"{error} (--no_measure exports without saying what is lost)") from error
    trained = (export.manifest.get("training") or {}).get("settings", {})
    bf16 = bool(trained.get("bf16")) if options.bf16 is None else options.bf16
    model = DyLoRAMoE.from_pretrained(str(export.checkpoint), dtype=torch.bfloat16 if bf16 else "auto").eval()
    return model if model.device.type == device() else model.to(device()), tokenizer, held


def device() -> str:
    """The device on which losses are measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def origin(export: Export, kind: str) -> dict[str, Any]:
    """Make the part of the record that both kinds of export share."""
    checkpoint = {"sha256": sha256(export.checkpoint / MANIFEST)}
    base = {name: export.base[name] for name in ("id", "revision")} | {"quantization": export.base.get("quantization")}
    return {"format_version": EXPORT_FORMAT_VERSION, "kind": kind, "checkpoint": checkpoint, "base": base}


def of_quantised(export: Export, what: str) -> list[str]:
    """Make a note where the experts were trained on quantised weights; `what` says what follows from that."""
    if not export.base["fingerprint"]["quantized"]:
        return []
    return [f"The experts were trained on a base whose weights were quantised; {what}."]


def told(export: Export, measured: Measured | None) -> dict[str, Any] | None:
    """Write the losses as JSON values; None where they were not measured."""
    return None if measured is None else losses.losses_as_json(measured, seed=export.options.seed)


def page_of_losses(export: Export, measured: Measured | None, way: str) -> str:
    """Write the part of a README about the losses, as Markdown."""
    if measured is None:
        return NOT_MEASURED
    seed = export.options.seed
    sentences = [loss_in_words(measured, way, seed=seed)] if way in measured.ways else []
    notes = [f"- {note}" for note in measured.notes]
    head, lines = losses.table_of(measured, seed=seed)
    rows = [
        [way, *(Markdown(cell if isinstance(cell, str) else " ".join(cell)) for cell in cells)] for way, *cells in lines
    ]
    table = markdown_table(head, rows, right=range(1, len(head)))
    return "\n\n".join(
        [
            *sentences,
            f"{losses.TITLE[0].upper()}{losses.TITLE[1:]}:",
            table,
            *(["\n".join(notes)] if notes else []),
        ]
    )


def show_export_losses(export: Export, measured: Measured | None, way: str) -> None:
    """Print the losses of an export, or that they were not measured."""
    if measured is None:
        export.screen.warn(NOT_MEASURED.replace("*", ""))
        return
    losses.show_served_losses(export.screen, measured, seed=export.options.seed)
    if way in measured.ways:
        export.screen.say(loss_in_words(measured, way, seed=export.options.seed))
