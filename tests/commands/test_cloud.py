"""dylora submit: the job field by field, what is refused before it is sent, and the run that resumes in the bucket."""

import dataclasses
import errno
import importlib.util
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import google.auth
import grpc
import pytest
import yaml
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import RefreshError, TransportError
from google.cloud import aiplatform_v1
from reference.paths import ROOT
from reference.runs import files_of, flags, tiny_run_folder, trained
from reference.vertex_server import JOB_NAME, StandInService, secret_manager

from dylo_moe import __version__
from dylo_moe.cli import main
from dylo_moe.commands.submit import start as cloud_start
from dylo_moe.commands.submit.arguments import CloudArguments
from dylo_moe.commands.submit.constants import _known, _problem, with_constants
from dylo_moe.commands.submit.job import as_yaml, build
from dylo_moe.commands.submit.machines import Machine, resolve
from dylo_moe.commands.submit.request import build_submit_parser, parse_submit
from dylo_moe.commands.submit.run import explained
from dylo_moe.training.run_folder import checkpoints_in
from dylo_moe.utils.install import how_to_install

IMAGE = "europe-west4-docker.pkg.dev/my-project/dylora/dylora-moe:0.1.0"
NEEDED = [
    *("--gcp_project", "my-project", "--region", "europe-west4", "--bucket", "gs://my-runs/dylora"),
    *("--image", IMAGE, "--display_name", "code"),
]
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in (
        "GOOGLE_CLOUD_PROJECT",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "WANDB_CHECKPOINT_ARTIFACT",
        "WANDB_API_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")


def said(capsys, *words):
    """The one line that a refused command ends with."""
    assert main(["submit", *words]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dylora submit: ")]
    return line


# The job.


def test_every_field_of_a_job():
    request = parse_submit(
        [
            *NEEDED,
            *("--machine_type", "a2-highgpu-4g", "--accelerator_type", "NVIDIA_TESLA_A100", "--accelerator_count", "4"),
            *("--boot_disk_gb", "300", "--strategy", "FLEX_START", "--max_wait_hours", "0.5", "--timeout_hours", "36"),
            *("--restart_job_on_worker_restart", "--service_account", "trainer@my-project.iam.gserviceaccount.com"),
            *("--network", "projects/123/global/networks/vpc", "--labels", "team=nlp,run=7"),
            *("--secrets", "WANDB_API_KEY=wandb:latest", "HF_TOKEN=projects/other/secrets/hub/versions/3"),
            *("--env", "WANDB_PROJECT=mine", "TEXT=a=b, c", "--wandb_checkpoint_artifact", "me/p/c:best"),
            *("--model", "/gcs/my-runs/base", "--datasets", "code_alpaca,/gcs/my-runs/more.jsonl", "--bf16"),
            *("--num_epochs=2", "--report_to", "wandb"),
        ]
    )
    assert aiplatform_v1.CustomJob.to_dict(build(request)) == aiplatform_v1.CustomJob.to_dict(
        aiplatform_v1.CustomJob(
            display_name="code",
            labels={"team": "nlp", "run": "7", "managed-by": "dylora-moe"},
            job_spec={
                "worker_pool_specs": [
                    {
                        "machine_spec": {
                            "machine_type": "a2-highgpu-4g",
                            "accelerator_type": "NVIDIA_TESLA_A100",
                            "accelerator_count": 4,
                        },
                        "replica_count": 1,
                        "disk_spec": {"boot_disk_size_gb": 300},
                        "container_spec": {
                            "image_uri": IMAGE,
                            "command": ["python", "-m", "dylo_moe.commands.submit.start"],
                            "args": [
                                *("--secret", "WANDB_API_KEY=projects/my-project/secrets/wandb/versions/latest"),
                                *("--secret", "HF_TOKEN=projects/other/secrets/hub/versions/3"),
                                *("--run_folder", "/gcs/my-runs/dylora/code/run", "--"),
                                *("torchrun", "--standalone", "--nproc_per_node=4", "train.py"),
                                *("--model", "/gcs/my-runs/base"),
                                *("--datasets", "code_alpaca,/gcs/my-runs/more.jsonl", "--bf16", "True"),
                                *("--num_train_epochs", "2", "--report_to", "wandb"),
                                *("--output_dir", "/gcs/my-runs/dylora/code/run", "--resume_from_checkpoint", "auto"),
                            ],
                            "env": [
                                {"name": "WANDB_PROJECT", "value": "mine"},
                                {"name": "TEXT", "value": "a=b, c"},
                                {"name": "WANDB_CHECKPOINT_ARTIFACT", "value": "me/p/c:best"},
                            ],
                        },
                    }
                ],
                "scheduling": {
                    "strategy": "FLEX_START",
                    "timeout": {"seconds": 36 * 3600},
                    "max_wait_duration": {"seconds": 1800},
                    "restart_job_on_worker_restart": True,
                },
                "service_account": "trainer@my-project.iam.gserviceaccount.com",
                "network": "projects/123/global/networks/vpc",
                "base_output_directory": {"output_uri_prefix": "gs://my-runs/dylora/code"},
            },
        )
    )


def test_a_job_of_the_defaults_says_nothing_that_was_not_meant():
    request = parse_submit([*NEEDED, "--persistent_resource_id", "pool-1"])
    values = aiplatform_v1.CustomJob.to_dict(
        build(request), use_integers_for_enums=False, always_print_fields_with_no_presence=False
    )
    assert values == {
        "display_name": "code",
        "labels": {"managed-by": "dylora-moe"},
        "job_spec": {
            "persistent_resource_id": "pool-1",
            "worker_pool_specs": [
                {
                    "machine_spec": {
                        "machine_type": "g2-standard-12",
                        "accelerator_type": "NVIDIA_L4",
                        "accelerator_count": 1,
                    },
                    "replica_count": "1",
                    "container_spec": {
                        "image_uri": IMAGE,
                        "command": ["python", "-m", "dylo_moe.commands.submit.start"],
                        "args": [
                            *("--run_folder", "/gcs/my-runs/dylora/code/run", "--", "python", "train.py"),
                            *("--output_dir", "/gcs/my-runs/dylora/code/run", "--resume_from_checkpoint", "auto"),
                        ],
                    },
                }
            ],
            "scheduling": {"strategy": "STANDARD"},
            "base_output_directory": {"output_uri_prefix": "gs://my-runs/dylora/code"},
        },
    }


def test_a_recipe_travels_as_flags_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_epochs: 3\nlora_r: 8\nstrategy: SPOT\nsave_strategy: steps\ndatasets: [mbpp, code_alpaca]\n")
    request = parse_submit([*NEEDED, "--config", str(recipe), "--num_train_epochs", "1"])
    assert request.flags == [
        *("--lora_r", "8", "--save_strategy", "steps", "--datasets", "mbpp", "code_alpaca", "--num_train_epochs", "1")
    ]
    assert request.options.strategy == "SPOT"
    assert not request.warnings


def test_a_flag_that_switches_off_travels_as_it_is():
    words = ["--no_logging_nan_inf_filter", "--fsdp", "true", "--fsdp_config", '{"version": 2}']
    assert parse_submit([*NEEDED, "--machine_type", "g2-standard-24", *words]).flags == words


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        (["--strategy", "SPOT"], "up to an epoch"),
        (["--strategy", "SPOT", "--save_strategy", "no"], "all that was trained"),
        (["--strategy", "SPOT", "--save_strategy", "steps"], None),
        ([], None),
    ],
)
def test_spot_without_checkpoints_in_an_epoch_warns(words, lost):
    warnings = parse_submit([*NEEDED, *words]).warnings
    assert bool(warnings) == (lost is not None)
    assert all(lost in warning and "--save_strategy steps" in warning for warning in warnings)


