"""A run that was interrupted goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from reference.runs import files_of, flags, tiny_run_folder, trained
from safetensors.torch import load_file, save_file

from dylo_moe.cli import main
from dylo_moe.commands.train.request import parse_train
from dylo_moe.commands.train.run import train
from dylo_moe.evaluation.arguments import EvalArguments
from dylo_moe.evaluation.results import evaluation_folder, evaluation_settings, take_evaluation_folder
from dylo_moe.model.checkpoint import CheckpointError
from dylo_moe.training.resume import data_changes
from dylo_moe.training.run_folder import checkpoints_in
from dylo_moe.training.stopping import StopRequest, is_exhausted
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils.errors import Stopped, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_run_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    return tiny_run_folder(tmp_path_factory.mktemp("chats"), is_chat=True)


SAVES = ("--save_strategy", "steps", "--save_steps", "5", "--eval_strategy", "steps", "--eval_steps", "4")
CASES = {
    "plain": (),
    "several workers": ("--dataloader_num_workers", "2"),
    "accumulation": ("--gradient_accumulation_steps", "3", "--per_device_train_batch_size", "3"),
    "packing, a shared expert": ("--packing", "true", "--per_device_train_batch_size", "2", "--shared_r", "6"),
    "grouped by length": ("--train_sampling_strategy", "group_by_length"),
    "top-2, dense": ("--top_k", "2", "--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs",
                     '{"num_cycles": 2}', "--warmup_steps", "3", "--weight_decay", "0.1",
                     "--label_smoothing_factor", "0.1"),
    "epochs": ("--save_strategy", "epoch", "--eval_strategy", "epoch"),
    "evaluated at epochs, saved at steps": ("--save_steps", "7", "--eval_strategy", "epoch"),
    "gradient checkpointing, answers routed": ("--gradient_checkpointing", "true", "--attn_implementation", "eager",
                                               "--granularity", "response"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_bit_equal(case, folder, chats, tmp_path):
    """From each of its checkpoints, in the middle of an epoch and at its end: weights, optimizer and log."""
    folder = chats if "answers" in case else folder
    whole = train(parse_train(flags(folder, tmp_path / "whole", *SAVES, *CASES[case]))).parent
    found = checkpoints_in(whole)
    assert len(found) > 2
    for step, checkpoint in (found[0], found[-2]):
        shutil.copytree(checkpoint, tmp_path / f"at-{step}" / checkpoint.name)
        again = train(parse_train(["--resume_from_checkpoint", str(tmp_path / f"at-{step}" / checkpoint.name),
                                 "--output_dir", str(tmp_path / f"from-{step}")])).parent  # fmt: skip
        assert files_of(again / "checkpoint") == files_of(whole / "checkpoint")
        last = checkpoints_in(whole)[-1][1].name
        for name in ("optimizer.pt", "scheduler.pt"):
            assert_same_state(torch.load(again / last / name), torch.load(whole / last / name))
        assert trained(again) == trained(whole)


def assert_same_state(ours, theirs) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_same_state(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        for one, other in zip(ours, theirs, strict=True):
            assert_same_state(one, other)
    else:
        assert ours == theirs


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """A finished run with checkpoints at 5, 10, ... of 21 steps."""
    return train(parse_train(flags(folder, tmp_path_factory.mktemp("run") / "whole", *SAVES))).parent


@pytest.fixture
def interrupted(whole, tmp_path) -> Path:
    """The same run as it was after step 10, a save under way."""
    copy = tmp_path / "interrupted"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoint")
    for step, path in checkpoints_in(copy):
        if step > 10:
            shutil.rmtree(path)
    (copy / ".checkpoint-15.partial").mkdir()
    return copy


@pytest.mark.parametrize("wanted", ["latest", "auto", "the run", "the checkpoint"])
def test_a_run_goes_on_in_its_own_folder(wanted, interrupted, whole):
    path = {"the run": str(interrupted), "the checkpoint": str(interrupted / "checkpoint-10")}.get(wanted, wanted)
    more = ["--output_dir", str(interrupted)] if path == wanted else []
    train(parse_train(["--resume_from_checkpoint", path, *more]))
    assert files_of(interrupted / "checkpoint") == files_of(whole / "checkpoint")
    assert trained(interrupted) == trained(whole)
    assert not (interrupted / ".checkpoint-15.partial").exists()


def test_auto_goes_back_to_the_newest_whole_checkpoint(interrupted, whole, capsys):
    """A job that is started again by itself would else stay where it is for ever."""
    newest = checkpoints_in(interrupted)[-1][1]
    (newest / "optimizer.pt").unlink()
    words = ["--output_dir", str(interrupted)]
    with pytest.raises(CheckpointError, match=f"{newest.name} is not whole: optimizer.pt is missing"):
        parse_train(["--resume_from_checkpoint", "latest", *words])
    train(parse_train(["--resume_from_checkpoint", "auto", *words]))
    said = capsys.readouterr().err
    assert f"passed over: checkpoint {newest} is not whole: optimizer.pt is missing" in said
    assert f"kept aside as broken-{newest.name}" in said
    assert (interrupted / f"broken-{newest.name}" / "dylora.json").is_file()
    assert files_of(interrupted / "checkpoint") == files_of(whole / "checkpoint")
    assert trained(interrupted) == trained(whole)


def written(run):
    """Every file of a run, with its content and the time of its last change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more", [[], ["--num_epochs", "2"]], ids=["the same", "fewer epochs"])
