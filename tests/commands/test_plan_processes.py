"""`dylora plan` of several processes: the steps they make, and what one of them holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from reference.paths import TESTS
from reference.runs import flags, tiny_run_folder
from reference.tiny import LORA, tiny_base, tiny_moe

from dylo_moe.cli import main
from dylo_moe.commands.plan.memory_account import EXPERTS, GRADIENTS, OPTIMIZER, Peak, peak_memory
from dylo_moe.commands.plan.outline import outline
from dylo_moe.commands.plan.per_process import (
    BASE,
    BUCKETS,
    FLAT,
    GATHERED,
    Processes,
    base_share,
    processes_of,
)
from dylo_moe.commands.plan.request import parse_plan
from dylo_moe.commands.plan.workload import Batch, Workload, workload
from dylo_moe.commands.train.request import parse_train
from dylo_moe.training.sharding import Sharding

KEEPS, DROPS = Sharding(False, False, ()), Sharding(True, False, ())
LAYER_OF_3 = 2 * 11 * 32 + 2 * 6 * 32 + 2 * 16 * 32 + 11 * 48 + 2 * 11
"""Numbers of a tiny layer in the first of three processes: q and o, k and v, gate and up, down, norms."""
LAYER = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
OUTSIDE = 2 * 97 * 32 + 32
"""Embeddings, head and norm."""
USUAL = Batch(8, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run_folder(tmp_path_factory.mktemp("plan"))


def peak(
    folder: Path,
    processes: Processes,
    *more: str,
    batch: Batch = USUAL,
    start_tokens: int = 0,
    device: str = "cpu",
) -> Peak:
    words = ["--model", str(folder / "base"), "--num_experts", "3", "--lora_r", "4", "--use_cpu", "true", *more]
    load = Workload(0, 0, 0, 0, batch, Batch(1, 8), start_tokens)
    return peak_memory(outline(parse_train(words)), load, device=device, processes=processes)


def test_a_share_by_hand():
    base = tiny_moe(tiny_base("llama", num_hidden_layers=3)).base
    dropped = base_share(base, 3, reshard_after_forward=True)
    assert dropped.whole == 4 * (3 * LAYER + OUTSIDE)
    assert dropped.kept == 4 * (3 * LAYER_OF_3 + 2 * 33 * 32 + 11)  # 97 rows are 33, 33 and 31
    assert dropped.gathered == 4 * (2 * LAYER + OUTSIDE)
    assert base_share(base, 3, reshard_after_forward=False) == dropped._replace(gathered=dropped.whole)


def test_one_matrix_that_is_embeddings_and_head_is_shared_once():
    share = base_share(tiny_base("qwen2"), 2, reshard_after_forward=True)
    assert share.whole == sum(item.nbytes for item in tiny_base("qwen2").parameters())
    assert share.gathered == share.whole  # two layers are all that it has


REAL = """
import json
from torch import distributed
from torch.distributed.tensor import DTensor
import torch
from reference.tiny import tiny_base, tiny_moe, tokens
from dylo_moe.training.sharding import Sharding, shard_base

distributed.init_process_group("gloo")
found = {}
for drops in (True, False):
    model = tiny_moe(tiny_base("llama", num_hidden_layers=3))
    shard_base(model, Sharding(drops, False, ()), device=torch.device("cpu"))
    own = lambda: [item for name, item in model.base.named_parameters() if ".lora_" not in name]
    kept = sum(item.to_local().nbytes for item in own())
    ids = tokens(2, 8)
    model.train()(input_ids=ids, labels=ids)
    found[str(drops)] = [kept, sum(item.nbytes for item in own() if not isinstance(item, DTensor))]
if distributed.get_rank() == 0:
    print(json.dumps(found))
