"""What a run's model is made of, and how much memory one process holds at the largest moment of its training.

Weights, gradients and optimizer states are counted; `step_activations` finds what a step computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from dylo_moe.commands.plan.outline import Outline
from dylo_moe.commands.plan.per_process import BASE, FLAT, Processes, one_process
from dylo_moe.commands.plan.step_activations import FakeStep, StepActivations, activations, most_of_all_experts
from dylo_moe.commands.plan.workload import Batch, Workload
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import SHARED
from dylo_moe.routing.dispatch import dense_is_quicker

EXPERTS = "experts and router"

OPTIMIZER = "optimizer state"

GRADIENTS = "gradients"

ACTIVATIONS = "activations and logits"

FEATURES = "features of the first rows"

PARTS = (BASE, EXPERTS, OPTIMIZER, GRADIENTS, ACTIVATIONS)
"""What the memory of a training step is made of."""

ADAM_STATES = 2
"""Numbers that AdamW keeps of each trained one, in its dtype."""

ALONE = Processes()


class Component(NamedTuple):
    """A part of the model, or several that are alike."""

    name: str
    parameters: int
    """Of one."""
    trainable: bool
    num: int = 1

    @property
    def total(self) -> int:
        """The parameters of all."""
        return self.num * self.parameters


class Weights(NamedTuple):
    """Bytes that are held from the beginning to the end."""

    base: int
    expert: int
    """The weights of one expert."""
    experts: int
    """The weights of all experts, the shared one too, and of the router."""
    trained: int
    """The weights that are trained; their gradients take as much again."""


class Peak(NamedTuple):
    """The most memory that one process holds at once, in bytes by part, and when."""

    when: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


class Settings(NamedTuple):
    """What of a run's flags changes a step, besides its batch."""

    checkpointing: bool
    """Whether layers are computed again in the backward."""
    accumulates: bool
    """Whether an optimizer step has several batches."""


def components(of: Outline) -> list[Component]:
    """Base, experts, a shared one where there is one, and the router; together all parameters of the model."""
    base = sum(item.numel() for name, item in of.whole.base.named_parameters() if ".lora_" not in name)
    router = of.with_all_experts(lambda model: sum(item.numel() for item in model.router.parameters()))
    expert, shared = of.whole.experts[0], of.whole.experts.shared
    return [
        Component("base", base, False),
        Component("expert", expert.parameters, expert.trainable, of.num_experts),
        *([] if shared is None else [Component("shared expert", shared.parameters, shared.trainable)]),
        Component("router", router, True),
    ]


def weights(of: Outline) -> Weights:
    """Counted on the model."""
    base = [item for name, item in of.whole.base.named_parameters() if ".lora_" not in name]
    expert = num_bytes(of.whole.experts.parameters(of.whole.experts[0].name))
    shared = num_bytes(of.whole.experts.parameters(SHARED))
    router = of.with_all_experts(lambda model: num_bytes([*model.router.parameters(), *model.router.buffers()]))
    gate = of.with_all_experts(lambda model: num_bytes(p for p in model.router.parameters() if p.requires_grad))
    return Weights(
        base=num_bytes([*base, *of.whole.base.buffers()]),
        expert=expert,
        experts=of.num_experts * expert + shared + router,
        trained=of.num_experts * expert + shared + gate,
    )


def num_bytes(tensors: Any) -> int:
    """The bytes of all these tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def describe_head(of: Outline) -> str:
    """The output head's size, and whether it is counted once with the embeddings."""
    base = of.whole.base
    head = cast(nn.Module, base.get_output_embeddings())
    weight = cast(Tensor, cast(Any, head).weight)
    tied = weight is cast(Any, base.get_input_embeddings()).weight
    shared = "the embeddings' own matrix, counted once" if tied else "a matrix of its own"
    return f"of the base, the output head has {weight.numel():,} parameters: {shared}"


