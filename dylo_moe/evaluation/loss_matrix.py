"""The loss matrix of continual learning: the held-out loss of every skill after every stage, and its figures.

R[i, s] is the loss of skill s after stage i, in nats per token, R[base, s] that of the base alone, and T the last
stage. l(s) is the last stage that taught s, and f(s) the first one (`Matrix.taught`). Papers on continual learning
define such figures for accuracies, where more is better; here R is a loss, so the sign of a difference is changed
where a higher figure is to be better. A cell that was not measured is absent, never 0: a figure that needs
it has None for that skill and says over how many skills its mean is. A loss that is not finite is NaN, and so is
every mean that holds it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dylo_moe.continual.config import CONSOLIDATED, GROWN, REPORTED, SKIPPED
from dylo_moe.utils.atomic_files import write_whole
from dylo_moe.utils.checks import is_number

MATRIX = "matrix.json"

TRAINING = (GROWN, CONSOLIDATED)
"""The actions of a stage's decision that train an expert: a new one, or that of a known skill."""

ACTIONS = (*TRAINING, SKIPPED, REPORTED)
"""All actions of a decision. The last two train nothing: known data is skipped, new data is reported with growth
off."""

CELLS = ("losses", "alone", "accuracy")
"""The fields of a stage that hold a number for each skill."""

MAX_PROBLEMS = 8
"""The most problems of one file that the message which refuses it names."""


@dataclass
class Stage:
    """The measurements after one stage."""

    name: str
    """The name of the stage's data: a skill, or a chunk of an unlabelled stream."""
    losses: dict[str, float]
    """The held-out loss of each skill and unlearned text with routing, in nats per token; NaN if not finite."""
    alone: dict[str, float] = field(default_factory=dict)
    """The same loss with every token sent to the skill's own expert, for skills that have one."""
    accuracy: dict[str, float] = field(default_factory=dict)
    """The share of held-out tokens sent to the skill's own expert, or for unlearned text to the base."""
    seconds: float = 0.0
    tokens: int = 0
    decision: dict[str, Any] = field(default_factory=dict)
    """A `SkillDecision` as JSON, with further facts of the stream; empty if no decision was made."""

    @property
    def has_trained(self) -> bool:
        """Whether the stage trained an expert; a stage without a decision did."""
        return self.decision.get("action") in (None, *TRAINING)


@dataclass(frozen=True)
class Figure:
    """One number for each skill that the figure applies to; None if a cell that it needs was not measured."""

    values: dict[str, float | None]
    is_higher_better: bool = False

    @property
    def known(self) -> dict[str, float]:
        """The numbers of the skills whose cells were measured."""
        return {skill: value for skill, value in self.values.items() if value is not None}

    @property
    def mean(self) -> float | None:
        """The mean over the known numbers; None if there are none."""
        return math.fsum(self.known.values()) / len(self.known) if self.known else None

    @property
    def worst(self) -> tuple[str, float] | None:
        """The worst number as (skill, value), the first one of equals; NaN is worse than any number."""
        sign = -1 if self.is_higher_better else 1
        badness = {skill: math.inf if math.isnan(value) else sign * value for skill, value in self.known.items()}
        return max(self.known.items(), key=lambda item: badness[item[0]]) if badness else None


