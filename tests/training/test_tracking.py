"""Weights & Biases and TensorBoard: what is logged is what was measured, a checkpoint comes back as it was, and no
secret goes along."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from reference.runs import flags, tiny_run_folder
from reference.tiny import padded, tiny_moe, tokens
from reference.wandb_file import history, records
from reference.wandb_server import StandInArtifact, connected
from transformers import TrainingArguments

from dylo_moe.model.checkpoint import CheckpointError, read_manifest
from dylo_moe.training.tracking import CheckpointArtifacts, download_checkpoint, log_plots, log_settings, prepare
from dylo_moe.training.trainer import DyLoRATrainer

SECRETS = {
    "WANDB_API_KEY": "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567",
    "HF_TOKEN": "hf_PlantedInTheEnvironment",
    "AWS_SECRET_ACCESS_KEY": "planted/AWS+secret+key",
}
REFERENCE = "team/dylora-moe/checkpoint-abc:best"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """What `prepare` sets in the environment is gone after the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a process whose every home and temporary folder lies in `home`."""
    kept = {name: value for name, value in os.environ.items() if not re.match("WANDB_|XDG_|HF_|TMP|NETRC", name)}
    for name in ("home", "tmp"):
        (home / name).mkdir(exist_ok=True)
    return {**kept, "HOME": str(home / "home"), "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1", **more}


def python(code: str, *arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """`dylora train --report_to wandb`, for real, without a server, in a process of its own with secrets around it."""
    place = tmp_path_factory.mktemp("offline")
    tiny_run_folder(place)
    output = place / "out"
    argv = ["train", *flags(place, output, "--report_to", "wandb", "--save_total_limit", "1")]
    done = python(
        "import sys; from dylo_moe.cli import main; sys.exit(main(sys.argv[1:]))", *argv, cwd=place,
        env=environment(place, WANDB_MODE="offline", **SECRETS),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (output / "wandb").glob("offline-run-*")
    return SimpleNamespace(place=place, output=output, run=run, printed=done.stdout + done.stderr)


def test_what_is_logged_offline_is_what_was_measured(offline):
    """Every log of the run is in the file that would be synchronised, under its stable name, with its value."""
    lines = [json.loads(line) for line in (offline.output / "metrics.jsonl").read_text().splitlines()]
    logs = [{key: value for key, value in line.items() if key not in ("time", "alarms")} for line in lines]
    logs = [log for log in logs if log.keys() - {"step"}]
    sent = [{name: json.loads(value) for name, value in row.items()} for row in history(offline.run)]
    sent = [row for row in sent if not any(name.startswith("plots/") for name in row)]
    assert len(sent) == len(logs)
    once = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
    names = set()
    for row, log in zip(sent, logs, strict=True):
        assert row["train/global_step"] == log.pop("step")
        for key, value in log.items():
            if key in once:
                continue
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            assert row[name] == pytest.approx(value, rel=1e-6), name
            names.add(name)
    assert names >= {
        "train/loss", "train/lm_loss", "train/balance_loss", "train/loss_low", "train/loss_high",
        "train/share_expert_0", "train/share_low_expert_0", "train/token_entropy", "train/average_entropy",
        "train/load_imbalance", "train/grad_norm_expert_0", "train/grad_norm_expert_1", "train/grad_norm_router",
        "train/gate_drift_expert_0", "train/tokens_per_second", "eval/loss", "eval/low_loss", "eval/high_loss",
        "eval/low_share_expert_0", "eval/low_token_entropy", "eval/low_average_entropy",
    }  # fmt: skip


def test_the_plots_are_sent(offline):
    (row,) = [row for row in history(offline.run) if any(name.startswith("plots/") for name in row)]
    pictures = {name.removesuffix("/path"): json.loads(row[name]) for name in row if name.endswith("/path")}
    assert pictures.keys() == {f"plots/{path.stem}" for path in (offline.output / "plots").glob("*.png")}
    for name, path in pictures.items():
        assert (offline.run / "files" / path).read_bytes() == (offline.output / f"{name}.png").read_bytes()


def test_each_checkpoint_is_an_artifact_with_its_files(offline):
    """Also of a checkpoint that save_total_limit has deleted since: copies, whole, by the hashes of their manifest."""
    found = [record.artifact for record in records(offline.run) if record.WhichOneof("record_type") == "artifact"]
    state = json.loads((offline.output / "checkpoint-21" / "trainer_state.json").read_text())
    losses = {log["step"]: log["eval_loss"] for log in state["log_history"] if "eval_loss" in log}
    steps = [7, 14, 21]
    kept = {21, min(steps, key=losses.__getitem__)}
    assert {path.name for path in offline.output.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in kept}
    assert [json.loads(artifact.metadata)["step"] for artifact in found] == steps
    (name,) = {artifact.name for artifact in found}
    assert name == f"checkpoint-{offline.run.name.rpartition('-')[2]}"
    best = float("inf")
    for step, artifact in zip(steps, found, strict=True):
        assert artifact.type == "model"
        expected = {"latest", f"step-{step}"} | ({"best"} if losses[step] < best else set())
        assert set(artifact.aliases) == expected
        best = min(best, losses[step])
        files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        assert all(offline.output in path.parents for path in files.values())
        manifest = json.loads(files["dylora.json"].read_text())
        assert files.keys() == {*manifest["files"], "dylora.json"}
        assert "optimizer.pt" in files
        for member, entry in manifest["files"].items():
            assert hashlib.sha256(files[member].read_bytes()).hexdigest() == entry["sha256"], member
        metadata = json.loads(artifact.metadata)
        assert metadata["eval_loss"] == losses[step]
        assert metadata["experts"] == ["expert_0", "expert_1"]
        assert metadata["base"] == str(offline.place / "base")


def test_no_secret_reaches_any_file_or_the_output(offline):
    looked_at = 0
    for path in offline.place.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            looked_at += 1
            for name, secret in SECRETS.items():
                assert secret.encode() not in content, f"{name} in {path}"
    assert looked_at > 50
    assert not any(secret in offline.printed for secret in SECRETS.values())


def test_nothing_of_the_tracking_lies_outside_the_runs_folder(offline):
    files = [path for path in offline.place.rglob("*") if path.is_file() and offline.output not in path.parents]
    assert files  # the datasets
    assert not [path for path in files if "wandb" in path.relative_to(offline.place).as_posix().lower()]
    assert not list((offline.output / "wandb").rglob("*.patch"))  # no source code either


ASK = """
import types
from pathlib import Path
from dylo_moe.training import tracking
tracking.API_TIMEOUT_SECONDS = tracking.START_TIMEOUT_SECONDS = 2
arguments = types.SimpleNamespace(report_to=["wandb"], process_index=0, run_name=None)
for name, ask in {
    "download": lambda: tracking.download_checkpoint("team/project/name:latest", Path("into")),
    "train": lambda: tracking.prepare(arguments, Path("run")),
}.items():
    try:
        ask()
    except ValueError as error:
        print(f"{name}: {error}")
