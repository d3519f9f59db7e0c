"""The flags of `dylora compare`: those of `dylora train`, and what is compared."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from dylo_moe.commands.compare.grid import Cell, grid_cells, plain
from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.evaluation.arguments import LOSSES, TASKS, EvalArguments
from dylo_moe.parsing.command_line import CommandLine, refusal_of
from dylo_moe.training.arguments import TrainerOptions
from dylo_moe.utils.checks import POSITIVE
from dylo_moe.utils.words import split_at_commas

BASE_ARM = "base"

OURS = "ours"

ARMS = {
    BASE_ARM: "the base",
    "lora_total": "one LoRA of equal total size",
    "lora_active": "one LoRA of equal active size",
    "uniform": "uniform routing",
    "random": "random routing",
    OURS: "ours",
}
"""The arms of a comparison in the order of the table, each with its title for readers."""

NOT_OFFERED = {
    "seed": "give --seeds",
    "router_policy": "every policy is an arm of its own; --arms chooses",
    "resume_from_checkpoint": "type the same command again, and it resumes",
    "wandb_checkpoint_artifact": "type the same command again, and it resumes",
    "early_stopping_patience": "all arms train on the same tokens",
    "early_stopping_threshold": "all arms train on the same tokens",
    "load_best_model_at_end": "it would choose a checkpoint by the very rows that the arms are compared on",
    "eval_benchmark": "every arm is evaluated once it is trained: --tasks",
    "eval_benchmark_steps": "every arm is evaluated once it is trained: --tasks",
    "include_num_input_tokens_seen": "tokens are always counted here",
}
"""Flags of `dylora train` that would have no effect or a wrong one here, each with the reason."""

REPLACED_BY = {
    "learning_rates": ("learning_rate",),
    "scales": ("lora_alpha", "shared_alpha"),
    "budgets": ("max_steps",),
}
"""Each list of values that are compared, with the flags of `dylora train` whose one value it replaces."""

SEARCH_SUBSET = 10.0
"""The percentage of rows that a grid is searched on, where --search_subset does not say another."""

OF_CODE = ("timeout_seconds", "memory_mib", "limit", "max_new_tokens")
"""Flags of `dylora eval` that have no meaning without a task that runs code."""

EVAL = {item.name: item for item in fields(EvalArguments)}


@dataclass
class CompareArguments:
    """The flags that `dylora compare` has besides those of `dylora train`.

    Raises:
        ValueError: for values out of range; all problems in one message.
    """

    seeds: list[str] = field(
        default_factory=lambda: ["1", "2", "3"],
        metadata={"help": "Seeds with each of which every arm is trained; a seed also decides what is held out."},
    )
    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": "The arms that are compared: " + ", ".join(ARMS) + "."}
    )
    tasks: list[str] = field(
        default_factory=lambda: [LOSSES],
        metadata={"help": "The evaluations: " + ", ".join(TASKS) + "; losses are always measured."},
    )
    learning_rates: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Learning rates to search (1e-3 2e-3 4e-3): every arm is trained with each, and compared at its "
            "own best, which is chosen on rows that are neither trained nor held out (--search_subset, here 10)."
        },
    )
    scales: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Scales to search with the learning rates (1 2 4): the factor s of an adapter's s B A x; alpha "
            "follows from it and the rank of each arm's adapters."
        },
    )
    budgets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Optimizer steps to compare at, rising (60 120 240): each is a training of its own with its own "
            "schedule. The grid is searched at the first."
        },
    )
    search_every_budget: bool = field(
        default=False, metadata={"help": "Search the grid at every budget, not at the first alone."}
    )
    timeout_seconds: float = field(
        default=EvalArguments.timeout_seconds, metadata=dict(EVAL["timeout_seconds"].metadata)
    )
    memory_mib: int = field(default=EvalArguments.memory_mib, metadata=dict(EVAL["memory_mib"].metadata))
    limit: int | None = field(default=None, metadata=dict(EVAL["limit"].metadata))
    max_new_tokens: int = field(default=EvalArguments.max_new_tokens, metadata=dict(EVAL["max_new_tokens"].metadata))

    def __post_init__(self) -> None:
        problems = self._take_grid()
        for name in ("seeds", "arms", "tasks"):
            setattr(self, name, list(dict.fromkeys(split_at_commas(getattr(self, name)))))
        if not self.seeds or not all(seed.isdigit() for seed in self.seeds):
            problems.append(f"seeds is {','.join(self.seeds) or 'empty'}; it must be whole numbers from 0 on")
        for name, known in (("arms", ARMS), ("tasks", TASKS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                problems.append(f"{name} has {', '.join(unknown)}; there are {', '.join(known)}")
        if not unknown and (OURS not in self.arms or len(self.arms) < 2):
            problems.append(f"arms is {','.join(self.arms)}; it must have {OURS}, and something to compare with")
        if problems:
            raise ValueError("; ".join(problems))
        self.arms = [arm for arm in ARMS if arm in self.arms]

    def _take_grid(self) -> list[str]:
        """Split the lists of the grid and the budgets, write each value in one way, and return what is wrong."""
        problems = []
        for name in REPLACED_BY:
            texts = split_at_commas(getattr(self, name))
            kind, is_right = ("whole numbers", _is_count) if name == "budgets" else ("finite numbers", _is_positive)
            wrong = [text for text in texts if not is_right(text)]
            if wrong:
                problems.append(f"{name} has {', '.join(wrong)}; it must be {kind} above 0")
                continue
            values = [float(text) for text in texts]
            setattr(self, name, [plain(value) for value in values])
            again = sorted({plain(value) for value in values if values.count(value) > 1})
            if again:
                problems.append(f"{name} has {', '.join(again)} more than once")
            elif name == "budgets" and values != sorted(values):
                problems.append(f"budgets is {' '.join(self.budgets)}; they must rise")
        if self.search_every_budget and not (self.budgets and (self.learning_rates or self.scales)):
            problems.append("search_every_budget is given without --budgets and a grid (--learning_rates, --scales)")
        return problems

    @property
    def has_grid(self) -> bool:
        """Whether each arm's learning rate or scale is searched."""
        return bool(self.learning_rates or self.scales)

    @property
    def cells(self) -> list[Cell]:
        """The cells of the grid; without one the single cell of the flags' own values."""
        return grid_cells([float(rate) for rate in self.learning_rates], [float(scale) for scale in self.scales])

    @property
    def steps(self) -> list[int | None]:
        """The budgets in optimizer steps; without any, None alone: the length of training that the flags say."""
        return [int(budget) for budget in self.budgets] or [None]

    @property
    def searched_steps(self) -> list[int | None]:
        """The budgets at which the grid is searched."""
        return self.steps if self.search_every_budget else self.steps[:1]

    @property
    def benchmarks(self) -> list[str]:
        """The tasks that run code."""
        return [task for task in self.tasks if task != LOSSES]


