"""The flags that `dylora submit` has besides those of `dylora train`: where and how a job of Vertex AI runs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dylo_moe.commands.submit.machines import resolve
from dylo_moe.commands.submit.start import ARTIFACT_VARIABLE
from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.parsing.command_line import CommandLine, refusal_of
from dylo_moe.training.arguments import TrainerOptions
from dylo_moe.utils.redact import SECRET_NAME

NOT_OFFERED = {
    "output_dir": "it is made of --bucket and --display_name, so that the same command resumes the run",
    "resume_from_checkpoint": "a job always resumes its run; for a new run give another --display_name",
}
"""Flags of `dylora train` that have no meaning here; each with the reason."""

STANDARD, SPOT, FLEX_START = "STANDARD", "SPOT", "FLEX_START"

FLEX_START_MOST_HOURS = 7 * 24

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

BUCKET = re.compile(r"gs://(?P<path>[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[A-Za-z0-9._=-]+)*)/?")

IMAGE = re.compile(r"[\w.-]+(:\d+)?(/[\w.-]+)+(:[\w.-]+|@sha256:[0-9a-f]{64})")

LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}")

SECRET = re.compile(
    r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)=((projects/(?P<project>[a-z0-9:.-]+)/secrets/(?P<secret>[\w-]+)/versions/(?P<version>[\w-]+))"
    r"|((?P<own>[\w-]+):(?P<own_version>[\w-]+)))"
)

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)

IN_CLEAR = re.compile(
    r"(local-)?[0-9a-f]{40}|wandb_v1_\w{20,}|hf_[A-Za-z0-9]{20,}|AIza[\w-]{35}|ya29\.[\w.-]+|sk-[\w-]{20,}"
    r"|gh[opsu]_[A-Za-z0-9]{30,}|-----BEGIN .*",
    re.DOTALL,
)
"""The forms of secrets: keys of Weights & Biases, Hugging Face, Google, OpenAI and GitHub, and private keys."""


@dataclass
class CloudArguments:
    """The flags that `dylora submit` has besides those of `dylora train`.

    Raises:
        ValueError: for values that are missing or out of range; all problems in one message.
    """

    gcp_project: str | None = field(
        default=None, metadata={"help": "Id of the Google Cloud project; default: the variable GOOGLE_CLOUD_PROJECT."}
    )
    region: str = field(default="us-central1", metadata={"help": "Where the job runs; the bucket should be there too."})
    bucket: str | None = field(
        default=None,
        metadata={"help": "Where runs are written: gs://BUCKET or gs://BUCKET/FOLDER, with a hierarchical namespace."},
    )
    image: str | None = field(default=None, metadata={"help": "The container image, with its tag or digest."})
    display_name: str | None = field(
        default=None,
        metadata={"help": "Name of the job and of its run's folder. Submitted again, it resumes in that folder."},
    )
    machine_type: str = field(default="g2-standard-12", metadata={"help": "Type of the one machine that trains."})
    accelerator_type: str | None = field(
        default=None,
        metadata={"help": "Type of GPU, such as NVIDIA_TESLA_T4; default: the one that comes with the machine type."},
    )
    accelerator_count: int | None = field(
        default=None,
        metadata={
            "help": "Number of GPUs, each with a process of its own; default: as many as come with the machine type."
        },
    )
    boot_disk_gb: int | None = field(
        default=None,
        metadata={"help": "Size of the machine's disk, for base, datasets and image; default: the service's."},
    )
    strategy: str = field(
        default=STANDARD,
        metadata={
            "help": "STANDARD; SPOT: cheaper, but may be preempted at any time; FLEX_START: waits for a free machine.",
            "choices": [STANDARD, SPOT, FLEX_START],
        },
    )
    max_wait_hours: float | None = field(
        default=None, metadata={"help": "With FLEX_START, the longest wait; 0: no limit. Default: the service's, 24."}
    )
    timeout_hours: float | None = field(
        default=None, metadata={"help": "Longest time that the job runs; default: the service's, 7 days."}
    )
    restart_job_on_worker_restart: bool = field(
        default=False, metadata={"help": "Start the whole job again when its machine was restarted."}
    )
    persistent_resource_id: str | None = field(
        default=None,
        metadata={"help": "Run on this persistent resource of the project, which must have such a machine."},
    )
    service_account: str | None = field(
        default=None,
        metadata={"help": "Account that the job acts as (an e-mail address); default: Vertex AI's own agent."},
    )
    network: str | None = field(
        default=None, metadata={"help": "A peered network: projects/NUMBER/global/networks/NAME."}
    )
    labels: list[str] = field(default_factory=list, metadata={"help": "Labels of the job, KEY=VALUE."})
    secrets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Environment variables of the training from Secret Manager: WANDB_API_KEY=SECRET:VERSION, or "
            "NAME=projects/PROJECT/secrets/SECRET/versions/VERSION. The job holds only the reference."
        },
    )
    env: list[str] = field(
        default_factory=list, metadata={"help": "Other environment variables, NAME=VALUE; they are stored in the job."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the whole job and send nothing."})

    def __post_init__(self) -> None:
        self.gcp_project = self.gcp_project or os.environ.get("GOOGLE_CLOUD_PROJECT")
        for name in ("labels", "secrets"):
            setattr(self, name, [part for item in getattr(self, name) for part in item.split(",") if part])
        problems = [
            *self._missing(), *self._malformed(), *self._scheduling_problems(), *self._variable_problems(),
        ]  # fmt: skip
        try:
            self.machine = resolve(self.machine_type, self.accelerator_type, self.accelerator_count)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))

    def _missing(self) -> list[str]:
        advice = {
            "gcp_project": "the id of your project, which `gcloud projects list` shows, or set GOOGLE_CLOUD_PROJECT",
            "bucket": "where the run is written: gs://BUCKET (docs/vertex.md makes one)",
            "image": "the image that build_and_push.sh pushed, with its tag",
            "display_name": "a name for the job and the folder of its run",
        }
        return [f"{name} is not given: --{name}, {text}" for name, text in advice.items() if not getattr(self, name)]

    def _malformed(self) -> list[str]:
        rules = {
            "gcp_project": (
                re.compile(r"[a-z0-9][a-z0-9.:-]{2,62}"),
                "it must be the id of a project, in small letters",
            ),
            "region": (re.compile(r"[a-z]+(-[a-z]+)+\d+"), "it must be a region such as europe-west4, without a zone"),
            "bucket": (BUCKET, "it must be gs://BUCKET or gs://BUCKET/FOLDER"),
            "image": (
                IMAGE,
                "it must be HOST/PATH/NAME:TAG, or end in @sha256:DIGEST, so that a restart runs the same image",
            ),
            "display_name": (NAME, "it names a folder too: up to 63 letters, digits, '.', '_' and '-'"),
            "persistent_resource_id": (re.compile(r"[a-z][a-z0-9-]{0,62}"), "it must be small letters, digits and '-'"),
            "service_account": (re.compile(r"[\w.-]+@[\w.-]+"), "it must be an e-mail address"),
            "network": (
                re.compile(r"projects/\d+/global/networks/[a-z0-9-]+"),
                "it must be projects/NUMBER/global/networks/NAME",
            ),
        }
        return [
            f"{name} is {value!r}; {rule}"
            for name, (pattern, rule) in rules.items()
            if (value := getattr(self, name)) and not pattern.fullmatch(value)
        ]

    def _scheduling_problems(self) -> list[str]:
        problems = []
        if self.timeout_hours is not None and not self.timeout_hours > 0:
            problems.append(f"timeout_hours is {self.timeout_hours}; it must be above 0")
        if self.boot_disk_gb is not None and self.boot_disk_gb < 100:
            problems.append(f"boot_disk_gb is {self.boot_disk_gb}; it must be at least 100")
        if self.max_wait_hours is not None and self.strategy != FLEX_START:
            problems.append(f"max_wait_hours cannot apply: strategy is {self.strategy}, and only FLEX_START waits")
        if self.max_wait_hours is not None and not self.max_wait_hours >= 0:
            problems.append(f"max_wait_hours is {self.max_wait_hours}; it must be 0 or more")
        if self.strategy == FLEX_START and (self.timeout_hours or 0) > FLEX_START_MOST_HOURS:
            problems.append(f"timeout_hours is {self.timeout_hours}; with FLEX_START it must be at most 168")
        if self.persistent_resource_id and self.strategy != STANDARD:
            problems.append(
                f"strategy is {self.strategy}, which cannot apply to the machines of a persistent resource: they "
                "already exist"
            )
        return problems

    def _variable_problems(self) -> list[str]:
        rule = "small letters, digits, '_' and '-', at most 63 of each, the key beginning with a letter"
        problems = [f"labels has {pair!r}; it must be KEY=VALUE: {rule}" for pair in _not(LABEL, self.labels)]
        problems += [
            f"secrets has {_hidden(pair)}; it must be NAME=SECRET:VERSION or "
            "NAME=projects/PROJECT/secrets/SECRET/versions/VERSION, a reference to the value and never the value"
            for pair in _not(SECRET, self.secrets)
        ]
        problems += [f"env has {_hidden(pair)}; it must be NAME=VALUE" for pair in _not(VARIABLE, self.env)]
        for pair in self.env:
            name, _, value = pair.partition("=")
            if name == ARTIFACT_VARIABLE:
                problems.append(f"env has {name}; give --wandb_checkpoint_artifact, which is checked")
            elif SECRET_NAME.search(name) or IN_CLEAR.fullmatch(value.strip()):
                problems.append(
                    f"env would store {name} in the job, in clear: put the value into Secret Manager and give "
                    f"--secrets {name}=SECRET:latest"
                )
        for option, pairs in (("labels", self.labels), ("variables", [*self.secrets, *self.env])):
            names = [pair.partition("=")[0] for pair in pairs]
            problems += [f"{option} has {name} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
        return problems

    @property
    def secret_references(self) -> dict[str, str]:
        """The full reference to the value of each secret variable in Secret Manager."""
        found = [match for pair in self.secrets if (match := SECRET.fullmatch(pair))]
        return {
            match["name"]: f"projects/{match['project'] or self.gcp_project}/secrets/{match['secret'] or match['own']}"
            f"/versions/{match['version'] or match['own_version']}"
            for match in found
        }

    @property
    def folder(self) -> str:
        """The folder of the job, as a path below gs:// and /gcs/."""
        match = BUCKET.fullmatch(str(self.bucket))
        assert match is not None
        return f"{match['path']}/{self.display_name}"