"""


def test_no_key_and_no_network_have_their_messages(tmp_path):
    """With the real client, in two processes that wait beside each other."""
    key = {"WANDB_API_KEY": SECRETS["WANDB_API_KEY"], "WANDB_BASE_URL": "http://127.0.0.1:9"}
    patience = {"WANDB_X_GRAPHQL_RETRY_MAX": "1", "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "0.1"}

    def ask(name: str, more: dict[str, str]) -> subprocess.CompletedProcess[str]:
        (tmp_path / name).mkdir()
        return python(ASK, cwd=tmp_path / name, env=environment(tmp_path / name, **more))

    with ThreadPoolExecutor() as pool:
        jobs = pool.submit(ask, "no_key", {}), pool.submit(ask, "no_network", {**key, **patience})
        answers = [job.result() for job in jobs]
    words = "there is no key for Weights & Biases: run `wandb login`", "its server does not answer; is there a network"
    for answer, word in zip(answers, words, strict=True):
        for asked in ("download", "train"):
            (line,) = [part for part in answer.stdout.splitlines() if f"{asked}: " in part]
            assert word in line
        assert SECRETS["WANDB_API_KEY"] not in answer.stdout + answer.stderr
    assert not list(tmp_path.rglob("into"))


def test_a_checkpoint_comes_back_as_it_was(saved, tmp_path, monkeypatch):
    _, folder = saved
    connected(monkeypatch, {REFERENCE: StandInArtifact(folder)})
    into = tmp_path / "artifacts" / "fresh"
    assert download_checkpoint(REFERENCE, into) == into
    arrived = {path.relative_to(into): path.read_bytes() for path in into.rglob("*") if path.is_file()}
    assert arrived == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert read_manifest(into) == read_manifest(folder)
    assert [path.name for path in into.parent.iterdir()] == ["fresh"]


def test_an_altered_checkpoint_is_refused_by_its_own_hashes(saved, tmp_path, monkeypatch):
    _, folder = saved
    content = bytearray((folder / "router.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "router.safetensors").write_bytes(content)
    connected(monkeypatch, {REFERENCE: StandInArtifact(folder)})
    with pytest.raises(CheckpointError, match=r"router\.safetensors was altered"):
        read_manifest(download_checkpoint(REFERENCE, tmp_path / "fresh"))


HOSTILE = [
    "../dylora.json", "experts/../../x.pt", "/etc/passwd", "C:/x.pt", "C:x.pt", "..\\x.pt", "experts\\a\\b", "..",
    "experts/../adapter_config.json", "experts/a/b/adapter_config.json", "experts/.a/adapter_config.json",
    "experts//adapter_config.json", "./dylora.json", "dylora.json/", "dylora.json\n", "training_args.bin",
    "model.safetensors", "rng_state_x.pth", "x.py", ".bashrc", "Router.safetensors", "experts/a/adapter_model.bin", "",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_before_anything_is_fetched(saved, tmp_path, monkeypatch, name):
    _, folder = saved
    artifact = StandInArtifact(folder, {name: None})
    connected(monkeypatch, {REFERENCE: artifact})
    with pytest.raises(ValueError, match=f"it would write {re.escape(repr(name))}.* Nothing was fetched"):
        download_checkpoint(REFERENCE, tmp_path / "fresh")
    assert artifact.downloads == 0
    assert not (tmp_path / "fresh").exists()


def test_a_name_that_hides_another_path_is_refused(saved, tmp_path, monkeypatch):
    """The client writes to an entry's path; the manifest's key need not be the same."""
    _, folder = saved
    artifact = StandInArtifact(folder)
    artifact.manifest.entries["router.safetensors"].path = "../router.safetensors"
    connected(monkeypatch, {REFERENCE: artifact})
    with pytest.raises(ValueError, match="it would write"):
        download_checkpoint(REFERENCE, tmp_path / "fresh")
    assert artifact.downloads == 0


def test_external_files_are_refused(saved, tmp_path, monkeypatch):
    _, folder = saved
    artifact = StandInArtifact(folder, {"optimizer.pt": "file:///etc/passwd"})
    connected(monkeypatch, {REFERENCE: artifact})
    with pytest.raises(ValueError, match=r"optimizer\.pt is a reference to another place"):
        download_checkpoint(REFERENCE, tmp_path / "fresh")
    assert artifact.downloads == 0


def test_what_arrives_is_compared_with_what_was_listed(saved, tmp_path, monkeypatch):
    _, folder = saved
    artifact = StandInArtifact(folder, {"optimizer.pt": None})
    (folder / "scheduler.pt").symlink_to("/etc/hostname")
    (folder / "extra.txt").write_text("x")
    connected(monkeypatch, {REFERENCE: artifact})
    with pytest.raises(ValueError, match="what arrived") as refusal:
        download_checkpoint(REFERENCE, tmp_path / "fresh")
    for part in ("scheduler.pt is a link", "optimizer.pt is missing", "extra.txt was not listed"):
        assert part in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}


@pytest.mark.parametrize(
    "reference",
    ["name", "name:latest", "project/name:latest", "a/b/c", "a/b/c/d:e", "a/../c:d", "../b/c:d", "a/b/c:", "a/b/c:d\n",
     "https://x/a/b/c:d", "a/b/c:..", "a/b/c:d:e", "", "a\\b/c/d:e"],
)  # fmt: skip
def test_malformed_references_are_refused(tmp_path, reference):
    with pytest.raises(ValueError, match="it must be ENTITY/PROJECT/NAME:ALIAS"):
        download_checkpoint(reference, tmp_path / "fresh")


def test_a_folder_that_is_taken_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="it is not empty"):
        download_checkpoint(REFERENCE, tmp_path)


def test_unknown_artifact_permission_and_missing_client_have_their_messages(saved, tmp_path, monkeypatch):
    denied = wandb.errors.CommError("HTTP 403: permission denied")
    foreign = StandInArtifact(tmp_path / "nothing")
    connected(monkeypatch, {"team/p/denied:v0": denied, "team/p/foreign:v0": foreign})
    for reference, words in {
        REFERENCE: "there is no such artifact, or this key may not see it",
        "team/p/1403abc:v404": "there is no such artifact, or this key may not see it",
        "team/p/denied:v0": "the key has no permission for it, or is no longer valid",
        "team/p/foreign:v0": "it has no dylora.json",
    }.items():
        with pytest.raises(ValueError, match=words):
            download_checkpoint(reference, tmp_path / "fresh")
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline")))
    with pytest.raises(ValueError, match="WANDB_MODE is offline"):
        download_checkpoint(REFERENCE, tmp_path / "fresh")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'wandb>=0.19'"):
        download_checkpoint(REFERENCE, tmp_path / "fresh")
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'wandb>=0.19'"):
        prepare(SimpleNamespace(report_to=["wandb"]), tmp_path)


def test_a_run_that_does_not_ask_for_it_is_left_alone(tmp_path):
    before = dict(os.environ)
    prepare(SimpleNamespace(report_to=["tensorboard"]), tmp_path)
    log_settings({"num_experts": 4})
    log_plots([tmp_path / "x.png"])
    assert dict(os.environ) == before
    assert not list(tmp_path.iterdir())


def test_the_upload_of_the_stock_callback_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    with pytest.raises(ValueError, match="WANDB_LOG_MODEL is set"):
        prepare(SimpleNamespace(report_to=["wandb"]), tmp_path)


def test_a_run_that_goes_on_goes_on_at_the_server(tmp_path, monkeypatch):
    connected(monkeypatch, {})
    calls = []
    monkeypatch.setattr(wandb, "init", lambda **asked: calls.append(asked) or SimpleNamespace(id="abc"))
    arguments = SimpleNamespace(report_to=["wandb"], process_index=0, run_name="mine")
    for _ in range(2):
        prepare(arguments, tmp_path)
    assert [(call.get("id"), call.get("resume")) for call in calls] == [(None, None), ("abc", "allow")]
    assert calls[0]["project"] == "dylora-moe"
    assert calls[0]["dir"] == str(tmp_path)
    assert (calls[0]["settings"].disable_git, calls[0]["settings"].console) == (True, "off")


class StandInRun:
    """A run at a server that answers each artifact with an error, at once or later."""

    id, disabled, offline = "abc", False, False

    def __init__(self, later: bool) -> None:
        self.later, self.config, self.aliases = later, {}, []

    def log_artifact(self, artifact, aliases):
        self.aliases.append(aliases)
        error = wandb.errors.CommError(f"the key {SECRETS['WANDB_API_KEY']}\nwas refused")
        if not self.later:
            raise error

        def wait(timeout):
            raise error

        return SimpleNamespace(wait=wait)


@pytest.mark.parametrize("later", [False, True])
def test_a_failed_upload_is_told_once_and_training_goes_on(saved, tmp_path, monkeypatch, capsys, later):
    _, folder = saved
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    run = StandInRun(later)
    monkeypatch.setattr(wandb, "run", run)
    callback = CheckpointArtifacts()
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    for step in (1, 2, 3):  # of the last there is no folder, as when it was deleted by hand
        if step < 3:
            (tmp_path / f"checkpoint-{step}").symlink_to(folder)
        state = SimpleNamespace(
            global_step=step, epoch=1.0, best_global_step=1, log_history=[], is_world_process_zero=True
        )
        callback.on_save(arguments, state, None)
    callback.on_train_end(arguments, state, None)
    assert callback.failures == 3
    assert run.aliases == [["latest", "step-1", "best"], ["latest", "step-2"]]
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("wandb:")]
    assert len(told) == 2, told
    assert re.match(r"checkpoint-\d did not reach Weights & Biases; training continues: ", told[0])
    assert told[1] == f"3 checkpoints did not reach Weights & Biases; they are in {tmp_path}"
    assert SECRETS["WANDB_API_KEY"] not in "".join(told)


def test_settings_go_into_the_config_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    sent = {}
    config = SimpleNamespace(update=lambda values, allow_val_change: sent.update(values))
    monkeypatch.setattr(wandb, "run", SimpleNamespace(disabled=False, config=config))
    log_settings({
        "num_experts": 4, "hub_token": "x", "datasets": [f"https://me:{SECRETS['HF_TOKEN']}@host/data"], "top_k": 1,
    })  # fmt: skip
    assert sent == {"dylora": {"num_experts": 4, "datasets": ["https://me:<HF_TOKEN>@host/data"], "top_k": 1}}


def test_tensorboard_gets_the_scalars_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = []
    for index, length in enumerate((5, 30, 12, 3, 21, 8, 17, 40)):
        ids = tokens(length, seed=index).tolist()
        rows.append({"input_ids": ids, "labels": ids, "domain": index % 2})

    def collate(rows):
        ids, mask = padded([torch.tensor(row["input_ids"]) for row in rows], side="right")
        labels, _ = padded([torch.tensor(row["labels"]) for row in rows], side="right", pad=-100)
        domain = torch.tensor([row["domain"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "domain": domain}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, logging_steps=1, use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, save_strategy="no", eval_strategy="steps", eval_steps=1, report_to="tensorboard",
    )  # fmt: skip
    trainer = DyLoRATrainer(
        model=tiny_moe("llama"), args=arguments, train_dataset=rows, data_collator=collate, domains=["a", "b"],
        eval_dataset={"a": rows[::2], "b": rows[1::2]},
    )  # fmt: skip
    trainer.train()
    (event,) = tmp_path.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(event.parent))
    written.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for log in trainer.state.log_history:
        for key, value in log.items():
            if key != "step":
                name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
                expected.setdefault(name, []).append((log["step"], value))
    assert {"train/loss_a", "train/share_expert_0", "train/grad_norm_router", "eval/loss"} <= expected.keys()
    assert set(written.Tags()["scalars"]) == expected.keys()
    for name, values in expected.items():
        found = [(event.step, event.value) for event in written.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], name
