"""Runs of several processes by the commands a user types: torchrun and accelerate launch, over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from reference.forks import forked
from reference.laws import Laws
from reference.paths import ROOT
from reference.runs import files_of, flags, tiny_run_folder, trained

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.cli import main
from dylo_moe.commands.train.request import parse_train
from dylo_moe.commands.train.run import train as train
from dylo_moe.data.loading import load_data
from dylo_moe.model.checkpoint import CheckpointError
from dylo_moe.training.build import build_model
from dylo_moe.training.run_folder import checkpoints_in
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils.errors import RankLost, UsageError

BIN = Path(sys.executable).parent
PLAIN = (
    *("--lora_dropout", "0", "--optim", "sgd", "--learning_rate", "0.1", "--num_epochs", "2", "--logging_steps", "1"),
)
"""No dropout, whose masks depend on who draws them, and plain gradient descent: AdamW's first steps are little more
than the signs of gradients, which rounding may turn where they are almost nothing. Two passes of five steps, of which
the last is half empty."""
MANY = ("--num_experts", "12", "--shared_r", "3", "--save_strategy", "steps", "--save_steps", "6")
"""So many experts that a rank, and in some step every rank, has none for some of them; and one that serves all."""


def launcher(processes: int, kind: str) -> list[str]:
    if kind == "torchrun":
        return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    return [
        *(str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "recipes" / f"{kind}.yaml")),
        *("--num_processes", str(processes), "--main_process_port", "0"),
    ]


def start(words: list[str], log: Path, *, processes: int = 2, kind: str = "torchrun") -> subprocess.Popen:
    with open(log, "wb") as said:
        return subprocess.Popen(
            [*launcher(processes, kind), str(ROOT / "train.py"), *words],
            stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def run(words: list[str], log: Path, *, processes: int = 2, kind: str = "torchrun") -> str:
    status = start(words, log, processes=processes, kind=kind).wait(timeout=180)
    assert status == 0, log.read_text()
    return log.read_text()


def told(text: str) -> list[str]:
    """What the command said of its end."""
    return [line for line in text.splitlines() if line.startswith("dylora train:")]


SPEC = importlib.util.spec_from_file_location("processes", ROOT / "benchmarks" / "runs" / "processes.py")
processes_benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(processes_benchmark)


def near(laws: Laws, law: str, ours: Path, theirs: Path) -> None:
    assert files_of(ours / "checkpoint").keys() == files_of(theirs / "checkpoint").keys()
    found = torch.tensor(processes_benchmark.distance(ours / "checkpoint", theirs / "checkpoint"))
    laws.close(law, found, torch.zeros(()), atol=2e-6)


def close(ours: Path, theirs: Path) -> None:
    """Both logs hold the same lines, with the same numbers within rounding; each line is there once."""
    for one, other in zip(trained(ours), trained(theirs), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"total_flos"}:  # counts padding, of which shorter batches have less
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), (one["step"], key)


def once(folder: Path, name: str, make: Callable[[], object]) -> Path:
    """`folder/name`, which `make` makes; several workers of a test run make it once, as it takes long."""
    with FileLock(folder / f"{name}.lock"):
        if not (folder / f"{name}.made").exists():
            make()
            (folder / f"{name}.made").touch()
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared by the workers of one test run."""
    run_of_tests = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run_of_tests is None:
        return tiny_run_folder(tmp_path_factory.mktemp("distributed"))
    shared = tmp_path_factory.getbasetemp().parent / "distributed"
    shared.mkdir(exist_ok=True)
    once(shared, "base", lambda: tiny_run_folder(shared))
    return shared


@pytest.fixture(scope="module")
def alone(folder):
    """One process with 24 rows a step."""
    words = flags(folder, folder / "alone", *PLAIN, *MANY, "--per_device_train_batch_size", "24")
    return once(folder, "alone", lambda: main(["train", *words]))


def words_of_half(folder: Path, into: Path) -> list[str]:
    return flags(folder, into, *PLAIN, *MANY, "--per_device_train_batch_size", "12")


@pytest.fixture(scope="module")
def pair(folder, alone):
    """Two processes with 12 rows each."""
    words = words_of_half(folder, folder / "pair")
    return once(folder, "pair", lambda: run(words, folder / "pair.log", kind="accelerate_ddp"))


