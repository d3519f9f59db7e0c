"""The command `dylora export`: write a checkpoint for engines that do not route each token, and what that loses."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.commands.export import losses
from dylo_moe.commands.export.adapters import adapters_record, padded_adapters, stock_adapters
from dylo_moe.commands.export.arguments import MEASURED, MERGED, VLLM, mixture_weights
from dylo_moe.commands.export.losses import (
    BY_BASE,
    PER_REQUEST,
    PLAIN,
    Measured,
    loss_in_words,
    measure_requests,
    measure_routed,
    routed_shares,
)
from dylo_moe.commands.export.merged import bake
from dylo_moe.commands.export.page import NOT_MEASURED, merged_page, peft_page, vllm_page
from dylo_moe.commands.export.record import Export, of_prompts, of_quantised, origin
from dylo_moe.commands.export.request import ExportRequest
from dylo_moe.evaluation.held_out import HeldOut, held_out
from dylo_moe.evaluation.losses import measure
from dylo_moe.model.checkpoint import ADAPTER_FILES, named_base, read_manifest
from dylo_moe.model.manifest import expert_problem
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.model.saving import save_tensors
from dylo_moe.routing.config import SHARED
from dylo_moe.utils.atomic_files import check_free, listing, write_json
from dylo_moe.utils.markdown import Markdown, markdown_table
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.whole_folders import whole_folder
from dylo_moe.utils.write_errors import as_os_errors

RECORD, PAGE = "dylora_export.json", "README.md"


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
    """Export one adapter for each expert, for `--to vllm` and `--to peft`."""
    for_vllm = export.options.to == VLLM
    adapters = padded_adapters(export) if for_vllm else stock_adapters(export)
    measured = None
    if not export.options.no_measure:
        model, tokenizer, held = ready(export)
        size, adapts_prompts = export.options.batch_size, export.adapts_prompts
        measured = measure_requests(
            model, held, tokenizer, batch_size=size, screen=export.screen, adapts_prompts=adapts_prompts
        )
    with whole_folder(export.output) as folder:
        for name, adapter in adapters.items():
            (folder / name).mkdir()
            save_tensors(adapter.state, folder / name / ADAPTER_FILES[1])
            text = json.dumps(adapter.config, indent=2, sort_keys=True) + "\n"
            (folder / name / ADAPTER_FILES[0]).write_text(text, encoding="utf-8")
        record = {**adapters_record(export, adapters), "measured": told(export, measured)}
        record["files"] = listing(folder)
        write_json(folder / RECORD, record)
        write_page = vllm_page if for_vllm else peft_page
        page = write_page(record, page_of_losses(export, measured, PER_REQUEST))
        (folder / PAGE).write_text(page, encoding="utf-8")
    show_export_losses(export, measured, PER_REQUEST)
    for note in [f"{item['name']}: {note}" for item in record["experts"] for note in item["notes"]] + record["notes"]:
        export.screen.note(note)
    if for_vllm:
        export.screen.say("To serve them (README.md there says how to ask):")
        export.screen.copyable(f"cd {shlex.quote(str(export.output))}\n{record['serve_command']}")


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
        if export.adapts_prompts and options.expert is not None:
            with model.route_to(options.expert):
                way = f"{options.expert}, {BY_BASE}"
                ways[way] = measure(model, held, tokenizer, batch_size=options.batch_size, screen=export.screen)
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
            "notes": [
                *of_quantised(
                    export, "here they are merged into the unquantised weights, which differ by that rounding"
                ),
                *of_prompts(export, "merged weights are the same for every token"),
            ],
            "measured": told(export, measured),
            "files": listing(folder),
        }
        write_json(folder / RECORD, record)
        (folder / PAGE).write_text(merged_page(record, page_of_losses(export, measured, PLAIN)), encoding="utf-8")
    for note in record["notes"]:
        export.screen.note(note)
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