def _is_positive(text: str) -> bool:
    try:
        return POSITIVE.holds(float(text))
    except ValueError:
        return False


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def compare_refusal(name: str) -> str | None:
    """Why `dylora compare` does not offer a flag of that name; None where it does."""
    return NOT_OFFERED.get(name) or refusal_of(name)


COMPARE_LINE = CommandLine(
    prog="dylora compare",
    kinds=(*TRAIN_CONFIGS, CompareArguments),
    usage="dylora compare [--config RECIPE] [--FLAG VALUE ...]",
    description="Train and evaluate on the same data, tokens and seeds: the base, one LoRA of equal total parameters, "
    "one of equal active parameters, uniform routing, random routing, and ours; one table says whether ours wins. With "
    "--learning_rates and --scales each arm is compared at its own best, and with --budgets at several lengths. "
    "Started again after a kill, it resumes where it was.",
    refusal=compare_refusal,
    trainer=TrainerOptions,
    examples=(
        "dylora compare --config compare --output_dir runs/compare",
        "dylora compare --config compare --seeds 1 2 3 --arms lora_total ours --output_dir runs/seeds",
        "dylora compare --config compare --learning_rates 1e-3 2e-3 4e-3 --scales 1 2 4 --output_dir runs/searched",
        "dylora compare --config compare --learning_rates 1e-3 2e-3 --budgets 60 120 240 --output_dir runs/budgets",
    ),
)