def test_two_processes_give_the_weights_of_one(alone, pair, laws):
    steps = [line for line in trained(alone) if "lm_loss" in line]
    unchosen = [sum(value == 0 for key, value in line.items() if key.startswith("share_expert")) for line in steps]
    assert max(unchosen) > 0, "no expert was ever left out, so this shows less than it claims"
    near(laws, "two processes = one, weights", alone, pair)
    close(alone, pair)
    said = pair.with_suffix(".log").read_text()
    assert "2 processes, each with all of the base: 2 x 1 x 12 rows a step" in said
    assert said.count("The whole run took") == 1
    assert json.loads((pair / "run.json").read_text())["processes"] == 2


def test_two_processes_with_a_sharded_base_give_the_weights_of_one(folder, alone, pair, laws):
    """Without a save on the way, so that the end itself must gather what the ranks counted."""
    words = [*words_of_half(folder, folder / "shared"), "--save_strategy", "no"]
    said = run(words, folder / "shared.log", kind="accelerate_fsdp2")
    assert "2 processes, each with a share of the base (FSDP2): 2 x 1 x 12 rows a step" in said
    near(laws, "two processes with a sharded base = one, weights", alone, folder / "shared")
    close(alone, folder / "shared")
    assert files_of(folder / "shared" / "checkpoint") == files_of(pair / "checkpoint")


def test_two_processes_that_route_answers_give_the_weights_of_one(tmp_path, laws, monkeypatch):
    """Each with all of the base and with a share of it; the balance loss counts the answers of all ranks."""
    folder = tiny_run_folder(tmp_path, is_chat=True)
    more = (*PLAIN, "--granularity", "response", "--top_k", "2", "--max_steps", "3", "--balance_coefficient", "1")
    assert main(["train", *flags(folder, folder / "one", *more, "--per_device_train_batch_size", "24")]) == 0
    for name in ("two", "sharded"):
        if name == "sharded":
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
            monkeypatch.setenv("FSDP_VERSION", "2")
        two, log = flags(folder, folder / name, *more, "--per_device_train_batch_size", "12"), folder / f"{name}.log"
        assert forked(["train", *two], log, count=2) == [0, 0], log.read_text()
        assert ("FSDP2" in log.read_text()) == (name == "sharded")
        near(laws, f"{name} processes that route answers = one, weights", folder / "one", folder / name)
        close(folder / "one", folder / name)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_checkpoint_of_two_goes_on_with_another_number(processes, folder, alone, pair, laws):
    into = folder / f"on_{processes}"
    words = ["--resume_from_checkpoint", str(pair / "checkpoint-6"), "--output_dir", str(into)]
    if processes == 1:
        assert main(["train", *words]) == 0
    else:
        said = run(words, folder / "on_3.log", processes=3)
        assert "3 processes, each with all of the base: 3 x 1 x 8 rows a step" in said
        assert "the run has 3 processes, had 2" in said
    near(laws, "a checkpoint of two goes on with one or three, weights", alone, into)
    assert trained(into)[-1]["eval_loss"] == pytest.approx(trained(alone)[-1]["eval_loss"], rel=1e-5)


def test_rows_that_cannot_be_shared_are_refused(alone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(
        CheckpointError, match=r"with 24 rows a step, which 5 processes .* resume with 1, 2, 3, 4, 6, 8"
    ):
        parse_train(["--resume_from_checkpoint", str(alone)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataloader_drop_last", "true"], "rows would be left out"),
        (["--average_tokens_across_devices", "false"], "a step's loss is always the mean over the tokens"),
        (["--ddp_find_unused_parameters", "false"], "experts that no token chose have no gradient"),
        (["--ddp_static_graph", "true"], "which experts take part differs from step to step"),
        (["--accelerator_config", '{"split_batches": true}'], "accelerator_config sets split_batches"),
        (["--accelerator_config", '{"even_batches": false}'], "accelerator_config sets even_batches"),
        (["--fsdp_config", '{"version": 2}'], "nothing is shared without --fsdp true"),
    ],
)
def test_flags_that_would_make_another_step_are_refused(words, message, folder, tmp_path):
    with pytest.raises(UsageError, match=message):
        parse_train(flags(folder, tmp_path / "run", *words))


def test_rows_grouped_by_length_are_in_the_order_of_one_process(folder, tmp_path, monkeypatch):
    """A bug once: the order followed from the rows of one process, not from those of a step."""
    grouped = ("--train_sampling_strategy", "group_by_length")
    orders = []
    for rows, processes in (("8", 2), ("16", 1)):
        arguments = parse_train(flags(folder, tmp_path / rows, *grouped, "--per_device_train_batch_size", rows))
        monkeypatch.setattr(type(arguments.train), "world_size", property(lambda self, count=processes: count))
        data = load_data(arguments.data, load_tokenizer(arguments.model.model), seed=0)
        model = build_model(arguments.model, arguments.experts, arguments.router, bf16=False)
        trainer = DyLoRATrainer(model=model, args=arguments.train,
                                train_dataset=data.train, eval_dataset=data.evaluation, domains=data.names)  # fmt: skip
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] == orders[1] and orders[0] != sorted(orders[0])


