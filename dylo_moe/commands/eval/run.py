"""The command `dylora eval`: held-out losses and pass@k of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.eval.request import EvalRequest
from dylo_moe.evaluation.answers import Decoding
from dylo_moe.evaluation.arguments import LOSSES, EvalArguments
from dylo_moe.evaluation.benchmark import Benchmark, files_of, run_benchmark
from dylo_moe.evaluation.held_out import HeldOut, held_out
from dylo_moe.evaluation.losses import run_losses, show_losses
from dylo_moe.evaluation.names import CHAT, COMPLETION, HUMANEVAL, MBPP
from dylo_moe.evaluation.problems import Problem, load_examples, load_problems, problems_digest
from dylo_moe.evaluation.prompts import Asking, check_chat
from dylo_moe.evaluation.results import (
    RESULTS_FILE,
    add_result,
    check_evaluation_folder,
    evaluation_folder,
    evaluation_settings,
    export_evalplus,
    read_results,
    take_evaluation_folder,
)
from dylo_moe.evaluation.samples import SampleFile
from dylo_moe.evaluation.sandbox.sandbox import Sandbox, open_sandbox
from dylo_moe.model.checkpoint import named_base, read_manifest
from dylo_moe.model.manifest import expert_problem
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.eval_tables import TITLES, live_rate, show_example, show_results
from dylo_moe.routing.config import BASE
from dylo_moe.utils.owner import Owner
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.words import counted


class Exam(NamedTuple):
    """A benchmark to run: its problems, and how they are put to the model."""

    asking: Asking
    problems: list[Problem]


def evaluate_checkpoint(request: EvalRequest) -> Path:
    """Evaluate as the flags say, and print the results; returns the folder of the results.

    Raises:
        ValueError: for an incomplete checkpoint, data that is not available, or settings that differ from those of the
            evaluation that is to be resumed, or a folder that another process is evaluating into.
        SandboxError: where generated code cannot be isolated.
    """
    with Owner() as owner:
        return _evaluate(request, owner)


def _evaluate(request: EvalRequest, owner: Owner) -> Path:
    transformers_logging.disable_progress_bar()
    screen, options, checkpoint = Screen("eval"), request.options, Path(request.checkpoint)
    manifest = read_manifest(checkpoint)
    if problem := expert_problem(manifest, options.expert):
        raise ValueError(problem)
    trained = (manifest.get("training") or {}).get("settings", {})
    sandbox = open_sandbox(options.sandbox, options.limits) if options.benchmarks else None
    exams = [read_exam(name, options) for name in options.benchmarks]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = bool(trained.get("bf16")) if options.bf16 is None else options.bf16
    settings = evaluation_settings(checkpoint, options, bf16=bf16, device=device)
    if exams:
        settings["problems"] = {exam.asking.benchmark: problems_digest(exam.problems) for exam in exams}
    folder = evaluation_folder(checkpoint, options)
    owner.take(folder, "evaluating")
    check_evaluation_folder(folder, settings)
    base, revision = named_base(checkpoint, manifest)
    tokenizer = load_tokenizer(base, revision=revision)
    if exams and options.prompt == CHAT:
        check_chat(tokenizer)
    held = None
    if LOSSES in options.tasks and LOSSES not in read_results(folder):
        held = read_held_out(checkpoint, tokenizer, options)  # before the model, which takes longer, is loaded
    say_trained_on(screen, trained, options)
    model = DyLoRAMoE.from_pretrained(str(checkpoint), dtype=torch.bfloat16 if bf16 else "auto").eval()
    if model.device.type != device:
        model.to(device)
    if held is not None:
        losses = run_losses(
            model,
            tokenizer,
            held,
            batch_size=options.batch_size,
            expert=options.expert,
            seed=options.seed,
            screen=screen,
        )
        take_evaluation_folder(folder, settings)
        add_result(folder, (LOSSES,), losses)
    elif LOSSES in options.tasks:
        screen.say(f"losses were already measured: {folder / RESULTS_FILE}")
    if exams:
        take_evaluation_folder(folder, settings)
    if LOSSES in options.tasks:
        show_losses(screen, read_results(folder)[LOSSES])
    for exam in exams:
        assert sandbox is not None
        with forced(model, options.expert):
            run_exam(screen, exam, model, tokenizer, sandbox, options, folder)
    show_results(screen, read_results(folder))
    screen.file("results", folder / RESULTS_FILE)
    return folder


@contextmanager
def forced(model: DyLoRAMoE, expert: str | None) -> Iterator[None]:
    """Route every token to one expert within the `with` block; None: route as the router decides."""
    if expert is None:
        yield
        return
    with model.route_to(None if expert == BASE else expert):
        yield


def read_exam(name: str, options: EvalArguments) -> Exam:
    """Read the problems of a benchmark. Raises ValueError where they are not available."""
    examples = load_examples(name, options.data_dir) if options.prompt == COMPLETION else []
    problems = load_problems(name, options.data_dir)[: options.limit]
    return Exam(Asking(name, options.prompt, tuple(examples)), problems)


def say_trained_on(screen: Screen, trained: dict[str, Any], options: EvalArguments) -> None:
    """Print a note where training data may overlap with a benchmark, or where that is not known."""
    if not options.benchmarks:
        return
    datasets = trained.get("datasets", [])
    note = None
    if not trained:
        note = "The checkpoint does not say what it was trained on."
    elif MBPP in datasets and MBPP in options.tasks:
        note = "It was trained on mbpp's train split; its test split, which is asked here, is never trained on."
    elif not trained.get("decontaminate"):
        note = "Its training rows were not compared with the benchmarks (--decontaminate does that)."
    if note is not None:
        screen.note(note)


def read_held_out(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, options: EvalArguments) -> HeldOut:
    """Read the held-out rows that the flags name. Raises ValueError where they are not available."""
    return held_out(
        checkpoint,
        tokenizer,
        datasets=options.datasets or None,
        data_dir=options.data_dir,
        eval_subset=options.eval_subset,
        seed=options.seed,
    )


def run_exam(
    screen: Screen,
    exam: Exam,
    model: DyLoRAMoE,
    tokenizer: PreTrainedTokenizerBase,
    sandbox: Sandbox,
    options: EvalArguments,
    folder: Path,
) -> None:
    """Run one benchmark: greedy answers, then samples if wanted; each result is saved as soon as it is known.

    The first answer is printed, so that a wrong prompt is seen at once.
    """
    plans = [(Decoding("greedy"), [1])]
    if options.num_samples:
        sampled = Decoding("sampled", options.num_samples, options.temperature, options.top_p)
        plans.append((sampled, options.sampled_k))
    name = exam.asking.benchmark
    for place, (decoding, k) in enumerate(plans):
        benchmark = Benchmark(
            exam.problems,
            exam.asking,
            decoding,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
        )
        samples, verdicts = files_of(folder, benchmark)
        say_taken_up(screen, samples, verdicts.num_dropped)
        if place == 0:
            known = samples.samples[:1]
            example = known[0] if known else benchmark.generate(model, tokenizer, 0, benchmark.keys[:1])[0]
            show_example(screen, benchmark, example, tokenizer)
            room = benchmark.room(model, tokenizer)
            if room is not None and room < options.max_new_tokens:
                text = f"the base's context has room for {counted(room, 'token')} of an answer after the longest prompt"
                screen.note(text)
        with live_rate(screen, f"{TITLES[name]} {decoding.name}", len(benchmark.keys)) as tell:
            outcome = run_benchmark(
                benchmark, model, tokenizer, sandbox, samples=samples, verdicts=verdicts, k=k, tell=tell
            )
        add_result(folder, (name, decoding.name), outcome.as_json())
        if options.export:
            say_exported(screen, export_evalplus(samples), name, options)


def say_taken_up(screen: Screen, samples: SampleFile, num_dropped_verdicts: int) -> None:
    """Print how many answers an earlier run left, and how many of its answers and verdicts were cut off."""
    if samples.samples:
        screen.say(
            f"resuming: {len(samples.samples)} of {counted(len(samples.keys), 'answer')} already generated",
        )
    for count, what in ((samples.num_dropped, "answer"), (num_dropped_verdicts, "verdict")):
        if count:
            verb = "was" if count == 1 else "were"
            text = f"{counted(count, what)} {verb} cut off when the last run was killed, and will be made again"
            screen.warn(text)


def say_exported(screen: Screen, path: Path, name: str, options: EvalArguments) -> None:
    """Print the path of the samples for EvalPlus, and which answers it expects besides them."""
    screen.file("for EvalPlus", path)
    missing = []
    if options.limit is not None:
        missing.append(f"this file has the first {options.limit} only")
    if name != HUMANEVAL:
        missing.append("MBPP+ also has tasks of MBPP's other splits")
    if missing:
        text = f"EvalPlus expects an answer to every task of its set: {'; '.join(missing)}"
        screen.note(text)