def _not(pattern: re.Pattern[str], items: Sequence[str]) -> list[str]:
    return [item for item in items if not pattern.fullmatch(item)]


def _hidden(pair: str) -> str:
    """Write a malformed pair for a message, without the part that may be a secret."""
    name, sign, _ = pair.partition("=")
    return f"{name}=..." if sign else "a value without NAME="


def submit_refusal(name: str) -> str | None:
    """Say why `dylora submit` does not offer a flag; None where it offers the flag."""
    return NOT_OFFERED.get(name) or refusal_of(name)


SUBMIT_LINE = CommandLine(
    prog="dylora submit",
    kinds=(CloudArguments, *TRAIN_CONFIGS),
    usage="dylora submit [--config RECIPE] [--FLAG VALUE ...]",
    description="Train on a machine of Google Cloud: send a job to Vertex AI. The flags of the job come first below, "
    "then those of `dylora train`, which are checked here, before anything is sent. Look at the job before you pay for "
    "it: --dry_run prints it.",
    refusal=submit_refusal,
    trainer=TrainerOptions,
    examples=(
        "dylora submit --gcp_project my-project --region us-central1 --bucket gs://my-bucket "
        "--image us-central1-docker.pkg.dev/my-project/images/dylora:latest --display_name code --dry_run",
    ),
)
