"""Find the base model by its name, and load it.

A name is a model on the Hugging Face hub, a local folder, or `smollm2-135m` or `gemma3-270m`: real small models that
come from the Python package index, for machines that reach no hub and for trying things out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dylo_moe.base.packaged_models import BaseUnavailableError, resolve_base
from dylo_moe.base.packages import EMBEDDED_BASE, PACKAGED_MODELS
from dylo_moe.utils.hub import first_line, no_way_to_hub
from dylo_moe.utils.install import how_to_install
from dylo_moe.utils.words import listed

NEEDS_BITSANDBYTES = f"a base in 4 or 8 bits needs bitsandbytes: {how_to_install('quantized')}"


def load_base(name: str, *, revision: str | None = None, accept_terms: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load the causal language model `name`, in evaluation mode.

    Args:
        name: a hub id, a local folder, `smollm2-135m` or `gemma3-270m`. The model remembers this name, so a checkpoint
            never records the cache folder of one machine.
        revision: branch, tag or commit on the hub; only for a hub id.
        accept_terms: you accept the Gemma Terms of Use, without which `gemma3-270m` is not fetched.
        kwargs: passed on to `AutoModelForCausalLM.from_pretrained`, for example `dtype`, or `quantization_config`
            (see `four_bit`).

    Raises:
        BaseUnavailableError: there is no such model, it cannot be reached from here, it lacks weights, or a package
            that it needs is not installed.
        ValueError: a revision was given for something that has none, or a `quantization_config` for a base whose
            files are quantised already.
    """
    if kwargs.get("quantization_config") is not None:
        config = load_config(name, revision=revision, accept_terms=accept_terms)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"base {name!r} is quantised already; leave load_in_4bit or quantization_config out")
    kwargs["output_loading_info"] = True
    model, found = _load(AutoModelForCausalLM, name, revision, kwargs, accept_terms=accept_terms)
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing:
        raise BaseUnavailableError(
            f"base {name!r} is not whole: its files have no value of the right shape for {listed(missing)}, and a "
            "frozen base never learns one"
        )
    model.name_or_path = name
    model.config.name_or_path = name
    return model


def load_base_without_weights(
    name: str,
    *,
    dtype: torch.dtype | str,
    revision: str | None = None,
    accept_terms: bool = False,
    read_config: Callable[[str], PretrainedConfig] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Make the base `name` on the meta device: its modules and shapes, of which only the config is read.

    Args:
        dtype: "auto": what the config says, else fp32.
        revision, accept_terms: as in `load_base`; only without `read_config`.
        read_config: gives the config of the base; None: `load_config`.
        options: passed on to `AutoModelForCausalLM.from_config`, for example `attn_implementation`.

    Raises:
        BaseUnavailableError: as `load_base`.
    """
    if read_config is None:
        config = load_config(name, revision=revision, accept_terms=accept_terms)
    else:
        config = read_config(name)
    stored = config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=stored if isinstance(dtype, str) else dtype, **options)
    model.name_or_path = name
    model.config.name_or_path = name
    return model


def four_bit(compute_dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` with which `load_base` keeps the linears of a base in 4 bits.

    NormalFloat with double quantisation: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3.

    Args:
        compute_dtype: the dtype of the products with the weights, which are unpacked for each product.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
    }


def load_config(name: str, *, revision: str | None = None, accept_terms: bool = False) -> PretrainedConfig:
    """Load the config of the base `name`, without weights. Args and Raises: as `load_base`."""
    return _load(AutoConfig, name, revision, {}, accept_terms=accept_terms)


def load_tokenizer(name: str, *, revision: str | None = None, accept_terms: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base `name`; one without a padding token pads with its end-of-text token.

    Args and Raises: as `load_base`.
    """
    tokenizer = _load(AutoTokenizer, name, revision, {}, accept_terms=accept_terms)
    tokenizer.name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(
    auto_class: Any, name: str, revision: str | None, kwargs: dict[str, Any], *, accept_terms: bool = False
) -> Any:
    """Call `auto_class.from_pretrained`, and turn every failure for lack of files into one clear error."""
    on_hub = name not in PACKAGED_MODELS and not _is_local(name)
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
    resolved = resolve_base(name, accept_terms=accept_terms)
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
    """Whether `name` is a folder here. Raises if that folder holds no model, or if it is a path to nothing."""
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


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _hub_reason(name: str, revision: str | None, error: BaseException) -> str:
    """The message why the hub gave no model, and what to do."""
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
