"""Draw the charts of the page about a run from the run's record."""

from __future__ import annotations

import math

from dylo_moe.report.charts import Chart, heatmap, line_chart
from dylo_moe.report.run_record import Points, Record
from dylo_moe.training.charts import Series
from dylo_moe.utils.redact import short_name
from dylo_moe.utils.words import counted

NATS = "nats per token"


def loss_charts(record: Record) -> list[Chart]:
    """Draw the training and held-out loss of each dataset, and the loss of all training tokens."""
    charts = []
    for index, domain in enumerate(record.domains):
        series = [
            Series("training", record.points(f"loss_{domain}"), index),
            Series("held out", record.losses[domain], index, dots=True),
        ]
        charts.append(line_chart(short_name(domain), series, unit=NATS))
    whole = [Series("language model", record.points("lm_loss"), 0), Series("with all terms", record.points("loss"), 1)]
    return [*charts, line_chart("all training tokens", whole, unit=NATS)]


def benchmark_charts(record: Record) -> list[Chart]:
    """Draw pass@1 of each code benchmark that was run during training."""
    charts = []
    for index, name in enumerate(record.benchmarks):
        rates = Series("pass@1", record.points(f"eval_{name}_pass_at_1"), index, dots=True)
        tasks = record.last(f"eval_{name}_num_tasks")
        each = "" if tasks == 1 else " each"
        caption = "" if tasks is None else f"{counted(round(tasks), 'task')}, one greedy answer{each}."
        charts.append(line_chart(name, [rates], unit="share of the tasks", floor=0, caption=caption))
    return charts


def _routed(record: Record) -> str:
    """What is routed, and counted."""
    return "answers' tokens" if record.by_answers else "tokens"


def share_maps(record: Record) -> list[Chart]:
    """Draw the share of each dataset that went to each expert, from the evaluations if training did not log it."""
    charts = []
    for domain in record.domains:
        keys = [(expert, f"share_{domain}_{expert}") for expert in record.experts]
        if not any(record.points(key) for _, key in keys):
            keys = [(expert, f"eval_{domain}_share_{expert}") for expert in record.experts]
        steps = sorted({step for _, key in keys for step, _ in record.points(key)})
        known = [(expert, dict(record.points(key))) for expert, key in keys]
        rows: list[tuple[str, Points]] = [
            (expert, [(step, values.get(step)) for step in steps]) for expert, values in known
        ]
        charts.append(heatmap(short_name(domain), rows))
    return charts


def entropy_charts(record: Record) -> list[Chart]:
    """Draw the entropy of the router in training and on held-out tokens, beside that of an even use of all experts."""
    count = len(record.experts)
    marks = [(math.log(count), f"log({count})")] if count > 1 else []
    training = [
        Series("of one token", record.points("token_entropy"), 0),
        Series("of the mean", record.points("average_entropy"), 1),
    ]
    charts = [line_chart("entropy in training", training, unit="nats", floor=0, marks=marks)]
    for key, title in (("token", "of one held-out token"), ("average", f"of the mean over held-out {_routed(record)}")):
        series = [
            Series(short_name(domain), record.points(f"eval_{domain}_{key}_entropy"), index)
            for index, domain in enumerate(record.domains)
        ]
        charts.append(line_chart(title, series, unit="nats", floor=0, marks=marks))
    return charts


def load_charts(record: Record) -> list[Chart]:
    """Draw how evenly the experts are used."""
    shares = [Series(expert, record.points(f"share_{expert}"), index) for index, expert in enumerate(record.experts)]
    even = [(1 / len(record.experts), "even")] if len(record.experts) > 1 else []
    imbalance = [Series("load imbalance", record.points("load_imbalance"), 0)]
    return [
        line_chart(f"share of all training {_routed(record)}", shares, unit="share of the tokens", floor=0, marks=even),
        line_chart("load imbalance", imbalance, unit="busiest share / mean share", floor=1),
        line_chart(
            "balance loss", [Series("balance loss", record.points("balance_loss"), 0)], unit="loss term, no unit"
        ),
    ]


def drift_charts(record: Record) -> list[Chart]:
    """Draw how far the gate's rows have moved."""
    series = [
        Series(expert, record.points(f"gate_drift_{expert}"), index) for index, expert in enumerate(record.experts)
    ]
    return [line_chart("drift of each expert's gate row", series, unit="distance / length at the start", floor=0)]


def gradient_charts(record: Record) -> list[Chart]:
    """Draw the norms of gradients, the learning rate and the speed."""
    shared = ["shared"] if record.points("grad_norm_shared") else []
    names = [*record.experts, "router", *shared]
    series = [Series(name, record.points(f"grad_norm_{name}"), index) for index, name in enumerate(names)]
    charts = [line_chart("norm of each expert's and the router's gradient", series, unit="2-norm", floor=0)]
    for key, title, unit in (
        ("grad_norm", "norm of the whole gradient", "2-norm"),
        ("learning_rate", "learning rate", "learning rate"),
        ("tokens_per_second", "speed", "tokens per second"),
    ):
        charts.append(line_chart(title, [Series(title, record.points(key), 0)], unit=unit, floor=0))
    return charts