class MemoryAccount:
    """The memory of one process that trains a model, for any batch.

    Args:
        outline: the model.
        device: "cpu" or "cuda". On a GPU the router's start is no moment of the run, for the model is not there yet.
        processes: that train together.
        like: an account of the same run in another precision, which knows what many experts add.
    """

    def __init__(
        self, outline: Outline, *, device: str, processes: Processes = ALONE, like: MemoryAccount | None = None
    ) -> None:
        self.outline, self.device, self.processes = outline, device, processes
        self.held = weights(outline)
        self.one = one_process(outline.whole.base, processes, trained=self.held.trained, device=device)
        self._steps: dict[int, FakeStep] = {}
        self._followed: dict[tuple[Batch, bool], StepActivations] = {}
        self._evaluated: dict[Batch, int] = {}
        self._added: StepActivations | None = None if like is None else like._added

    def peak(self, load: Workload, settings: Settings | None = None) -> Peak:
        """The largest moment: the router's start, a training step, or an evaluation.

        Args:
            settings: None: those of the run's flags.
        """
        settings = settings_of_flags(self.outline) if settings is None else settings
        stages = self._stages_of_steps(load, settings)
        held = self.held
        always = {BASE: held.base, EXPERTS: held.experts}
        if self.device == "cpu":
            # The features of the texts, fp32, once text by text and once concatenated. The base is not shared yet.
            features = 2 * 4 * self.outline.whole.router.hidden_size * load.start_tokens
            stages.append(Peak("the start of the router", {**always, FEATURES: features}))
        if self.processes.sharding is not None:  # when the backward is over
            states = ADAM_STATES * held.trained
            after = {**always, OPTIMIZER: states, GRADIENTS: held.trained, FLAT: held.trained}
            stages.append(Peak("the averaging of gradients", self.one.holds(after, gathers=False)))
        return max(stages, key=lambda stage: stage.total)

    def _stages_of_steps(self, load: Workload, settings: Settings) -> list[Peak]:
        """The two moments of a training step, from the second step on, when AdamW has its states; and an evaluation.

        With accumulation the gradients of the micro-batches before are there from the beginning.
        """
        held, batch, evaluated = self.held, load.batch, load.eval_batch
        always = {BASE: held.base, EXPERTS: held.experts, OPTIMIZER: ADAM_STATES * held.trained}
        seen = self.training(batch, checkpointing=settings.checkpointing)
        before = held.trained if settings.accumulates else 0
        moments = [("a training step", before, seen.forward), ("a training step", held.trained, seen.backward)]
        if evaluated.rows * evaluated.seq > batch.rows * batch.seq:  # else it takes less, as it saves nothing
            moments.append(("an evaluation", 0, self.evaluation(evaluated)))
        return [
            Peak(when, self.one.holds({**always, GRADIENTS: gradients, ACTIVATIONS: computed}))
            for when, gradients, computed in moments
        ]

    def training(self, batch: Batch, *, checkpointing: bool) -> StepActivations:
        """What a training step computes with all experts. Each batch is followed once.

        What many experts add to a few depends little on layers, batch and precision, unless each token goes to all. So
        it is taken from two layers of each kind, in the first step that was followed.
        """
        batch = self._like_that_of_many(batch)
        key = batch, checkpointing
        if key in self._followed:
            return self._followed[key]
        few = self.outline.few
        if len(few) == 1 or self.outline.is_dense:
            traces = [self._step(model).traces(batch, checkpointing=checkpointing) for model in few]
            self._followed[key] = activations(self.outline, traces)
            return self._followed[key]
        traces = [self._step(few[0]).traces(batch, checkpointing=checkpointing)]
        if self._added is None:
            pairs = [traces[0][:1], self._step(few[1]).traces(batch, checkpointing=checkpointing, num_arrangements=1)]
            self._added = activations(self.outline, pairs).plus(activations(self.outline, pairs[:1]), -1)
        self._followed[key] = activations(self.outline, traces).plus(self._added, 1)
        return self._followed[key]

    def assume(self, batch: Batch, between: tuple[Batch, Batch], rows: float, *, checkpointing: bool) -> None:
        """Take a batch to compute what so many rows do, on the line between two batches of one length.

        The largest of several moments, each of which grows evenly with the rows, lies on or below the line between two
        of its points: no batch between takes more.

        Args:
            between: the batches, the smaller one first.
        """
        fewer, more = between
        low, high = (self.training(one, checkpointing=checkpointing) for one in between)
        share = (rows - fewer.rows) / (more.rows - fewer.rows)
        found = StepActivations(*(round(a + share * (b - a)) for a, b in zip(low, high, strict=True)))
        self._followed.setdefault((batch, checkpointing), found)

    def evaluation(self, batch: Batch) -> int:
        """What an evaluation computes with all experts, in bytes."""
        batch = self._like_that_of_many(batch)
        if batch not in self._evaluated:
            self._evaluated[batch] = most_of_all_experts(
                self.outline, [self._step(model).evaluation(batch) for model in self.outline.few]
            )
        return self._evaluated[batch]

    def _step(self, model: DyLoRAMoE) -> FakeStep:
        """The steps of one of the outline's models of few layers, made when they are first followed."""
        if id(model) not in self._steps:
            self._steps[id(model)] = FakeStep(self.outline, model)
        return self._steps[id(model)]

    def _like_that_of_many(self, batch: Batch) -> Batch:
        """The batch, or one of some more tokens, with which a few experts are computed as many are: only for the tokens
        that selected them. With few experts and tokens it is quicker to compute all for all."""
        if len(self.outline.few) > 1 and not self.outline.is_dense:
            model = self.outline.few[0]
            pool: dict[str, int] = {"num_experts": len(model.experts), "top_k": model.router_config.top_k}
            while dense_is_quicker(num_tokens=batch.rows * batch.seq, **pool):
                batch = batch._replace(seq=batch.seq + 1)
        return batch


def settings_of_flags(of: Outline) -> Settings:
    """The settings that the run was asked for."""
    train = of.arguments.train
    checkpointing = getattr(train, "activation_checkpointing", False) or train.gradient_checkpointing  # newer, older
    return Settings(bool(checkpointing), train.gradient_accumulation_steps > 1)


def peak_memory(of: Outline, load: Workload, *, device: str = "cpu", processes: Processes = ALONE) -> Peak:
    """The largest moment of one process; see `MemoryAccount`. The outline can be used for nothing else afterwards."""
    return MemoryAccount(of, device=device, processes=processes).peak(load)