@dataclass
class Matrix:
    """Losses of skills after stages, with the base's as the first row.

    The order of `skills` is that of the columns. `unlearned` are texts that are never trained: the base's own.
    """

    skills: list[str]
    unlearned: list[str] = field(default_factory=list)
    base: dict[str, float] = field(default_factory=dict)
    """The losses of the base alone."""
    stages: list[Stage] = field(default_factory=list)

    def taught(self, skill: str) -> list[int]:
        """The stages that taught this skill, as indices into `stages`; empty if it was never learned.

        These are the stages of the skill's own data: those that have its name and trained an expert. A stage with
        another skill's data that trained the same expert does not teach this skill, so its effect on this skill's loss
        counts as forgetting. A chunk of an unlabelled stream has no skill's name, and all that is known of its data is
        which expert it trained: it teaches the skills whose own expert that is. A skill's own expert is that of the
        stages with its name; without such stages the expert of its name; and without that the one that was trained
        when `alone` first held the skill.
        """
        trained = [place for place, stage in enumerate(self.stages) if stage.has_trained]
        experts = {place: self.stages[place].decision.get("expert") for place in trained}
        named = [place for place in trained if self.stages[place].name == skill]
        chunks = [place for place in trained if self.stages[place].name not in self.skills]
        own = {experts[place] for place in named}
        if not named:
            first = next((place for place, stage in enumerate(self.stages) if skill in stage.alone), None)
            by_name = any(experts[place] == skill for place in chunks)
            own = {skill} if by_name else {experts[first]} if first in chunks else set()
        own.discard(None)
        return [place for place in trained if place in named or (place in chunks and experts[place] in own)]

    def learned_at(self, skill: str) -> int | None:
        """The last stage that taught a skill, l(s); a stream may come back to a skill, which is then learned again."""
        taught = self.taught(skill)
        return taught[-1] if taught else None

    def change(self, place: int, skill: str) -> float | None:
        """R[place, s] - R[l(s), s] once the skill has been learned; for an unlearned text R[place, s] - R[base, s]."""
        now = self.stages[place].losses.get(skill)
        if skill in self.unlearned:
            return _difference(now, self.base.get(skill))
        learned = self.learned_at(skill)
        if learned is None or place < learned:
            return None
        return _difference(now, self.stages[learned].losses.get(skill))

    def losses(self, place: int = -1) -> Figure:
        """R[place, s] of every skill, learned or not; the mean is the average loss after that stage."""
        return Figure({skill: self.stages[place].losses.get(skill) for skill in self.skills} if self.stages else {})

    def forgetting(self) -> Figure:
        """R[T, s] - R[l(s), s]: the last loss minus that just after learning; a positive value is worse.

        The figure applies to skills that a later stage could have harmed: one that was never learned has nothing to
        forget, and for one that was learned in the last stage nothing is known yet. Chaudhry et al. 2018
        (arXiv:1801.10112, section 4.2) compare with a skill's best result so far, we with that when its learning
        ended, so that the figure can be negative.
        """
        learned = {skill: self.learned_at(skill) for skill in self.skills}
        last = len(self.stages) - 1
        return Figure(
            {skill: self.change(last, skill) for skill, at in learned.items() if at is not None and at < last}
        )

    def backward_transfer(self) -> Figure:
        """R[l(s), s] - R[T, s], the negative of forgetting; if it is positive, later stages made the skill better.

        Lopez-Paz and Ranzato 2017 (GEM, arXiv:1706.08840), eq. 3, with the sign changed for losses.
        """
        return Figure({skill: _negative(value) for skill, value in self.forgetting().values.items()}, True)

    def forward_transfer(self) -> Figure:
        """R[base, s] - R[f(s) - 1, s]; if it is positive, earlier stages made the skill better before it was trained.

        Lopez-Paz and Ranzato 2017 (GEM, arXiv:1706.08840), eq. 4, with the sign changed for losses, and the base in
        place of an untrained network. As there, it applies to the learned skills except those of the first stage.
        """
        first = {skill: taught[0] for skill in self.skills if (taught := self.taught(skill)) and taught[0] > 0}
        return Figure(
            {s: _difference(self.base.get(s), self.stages[at - 1].losses.get(s)) for s, at in first.items()}, True
        )

    def gain_kept(self) -> Figure:
        """(R[base, s] - R[T, s]) / (R[base, s] - alone[l(s), s]): the share of its own expert's gain that a skill has
        now.

        At 1 the skill is as good as the right expert, chosen by an oracle, was just after learning; at 0 it is as good
        as the base. The oracle's loss is the first that was measured from l(s) on. The figure applies to learned
        skills; one whose expert gained nothing over the base has no share.
        """
        values: dict[str, float | None] = {}
        for skill in self.skills:
            learned = self.learned_at(skill)
            if learned is None:
                continue
            alone = next((stage.alone[skill] for stage in self.stages[learned:] if skill in stage.alone), None)
            gain = _difference(self.base.get(skill), alone)
            now = _difference(self.base.get(skill), self.stages[-1].losses.get(skill))
            if gain is None or now is None:
                values[skill] = None
            elif not gain <= 0:
                values[skill] = now / gain
        return Figure(values, True)

    def routing_accuracy(self) -> Figure:
        """The share of a learned skill's held-out tokens that the router sends to its own expert after the last
        stage."""
        return Figure({s: self.stages[-1].accuracy.get(s) for s in self.skills if self.taught(s)}, True)

    def left_to_base(self) -> Figure:
        """The share of an unlearned text's held-out tokens that the router sends to the base after the last stage."""
        last = self.stages[-1].accuracy if self.stages else {}
        return Figure({text: last.get(text) for text in self.unlearned} if self.stages else {}, True)

    def drift(self) -> Figure:
        """R[T, s] - R[base, s] of the unlearned texts; if it is positive, learning harmed them."""
        last = len(self.stages) - 1
        return Figure({text: self.change(last, text) for text in self.unlearned} if self.stages else {})


@dataclass(frozen=True)
class Kind:
    """A figure of a matrix, with its title and how its numbers are shown."""

    title: str
    of: Callable[[Matrix], Figure]
    template: str = "{:.4f}"

    def show(self, value: float | None) -> str:
        """A value of the figure in words."""
        return shown(value, self.template)


FIGURES: dict[str, Kind] = {
    "loss": Kind("loss after the last stage", Matrix.losses),
    "forgetting": Kind("forgetting", Matrix.forgetting, "{:+.4f}"),
    "backward_transfer": Kind("backward transfer", Matrix.backward_transfer, "{:+.4f}"),
    "forward_transfer": Kind("forward transfer", Matrix.forward_transfer, "{:+.4f}"),
    "gain_kept": Kind("share of the own expert's gain kept", Matrix.gain_kept, "{:.1%}"),
    "routing_accuracy": Kind("routing accuracy", Matrix.routing_accuracy, "{:.1%}"),
    "left_to_base": Kind("unlearned text sent to the base", Matrix.left_to_base, "{:.1%}"),
    "drift": Kind("unlearned text against the base", Matrix.drift, "{:+.4f}"),
}
"""The figures by name, in the order in which they are shown."""

