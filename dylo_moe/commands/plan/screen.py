"""What `dylora plan` prints: parts of the model, steps, memory and whether it fits, in lines of 80 letters."""

from __future__ import annotations

import textwrap

from dylo_moe.commands.plan.arguments import CPU
from dylo_moe.commands.plan.memory_account import PARTS, Component
from dylo_moe.commands.plan.request import PlanRequest
from dylo_moe.commands.plan.room import FREE_WORDS, GB, Memory
from dylo_moe.commands.plan.run import BF16_BYTES, Plan
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table
from dylo_moe.utils.words import counted

MB = 1e6

WIDTH = 80

EXPERTS_LISTED = 8
"""Up to so many experts get a line each."""

ON_CPU = "The C library may keep more than this: docs/plan.md compares plans with runs."

ON_GPU = (
    "A CUDA context (some hundred MB), workspaces and the allocator's rounding come on top. Nothing was measured on a "
    "GPU: this is computed."
)
"""Printed below the memory."""


def show_plan(request: PlanRequest, plan: Plan) -> None:
    """Print a plan."""
    screen = Screen("plan", is_answer=True)
    show_components(screen, request, plan)
    show_workload(screen, request, plan)
    show_memory(screen, request, plan)
    show_room(screen, request, plan)


def say(screen: Screen, sentence: str) -> None:
    """Print a sentence in lines of 80 letters, also where there is no terminal."""
    screen.say(textwrap.fill(sentence, WIDTH, break_long_words=False, break_on_hyphens=False))


def show_components(screen: Screen, request: PlanRequest, plan: Plan) -> None:
    """Component, parameters, memory in bf16, trainable or frozen; then the two shares."""
    asked = request.arguments.experts
    title = f"{request.arguments.model.model}, {counted(asked.num_experts, 'expert')} of rank {asked.lora_r}"
    if asked.shared_r:
        title += f", a shared one of rank {asked.shared_r}"
    table = Table(title, ("component", "parameters", "bf16, MB", "share", ""), words=("",))
    total = sum(item.total for item in plan.components)

    def add(name: str, parameters: int, kind: str) -> None:
        table.add_row(
            name, f"{parameters:,}", f"{BF16_BYTES * parameters / MB:,.2f}", f"{parameters / total:.3%}", kind
        )

    for item in listed(plan.components):
        add(item.name, item.parameters, "trainable" if item.trainable else "frozen")
    table.add_section()
    for kind, wanted in (("frozen", False), ("trainable", True)):
        add(f"all {kind}", sum(item.total for item in plan.components if item.trainable is wanted), "")
    add("everything", total, "")
    screen.say(table)
    say(screen, plan.head)
    if plan.left_out is not None:
        say(screen, f"no expert adapts {plan.left_out}")
    say(
        screen,
        f"one expert: {plan.expert_served_bytes / MB:,.1f} MB served in bf16, "
        f"{plan.expert_training_bytes / MB:,.1f} MB while it trains (weights, gradients, AdamW)",
    )
    screen.say()


def listed(components: list[Component]) -> list[Component]:
    """The components with a line for each expert, or with one for many."""
    base, expert, *others = components
    if expert.num > EXPERTS_LISTED:
        return [base, expert._replace(name=f"each of {expert.num:,} experts"), *others]
    return [base, *(expert._replace(name=f"expert_{index}") for index in range(expert.num)), *others]


def show_workload(screen: Screen, request: PlanRequest, plan: Plan) -> None:
    """Rows, tokens and steps, or why they are not known."""
    load, train = plan.workload, request.arguments.train
    if load is None:
        say(screen, f"tokens per epoch, steps: not known: {plan.not_known}")
    else:
        rows = counted(load.rows, "packed row" if load.batch.packed else "row")
        count = "" if plan.processes.num == 1 else f"{plan.processes.num} x "
        epochs = "--max_steps"
        if train.max_steps <= 0:
            epochs = f"{train.num_train_epochs:g} {'epoch' if train.num_train_epochs == 1 else 'epochs'}"
        say(screen, f"tokens per epoch: {load.tokens:,} in {rows}")
        say(
            screen,
            f"steps: {load.steps:,} ({epochs}; {load.steps_per_epoch:,} an epoch, each of "
            f"{count}{train.gradient_accumulation_steps} x {counted(train.per_device_train_batch_size, 'row')})",
        )
    say(
        screen,
        f"a training checkpoint: {plan.checkpoint_bytes / MB:,.1f} MB (experts, router, optimizer state), on disk",
    )
    screen.say()


def show_memory(screen: Screen, request: PlanRequest, plan: Plan) -> None:
    """The parts of the peak."""
    batch, peak = plan.batch, plan.peak
    of_one = "" if plan.processes.num == 1 else " of one process"
    size = f"{counted(batch.rows, 'row')} of {counted(batch.seq, 'token')}"
    table = Table(f"estimated peak{of_one} on {request.device}: {size}, {precision(request)}", ("part", "MB"))
    for name in dict.fromkeys([*PARTS, *peak.parts]):
        if peak.parts.get(name):
            table.add_row(name, f"{peak.parts[name] / MB:,.0f}")
    if plan.process_bytes:
        table.add_row("Python and libraries", f"{plan.process_bytes / MB:,.0f}")
    table.add_section()
    table.add_row(f"peak, in {peak.when}", f"{plan.total_bytes / MB:,.0f}", style="bold")
    screen.say(table)
    say(screen, ON_CPU if request.device == CPU else ON_GPU)
    if request.arguments.router.per_response:
        say(screen, "Of rows that are an answer throughout: with granularity response, prompts need less.")


def precision(request: PlanRequest) -> str:
    """The flag of the precision, in words."""
    train = request.arguments.train
    return "--bf16" if train.bf16 else "--fp16" if train.fp16 else "without --bf16"


def show_room(screen: Screen, request: PlanRequest, plan: Plan) -> None:
    """Whether the run fits, and what to change where it does not."""
    if not plan.memories:
        return
    answers = [(size, size.holds(plan.total_bytes, request.device)) for size in plan.memories]
    each = " on each of these GPUs" if plan.processes.num > 1 and request.device != CPU else ""
    words = ", ".join(f"{size.name} {'yes' if fits else 'no'}" for size, fits in answers)
    say(screen, f"fits{each} ({FREE_WORDS[request.device]}): {words}")
    if not answers[-1][1]:
        show_changes(screen, request, plan, plan.memories[-1])
    elif not answers[0][1]:
        largest = [size for size, fits in answers if not fits][-1]
        say(screen, f"With --memory_gb {largest.gb:g} the plan says what to change for that.")


def show_changes(screen: Screen, request: PlanRequest, plan: Plan, size: Memory) -> None:
    """What would take less, and how much less."""
    if not plan.changes:
        say(screen, "No change of the batch or the precision would take less.")
        return
    screen.say()
    holds = [size.holds(change.num_bytes + plan.process_bytes, request.device) for change in plan.changes]
    table = Table("what would take less, all other flags as they are", ("with", "peak, GB", "fits"), words=("fits",))
    for change, fits in zip(plan.changes, holds, strict=True):
        table.add_row(change.flags, f"{(change.num_bytes + plan.process_bytes) / GB:,.1f}", "yes" if fits else "no")
    screen.say(table)
    if not any(holds):
        say(screen, f"None of these fits in {size.name}.")
    say(screen, "Fewer experts, a lower rank and a smaller base take less too. --load_in_4bit is not estimated.")
