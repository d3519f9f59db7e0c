"""Build a training as a CustomJob of Vertex AI, in the types of its client library, without reaching the network."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import yaml

from dylo_moe.commands.submit.arguments import CloudArguments
from dylo_moe.commands.submit.request import SubmitRequest
from dylo_moe.commands.submit.start import ARTIFACT_VARIABLE, GO_ON
from dylo_moe.utils.install import how_to_install
from dylo_moe.utils.words import nearest

if TYPE_CHECKING:
    from google.cloud import aiplatform_v1


NOT_INSTALLED = f"the client library of Vertex AI is not installed: {how_to_install('vertex')}"

MANAGED_BY = {"managed-by": "dylora-moe"}


def client_library() -> Any:
    """Import the generated client of Vertex AI, version 1 of its interface.

    The layer above it (`google.cloud.aiplatform`) sends the same messages, but completes them only while sending, so
    that a job could not be shown before it is sent.

    Raises:
        ValueError: where the library is not installed.
    """
    try:
        is_installed = importlib.util.find_spec("google.cloud.aiplatform_v1") is not None
    except ModuleNotFoundError:
        is_installed = False
    if not is_installed:
        raise ValueError(NOT_INSTALLED)
    from google.cloud import aiplatform_v1

    return aiplatform_v1


def build(request: SubmitRequest) -> aiplatform_v1.CustomJob:
    """Build the whole job; the same object is printed and sent."""
    types, options = client_library(), request.options
    container = types.ContainerSpec(
        image_uri=options.image,
        command=["python", "-m", "dylo_moe.commands.submit.start"],
        args=container_args(request),
        env=[types.EnvVar(name=name, value=value) for name, value in job_environment(request).items()],
    )
    pool = types.WorkerPoolSpec(machine_spec=_machine(types, request), replica_count=1, container_spec=container)
    if options.boot_disk_gb is not None:
        pool.disk_spec = types.DiskSpec(boot_disk_size_gb=options.boot_disk_gb)
    return types.CustomJob(
        display_name=options.display_name,
        labels={**MANAGED_BY, **dict(pair.split("=", 1) for pair in options.labels)},
        job_spec=types.CustomJobSpec(
            worker_pool_specs=[pool],
            scheduling=_scheduling(types, options),
            service_account=options.service_account or "",
            network=options.network or "",
            persistent_resource_id=options.persistent_resource_id or "",
            base_output_directory=types.GcsDestination(output_uri_prefix=f"gs://{options.folder}"),
        ),
    )


def job_folder(options: CloudArguments) -> str:
    """The folder that the run is written to, as the job sees it; the service may write beside it."""
    return f"/gcs/{options.folder}/run"


def container_args(request: SubmitRequest) -> list[str]:
    """The arguments of `dylo_moe.commands.submit.start`: references to secrets, the run's folder, and the training."""
    secrets = request.options.secret_references.items()
    num_processes = request.machine.accelerator_count
    several = ["torchrun", "--standalone", f"--nproc_per_node={num_processes}"]
    folder = job_folder(request.options)
    return [
        *(word for name, reference in secrets for word in ("--secret", f"{name}={reference}")),
        *("--run_folder", folder, "--"),
        *(several if num_processes > 1 else ["python"]),
        *("train.py", *request.flags, "--output_dir", folder, *GO_ON),
    ]


def job_environment(request: SubmitRequest) -> dict[str, str]:
    """The variables that are stored in the job."""
    own = dict(pair.split("=", 1) for pair in request.options.env)
    return own | ({ARTIFACT_VARIABLE: request.artifact} if request.artifact else {})


def parent(options: CloudArguments) -> str:
    """The project and region that the job is created in, as the service names them."""
    return f"projects/{options.gcp_project}/locations/{options.region}"


def as_yaml(job: aiplatform_v1.CustomJob) -> str:
    """Write a job as YAML, which people, `gcloud` and the client library can read."""
    values = type(job).to_dict(job, use_integers_for_enums=False, always_print_fields_with_no_presence=False)
    values["labels"] = dict(sorted(values["labels"].items()))
    return yaml.safe_dump(values, sort_keys=False, width=120, allow_unicode=True)


def _machine(types: Any, request: SubmitRequest) -> Any:
    machine = request.machine
    spec = types.MachineSpec(machine_type=machine.machine_type)
    if machine.accelerator_type is not None:
        known = [kind.name for kind in types.AcceleratorType if kind.value]
        if machine.accelerator_type not in known:
            near = nearest(machine.accelerator_type.upper(), known, cutoff=0.4)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"accelerator_type is {machine.accelerator_type!r}; {hint}")
        spec.accelerator_type = types.AcceleratorType[machine.accelerator_type]
        spec.accelerator_count = machine.accelerator_count
    return spec


def _scheduling(types: Any, options: CloudArguments) -> Any:
    scheduling = types.Scheduling(
        strategy=types.Scheduling.Strategy[options.strategy],
        restart_job_on_worker_restart=options.restart_job_on_worker_restart,
    )
    if options.timeout_hours is not None:
        scheduling.timeout = {"seconds": round(options.timeout_hours * 3600)}
    if options.max_wait_hours is not None:
        scheduling.max_wait_duration = {"seconds": round(options.max_wait_hours * 3600)}
    return scheduling
