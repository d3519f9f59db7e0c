"""The flags of `dylora eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dylo_moe.evaluation.names import BENCHMARKS, STYLES
from dylo_moe.evaluation.sandbox.isolation import BUBBLEWRAP, SANDBOXES, Limits
from dylo_moe.utils.checks import COUNT, PERCENT, POSITIVE, SEED, Range, range_problems
from dylo_moe.utils.words import split_at_commas

LOSSES = "losses"

TASKS = (LOSSES, *BENCHMARKS)

EVALPLUS = "evalplus"

DEFAULT_K = (1, 10, 100)

ONLY_FOR_LOSSES = ("datasets", "eval_subset")

ONLY_FOR_SAMPLES = ("temperature", "top_p", "k")

ONLY_FOR_CODE = (  # noqa: SIM905
    "prompt num_samples limit max_new_tokens export allow_code_execution sandbox timeout_seconds memory_mib"
).split() + list(ONLY_FOR_SAMPLES)

RANGES = {
    "num_samples": Range(0, is_whole=True),
    "temperature": POSITIVE,
    "top_p": Range(0, is_open=True, most=1),
    "limit": COUNT,
    "batch_size": COUNT,
    "max_new_tokens": COUNT,
    "seed": SEED,
    "eval_subset": PERCENT,
}


@dataclass
class EvalArguments:
    """The flags of `dylora eval` that follow the checkpoint.

    Raises:
        ValueError: for values out of range; one message holds all problems.
    """

    tasks: list[str] = field(
        default_factory=lambda: [LOSSES],
        metadata={"help": "What to evaluate, comma-separated: losses, humaneval, mbpp."},
    )
    expert: str | None = field(
        default=None, metadata={"help": "Send every token to this expert; base: to the unchanged model."}
    )
    prompt: str = field(
        default=STYLES[0],
        metadata={
            "help": "How problems are asked: as a text to continue, or as a question in the base's chat template.",
            "choices": list(STYLES),
        },
    )
    num_samples: int = field(default=0, metadata={"help": "Samples of each problem, besides the greedy answer."})
    temperature: float = field(
        default=0.8, metadata={"help": "Temperature of the sampling; the greedy answer is always generated too."}
    )
    top_p: float = field(
        default=0.95, metadata={"help": "Sample from the smallest set of tokens with this probability."}
    )
    k: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The k of pass@k of the samples, comma-separated; default: of 1, 10, 100 what num_samples allows."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first so many problems of each benchmark."})
    batch_size: int = field(default=16, metadata={"help": "Answers generated together, or rows of a loss."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    seed: int = field(default=42, metadata={"help": "Seed of the sampling and of the intervals."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Whether the base computes in bfloat16; default: as it was trained."}
    )
    datasets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Datasets of the losses; default: those of the checkpoint's run, with its very held-out rows."
        },
    )
    eval_subset: float | None = field(
        default=None, metadata={"help": "Percent of each dataset's held-out rows; default: as in the checkpoint's run."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "A local mirror of datasets and benchmarks, as in dylora train."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where results are written; default: evaluation/, beside the checkpoint."}
    )
    export: str | None = field(default=None, metadata={"help": "Also write the samples in this form: evalplus."})
    allow_code_execution: bool = field(
        default=False,
        metadata={"help": "Run what the model writes, each program in isolation. humaneval and mbpp need it."},
    )
    sandbox: str = field(
        default=BUBBLEWRAP,
        metadata={
            "help": "How generated code is isolated; rlimits_only isolates nothing, it only bounds time and memory.",
            "choices": list(SANDBOXES),
        },
    )
    timeout_seconds: float = field(default=Limits.timeout_seconds, metadata={"help": "Longest run of one program."})
    memory_mib: int = field(default=Limits.memory_mib, metadata={"help": "Most memory of one program, in MiB."})

    def __post_init__(self) -> None:
        self.tasks, self.k, self.datasets = ([*_split(values)] for values in (self.tasks, self.k, self.datasets))
        problems = []
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            problems.append(f"tasks is {', '.join(unknown) or 'empty'}; it must be some of {', '.join(TASKS)}")
        problems += range_problems(vars(self), RANGES)
        if self.export not in (None, EVALPLUS):
            problems.append(f"export is {self.export!r}; it must be {EVALPLUS}, or be left out")
        if self.output_dir is not None and not self.output_dir.strip():
            problems.append(f"output_dir is {self.output_dir!r}; name a folder")
        bad = [k for k in self.k if not k.isdigit() or not 1 <= int(k) <= max(self.num_samples, 1)]
        if bad:
            problems.append(f"k is {', '.join(bad)}; it must be 1 to num_samples, which is {self.num_samples}")
        try:
            self.limits  # noqa: B018  # the object checks its values
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def benchmarks(self) -> list[str]:
        """The tasks that run generated code."""
        return [task for task in BENCHMARKS if task in self.tasks]

    @property
    def limits(self) -> Limits:
        """The limits on what one program may use."""
        return Limits(timeout_seconds=self.timeout_seconds, memory_mib=self.memory_mib)

    @property
    def sampled_k(self) -> list[int]:
        """The values of k for pass@k of the samples, in ascending order."""
        return sorted({int(k) for k in self.k}) or [k for k in DEFAULT_K if k <= self.num_samples]


def _split(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(split_at_commas(values)))
