"""What a run's model is made of, and how much memory one process holds at the largest moment of its training.

Weights, gradients and optimizer states are counted; `step_activations` finds what a step computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from dylo_moe.commands.plan.outline import Outline
from dylo_moe.commands.plan.per_process import BASE, FLAT, OneProcess, Processes, one_process
from dylo_moe.commands.plan.step_activations import FakeStep
from dylo_moe.commands.plan.workload import Workload

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
    """A part of the model."""

    name: str
    parameters: int
    trainable: bool


class Weights(NamedTuple):
    """Bytes that are held from the beginning to the end."""

    base: int
    expert: int
    """The weights of one expert."""
    experts: int
    """The weights of all experts and of the router."""
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


def components(of: Outline) -> list[Component]:
    """Base, each expert and the router; together all parameters of the model."""
    base = sum(item.numel() for name, item in of.whole.base.named_parameters() if ".lora_" not in name)
    router = sum(item.numel() for item in of.few.router.parameters())
    parameters = of.whole.experts[0].parameters
    experts = [Component(expert.name, parameters, expert.trainable) for expert in of.few.experts]
    return [Component("base", base, False), *experts, Component("router", router, True)]


def weights(of: Outline) -> Weights:
    """Counted on the model."""
    base = [item for name, item in of.whole.base.named_parameters() if ".lora_" not in name]
    router = of.few.router
    expert = num_bytes(of.whole.experts.parameters(of.whole.experts[0].name))
    experts = len(of.few.experts) * expert
    return Weights(
        base=num_bytes([*base, *of.whole.base.buffers()]),
        expert=expert,
        experts=experts + num_bytes([*router.parameters(), *router.buffers()]),
        trained=experts + num_bytes([item for item in router.parameters() if item.requires_grad]),
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


def peak_memory(of: Outline, load: Workload, *, processes: Processes = ALONE) -> Peak:
    """The largest moment of one process: the router's start, a training step, or an evaluation.

    On a GPU the router's start is none, for the model is not there yet.
    """
    device = of.arguments.train.device.type
    held = weights(of)
    one = one_process(of.whole.base, processes, trained=held.trained, device=device)
    stages = step_stages(of, load, held=held, one=one)
    always = {BASE: held.base, EXPERTS: held.experts}
    if device == "cpu":
        # The features of the texts, fp32, once text by text and once concatenated. The base is not shared yet.
        features = 2 * 4 * of.few.router.hidden_size * load.start_tokens
        stages.append(Peak("the start of the router", {**always, FEATURES: features}))
    if processes.sharding is not None:  # when the backward is over
        states = ADAM_STATES * held.trained
        after = {**always, OPTIMIZER: states, GRADIENTS: held.trained, FLAT: held.trained}
        stages.append(Peak("the averaging of gradients", one.holds(after, gathers=False)))
    return max(stages, key=lambda stage: stage.total)


def step_stages(of: Outline, load: Workload, *, held: Weights, one: OneProcess) -> list[Peak]:
    """The two moments of a training step, from the second step on, when AdamW has its states; and an evaluation.

    With accumulation the gradients of the micro-batches before are there from the beginning.
    """
    step, batch, evaluated = FakeStep(of), load.batch, load.eval_batch
    always = {BASE: held.base, EXPERTS: held.experts, OPTIMIZER: ADAM_STATES * held.trained}
    seen = step.training(batch)
    before = held.trained if of.arguments.train.gradient_accumulation_steps > 1 else 0
    moments = [("a training step", before, seen.forward), ("a training step", held.trained, seen.backward)]
    if evaluated.rows * evaluated.seq > batch.rows * batch.seq:  # else it takes less, as it saves nothing
        moments.append(("an evaluation", 0, step.evaluation(evaluated)))
    return [
        Peak(when, one.holds({**always, GRADIENTS: gradients, ACTIVATIONS: computed}))
        for when, gradients, computed in moments
    ]
