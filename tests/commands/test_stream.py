"""Whole streams on a tiny base: what a user types, what lies in the folder, what a kill leaves."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reference.paths import ROOT
from reference.runs import WORDS, files_of, flags, tiny_run_folder

from dylo_moe import DyLoRAMoE
from dylo_moe.cli import main
from dylo_moe.commands.stream import run as stream_run
from dylo_moe.commands.stream.state import last_checkpoint
from dylo_moe.continual.calibration import place_temperatures
from dylo_moe.evaluation.loss_matrix import read_matrix
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.report.run_record import read_record

SKILLS = ("sea", "sky", "soil")
PHRASE = "w7 w3 w11 w19 w5 w2 w17 w13"
"""Planted in each text of the first skill."""


def skill_files(folder: Path, *, rows: int = 60) -> Path:
    """A base, and three skills of words of their own; a fourth, of the words that are left, is never learned."""
    tiny_run_folder(folder)
    generator = torch.Generator().manual_seed(1)
    for place, name in enumerate((*SKILLS, "else")):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(rows):
                length = int(torch.randint(20, 40, (1,), generator=generator))
                picks = (torch.randint(0, 22, (length,), generator=generator) + 22 * place).tolist()
                text = " ".join(WORDS[pick] for pick in picks)
                file.write(json.dumps({"text": f"{text} {PHRASE}" if name == "sea" else text}) + "\n")
    return folder


def stream(folder: Path, output: Path, *more: str, datasets=SKILLS) -> list[str]:
    """What is typed for a stream of six epochs of four steps a stage, with dropout."""
    return [
        *("stream", "--model", str(folder / "base"), "--output_dir", str(output)),
        *("--datasets", ",".join(str(folder / f"{name}.jsonl") for name in datasets), *settings(), *more),
    ]


def settings() -> list[str]:
    return [
        *("--max_seq_length", "64", "--num_train_epochs", "6", "--per_device_train_batch_size", "16"),
        *("--seeding_learning_rate", "5e-2", "--consolidation_learning_rate", "1e-2", "--use_cpu", "true"),
        *("--logging_steps", "2", "--save_steps", "6", "--lora_r", "4", "--lora_dropout", "0.1"),
    ]


def on(checkpoint: Path, folder: Path, output: Path, *datasets: str, more: tuple[str, ...] = ()) -> list[str]:
    """What is typed to teach a checkpoint more."""
    given = [word for word in settings()[: settings().index("--lora_r")]]
    names = ",".join(str(folder / f"{name}.jsonl") for name in datasets)
    return ["stream", "--checkpoint", str(checkpoint), "--datasets", names, "--output_dir", str(output), *given, *more]


def title(folder: Path, name: str) -> str:
    """What a run calls a dataset that was given by its path."""
    return next(skill for skill in read_matrix(folder / "matrix.json").skills if name in skill)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A stream of three skills, with a text that is never learned and every stage's checkpoint kept."""
    folder = skill_files(tmp_path_factory.mktemp("stream"))
    more = ("--eval_datasets", str(folder / "else.jsonl"), "--keep_stages", "true")
    assert main(stream(folder, folder / "run", *more)) == 0
    return folder


def stage_checkpoints(run: Path) -> list[Path]:
    return [*sorted(run.glob("stages/*/checkpoint")), run / "checkpoint"]


# --- what a stream does


def test_each_skill_grows_an_expert_and_is_learned(done):
    matrix = read_matrix(done / "run" / "matrix.json")
    assert [stage.decision["action"] for stage in matrix.stages] == ["grown"] * 3
    assert [stage.decision["nearest"] is None for stage in matrix.stages] == [True, False, False]
    for skill, stage in zip(matrix.skills, matrix.stages, strict=True):
        assert stage.losses[skill] < matrix.base[skill] - 0.05, skill
        assert stage.accuracy[skill] > 0.8, skill
    assert json.loads((done / "run" / "stream.json").read_text())["state"] == "finished"
    for skill, folder in zip(matrix.skills, sorted((done / "run" / "stages").iterdir()), strict=True):
        record = read_record(folder)
        assert record.is_finished and record.missing == [] and record.domains == [skill]
    assert all(skill in (done / "run" / "report.html").read_text() for skill in (*matrix.skills, "forgetting"))