def test_a_peer_lost_while_saving_is_no_failure_of_the_save(folder, tmp_path, monkeypatch):
    """A bug once: it was told as a disk that cannot be written, and the run as one that nobody can go on with."""
    lost = "[pair.cc:537] Read error [127.0.0.1]:15785: Connection reset by peer"
    monkeypatch.setattr(
        DyLoRATrainer, "_save_rng_state", lambda self, folder: (_ for _ in ()).throw(RuntimeError(lost))
    )
    monkeypatch.setattr("dylo_moe.utils.distributed.num_ranks", lambda: 2)
    monkeypatch.setattr("dylo_moe.utils.distributed.from_first", lambda make: make())
    with pytest.raises(RankLost, match=r"another process of this run has gone; .* has no checkpoint yet"):
        train(parse_train(flags(folder, tmp_path / "run")))


def test_a_mistake_that_every_rank_finds_is_told_once(folder):
    log = folder / "mistake.log"
    assert start(flags(folder, folder / "mistake", "--lora_targets", "nothing"), log).wait(timeout=120) != 0
    [line] = told(log.read_text())
    assert "nothing" in line


LONG = (
    *("--num_epochs", "6", "--save_strategy", "steps", "--save_steps", "4", "--eval_strategy", "no"),
    *("--per_device_train_batch_size", "8"),
)


def interrupt(words: list[str], log: Path, into: Path, *, number: int, launcher_too: bool = False) -> str:
    """Start, wait for two more checkpoints, send a signal to a rank or to the launcher; returns what was said."""
    process, wanted = start(words, log), len(checkpoints_in(into)) + 2
    deadline = time.monotonic() + 120
    while process.poll() is None and len(checkpoints_in(into)) < wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, log.read_text()
    os.kill(process.pid if launcher_too else ranks_of(process.pid)[-1], number)
    assert process.wait(timeout=60) != 0
    return log.read_text()


def ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return once(folder, "whole", lambda: run(flags(folder, folder / "whole", *LONG), folder / "whole.log"))


def test_an_interrupted_run_says_so_once_and_ends_bit_equal(folder, uninterrupted, tmp_path):
    """First a rank is killed, then all are asked to stop. With dropout, whose masks go on too; sharded or not."""
    cut, sharded = tmp_path / "cut", ("--fsdp", "true")
    said = interrupt(flags(folder, cut, *LONG, *sharded), tmp_path / "1.log", cut, number=signal.SIGKILL)
    [line] = told(said)
    last = checkpoints_in(cut)[-1][1]
    assert f"another process of this run has gone; the last whole checkpoint is {last}. Resume with the same" in line
    assert line.endswith(f"launcher and: train.py --resume_from_checkpoint {cut}")
    again = ["--resume_from_checkpoint", str(cut)]
    said = interrupt(again, tmp_path / "2.log", cut, number=signal.SIGTERM, launcher_too=True)
    [line] = told(said)
    last = checkpoints_in(cut)[-1][1]
    assert f"stopped by SIGTERM; saved {last}. Resume with the same launcher and: train.py" in line
    run([*again, *sharded], tmp_path / "3.log")
    assert files_of(cut / "checkpoint") == files_of(uninterrupted / "checkpoint")


def test_other_commands_and_single_processes_say_what_they_cannot(folder, tmp_path, capsys, monkeypatch):
    assert main(["train", *flags(folder, tmp_path / "run", "--fsdp", "true")]) == 2
    assert "FSDP cannot be used so: there is one process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["eval", "nowhere"]) == 2
    assert "dylora eval: this command runs in one process" in capsys.readouterr().err