def test_fp16_is_for_the_jobs_machine():
    """It was refused where the machine that sends the job has no GPU."""
    machine = ["--accelerator_type", "NVIDIA_TESLA_T4", "--machine_type", "n1-standard-8"]
    assert "--fp16" in parse_submit([*NEEDED, *machine, "--fp16"]).flags


def test_flags_of_another_machine_are_not_refused_by_this_one(monkeypatch):
    """bf16, tf32 and Liger need a GPU, which the laptop that submits has not."""
    words = ["--bf16", "true", "--tf32", "true", "--use_liger_kernel", "true"]
    assert parse_submit([*NEEDED, *words]).flags == words
    with pytest.raises(ValueError, match="tf32"):
        parse_submit([*NEEDED, "--tf32", "maybe"])


def test_what_the_shell_says_of_project_and_artifact_is_taken(monkeypatch):
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "my-project")
    monkeypatch.setenv("WANDB_CHECKPOINT_ARTIFACT", "me/p/c:v3")
    request = parse_submit([*NEEDED[2:], "--secrets", "WANDB_API_KEY=wandb:latest"])
    assert (request.options.gcp_project, request.artifact) == ("my-project", "me/p/c:v3")


# The command.


def test_a_dry_run_prints_the_whole_job_and_needs_nobody(capsys, monkeypatch):
    monkeypatch.setattr(aiplatform_v1, "JobServiceClient", None)
    monkeypatch.setattr(google.auth, "default", None)
    words = [*NEEDED, "--strategy", "SPOT", "--labels", "b=2", "a=1", "--lora_r", "8"]
    assert main(["submit", *words, "--dry_run"]) == 0
    printed = capsys.readouterr()
    assert aiplatform_v1.CustomJob(yaml.safe_load(printed.out)) == build(parse_submit(words))
    assert "projects/my-project/locations/europe-west4" in printed.out.splitlines()[0]
    assert printed.err.splitlines()[0].startswith("Note: strategy is SPOT")