distributed.destroy_process_group()
"""


def test_the_share_is_what_two_real_processes_keep(tmp_path):
    """And what stays gathered when a forward is over: what is in no layer, or everything."""
    (tmp_path / "real.py").write_text(REAL)
    path = f"{TESTS}{os.pathsep}{TESTS.parent}"
    done = subprocess.run(
        [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2", "real.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=180,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    base = tiny_base("llama", num_hidden_layers=3)
    dropped, stays = (base_share(base, 2, reshard_after_forward=drops) for drops in (True, False))
    assert found == {"True": [dropped.kept, 4 * OUTSIDE], "False": [stays.kept, stays.gathered]}
    assert dropped.gathered == 4 * (OUTSIDE + 2 * LAYER)


def test_ddp_adds_its_buckets_to_what_one_process_holds(folder):
    alone, pair = peak(folder, Processes()), peak(folder, Processes(2))
    assert alone.when == pair.when == "a training step"
    assert alone.parts.get(BUCKETS, 0) == 0
    trained = [item for item in tiny_moe(num_experts=3, lora=LORA).parameters() if item.requires_grad]
    assert pair.parts == {**alone.parts, BUCKETS: sum(item.nbytes for item in trained)}


@pytest.mark.parametrize("how", [DROPS, KEEPS])
def test_fsdp_replaces_the_base_by_a_share_and_what_is_gathered(folder, how):
    alone, shared = peak(folder, Processes()), peak(folder, Processes(3, how))
    share = base_share(tiny_base("llama"), 3, reshard_after_forward=how.reshard_after_forward)
    saved = alone.parts[BASE] - shared.parts[BASE]
    assert saved == share.whole - share.kept == 4 * (2 * LAYER + OUTSIDE - 2 * LAYER_OF_3 - 2 * 33 * 32 - 11)
    assert shared.parts[GATHERED] == share.gathered
    others = {name: size for name, size in alone.parts.items() if name not in (BASE, BUCKETS)}
    assert {name: shared.parts[name] for name in others} == others


def test_many_experts_of_a_short_batch_peak_where_gradients_are_averaged(folder):
    """All of them, and the message of as many bytes; no layer is gathered any more."""
    parts = peak(folder, Processes(2, DROPS), "--lora_r", "512", batch=Batch(1, 2))
    assert parts.when == "the averaging of gradients"
    trained = parts.parts[GRADIENTS]
    assert (parts.parts[FLAT], parts.parts[OPTIMIZER], parts.parts[GATHERED]) == (trained, 2 * trained, 0)
    assert trained <= parts.parts[EXPERTS] < 1.001 * trained  # the router's buffers


def test_shares_in_the_hosts_memory_are_none_of_a_gpus(folder):
    offloaded = Processes(2, DROPS._replace(cpu_offload=True))
    assert peak(folder, offloaded).parts[BASE] == peak(folder, Processes(2, DROPS)).parts[BASE]
    here, there = (peak(folder, how, device="cuda") for how in (Processes(2, DROPS), offloaded))
    kept = base_share(tiny_base("llama"), 2, reshard_after_forward=True).kept
    assert here.parts[BASE] - there.parts[BASE] == kept


def test_the_start_of_the_router_is_no_moment_of_a_gpu(folder):
    """A bug once: it was counted there, though `dylora train` starts the router before the model moves."""
    shared = peak(folder, Processes(2, DROPS), start_tokens=100_000)
    assert (shared.when, shared.parts["features of the first rows"]) == ("the start of the router", 8 * 32 * 100_000)
    assert shared.parts[BASE] == peak(folder, Processes()).parts[BASE]  # it is whole then
    assert peak(folder, Processes(), start_tokens=100_000, device="cuda").when == "a training step"


@pytest.mark.parametrize("more", [(), ("--gradient_accumulation_steps", "2")])
def test_two_processes_make_the_steps_of_one_with_twice_the_rows(folder, more):
    half = workload(parse_train(flags(folder, folder / "half", *more)), num_processes=2)
    whole = workload(
        parse_train(flags(folder, folder / "whole", *more, "--per_device_train_batch_size", "32")), num_processes=1
    )
    assert (half.steps, half.steps_per_epoch) == (whole.steps, whole.steps_per_epoch)
    assert (half.batch.rows, whole.batch.rows) == (16, 32)
    one = workload(parse_train(flags(folder, folder / "one", *more)))
    assert one.steps > half.steps


def test_the_command_says_whose_memory_and_which_rows(folder, capsys):
    words = flags(folder, folder / "out", "--gradient_accumulation_steps", "2")
    assert main(["plan", *words, "--num_processes", "3", "--fsdp", "true"]) == 0
    printed = capsys.readouterr().out
    assert "each of 3 x 2 x 16 rows" in " ".join(printed.split())
    assert "peak of one process on cpu" in printed and GATHERED in printed and BUCKETS not in printed
    assert main(["plan", *words]) == 0
    printed = capsys.readouterr().out
    assert "each of 2 x 16 rows" in " ".join(printed.split()) and "of one process" not in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_processes", "0"], "num_processes is 0; it must be at least 1"),
        (["--num_processes", "two"], "num_processes is 'two'; it must be a whole number"),
        (["--fsdp", "true"], r"num_processes is 1; .*--num_processes 8"),
        (["--num_processes", "2", "--fsdp_config", '{"version": 2}'], "nothing is shared without --fsdp true"),
        (
            ["--num_processes", "2", "--fsdp", "true", "--fsdp_config", '{"activation_checkpointing": true}'],
            "would lose the routing; use --gradient_checkpointing",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, capsys, words, said):
    assert main(["plan", *flags(folder, folder / "out"), *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dylora plan:")]
    assert len(lines) == 1 and re.search(said, lines[0]), lines


def test_the_number_is_a_flag_of_this_command_alone(folder, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("num_processes: 2\n")
    assert main(["train", *flags(folder, folder / "out"), "--num_processes", "2"]) == 2
    assert main(["plan", "--config", str(tmp_path / "recipe.yaml")]) == 2
    said = capsys.readouterr().err
    assert "there is no flag --num_processes" in said and "recipe.yaml: line 1: there is no flag num_processes" in said
    assert main(["plan", "--help"]) == 0
    assert "--num_processes" in capsys.readouterr().out


def test_what_the_flags_of_fsdp_say_is_what_is_planned_and_nothing_else_changes(folder):
    words = ["--num_processes", "4", "--fsdp", "true", "--fsdp_config", '{"reshard_after_forward": false}']
    request = parse_plan([*flags(folder, folder / "out"), *words])
    known = set(os.environ)
    assert processes_of(request.arguments.train, request.num_processes) == Processes(4, KEEPS)
    assert set(os.environ) == known


def test_processes_that_go_on_share_the_rows_of_the_checkpoint(folder, capsys):
    run = folder / "run"
    assert (
        main(["train", *flags(folder, run, "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1")]) == 0
    )
    go_on = ["--resume_from_checkpoint", str(run / "checkpoint-1"), "--use_cpu", "true", "--num_processes"]
    train = parse_plan([*go_on, "4"]).arguments.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (4, 1)
    capsys.readouterr()
    assert main(["plan", *go_on, "3"]) == 2
    assert "with 16 rows a step, which 3 processes cannot share" in capsys.readouterr().err
