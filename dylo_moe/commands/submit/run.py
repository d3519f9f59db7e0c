"""The command `dylora submit`: send a training to Vertex AI, or print the job without sending it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dylo_moe.commands.submit.arguments import CloudArguments
from dylo_moe.commands.submit.job import as_yaml, build, client_library, job_folder, parent
from dylo_moe.commands.submit.request import SubmitRequest
from dylo_moe.utils.screen import Screen

if TYPE_CHECKING:
    from google.cloud import aiplatform_v1


TIMEOUT_SECONDS = 60
"""The longest time that the service may take to accept a job."""


def submit(request: SubmitRequest) -> None:
    """Send a job and print where it is; with --dry_run, print the job and send nothing.

    Raises:
        ValueError: for a job that cannot be sent, with what to do.
    """
    job, screen = build(request), Screen("submit")
    for warning in request.warnings:
        screen.note(warning)
    if request.options.dry_run:
        head = f"# Nothing was sent. Without --dry_run this job goes to {parent(request.options)}."
        screen.copyable(f"{head}\n{as_yaml(job).rstrip()}", is_answer=True)
        return
    sent = send(job, request.options)
    show_job(screen, sent, request.options)


def send(job: aiplatform_v1.CustomJob, options: CloudArguments) -> aiplatform_v1.CustomJob:
    """Create the job at the service; returns the job as the service answers, with its name.

    Raises:
        ValueError: for a job that the service does not accept, in one line, with what to do.
    """
    types = client_library()
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        client = types.JobServiceClient(client_options={"api_endpoint": f"{options.region}-aiplatform.googleapis.com"})
        return client.create_custom_job(parent=parent(options), custom_job=job, timeout=TIMEOUT_SECONDS)
    except (GoogleAPIError, GoogleAuthError) as error:
        raise ValueError(explained(error, options)) from error


def show_job(screen: Screen, job: aiplatform_v1.CustomJob, options: CloudArguments) -> None:
    """Print where the job is, and how to follow and cancel it."""
    number = job.name.rpartition("/")[2]
    where = f"--region={options.region} --project={options.gcp_project}"
    console = f"https://console.cloud.google.com/agent-platform/locations/{options.region}/training/{number}"
    screen.result("job", job.name)
    for label, text in {
        "run": f"gs://{job_folder(options).removeprefix('/gcs/')}",
        "console": f"{console}?project={options.gcp_project}",
        "follow": f"gcloud ai custom-jobs stream-logs {number} {where}",
        "cancel": f"gcloud ai custom-jobs cancel {number} {where}",
    }.items():
        screen.copyable(f"{label:12s} {text}")


def explained(error: Exception, options: CloudArguments) -> str:
    """Explain a failure in one line, with what to do."""
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError

    said = " ".join(str(getattr(error, "message", None) or error).split())
    where = f"project {options.gcp_project}, region {options.region}"
    answers: list[tuple[Any, str]] = [
        (DefaultCredentialsError, "there are no credentials of Google Cloud: `gcloud auth application-default login`"),
        (TransportError, "Google's server for credentials does not answer; is there a network?"),
        (
            (GoogleAuthError, exceptions.Unauthenticated),
            "the credentials are not accepted, or too old: `gcloud auth application-default login`",
        ),
        (exceptions.PermissionDenied, _permission(said, options)),
        (
            exceptions.ResourceExhausted,
            f"there is no quota for {options.machine_type} with strategy {options.strategy} in {where}: ask for more "
            "under IAM & Admin, Quotas (custom model training), or choose another machine_type, region or strategy",
        ),
        (
            exceptions.NotFound,
            f"something is not found in {where}: look at --gcp_project, --region"
            + (", --persistent_resource_id" if options.persistent_resource_id else "")
            + (", --network" if options.network else ""),
        ),
        (
            (exceptions.InvalidArgument, exceptions.FailedPrecondition),
            f"the service refuses this job in {where}; compare it with what --dry_run prints",
        ),
        (
            (exceptions.ServiceUnavailable, exceptions.DeadlineExceeded, exceptions.RetryError),
            f"{options.region}-aiplatform.googleapis.com does not answer; is there a network, and is the region right? "
            "Look at `gcloud ai custom-jobs list` before you submit again: the job may have arrived",
        ),
    ]
    advice = next((text for kind, text in answers if isinstance(error, kind)), "the service refused the job")
    return f"not submitted: {advice} ({said[:300]})"


def _permission(said: str, options: CloudArguments) -> str:
    if "actAs" in said:
        return (
            f"you may not act as {options.service_account or 'the service account'}: you need the role "
            "roles/iam.serviceAccountUser on it"
        )
    if "has not been used" in said or "disabled" in said:
        return (
            "Vertex AI is not enabled: `gcloud services enable aiplatform.googleapis.com "
            f"--project={options.gcp_project}`"
        )
    return f"you may not make jobs in project {options.gcp_project}: you need the role roles/aiplatform.user in it"