def test_what_is_sent_is_what_the_dry_run_prints(capsys, monkeypatch):
    service = StandInService()
    monkeypatch.setattr(aiplatform_v1, "JobServiceClient", service.client)
    words = [*NEEDED, "--lora_r", "8", "--secrets", "HF_TOKEN=hub:1", "--boot_disk_gb", "200"]
    assert main(["submit", *words, "--dry_run"]) == 0
    shown = aiplatform_v1.CustomJob(yaml.safe_load(capsys.readouterr().out))
    with service.running():
        assert main(["submit", *words]) == 0
    [request] = service.requests
    assert (request.parent, request.custom_job) == ("projects/my-project/locations/europe-west4", shown)
    assert service.endpoints == ["europe-west4-aiplatform.googleapis.com"]
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    where = "--region=europe-west4 --project=my-project"
    assert lines == {
        "job": JOB_NAME,
        "run": "gs://my-runs/dylora/code/run",
        "console": "https://console.cloud.google.com/agent-platform/locations/europe-west4/training/456?project=my-project",
        "follow": f"gcloud ai custom-jobs stream-logs 456 {where}",
        "cancel": f"gcloud ai custom-jobs cancel 456 {where}",
    }


STATUS = grpc.StatusCode


@pytest.mark.parametrize(
    ("status", "detail", "advice"),
    [
        (STATUS.PERMISSION_DENIED, "Permission 'aiplatform.customJobs.create' denied", "roles/aiplatform.user"),
        (STATUS.PERMISSION_DENIED, "lacks iam.serviceAccounts.actAs on it", "roles/iam.serviceAccountUser"),
        (STATUS.PERMISSION_DENIED, "API has not been used in project 1 before", "gcloud services enable aiplatform"),
        (STATUS.RESOURCE_EXHAUSTED, "The following quota metrics exceed quota limits", "IAM & Admin, Quotas"),
        (STATUS.NOT_FOUND, "The project was not found", "look at --gcp_project, --region"),
        (STATUS.INVALID_ARGUMENT, "Machine type is not supported", "compare it with what --dry_run prints"),
        (STATUS.FAILED_PRECONDITION, "no such service account", "compare it with what --dry_run prints"),
        (STATUS.UNAUTHENTICATED, "invalid credentials", "gcloud auth application-default login"),
        (STATUS.UNAVAILABLE, "try later", "the job may have arrived"),
        (STATUS.INTERNAL, "oh", "the service refused the job"),
    ],
)
def test_each_refusal_of_the_service_is_one_line_with_what_to_do(capsys, monkeypatch, status, detail, advice):
    service = StandInService((status, f"{detail}\nand more"))
    monkeypatch.setattr(aiplatform_v1, "JobServiceClient", service.client)
    with service.running():
        line = said(capsys, *NEEDED)
    assert len(service.requests) == 1
    assert advice in line
    assert f"{detail} and more" in line


def test_without_credentials_it_says_how_to_get_some(capsys, monkeypatch, tmp_path):
    """The real client, which finds none on this machine."""
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    assert "there are no credentials of Google Cloud: `gcloud auth application-default login`" in said(capsys, *NEEDED)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RefreshError("Reauthentication is needed"), "gcloud auth application-default login"),
        (TransportError("no route"), "is there a network?"),
        (exceptions.RetryError("timeout", cause=None), "does not answer"),
        (exceptions.NotFound("no such pool"), "--persistent_resource_id"),
    ],
)
def test_other_errors_of_the_client_are_explained(error, advice):
    options = parse_submit([*NEEDED, "--persistent_resource_id", "pool"]).options
    assert advice in explained(error, options)


def test_without_the_client_library_it_names_the_extra(capsys, monkeypatch):
    find = importlib.util.find_spec

    def gone(name):
        if name.startswith("google"):
            raise ModuleNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.util, "find_spec", gone)
    assert how_to_install("vertex") in said(capsys, *NEEDED, "--dry_run")


# The constants of submit_full_training.py.