def test_a_finished_run_says_so_and_nothing_of_it_is_written(more, whole, capsys):
    """Its checkpoint was written again, so that an evaluation of it was refused as one of another checkpoint."""
    before = written(whole)
    assert train(parse_train(["--resume_from_checkpoint", str(whole), *more])) == whole / "checkpoint"
    assert written(whole) == before
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"{whole} is finished, at step 21, epoch 3: nothing is left to train, and nothing was written" in said


def test_a_finished_run_whose_result_is_lost_makes_it_again(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoint")
    train(parse_train(["--resume_from_checkpoint", str(copy)]))
    assert files_of(copy / "checkpoint") == files_of(whole / "checkpoint")
    assert trained(copy) == trained(whole)


def test_a_finished_run_without_numbered_checkpoints_is_not_trained_anew(whole, tmp_path):
    """It began at its beginning, and wrote over its result."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    before = written(copy)
    train(parse_train(["--resume_from_checkpoint", str(copy)]))
    for more, reason in ((["--num_epochs", "4"], "go on from. Its result"), (["--lora_r", "8"], "lora_r is 8, was 4")):
        with pytest.raises(CheckpointError, match=rf"is finished, at step 21, epoch 3, and has no .*{reason}"):
            train(parse_train(["--resume_from_checkpoint", str(copy), *more]))
    assert written(copy) == before


def test_more_epochs_go_on_from_the_last_checkpoint_and_keep_the_earlier_result(whole, tmp_path, capsys):
    """With its evaluation, which can be resumed as before."""
    copy, options = tmp_path / "run", EvalArguments()

    def evaluate(checkpoint):
        settings = evaluation_settings(checkpoint, options, bf16=False, device="cpu")
        take_evaluation_folder(evaluation_folder(checkpoint, options), settings)

    shutil.copytree(whole, copy)
    evaluate(copy / "checkpoint")
    arguments = parse_train(["--resume_from_checkpoint", str(copy), "--num_epochs", "4"])
    assert arguments.changed == ("num_train_epochs is 4.0, was 3.0",)
    train(arguments)
    kept = copy / "checkpoint-of-step-21"
    assert f"the earlier result is kept as {kept}" in capsys.readouterr().out.replace("\n", "")
    state = json.loads((checkpoints_in(copy)[-1][1] / "trainer_state.json").read_text())
    assert state["epoch"] == 4
    assert files_of(kept) == files_of(whole / "checkpoint") != files_of(copy / "checkpoint")
    assert [path.name for path in (copy / "evaluation").iterdir()] == [kept.name]
    evaluate(kept)
    evaluate(copy / "checkpoint")


def test_a_run_killed_before_its_first_checkpoint_starts_at_its_beginning(whole, interrupted, capsys):
    for _, path in checkpoints_in(interrupted):
        shutil.rmtree(path)
    train(parse_train(["--resume_from_checkpoint", "latest", "--output_dir", str(interrupted)]))
    assert "starts from the beginning" in capsys.readouterr().err
    ours, theirs = ((path / "metrics.jsonl").read_text().splitlines() for path in (interrupted, whole))
    assert [json.loads(line)["step"] for line in ours] == [json.loads(line)["step"] for line in theirs]
    assert files_of(interrupted / "checkpoint") == files_of(whole / "checkpoint")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume_from_checkpoint", "latest"], "finds no run in runs"),
        (["--resume_from_checkpoint", "latest", "--output_dir", "{tmp}/none"], "there is no run in"),
        (["--resume_from_checkpoint", "{tmp}/none"], "there is no checkpoint and no run"),
        (["--resume_from_checkpoint", "{tmp}"], "neither a checkpoint"),
        (["--resume_from_checkpoint", "{whole}/checkpoint"], "nothing to resume training from"),
        (["--resume_from_checkpoint", "{whole}", "--lora_r", "8", "--seed", "1"],
         "lora_r is 8, was 4; seed is 1, was 42"),
        (["--resume_from_checkpoint", "{whole}", "--per_device_train_batch_size", "4"],
         "per_device_train_batch_size is 4, was 16"),
        (["--resume_from_checkpoint", "a", "--wandb_checkpoint_artifact", "b/c/d:e"], "cannot both be given"),
    ],
)  # fmt: skip
def test_what_cannot_go_on_is_refused_before_anything_is_loaded(words, message, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no runs
    with pytest.raises((UsageError, CheckpointError)) as raised:
        parse_train([word.format(tmp=tmp_path, whole=whole) for word in words])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state.pth", "trainer_state.json", "router.safetensors", "README.md"]
)
def test_every_file_of_a_checkpoint_is_verified(name, interrupted):
    path = interrupted / "checkpoint-10" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} was altered"):
        parse_train(["--resume_from_checkpoint", str(interrupted)])
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        parse_train(["--resume_from_checkpoint", str(interrupted)])


def test_other_data_is_refused(folder, interrupted, tmp_path):
    """Rows that are other; the same rows elsewhere are not."""
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    datasets = [f"{moved / 'low.jsonl'},{moved / 'high.jsonl'}"]
    words = ["--resume_from_checkpoint", str(interrupted), "--model", str(moved / "base"), "--datasets"]
    whole = (moved / "high.jsonl").read_text()
    (moved / "high.jsonl").write_text("\n".join(whole.splitlines()[:-3]))
    with pytest.raises(ValueError, match=r"with other data: high has 51 training rows, had 54"):
        train(parse_train([*words, *datasets]))
    (moved / "high.jsonl").write_text(whole)
    train(parse_train([*words, *datasets]))


def rows_of_datasets(**datasets):
    """A fingerprint, and the record of a checkpoint that has it; each dataset is its (training, held-out) rows."""
    entries = {
        f"{place}: {what} rows": f"{value[:2]} rows, {value}"
        for place, values in enumerate(datasets.values())
        for what, value in zip(("training", "held-out"), values, strict=True)
    }
    entries["the epoch's order"] = str(sorted(datasets.values()))
    return entries, {"data": entries, "facts": {"data": [{"name": name} for name in datasets]}}


LOW, HIGH, OTHER = ("54a", "60a"), ("54b", "60b"), ("54c", "51c")


@pytest.mark.parametrize(
    ("now", "phrases"),
    [
        ({"low": LOW, "high": HIGH}, []),
        ({"low": LOW, "renamed": HIGH}, []),
        ({"low": LOW}, ["high is not among the datasets (it had 54 training rows and 60 held-out rows)"]),
        ({"high": HIGH}, ["low is not among the datasets (it had 54 training rows and 60 held-out rows)"]),
        (
            {"low": LOW, "high": HIGH, "more": OTHER},
            ["more is a new dataset (54 training rows and 51 held-out rows)"],
        ),
        (
            {"renamed": LOW, "more": OTHER},
            [
                "high is not among the datasets (it had 54 training rows and 60 held-out rows)",
                "more is a new dataset (54 training rows and 51 held-out rows)",
            ],
        ),
        (
            {"low": LOW, "high": OTHER},
            ["high has 51 held-out rows, had 60", "high has 54 training rows, as before, but with other texts"],
        ),
        ({"high": HIGH, "low": LOW}, ["the datasets are high, low, were in the order low, high"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_difference_of_the_data_has_the_name_of_its_dataset(now, phrases):
    """They were named by their places, as in "1: held-out rows are none, were 6"."""
    _, record = rows_of_datasets(low=LOW, high=HIGH)
    assert data_changes(record, rows_of_datasets(**now)[0], list(now)) == phrases


def test_another_base_is_refused(folder, interrupted, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="trained on another base"):
        train(parse_train(["--resume_from_checkpoint", str(interrupted), "--model", str(tmp_path / "base")]))


def test_an_older_checkpoint_needs_a_folder_of_its_own(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    with pytest.raises(ValueError, match="holds checkpoint-21, which is newer than checkpoint-10"):
        train(parse_train(["--resume_from_checkpoint", str(copy / "checkpoint-10")]))
    assert files_of(copy / "checkpoint") == files_of(whole / "checkpoint")


@pytest.mark.parametrize(("where", "step"), [("on_step_end", 7), ("on_prediction_step", 8)])
def test_a_signal_saves_and_leaves(where, step, folder, whole, tmp_path, monkeypatch):
    """At the end of the running step, or at the next batch of an evaluation; the run then goes on to the same end."""
    real = getattr(StopRequest, where)

    def heard(self, args, state, control, **kwargs):
        if state.global_step == step:
            signal.raise_signal(signal.SIGTERM)
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopRequest, where, heard)
    before = signal.getsignal(signal.SIGTERM)
    message = rf"SIGTERM; saved .*checkpoint-{step}. Resume with: .*--resume_from_checkpoint"
    with pytest.raises(Stopped, match=message) as stop:
        train(parse_train(flags(folder, tmp_path / "run", *SAVES)))
    assert stop.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    train(parse_train(["--resume_from_checkpoint", str(tmp_path / "run")]))
    assert files_of(tmp_path / "run" / "checkpoint") == files_of(whole / "checkpoint")


def test_checkpoints_are_limited_and_the_best_is_kept(folder, tmp_path):
    more = ["--save_total_limit", "2", "--eval_steps", "5", "--learning_rate", "0.3", "--num_epochs", "5"]
    more += ["--lr_scheduler_type", "constant", "--load_best_model_at_end", "true"]
    run_folder = train(parse_train(flags(folder, tmp_path / "run", *SAVES, *more))).parent
    log = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in log if "eval_loss" in line and line["step"] > 0}
    best = min((step for step in losses), key=losses.__getitem__)
    kept = [step for step, _ in checkpoints_in(run_folder)]
    assert len(kept) == 2 and best in kept and 35 in kept and best != 35
    assert files_of(run_folder / "checkpoint") == files_of(run_folder / f"checkpoint-{best}")


def test_early_stopping_counts_evaluations_without_improvement(folder, tmp_path):
    more = ["--early_stopping_patience", "2", "--eval_steps", "5", "--learning_rate", "0.5", "--num_epochs", "9"]
    run_folder = train(parse_train(flags(folder, tmp_path / "run", *SAVES, *more))).parent
    steps = [step for step, _ in checkpoints_in(run_folder)]
    assert steps[-1] < 63
    log = json.loads((checkpoints_in(run_folder)[-1][1] / "trainer_state.json").read_text())["log_history"]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert min(losses[-2:]) >= min(losses[:-2])
    for end in range(len(losses) + 1):
        assert is_exhausted(losses[:end], patience=2, threshold=0.0) == (end == len(losses))
    before = files_of(run_folder / "checkpoint")
    train(parse_train(["--resume_from_checkpoint", str(run_folder)]))
    assert files_of(run_folder / "checkpoint") == before


@pytest.mark.parametrize("what", ["optimizer", "weights"])
def test_a_full_disk_is_one_message_and_no_broken_checkpoint(what, folder, whole, tmp_path, monkeypatch):
    """The second save hits the system's own limit on the size of a file, in torch.save or in safetensors."""
    real, limit = DyLoRATrainer._save_checkpoint, {"optimizer": 20_000, "weights": 1_000}[what]
    if what == "weights":
        monkeypatch.setattr(DyLoRATrainer, "_save_optimizer_and_scheduler", lambda self, folder: None)
        monkeypatch.setattr(DyLoRATrainer, "_save_rng_state", lambda self, folder: None)

    def limited(self, *args):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if self.state.global_step == 10 else soft, hard))
        try:
            real(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(DyLoRATrainer, "_save_checkpoint", limited)
    with pytest.raises(CheckpointError, match=r"cannot save .*checkpoint-10: .*last whole checkpoint is checkpoint-5"):
        train(parse_train(flags(folder, tmp_path / "run", *SAVES)))
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-5"]
    monkeypatch.undo()
    if what == "optimizer":
        train(parse_train(["--resume_from_checkpoint", str(tmp_path / "run")]))
        assert files_of(tmp_path / "run" / "checkpoint") == files_of(whole / "checkpoint")


def test_a_folder_that_cannot_be_written_is_one_line(folder, capsys):
    """Before anything is trained; /proc takes no new folders, not even root's."""
    assert main(["train", *flags(folder, Path("/proc/run"), *SAVES)]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1 and "/proc/run" in shown[0]


def test_a_run_goes_on_from_an_artifact(interrupted, whole, tmp_path, monkeypatch):
    """What Weights & Biases hands back is verified like any checkpoint, and the run goes on in a new folder."""
    asked = []

    def fetch(reference: str, into: Path) -> Path:
        asked.append(reference)
        assert not into.exists()
        shutil.copytree(interrupted / "checkpoint-10", into)
        return into

    monkeypatch.setattr("dylo_moe.commands.train.request.download_checkpoint", fetch)
    monkeypatch.chdir(tmp_path)
    words = ["--wandb_checkpoint_artifact", "me/mine/checkpoint-abc:latest"]
    train(parse_train([*words, "--output_dir", "again"]))
    assert asked == ["me/mine/checkpoint-abc:latest"]
    assert files_of(tmp_path / "again" / "checkpoint") == files_of(whole / "checkpoint")
    (interrupted / "checkpoint-10" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.pt is missing"):
        parse_train([*words, "--output_dir", "third"])
    assert len(asked) == 2 and not (tmp_path / "third").exists()
