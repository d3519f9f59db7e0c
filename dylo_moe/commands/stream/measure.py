"""Measure the held-out losses of a stream: each stage fills a row of the loss matrix."""

from __future__ import annotations

import copy

from transformers import PrinterCallback

from dylo_moe.commands.stream.context import StreamContext
from dylo_moe.commands.stream.state import StreamState
from dylo_moe.continual.growth import SkillDecision
from dylo_moe.evaluation.loss_matrix import Stage
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.loss_matrix_table import MatrixTable
from dylo_moe.routing.config import BASE
from dylo_moe.training.trainer import DyLoRATrainer


def measure_base(context: StreamContext, model: DyLoRAMoE, state: StreamState) -> None:
    """Measure the base alone, which is the first row of the matrix."""
    trainer = _evaluator(context, model)
    with context.screen.status("evaluating the base"), model.route_to(None):
        for name in (*state.matrix.skills, *state.matrix.unlearned):
            trainer.evaluate({name: context.data.evaluation[name]})
            state.matrix.base[name] = trainer.readings[name].loss


def measure_stage(
    context: StreamContext, model: DyLoRAMoE, state: StreamState, stage: Stage, decision: SkillDecision
) -> None:
    """Measure every dataset after a stage; on a terminal, its row of the matrix fills as it is measured.

    Besides the loss, this measures the share of the routing weight of a dataset's tokens that its own expert has, and,
    for datasets whose expert the stage has trained, the loss of that expert alone.
    """
    trainer = _evaluator(context, model)
    with context.screen.live(MatrixTable(state.matrix)) as live:
        for name in (*state.matrix.skills, *state.matrix.unlearned):
            rows = {name: context.data.evaluation[name]}
            trainer.evaluate(rows)
            reading, owner = trainer.readings[name], state.owner(name)
            stage.losses[name] = reading.loss
            if name in state.matrix.unlearned:
                owner = BASE
            if owner in reading.shares:
                # A dataset in which nothing is routed, as text without answers is with response granularity, is all
                # read by the base.
                stage.accuracy[name] = reading.shares[owner] if reading.num_routed else float(owner == BASE)
            if owner is not None and owner == decision.expert:
                with model.route_to(owner):
                    trainer.evaluate(rows)
                stage.alone[name] = trainer.readings[name].loss
            if live is not None:
                live.refresh()


def _evaluator(context: StreamContext, model: DyLoRAMoE) -> DyLoRATrainer:
    """Make a Trainer that only evaluates."""
    arguments = copy.copy(context.request.train)
    arguments.output_dir = str(context.folder)
    trainer = DyLoRATrainer(
        model=model,
        args=arguments,
        data_collator=context.collator,
        domains=context.data.names,
        callbacks=[context.stop],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