SCRIPT = (ROOT / "submit_full_training.py").read_text()
WORDS_OF_CONSTANTS = {
    "PROJECT_ID": ("my-project", "--gcp_project my-project"),
    "REGION": ("europe-west4", "--region europe-west4"),
    "BUCKET_NAME": ("my-runs/dylora", "--bucket gs://my-runs/dylora"),
    "DISPLAY_NAME": ("code", "--display_name code"),
    "SERVICE_ACCOUNT": ("me@p.iam.gserviceaccount.com", "--service_account me@p.iam.gserviceaccount.com"),
    "SECRETS": (["WANDB_API_KEY=wandb:1", "HF_TOKEN=hub:2"], "--secrets WANDB_API_KEY=wandb:1 HF_TOKEN=hub:2"),
    "DOCKER_REPO_NAME": ("dylora", f"--image us-central1-docker.pkg.dev/from-shell/dylora/dylora-moe:{__version__}"),
    "IMAGE_NAME": ("mine", f"--image us-central1-docker.pkg.dev/from-shell/dylora/mine:{__version__}"),
    "IMAGE_TAG": ("v7", "--image us-central1-docker.pkg.dev/from-shell/dylora/dylora-moe:v7"),
    "IMAGE": (IMAGE, f"--image {IMAGE}"),
    "MACHINE_TYPE": ("n1-standard-8", "--machine_type n1-standard-8"),
    "ACCELERATOR_TYPE": ("NVIDIA_TESLA_T4", "--accelerator_type NVIDIA_TESLA_T4"),
    "ACCELERATOR_COUNT": (2, "--accelerator_count 2"),
    "USE_SPOT": (True, "--strategy SPOT"),
    "WANDB_CHECKPOINT_ARTIFACT": ("me/p/c:v3", "--wandb_checkpoint_artifact me/p/c:v3"),
    "RECIPE": ("code", "--config code"),
    "MODEL": ("google/codegemma-2b", "--model google/codegemma-2b"),
    "DATASETS": (("mbpp", "code_alpaca"), "--datasets mbpp code_alpaca"),
    "NUM_EXPERTS": (6, "--num_experts 6"),
    "NUM_EPOCHS": (0.5, "--num_epochs 0.5"),
    "SAVE_STRATEGY": ("steps", "--save_strategy steps"),
    "SAVE_STEPS": (100, "--save_steps 100"),
    "REPORT_TO": ("wandb", "--report_to wandb"),
}


def run_script(monkeypatch, capsys, tmp_path, constants, *typed):
    """Set constants in a copy of the script, or add them, and run it: the exit status, and what it printed."""
    text = SCRIPT
    for name, value in constants.items():
        line = f"{name} = {value!r}"
        text, found = re.subn(rf"(?m)^{name} = None\b", line, text)
        text = text if found else text.replace("\nif __name__", f"\n{line}\n\nif __name__")
    (tmp_path / "submit_full_training.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["submit_full_training.py", *typed])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(tmp_path / "submit_full_training.py"), run_name="__main__")
    return done.value.code, capsys.readouterr()


def apart(words):
    """A command line in which each flag and its value are two words."""
    parts = [word.partition("=") if word.startswith("--") else (word, "", "") for word in words]
    return [part for flag, sign, value in parts for part in ([flag, value] if sign else [flag])]


def test_every_constant_of_the_script_is_a_flag_and_none_is_no_flag(monkeypatch):
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "from-shell")
    shown = dict(re.findall(r"(?m)^([A-Z_]+) = (\w+)", SCRIPT))
    assert shown == dict.fromkeys(WORDS_OF_CONSTANTS, "None")
    for name, (value, words) in WORDS_OF_CONSTANTS.items():
        repository = {"DOCKER_REPO_NAME": "dylora"} if name.startswith("IMAGE_") else {}
        constants = {**dict.fromkeys(WORDS_OF_CONSTANTS), **repository, name: value}
        assert apart(with_constants(constants, ["--typed"])) == [*words.split(), "--typed"]
    assert with_constants(dict.fromkeys(WORDS_OF_CONSTANTS), ["--typed"]) == ["--typed"]
    assert apart(with_constants({"USE_SPOT": False}, [])) == ["--strategy", "STANDARD"]


def test_the_script_with_all_its_constants_prints_the_job_of_these_flags(monkeypatch, capsys, tmp_path):
    constants = {name: value for name, (value, _) in WORDS_OF_CONSTANTS.items() if name != "IMAGE"}
    constants |= {"LORA_R": 16, "BF16": True, "LEARNING_RATE": 2e-4}
    status, said = run_script(monkeypatch, capsys, tmp_path, constants, "--num_experts", "8", "--dry_run")
    assert not status, said.err
    words = [word for name in constants if name in WORDS_OF_CONSTANTS for word in WORDS_OF_CONSTANTS[name][1].split()]
    image = "europe-west4-docker.pkg.dev/my-project/dylora/mine:v7"
    more = ["--image", image, "--lora_r", "16", "--bf16", "True", "--learning_rate", "0.0002", "--num_experts", "8"]
    assert aiplatform_v1.CustomJob(yaml.safe_load(said.out)) == build(parse_submit([*words, *more]))