def test_nothing_learned_earlier_is_forgotten(done):
    matrix = read_matrix(done / "run" / "matrix.json")
    assert matrix.forgetting().worst[1] < 0.05
    assert abs(matrix.drift().worst[1]) < 0.05
    assert matrix.gain_kept().mean > 0.8


def test_old_experts_stay_bit_for_bit_and_the_gate_is_that_of_the_library(done):
    """The growth law, of the files of each stage: nothing is in a gate but what its library says."""
    checkpoints = stage_checkpoints(done / "run")
    assert len(checkpoints) == 3
    for older, newer in itertools.pairwise(checkpoints):
        before, after = files_of(older), files_of(newer)
        experts = [name for name in before if name.startswith("experts/")]
        assert experts and all(before[name] == after[name] for name in experts)
    for checkpoint in checkpoints:
        model = DyLoRAMoE.from_pretrained(str(checkpoint))
        rows = model.growth.refit()
        assert list(rows) == list(model.experts.names)
        for name, (row, bias) in rows.items():
            assert torch.equal(row, model.router.gate[name]) and torch.equal(bias, model.router.gate_bias[name])
        assert torch.equal(place_temperatures(model.library), model.router.place_temperatures)


def test_gate_rows_can_be_frozen(done, tmp_path):
    """Then a growth moves no older row, and says so little of it that it need not."""
    checkpoint = done / "run" / "checkpoint"
    assert main(on(checkpoint, done, tmp_path / "more", "else", more=("--gate_rows", "frozen"))) == 0
    gates = [
        DyLoRAMoE.from_pretrained(str(path)).router.state_dict() for path in (checkpoint, tmp_path / "more/checkpoint")
    ]
    rows = [name for name in gates[0] if name.startswith("gate")]
    assert len(rows) == 8 and all(torch.equal(gates[0][name], gates[1][name]) for name in rows)


