"""A stage of a stream that ends early, by rows of its own that are not trained."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from reference.forks import forked, signal_when
from reference.runs import files_of
from test_stream import skill_files, stage_checkpoints, stream

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_tokenizer
from dylo_moe.cli import main
from dylo_moe.commands.stream.early_stop import outcome, split_rows
from dylo_moe.data.collator import Collator
from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
from dylo_moe.evaluation.loss_matrix import read_matrix

EARLY = ("--early_stopping_patience", "2", "--eval_steps", "2", "--num_train_epochs", "30")
"""Of 120 steps a stage, at a rate so high that the loss soon rises."""


def evaluations(stage: Path) -> dict[int, float]:
    """The loss of the kept-back rows by step, from the stage's log."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert len(found) == len(dict(found))  # each is there once
    return dict(found)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = skill_files(tmp_path_factory.mktemp("early"))
    assert main(stream(folder, folder / "run", *EARLY, "--keep_stages", "true", datasets=("sea", "sky"))) == 0
    return folder


def test_a_stage_ends_early_with_its_best_weights_and_trains_no_row_that_decides(done):
    """The loss of the kept-back rows is computed anew from the checkpoint, outside of the Trainer."""
    tokenizer, matrix = load_tokenizer(str(done / "base")), read_matrix(done / "run" / "matrix.json")
    config = DataConfig(datasets=[str(done / "sea.jsonl")], max_seq_length=64)
    rows = load_data(config, tokenizer, seed=42).train
    trained, kept_back = split_rows(rows, "sea")
    assert (len(trained), len(kept_back)) == (49, 5)
    assert not {tuple(row["input_ids"]) for row in trained} & {tuple(row["input_ids"]) for row in kept_back}
    found = evaluations(done / "run" / "stages" / "01_sea")
    last = max(found)
    assert last < 120 and min(found, key=found.get) < last
    num_tokens = sum(len(row["input_ids"]) for row in trained)
    passes = matrix.stages[0].tokens / num_tokens
    assert passes == pytest.approx(last / 4, abs=1)  # four steps a pass, of which the last one is smaller
    model = DyLoRAMoE.from_pretrained(str(stage_checkpoints(done / "run")[0])).eval()
    batch = Collator(tokenizer)(list(kept_back))
    batch.pop("domain")
    with torch.no_grad(), model.route_to("sea"):
        assert float(model(**batch).lm_loss) == pytest.approx(min(found.values()), rel=1e-5)


def test_an_interrupted_stage_ends_early_as_one_that_was_not(done, tmp_path):
    """Killed, and stopped by a signal; the best weights are older than the checkpoints it goes on from."""
    run, log = tmp_path / "run", tmp_path / "said"
    words = stream(done, run, *EARLY, "--keep_stages", "true", "--save_steps", "3", datasets=("sea", "sky"))
    again = ["stream", "--resume_from_checkpoint", str(run)]
    best = signal_when(lambda: any(run.glob("stages/01_*/checkpoint-*/best_expert.safetensors")), signal.SIGKILL)
    assert forked(words, log, interrupt=best) == [-signal.SIGKILL]
    second = signal_when(lambda: any(run.glob("stages/02_*/checkpoint-*")), signal.SIGTERM)
    assert forked(again, log, interrupt=second) == [128 + signal.SIGTERM], log.read_text()
    assert main(again) == 0
    for one, other in zip(stage_checkpoints(done / "run"), stage_checkpoints(run), strict=True):
        assert files_of(one) == files_of(other)
    for stage in ("01_sea", "02_sky"):
        assert evaluations(run / "stages" / stage) == evaluations(done / "run" / "stages" / stage)


def test_exhausted_patience_begins_consolidation_and_then_ends_the_stage():
    losses = [3.0, 2.0, 2.0, 2.1, 1.9, 1.95, 1.95, 1.0]
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses, 1)]
    ends = [outcome(history[:count], planned_switch=6, patience=2, threshold=0.0) for count in range(1, 9)]
    assert [end.switch_step for end in ends] == [6, 6, 6, 4, 4, 4, 4, 4]
    assert [end.is_over for end in ends] == [False] * 6 + [True, False]
    known = outcome(history[:4], planned_switch=0, patience=2, threshold=0.0)
    assert known.is_over  # a known skill is consolidated from its first step on


def test_rows_of_every_dataset_of_a_chunk_are_kept_back():
    chunk = Dataset.from_dict({"domain": [0] * 30 + [1] * 20, "row": list(range(50))})
    trained, kept_back = split_rows(chunk, "chunk_1")
    assert sorted([*trained["row"], *kept_back["row"]]) == list(range(50))
    assert kept_back["domain"] == [0, 0, 0, 1, 1]
    assert len(split_rows(chunk.select(range(3)), "chunk_1")[1]) == 1
    with pytest.raises(ValueError, match="chunk_1 has 1 training row"):
        split_rows(chunk.select([0]), "chunk_1")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval_steps", "2"), "eval_steps is given without early_stopping_patience"),
        (("--early_stopping_patience", "0"), "early_stopping_patience is 0"),
        (("--load_best_model_at_end", "true"), "the lowest loss of rows kept back"),
    ],
)
def test_flags_without_meaning_are_refused(done, tmp_path, capsys, more, message):
    assert main(stream(done, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err