def test_what_is_typed_wins_over_a_constant():
    constants = {"RECIPE": "code", "IMAGE_TAG": "v7", "DOCKER_REPO_NAME": "r", "PROJECT_ID": "p", "REGION": "a-b1"}
    typed = ["--config=stream", "--image", "here/image:1", "--region", "c-d2"]
    assert apart(with_constants(constants, typed)) == ["--gcp_project", "p", "--region", "a-b1", *apart(typed)]
    typed = ["--config", "stream", "--gcp_project=q"]
    image = ["--image", f"us-central1-docker.pkg.dev/q/r/dylora-moe:{__version__}"]
    assert apart(with_constants({"RECIPE": "code", "DOCKER_REPO_NAME": "r"}, typed)) == [*image, *apart(typed)]


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"WANDB_CHECKPOINT": "a/b/c:d"}, "there is no constant WANDB_CHECKPOINT; did you mean"),
        ({"PROJCT_ID": None}, "there is no constant PROJCT_ID; did you mean PROJECT_ID?"),
        ({"LERNING_RATE": 1e-3}, "there is no constant LERNING_RATE; did you mean LEARNING_RATE?"),
        ({"NO_LOG_ON_EACH_NODE": True}, "there is no constant NO_LOG_ON_EACH_NODE; did you mean LOG_ON_EACH_NODE?"),
        ({"OUTPUT_DIR": "runs/x"}, "OUTPUT_DIR is not offered: it is made of --bucket and --display_name"),
        ({"USE_SPOT": "yes"}, "USE_SPOT is 'yes'; it must be True or False, or None"),
        ({"NUM_EXPERTS": 2.5}, "NUM_EXPERTS is 2.5; it must be a whole number, or None"),
        ({"NUM_EXPERTS": True}, "NUM_EXPERTS is True; it must be a whole number, or None"),
        ({"NUM_EPOCHS": "3"}, "NUM_EPOCHS is '3'; it must be a number, or None"),
        ({"DATASETS": [1]}, "DATASETS is [1]; it must be a list of texts, or None"),
        ({"MODEL": ["a"]}, "MODEL is ['a']; it must be a text, or None"),
        ({"PROJECT_ID": "a", "GCP_PROJECT": "b"}, "PROJECT_ID and GCP_PROJECT are the same; set one of them"),
        ({"IMAGE": IMAGE, "DOCKER_REPO_NAME": "r"}, "DOCKER_REPO_NAME and IMAGE are the same; set one of them"),
        ({"IMAGE_TAG": "v7"}, "IMAGE_TAG cannot apply without DOCKER_REPO_NAME"),
        ({"DOCKER_REPO_NAME": "r"}, "set PROJECT_ID, or the whole IMAGE"),
        ({}, "nothing is set: write PROJECT_ID, BUCKET_NAME, DISPLAY_NAME"),
    ],
)
def test_a_wrong_constant_is_one_line_with_its_name(constants, message, monkeypatch, capsys, tmp_path):
    status, said = run_script(monkeypatch, capsys, tmp_path, constants)
    assert status == 2
    assert said.err.startswith("dylora submit: ") and message in said.err and said.err.count("\n") == 1


def test_no_constant_swallows_a_typed_word(monkeypatch, capsys, tmp_path):
    for typed in (["foo"], ["--config", "code", "foo"], ["--dry_run", "foo"]):
        status, said = run_script(monkeypatch, capsys, tmp_path, {"DATASETS": ["mbpp"]}, *typed)
        assert (status, said.out) == (2, "") and "'foo' belongs to no flag" in said.err, typed


def test_the_constants_that_messages_offer_are_constants():
    offered = _known(parser := build_submit_parser())
    assert {"LOG_ON_EACH_NODE", "LEARNING_RATE", "LORA_R"} <= {*offered}
    assert [name for name in offered if _problem(name, None, parser)] == []


# Refused before anything is sent.