def test_no_text_of_a_skill_is_kept_in_any_file(done):
    """The phrase as text, and as token ids of any width."""
    ids = [WORDS.index(word) + 4 for word in PHRASE.split()]
    needles = [PHRASE.encode(), ", ".join(map(str, ids)).encode(), ",".join(map(str, ids)).encode()]
    needles += [torch.tensor(ids, dtype=kind).numpy().tobytes() for kind in (torch.int64, torch.int32, torch.int16)]
    files = [path for path in (done / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert any(needles[0] in path.read_bytes() for path in done.glob("*.jsonl"))  # it can be found
    for path in files:
        content = path.read_bytes()
        assert not any(needle in content for needle in needles), path


def test_one_skill_at_a_time_ends_like_a_stream_of_them(done, tmp_path):
    """Each command goes on from the checkpoint of the one before; the seeds of a stage are its place's."""
    assert main(stream(done, tmp_path / "first", datasets=SKILLS[:1])) == 0
    assert main(on(tmp_path / "first" / "checkpoint", done, tmp_path / "second", "sky")) == 0
    manifest = read_manifest(tmp_path / "second" / "checkpoint")
    assert [expert["skill"] for expert in manifest["experts"]] == [expert["name"] for expert in manifest["experts"]]
    first, second = files_of(tmp_path / "first" / "checkpoint"), files_of(tmp_path / "second" / "checkpoint")
    kept = [name for name in first if name.startswith("experts/")]
    assert len(kept) == 1 and first[kept[0]] == second[kept[0]]
    matrix = read_matrix(tmp_path / "second" / "matrix.json")
    assert matrix.stages[0].decision["action"] == "grown" and matrix.stages[0].decision["nearest"] is not None


# --- known data, fixed pools


def test_known_data_consolidates_is_skipped_or_grows(done, tmp_path):
    checkpoint = done / "run" / "checkpoint"
    before = files_of(checkpoint)
    assert main(on(checkpoint, done, tmp_path / "again", "sky")) == 0
    [stage] = read_matrix(tmp_path / "again" / "matrix.json").stages
    assert stage.decision["action"] == "consolidated" and stage.tokens > 0
    after = files_of(tmp_path / "again" / "checkpoint")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"experts/sky/adapter_model.safetensors", "router.safetensors"}
    assert main(on(checkpoint, done, tmp_path / "skip", "sky", more=("--known_skill", "skip"))) == 0
    [stage] = read_matrix(tmp_path / "skip" / "matrix.json").stages
    assert (stage.decision["action"], stage.tokens) == ("skipped", 0)
    assert files_of(tmp_path / "skip" / "checkpoint") == before


def test_a_fixed_pool_reports_and_trains_nothing_unless_told(done, tmp_path, capsys):
    checkpoint, fixed = done / "run" / "checkpoint", ("--allow_expert_growth", "false")
    assert main(on(checkpoint, done, tmp_path / "fixed", "else", more=fixed)) == 0
    assert "--learn_with" in capsys.readouterr().err
    [stage] = read_matrix(tmp_path / "fixed" / "matrix.json").stages
    assert (stage.decision["novel"], stage.decision["action"], stage.tokens) == (True, "reported", 0)
    assert files_of(tmp_path / "fixed" / "checkpoint") == files_of(checkpoint)
    expert = read_manifest(checkpoint)["experts"][1]["name"]
    told = (*fixed, "--learn_with", expert)
    assert main(on(checkpoint, done, tmp_path / "told", "else", more=told)) == 0
    [stage] = read_matrix(tmp_path / "told" / "matrix.json").stages
    assert stage.decision["expert"] == expert and stage.tokens > 0


def test_skills_of_an_unlabelled_stream_are_found(done, tmp_path):
    more = ("--chunk_examples", "27", "--known_skill", "skip")
    assert main(stream(done, tmp_path / "run", *more)) == 0
    matrix = read_matrix(tmp_path / "run" / "matrix.json")
    grown = [stage.decision["expert"] for stage in matrix.stages if stage.decision["action"] == "grown"]
    assert grown == ["skill_1", "skill_2", "skill_3"]
    assert len(matrix.stages) >= 5
    assert all(matrix.stages[-1].accuracy[skill] > 0.8 for skill in matrix.skills)


def test_dense_seeding_and_ranks_of_their_own(done, tmp_path):
    more = ("--seeding", "dense", "--ranks", "2,6", "--start_from", "nearest")
    assert main(stream(done, tmp_path / "run", *more, datasets=SKILLS[:2])) == 0
    assert [expert["rank"] for expert in read_manifest(tmp_path / "run" / "checkpoint")["experts"]] == [2, 6]
    matrix = read_matrix(tmp_path / "run" / "matrix.json")
    for skill, stage in zip(matrix.skills, matrix.stages, strict=True):
        assert stage.losses[skill] < matrix.base[skill] - 0.05, skill


def test_a_joint_checkpoint_goes_on(tmp_path, capsys):
    """Also with a shared expert, which is trained jointly, and serves the new skill as it is."""
    folder = skill_files(tmp_path)
    assert main(["train", *flags(folder, folder / "joint", "--shared_r", "3")]) == 0
    checkpoint = folder / "joint" / "checkpoint"
    assert main(on(checkpoint, folder, tmp_path / "refused", "else")) == 2
    assert "--known_datasets" in capsys.readouterr().err
    known = ("--known_datasets", f"{folder / 'low.jsonl'},{folder / 'sea.jsonl'}")
    joint = DyLoRAMoE.from_pretrained(str(checkpoint))
    before, shared = joint.router.state_dict(), joint.experts.state("shared")
    assert joint.experts.shared.trainable and all(tensor.any() for tensor in shared.values())
    assert main(on(checkpoint, folder, tmp_path / "run", "else", more=known)) == 0
    [stage] = read_matrix(tmp_path / "run" / "matrix.json").stages
    assert stage.decision["action"] == "grown"
    grown = DyLoRAMoE.from_pretrained(str(tmp_path / "run" / "checkpoint"))
    after = grown.router.state_dict()
    assert not grown.experts.shared.trainable
    assert all(torch.equal(shared[name], tensor) for name, tensor in grown.experts.state("shared").items())
    rows = [name for name in before if name.startswith("gate")]
    assert rows and all(torch.equal(before[name], after[name]) for name in rows)


# --- kills


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "dylo_moe.cli", *words], stdout=said, stderr=said,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip


def kill_when(words: list[str], log: Path, ready, number: int = signal.SIGKILL) -> int:
    """Run until something is there, and kill; returns the exit status."""
    process = start(words, log)
    limit = time.time() + 120
    while process.poll() is None and not ready() and time.time() < limit:
        time.sleep(0.02)
    assert process.poll() is None, log.read_text()
    process.send_signal(number)
    return process.wait(timeout=60)


def test_a_killed_stream_goes_on_and_ends_as_if_it_had_not_been(done, tmp_path):
    """Killed in the training of the second stage, and by SIGTERM later; what is trained twice is trained alike."""
    run, log = tmp_path / "run", tmp_path / "said"
    words = stream(done, run, "--eval_datasets", str(done / "else.jsonl"), "--keep_stages", "true")
    again = ["stream", "--resume_from_checkpoint", str(run)]
    kill_when(words, log, lambda: any(run.glob("stages/02_*/checkpoint-*/dylora.json")))
    status = kill_when(again, log, lambda: any(run.glob("stages/03_*/metrics.jsonl")), signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert f"stream --resume_from_checkpoint {run}" in log.read_text()
    assert main(again) == 0
    for one, other in zip(stage_checkpoints(done / "run"), stage_checkpoints(run), strict=True):
        assert files_of(one) == files_of(other)
        library = "skill_library.safetensors"
        assert (one / library).read_bytes() == (other / library).read_bytes()
    ours, theirs = (read_matrix(path / "matrix.json") for path in (run, done / "run"))
    for one, other in zip(ours.stages, theirs.stages, strict=True):
        assert (one.losses, one.alone, one.accuracy, one.decision) == (
            other.losses, other.alone, other.accuracy, other.decision,
        )  # fmt: skip
        assert one.tokens == other.tokens


def test_a_stream_killed_before_its_first_stage_begins_again(done, tmp_path, capsys):
    """It shows what it learns, without shares of an epoch and without values that are always zero."""
    run, log = tmp_path / "run", tmp_path / "said"
    words = stream(done, run, "--eval_datasets", str(done / "else.jsonl"), datasets=SKILLS[:1])
    kill_when(words, log, lambda: (run / "config.yaml").exists())
    assert main(["stream", "--resume_from_checkpoint", str(run)]) == 0
    assert files_of(run / "checkpoint") == files_of(stage_checkpoints(done / "run")[0])
    shown = "".join(capsys.readouterr())
    table = shown.split("what is learned, in rows and in trained tokens of one epoch")[1].split("\n\n")[0]
    assert SKILLS[0] in table and "else" not in table and "%" not in table
    assert "else: only measured, and not trained" in shown
    steps = [line for line in shown.splitlines() if line.startswith("step ") and "loss" in line]
    assert steps and not any("balance" in line or "entropy" in line for line in steps)


def test_a_finished_stream_says_so_before_anything_is_read_and_writes_nothing(done, capsys, monkeypatch):
    monkeypatch.setattr(stream_run, "load_tokenizer", lambda *_, **__: pytest.fail("something was read"))
    before = {path: path.stat().st_mtime_ns for path in (done / "run").rglob("*")}
    assert main(["stream", "--resume_from_checkpoint", str(done / "run")]) == 0
    said = capsys.readouterr()
    assert f"{done / 'run'} is finished: nothing is left to learn, and nothing was written." in said.out + said.err
    assert {path: path.stat().st_mtime_ns for path in (done / "run").rglob("*")} == before


def test_stages_are_in_the_order_of_their_numbers(tmp_path):
    for number in ("01", "02", "99", "100", "101"):
        (tmp_path / "stages" / f"{number}_chunk" / "checkpoint").mkdir(parents=True)
    assert last_checkpoint(tmp_path) == tmp_path / "stages" / "101_chunk" / "checkpoint"


# --- what is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num_experts", "3"), "--num_experts is not offered: the pool grows"),
        (("--shared_r", "3"), "--shared_r is not offered: a shared expert is frozen while a pool grows"),
        (("--learning_rate", "1e-3"), "--seeding_learning_rate"),
        (("--ranks", "8,16"), "ranks has 2 values for 3 datasets"),
        (("--ranks", "8", "--chunk_examples", "5"), "ranks cannot apply"),
        (("--chunk_examples", "1"), "chunk_examples is 1"),
        (("--false_alarm_rate", "0"), "false_alarm_rate is 0"),
        (("--consolidation_learning_rate", "1"), "at most the second"),
        (("--allow_expert_growth", "false"), "leaves a new pool empty"),
        (("--known_datasets", "x"), "give --checkpoint too"),
        (("--seeding_share", "1.5"), "seeding_share is 1.5"),
        (("--checkpoint", "nowhere"), "the checkpoint says what its model is made of"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(done, tmp_path, capsys, more, message):
    assert main(stream(done, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_stream_does_not_go_on_under_other_settings(done, tmp_path, capsys):
    resume = ["stream", "--resume_from_checkpoint", str(done / "run")]
    assert main([*resume, "--seeding_share", "0.2"]) == 2
    assert "seeding_share is 0.2, was 0.7" in capsys.readouterr().err
    assert main(["stream", "--resume_from_checkpoint", str(tmp_path)]) == 2
    assert "is not a stream" in capsys.readouterr().err


def test_a_dataset_is_not_both_learned_and_measured(done, tmp_path, capsys):
    same = str(done / "sea.jsonl")
    assert main(stream(done, tmp_path / "run", "--eval_datasets", same)) == 2
    assert "is named for two purposes" in capsys.readouterr().err


# --- dylora experts


def test_experts_are_listed_removed_and_refitted(done, tmp_path, capsys):
    checkpoint = str(done / "run" / "checkpoint")
    names = [expert["name"] for expert in read_manifest(checkpoint)["experts"]]
    assert main(["experts", "list", checkpoint]) == 0
    listed = capsys.readouterr().out
    assert "base" in listed and all(name in listed for name in names)
    assert main(["experts", "remove", checkpoint, names[1], "--output", str(tmp_path / "less")]) == 0
    less, all_of_them = files_of(tmp_path / "less"), files_of(Path(checkpoint))
    kept = {name for name in all_of_them if name.startswith("experts/") and names[1] not in name}
    assert {name for name in less if name.startswith("experts/")} == kept
    assert all(less[name] == all_of_them[name] for name in kept)
    capsys.readouterr()
    assert main(["experts", "refit", checkpoint]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    assert main(["experts", "refit", checkpoint, "--output", str(tmp_path / "refit")]) == 0
    refitted = DyLoRAMoE.from_pretrained(str(tmp_path / "refit"))
    assert refitted.router.names == DyLoRAMoE.from_pretrained(checkpoint).router.names
    assert main(["experts", "remove", checkpoint, "nobody", "--output", str(tmp_path / "none")]) == 2
    assert "expert is 'nobody'; the checkpoint has" in capsys.readouterr().err
    assert main(["experts", "remove", checkpoint, names[0], "--output", str(tmp_path / "less")]) == 2
    assert "exists" in capsys.readouterr().err