OF_UNLEARNED = ("left_to_base", "drift")
"""The figures about text that is never trained."""


def shown(value: float | None, template: str = "{:.4f}") -> str:
    """A number in words: formatted by `template`, or "not measured" or "not finite"."""
    return "not measured" if value is None else template.format(value) if math.isfinite(value) else "not finite"


def write_matrix(path: Path, matrix: Matrix) -> None:
    """Write matrix.json atomically; a number that is not finite becomes null.

    Raises:
        ValueError: for a matrix that `read_matrix` would refuse.
    """
    record = {
        **asdict(matrix),
        "base": _nulled(matrix.base),
        "stages": [
            {**asdict(stage), **{name: _nulled(getattr(stage, name)) for name in (*CELLS, "decision")}}
            for stage in matrix.stages
        ],
    }
    _refuse(f"the matrix for {path}", _problems(record))
    write_whole(path, (json.dumps(record, indent=1, ensure_ascii=True) + "\n").encode())


def read_matrix(path: Path) -> Matrix:
    """Read and check matrix.json.

    Raises:
        ValueError: for a file that is not a matrix, with its problems.
        OSError: for a file that cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    _refuse(str(path), _problems(record))
    stages = [
        Stage(**{**stage, **{name: _numbers(stage.get(name, {})) for name in CELLS}}) for stage in record["stages"]
    ]
    return Matrix(**{**record, "base": _numbers(record["base"]), "stages": stages})


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - MAX_PROBLEMS:,} more" if len(problems) > MAX_PROBLEMS else ""
        raise ValueError(f"{what} is not a loss matrix: {'; '.join(problems[:MAX_PROBLEMS])}{more}")


def _problems(record: Any) -> list[str]:
    """The problems that keep the content of a file from being a matrix."""
    problems = _wrong_keys("it", record, {field.name for field in fields(Matrix)}, set())
    if problems:
        return problems
    skills, unlearned = record["skills"], record["unlearned"]
    for title, names in (("skills", skills), ("unlearned", unlearned)):
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            return [f"{title} is not a list of names"]
    if len({*skills, *unlearned}) < len(skills) + len(unlearned):
        problems.append("skills and unlearned name something twice")
    problems += _wrong_cells("base", record["base"], {*skills, *unlearned})
    if not isinstance(record["stages"], list):
        return [*problems, "stages is not a list"]
    for place, stage in enumerate(record["stages"], start=1):
        problems += _stage_problems(f"stage {place}", stage, set(skills), {*skills, *unlearned})
    return problems


def _stage_problems(title: str, stage: Any, skills: set[str], columns: set[str]) -> list[str]:
    problems = _wrong_keys(title, stage, {"name", "losses"}, {field.name for field in fields(Stage)})
    if problems:
        return problems
    if not isinstance(stage["name"], str):
        problems.append(f"{title}'s name is {stage['name']!r}")
    problems += _wrong_cells(f"{title}'s losses", stage["losses"], columns)
    problems += _wrong_cells(f"{title}'s alone", stage.get("alone", {}), skills)
    problems += _wrong_cells(f"{title}'s accuracy", stage.get("accuracy", {}), columns, most=1)
    for name in ("seconds", "tokens"):
        if not is_number(value := stage.get(name, 0)) or not 0 <= value < math.inf:
            problems.append(f"{title}'s {name} is {value!r}; it must be a finite number of at least 0")
    decision = stage.get("decision", {})
    if not isinstance(decision, dict):
        problems.append(f"{title}'s decision is {decision!r}; it must be an object")
    elif decision.get("action") not in (None, *ACTIONS):
        problems.append(f"{title}'s action is {decision['action']!r}; it must be one of {', '.join(ACTIONS)}")
    return problems


def _wrong_keys(title: str, record: Any, needed: set[str], others: set[str]) -> list[str]:
    if not isinstance(record, dict):
        return [f"{title} is no object"]
    problems = [f"{title} has no {name}" for name in sorted(needed - record.keys())]
    return problems + [f"{title} has an unknown entry {name!r}" for name in sorted(record.keys() - needed - others)]


def _wrong_cells(title: str, cells: Any, names: set[str], most: float = math.inf) -> list[str]:
    if not isinstance(cells, dict):
        return [f"{title} is no object"]
    problems = [f"{title} name {name!r}, which is no skill here" for name in cells if name not in names]
    for name, value in cells.items():
        if value is not None and not (is_number(value) and (math.isnan(value) or 0 <= value <= most)):
            limit = f"from 0 to {most:g}" if most < math.inf else "from 0 on"
            problems.append(f"{title} of {name!r} is {value!r}; it must be a number {limit}, or null")
    return problems


def _nulled(cells: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if is_number(value) and not math.isfinite(value) else value for name, value in cells.items()}


def _numbers(cells: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in cells.items()}


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