def test_all_that_is_missing_is_named_at_once(capsys):
    line = said(capsys, "--lora_r", "8")
    assert all(f"{name} is not given" in line for name in ("gcp_project", "bucket", "image", "display_name"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_rr", "8"], "there is no flag --lora_rr; did you mean --lora_r?"),
        (["--lora_r", "eight"], "lora_r is 'eight'; it must be a whole number"),
        (["word"], "'word' belongs to no flag"),
        (["--output_dir", "x"], "it is made of --bucket and --display_name"),
        (["--resume_from_checkpoint", "x"], "a job always resumes its run"),
        (["--bf16", "--fp16"], "bf16 and fp16 are both given"),
        (["--top_k", "9"], "top_k is 9, but num_experts is 4"),
        (["--bucket", "my-runs"], "bucket is 'my-runs'; it must be gs://BUCKET"),
        (["--image", "dylora-moe"], "it must be HOST/PATH/NAME:TAG"),
        (["--image", "host/dylora-moe"], "it must be HOST/PATH/NAME:TAG"),
        (["--display_name", "a/b"], "it names a folder too"),
        (["--region", "europe-west4-a"], "without a zone"),
        (["--service_account", "me"], "it must be an e-mail address"),
        (["--network", "vpc"], "projects/NUMBER/global/networks/NAME"),
        (["--labels", "Team=NLP"], "labels has 'Team=NLP'; it must be KEY=VALUE: small letters"),
        (["--labels", f"a={'b' * 64}"], "at most 63 of each"),
        (["--labels", "a=1", "a=2"], "labels has a twice"),
        (["--timeout_hours", "0"], "it must be above 0"),
        (["--max_wait_hours", "2"], "only FLEX_START waits"),
        (["--strategy", "FLEX_START", "--timeout_hours", "169"], "at most 168"),
        (["--strategy", "SPOT", "--persistent_resource_id", "p"], "they already exist"),
        (["--boot_disk_gb", "10"], "at least 100"),
        (["--datasets", "code_alpacca"], "the nearest known one is 'code_alpaca'"),
        (["--datasets", "gs://my-runs/rows.jsonl"], "write /gcs/my-runs/rows.jsonl"),
        (["--datasets", "rows.jsonl"], "there is no file or folder"),
        (["--model", "~/base"], "write /gcs/BUCKET/data/base"),
        (["--model", "gs://my-runs/base"], "write /gcs/my-runs/base"),
        (["--data_dir", "/data"], "data_dir is /data, which is on this machine"),
        (["--fsdp", "true"], "g2-standard-12 has 1; leave it out, or take a larger machine"),
        (["--fsdp", "true", "--fsdp_config", "fsdp.json"], "fsdp.json"),
        (["--report_to", "wandb"], "--secrets WANDB_API_KEY=SECRET:latest"),
        (["--wandb_checkpoint_artifact", "x", "--secrets", "WANDB_API_KEY=w:1"], "must be ENTITY/PROJECT/NAME:ALIAS"),
        (["--wandb_checkpoint_artifact", "a/b/c:d"], "needs a key in the job"),
        (["--env", "WANDB_CHECKPOINT_ARTIFACT=a/b/c:d"], "give --wandb_checkpoint_artifact"),
        (["--env", "A"], "it must be NAME=VALUE"),
        (["--env", "A=1", "--secrets", "A=s:1"], "variables has A twice"),
        (["--accelerator_type", "NVIDIA_L5", "--machine_type", "new-1"], "did you mean NVIDIA_L4?"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_here(capsys, words, message):
    given = {word for word in words if word.startswith("--")}
    needed = [word for place in range(0, len(NEEDED), 2) if NEEDED[place] not in given for word in NEEDED[place:][:2]]
    assert message in said(capsys, *needed, *words, "--dry_run")


def test_a_file_of_this_machine_is_refused_with_the_command_that_copies_it(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    line = said(capsys, *NEEDED, "--datasets", str(tmp_path / "rows.jsonl"))
    assert f"`gcloud storage cp -r {tmp_path}/rows.jsonl gs://BUCKET/data/rows.jsonl`" in line


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--secrets", f"WANDB_API_KEY={KEY}"], KEY),
        (["--secrets", "WANDB_API_KEY=some-key-of-another-form"], "some-key-of-another-form"),
        (["--env", f"A={KEY}"], KEY),
        (["--env", "HF_TOKEN=abc"], "abc"),
        (["--env", "MY_PASSWORD=abc"], "abc"),
        (["--run_name", "hf_abcdefghijklmnopqrstuvwxyz"], "hf_abc"),
        ([f"--run_name={KEY}"], KEY),
        (["--labels", f"key={KEY}"], KEY),
        (["--hub_token", "abc"], "abc"),
    ],
)
def test_no_secret_is_taken_in_clear_or_shown(capsys, words, value):
    assert value not in said(capsys, *NEEDED, *words, "--dry_run")


def test_a_pinned_revision_is_no_secret():
    """It has the form of an older key of Weights & Biases."""
    assert parse_submit([*NEEDED, "--datasets", f"someone/rows@{KEY}"]).flags == ["--datasets", f"someone/rows@{KEY}"]


@pytest.mark.parametrize(
    ("given", "machine"),
    [
        (("a2-ultragpu-2g", None, None), Machine("a2-ultragpu-2g", "NVIDIA_A100_80GB", 2)),
        (("a2-megagpu-16g", None, 16), Machine("a2-megagpu-16g", "NVIDIA_TESLA_A100", 16)),
        (("g2-standard-48", "NVIDIA_L4", None), Machine("g2-standard-48", "NVIDIA_L4", 4)),
        (("n1-standard-8", "NVIDIA_TESLA_T4", 2), Machine("n1-standard-8", "NVIDIA_TESLA_T4", 2)),
        (("e2-standard-8", None, None), Machine("e2-standard-8", None, 0)),
        (("z9-future-4", "NVIDIA_B200", 3), Machine("z9-future-4", "NVIDIA_B200", 3)),
    ],
)
def test_machines_have_their_accelerators(given, machine):
    assert resolve(*given) == machine


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (("a2-highgpu-1g", "NVIDIA_L4", 1), "a2-highgpu-1g comes with NVIDIA_TESLA_A100"),
        (("a2-highgpu-1g", None, 2), "comes with 1 NVIDIA_TESLA_A100"),
        (("g2-standard-24", None, 1), "comes with 2 NVIDIA_L4"),
        (("g2-standard-5", None, None), "add --accelerator_count"),
        (("n1-standard-8", "NVIDIA_TESLA_A100", 1), "comes only with a2-highgpu and a2-megagpu machines"),
        (("n1-standard-8", "NVIDIA_TESLA_T4", 3), "must be one of 1, 2, 4"),
        (("e2-standard-8", "NVIDIA_TESLA_T4", 1), "can be added to n1 machines only"),
        (("n1-standard-8", None, 1), "accelerator_type is not given"),
        (("n1-standard-8", "NVIDIA_TESLA_T4", 0), "at least 1"),
        (("ct5lp-hightpu-4t", "TPU_V5_LITEPOD", 4), "not on TPUs"),
    ],
)
def test_machines_that_cannot_be_are_refused_with_the_rule(given, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        resolve(*given)


# In the container.


@pytest.fixture
def anonymous(monkeypatch):
    monkeypatch.setattr(google.auth, "default", lambda scopes: (AnonymousCredentials(), "my-project"))


def test_secrets_are_fetched_into_the_environment_of_the_training(anonymous, monkeypatch, tmp_path):
    started = []

    def replace(file, words):
        started.append((file, words, os.environ["A_KEY"], os.environ["B_KEY"]))

    monkeypatch.setattr(os, "execvp", replace)
    for name in ("A_KEY", "B_KEY"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
    with secret_manager(
        {"projects/p/secrets/a/versions/1": f"{KEY}\n", "projects/p/secrets/b/versions/latest": "x"}
    ) as at:
        monkeypatch.setattr(cloud_start, "SECRET_MANAGER", at)
        secrets = ["A_KEY=projects/p/secrets/a/versions/1", "B_KEY=projects/p/secrets/b/versions/latest"]
        words = [word for pair in secrets for word in ("--secret", pair)]
        cloud_start.main([*words, "--run_folder", str(tmp_path / "job" / "run"), "--", "python", "-c", "--", "x"])
    assert started == [("python", ["python", "-c", "--", "x"], KEY, "x")]
    assert list((tmp_path / "job").iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("403", "roles/secretmanager.secretAccessor"),
        ("404", "there is no such secret or version"),
        ("503", "status 503"),
        ("\n", "it is empty"),
        (None, "Connection"),
    ],
)
def test_a_secret_that_cannot_be_had_ends_the_job_with_one_line(
    anonymous, monkeypatch, capsys, tmp_path, answer, reason
):
    monkeypatch.setattr(os, "execvp", None)
    with secret_manager({} if answer is None else {"projects/p/secrets/s/versions/1": answer}) as address:
        monkeypatch.setattr(cloud_start, "SECRET_MANAGER", "http://127.0.0.1:9" if answer is None else address)
        words = ["--secret", "A=projects/p/secrets/s/versions/1", "--run_folder", str(tmp_path / "run"), "--", "true"]
        assert cloud_start.main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dylora job: cannot read the secret projects/p/secrets/s/versions/1 for A: ")
    assert reason in line


def test_a_bucket_that_cannot_rename_folders_is_known_at_once(monkeypatch, capsys, tmp_path):
    """As gcsfuse answers in a bucket with a flat namespace."""

    def refused(source, target):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "rename", refused)
    assert cloud_start.main(["--run_folder", str(tmp_path / "job" / "run"), "--", "true"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--enable-hierarchical-namespace" in line
    assert list((tmp_path / "job").iterdir()) == []


def test_a_bucket_that_cannot_be_written_is_known_at_once(capsys, tmp_path):
    (tmp_path / "job").write_text("a file where a folder should be")
    assert cloud_start.main(["--run_folder", str(tmp_path / "job" / "run"), "--", "true"]) == 2
    assert "roles/storage.objectUser" in capsys.readouterr().err


def test_a_job_begins_from_an_artifact_until_it_has_a_checkpoint_of_its_own(tmp_path):
    command, run = ["python", "train.py", "--resume_from_checkpoint", "auto"], tmp_path / "run"
    from_artifact = ["python", "train.py", "--wandb_checkpoint_artifact", "me/p/c:best"]
    assert cloud_start.with_start(command, run, None) == command
    assert cloud_start.with_start(command, run, "me/p/c:best") == from_artifact
    run.mkdir()
    (run / "config.yaml").write_text("{}")  # stopped before its first checkpoint
    assert cloud_start.with_start(command, run, "me/p/c:best") == from_artifact
    assert not run.exists()
    (run / "checkpoint-7").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    assert cloud_start.with_start(command, run, "me/p/c:best") == command
    (run / "checkpoint-7").rename(run / "checkpoint")
    with pytest.raises(ValueError, match="is over; submit under another --display_name"):
        cloud_start.with_start(command, run, "me/p/c:best")
    assert (run / "checkpoint").is_dir()


def test_the_command_of_a_job_killed_and_run_again_ends_bit_equal(tmp_path, monkeypatch, capsys):
    """The very words of the job that `submit_full_training.py --dry_run` prints; /gcs is a folder here."""
    bucket = tmp_path / "gcs" / "my-runs"
    bucket.mkdir(parents=True)
    tiny_run_folder(bucket)
    more = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2", "--num_epochs", "1"]
    wanted = flags(bucket, bucket / "straight", *more)
    sent = [word.replace(str(bucket), "/gcs/my-runs") for word in wanted if word != str(bucket / "straight")]
    sent.remove("--output_dir")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    monkeypatch.setattr(sys, "argv", ["submit_full_training.py", *NEEDED, *sent, "--dry_run"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "submit_full_training.py"), run_name="__main__")
    assert not done.value.code
    container = yaml.safe_load(capsys.readouterr().out)["job_spec"]["worker_pool_specs"][0]["container_spec"]
    command = [word.replace("/gcs", str(tmp_path / "gcs")) for word in (*container["command"], *container["args"])]
    run = bucket / "dylora" / "code" / "run"
    with open(tmp_path / "said", "wb") as log:
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while first.poll() is None and not checkpoints_in(run):
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)  # it is still this process: the start became the training
        assert first.wait() == -signal.SIGKILL, (tmp_path / "said").read_text()
    [*_, (step, _)] = checkpoints_in(run)
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"checkpoint-{step}, step {step}" in again.stdout.replace("\n", "")
    assert main(["train", *wanted]) == 0
    assert files_of(run / "checkpoint") == files_of(bucket / "straight" / "checkpoint")
    assert trained(run) == trained(bucket / "straight")


# The page.

PAGE = (ROOT / "docs" / "vertex.md").read_text()


def test_the_page_shows_what_its_dry_run_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    [command, shown] = re.search(
        r"```\n(dylora submit[^`]*?--dry_run)\n```.*?```yaml\n(.*?)```", PAGE, re.DOTALL
    ).groups()
    assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    assert capsys.readouterr().out == shown


def test_the_constants_of_the_page_make_a_job(monkeypatch, capsys, tmp_path):
    pairs = re.findall(r"(?m)^    ([A-Z_]+) = (.+)$", PAGE)
    constants = {name: None if value == "None" else value.strip('"') for name, value in pairs}
    status, said = run_script(monkeypatch, capsys, tmp_path, constants, "--dry_run")
    assert not status, said.err
    image = f"europe-west4-docker.pkg.dev/my-project/dylora/dylora-moe:{__version__}"
    words = [*NEEDED[:-4], "--image", image, "--display_name", "code-1", "--config", "code"]
    assert aiplatform_v1.CustomJob(yaml.safe_load(said.out)) == build(parse_submit(words))


def test_the_page_has_every_flag_of_a_job_with_its_default():
    rows = {
        line.split("`")[1].removeprefix("--"): line.split("|")[2].strip(" `")
        for line in PAGE.splitlines()
        if "| `--" in line
    }
    shown = {
        item.name: "none" if item.default in (None, dataclasses.MISSING) else str(item.default)
        for item in dataclasses.fields(CloudArguments)
    }
    assert rows == shown


def test_yaml_is_the_job_itself():
    job = build(parse_submit([*NEEDED, "--timeout_hours", "1.5", "--env", "A=ü: {x}"]))
    assert aiplatform_v1.CustomJob(yaml.safe_load(as_yaml(job))) == job
