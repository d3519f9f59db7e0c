"""The first program of a job of Vertex AI: it fetches the secrets, checks the run's folder, and becomes the training.

    python -m dylo_moe.commands.submit.start --secret WANDB_API_KEY=projects/P/secrets/S/versions/V \
        --run_folder FOLDER -- COMMAND

A job's environment variables are stored with the job, and all who may see the job can read them. So the job holds only
references to secrets, and this program copies their values from Secret Manager into the environment of the training.
"""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dylo_moe.training.run_folder import CONFIG_FILE, checkpoints_in
from dylo_moe.utils.file_names import RESULT
from dylo_moe.utils.harmless import harmless
from dylo_moe.utils.install import how_to_install

SECRET_MANAGER = "https://secretmanager.googleapis.com"

TIMEOUT_SECONDS = 30

SCOPE = "https://www.googleapis.com/auth/cloud-platform"

ARTIFACT_VARIABLE = "WANDB_CHECKPOINT_ARTIFACT"
"""The variable that names the checkpoint at Weights & Biases from which a run begins, until it has one of its own."""

GO_ON = ["--resume_from_checkpoint", "auto"]


def main(argv: Sequence[str] | None = None) -> int:
    """Replace this process by the training; returns, with the exit status, only where the training cannot begin."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m dylo_moe.commands.submit.start", allow_abbrev=False)
    parser.add_argument("--secret", action="append", default=[], help="NAME=projects/P/secrets/S/versions/V")
    parser.add_argument(
        "--run_folder",
        type=Path,
        required=True,
        help="the folder of the run; whether its parent folder can be written and renamed in is checked first",
    )
    given = parser.parse_args(own)
    try:
        for pair in given.secret:
            name, _, reference = pair.partition("=")
            os.environ[name] = fetch_secret(name, reference)
        check_folders_move(given.run_folder.parent)
        command = with_start(command, given.run_folder, os.environ.get(ARTIFACT_VARIABLE))
        os.execvp(command[0], command)
    except (ValueError, OSError) as error:
        print(f"dylora job: {harmless(str(error))}", file=sys.stderr)
    return 2


def fetch_secret(name: str, reference: str) -> str:
    """Read the value of a secret, with the credentials of the machine, which are those of the job's service account.

    Raises:
        ValueError: where it cannot be read, with what to do. No message contains the value.
    """
    what = f"cannot read the secret {reference} for {name}"
    try:
        import google.auth
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import AuthorizedSession
        from requests import RequestException
    except ImportError as error:
        raise ValueError(f"{what}: google-auth is not in the image: {how_to_install('vertex-job')}") from error
    try:
        credentials, _ = google.auth.default(scopes=[SCOPE])
        answer = AuthorizedSession(credentials).get(f"{SECRET_MANAGER}/v1/{reference}:access", timeout=TIMEOUT_SECONDS)
    except (GoogleAuthError, RequestException) as error:
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error
    reasons = {
        401: "the job's service account is not accepted",
        403: "the job's service account is not allowed to: give it the role roles/secretmanager.secretAccessor on this "
        "secret, and check that the API secretmanager.googleapis.com is enabled",
        404: "there is no such secret or version; `gcloud secrets versions list` shows them",
    }
    if answer.status_code != 200:
        reason = reasons.get(answer.status_code, "Secret Manager refused the request")
        raise ValueError(f"{what}: {reason} (status {answer.status_code})")
    try:
        value = base64.b64decode(answer.json()["payload"]["data"]).decode().strip("\r\n")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{what}: the answer of Secret Manager is not text") from error
    if not value:
        raise ValueError(f"{what}: it is empty")
    return value


def check_folders_move(folder: Path) -> None:
    """Check before the training, not at the first save, that `folder` can be written and folders in it renamed.

    A checkpoint is written under another name and renamed into place. Cloud Storage can rename a folder atomically only
    in a bucket with a hierarchical namespace.

    Raises:
        ValueError: where that is not possible, with what to do.
    """
    before, after = folder / ".dylora-probe", folder / ".dylora-probe-renamed"
    try:
        for place in (before, after):
            shutil.rmtree(place, ignore_errors=True)  # left by a job that was killed here
        (before / "inner").mkdir(parents=True)
        (before / "inner" / "file").write_text("probe")
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder}: {error}. Does the bucket exist, and has the job's service account the role "
            "roles/storage.objectUser on it?"
        ) from error
    try:
        os.rename(before, after)
        if (after / "inner" / "file").read_text() != "probe":
            raise OSError("its files are gone")
    except OSError as error:
        raise ValueError(
            f"folders in {folder} cannot be renamed ({error}), so no checkpoint would be written atomically: the "
            "bucket needs a hierarchical namespace, which it can get only when it is created: "
            "gcloud storage buckets create gs://NAME "
            "--enable-hierarchical-namespace --uniform-bucket-level-access"
        ) from error
    finally:
        for place in (before, after):
            shutil.rmtree(place, ignore_errors=True)


def with_start(command: list[str], run: Path, artifact: str | None) -> list[str]:
    """Make the command resume the run, or begin from `artifact` where the run has saved no checkpoint yet.

    In the second case, files of a job that was stopped before its first checkpoint are removed: the command would
        resume
    from them, and so start untrained instead of from the artifact.

    Raises:
        ValueError: for a run that is over, and has no checkpoint to resume from.
    """
    if not artifact or checkpoints_in(run):
        return command
    if (run / RESULT).is_dir():
        raise ValueError(
            f"the run in {run} is over; submit under another --display_name to begin from {artifact} again"
        )
    if (run / CONFIG_FILE).is_file():
        shutil.rmtree(run)
    place = next(place for place in range(len(command)) if command[place : place + 2] == GO_ON)
    return [*command[:place], "--wandb_checkpoint_artifact", artifact, *command[place + 2 :]]


if __name__ == "__main__":
    sys.exit(main())
