"""Weights & Biases, off by default: starts a run, uploads its checkpoints as artifacts, and downloads one of them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dylo_moe.training.run_folder import checkpoint_name
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.install import how_to_install
from dylo_moe.utils.redact import SECRET_NAME
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.whole_folders import replace_folder, written_aside

PROJECT = "dylora-moe"

ARTIFACT_TYPE = "model"

START_TIMEOUT_SECONDS = 60
"""How long a run waits for the server before it fails."""

API_TIMEOUT_SECONDS = 20
"""How long one request of a download waits."""

UPLOAD_TIMEOUT_SECONDS = 600
"""How long the end of training waits for uploads that are not finished."""

REFERENCE = re.compile(r"\w[\w.-]*/\w[\w. -]*/\w[\w.-]{0,127}:\w[\w.-]*", re.ASCII)

MEMBER = re.compile(
    r"dylora\.json|README\.md|(router|gate_start|skill_library)\.safetensors"
    r"|experts/[A-Za-z0-9][A-Za-z0-9_-]{0,63}/adapter_(config\.json|model\.safetensors)"
    r"|trainer_state\.json|(optimizer|scheduler|scaler)\.pt|rng_state(_[0-9]+)?\.pth"
)
"""Every file that a checkpoint of ours can hold. No absolute path, drive, backslash or ".." matches."""

NOT_INSTALLED = f"wandb is not installed: {how_to_install('wandb')}"

NO_KEY = (
    "there is no key for Weights & Biases: run `wandb login`, or set WANDB_API_KEY; WANDB_MODE=offline tracks a run "
    "without one"
)


# A run.


def tracking_problem() -> str | None:
    """Why no run of Weights & Biases can be started from here; None: nothing is known to be in the way."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    try:
        _client()
        _check_no_model_log()
    except ValueError as error:
        return str(error)
    is_offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
    return None if is_offline or _may_have_key() else NO_KEY


def _may_have_key() -> bool:
    """Whether there is a place where a key, or the wish to track without one, may be written down.

    The client is not asked, because from its first call on it no longer reads the environment, by which `prepare` keeps
    its files in the run's folder.
    """
    home = Path.home()
    places = [
        *(os.environ.get("NETRC"), home / ".netrc", home / "_netrc", Path("wandb") / "settings"),
        Path(os.environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb") / "settings",
    ]
    variables = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    return any(os.environ.get(name) for name in variables) or any(place and Path(place).is_file() for place in places)


def prepare(arguments: Any, folder: Path) -> None:
    """Start a run of Weights & Biases, where `report_to` names it; the Trainer's own callback then logs into it.

    Its files are written into `folder`. Neither source code nor the console's output is sent, nor the address of the
    git repository, which can hold a token. A run that is resumed in its folder is resumed on the server, too.

    Args:
        arguments: `transformers.TrainingArguments`, after `report_to` was resolved.
        folder: the folder of the run.

    Raises:
        ValueError: wandb is not installed, there is no key or no server, or WANDB_LOG_MODEL is set.
    """
    if "wandb" not in arguments.report_to or os.environ.get("WANDB_MODE") == "disabled":
        return
    wandb = _client()
    _check_no_model_log()
    own = folder.resolve() / "wandb"
    for name, value in {
        "WANDB_PROJECT": PROJECT,
        "WANDB_DIR": own.parent,
        "WANDB_DATA_DIR": own / "data",
        "WANDB_CACHE_DIR": own / "cache",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
    }.items():
        os.environ.setdefault(name, str(value))
    if arguments.process_index == 0 and wandb.run is None:
        own.mkdir(parents=True, exist_ok=True)
        _start(wandb, arguments.run_name, own / "run_id")


def _start(wandb: Any, name: str | None, known: Path) -> None:
    """Start a run, or resume the one whose id the file `known` holds."""
    online = not _offline(wandb)
    goes_on: dict[str, Any] = {}
    if online:
        _check_key(wandb)
        if "WANDB_RUN_ID" not in os.environ and known.is_file():
            goes_on = {"id": known.read_text(encoding="utf-8").strip(), "resume": "allow"}
    try:
        run = wandb.init(
            project=os.environ["WANDB_PROJECT"],
            name=name,
            dir=os.environ["WANDB_DIR"],
            settings=wandb.Settings(
                init_timeout=START_TIMEOUT_SECONDS,
                # Said again: once it has been used, as by a download, the client no longer reads the environment.
                console=os.environ["WANDB_CONSOLE"],
                disable_git=_is_true("WANDB_DISABLE_GIT"),
                disable_code=_is_true("WANDB_DISABLE_CODE"),
            ),
            **goes_on,
        )
    except (wandb.Error, OSError, ValueError) as error:
        raise ValueError(_explained(error, "cannot start a run of Weights & Biases")) from error
    if online:
        known.write_text(f"{run.id}\n", encoding="utf-8")


def _is_true(variable: str) -> bool:
    return os.environ[variable].lower() in ("true", "1", "t")


def log_settings(settings: Mapping[str, Any]) -> None:
    """Put our flags into the run's config, under `dylora`, without secrets; does nothing where there is no run."""
    run = _run()
    if run is not None:
        run.config.update({"dylora": _plain(settings)}, allow_val_change=True)


def log_plots(paths: Iterable[Path]) -> None:
    """Put pictures into the run, as `plots/NAME`; does nothing where there is no run."""
    run = _run()
    pictures = [path for path in paths if path.suffix == ".png" and path.is_file()]
    if run is None or not pictures:
        return
    try:
        run.log({f"plots/{path.stem}": _client().Image(str(path)) for path in pictures})
    except Exception as error:  # the training is done, and no failed upload may hide its result
        _tell(_explained(error, "the plots were not sent to Weights & Biases"))


def end_tracking() -> None:
    """End the run as a failed one; does nothing where there is no run."""
    run = _run()
    if run is not None:
        run.finish(exit_code=1)


class CheckpointArtifacts(TrainerCallback):
    """Uploads each checkpoint as a version of one artifact, with the aliases `latest`, `step-N` and `best`.

    A failed upload does not end the training: one line reports the first, and `failures` counts them.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.logged = 0
        self.pending: list[Any] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the checkpoint that was just written."""
        run = _run()
        folder = Path(args.output_dir) / checkpoint_name(state.global_step)
        if run is None or not state.is_world_process_zero:
            return
        try:
            artifact = _client().Artifact(
                artifact_name(run.id), type=ARTIFACT_TYPE, metadata=_plain(checkpoint_metadata(folder, state))
            )
            # Uploads happen later, without a server never, and the folder may be deleted as soon as the next one is
            # there (save_total_limit). So the files are copied ("mutable"), into the run's folder, and read from the
            # copy; an upload removes it. A copy in the cache besides would only fill the disk.
            artifact.add_dir(str(folder), policy="mutable", skip_cache=True)
            best = ["best"] if state.best_global_step == state.global_step else []
            logged = run.log_artifact(artifact, aliases=["latest", f"step-{state.global_step}", *best])
        except Exception as error:  # a failed upload must not end a training
            self._failed(error, folder)
            return
        self.logged += 1
        if not run.offline:  # without a server nothing ever answers
            self.pending.append((folder, logged))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for uploads that are not finished, so that a failure is reported."""
        deadline = time.monotonic() + UPLOAD_TIMEOUT_SECONDS  # for all of them: other ranks are waiting
        for folder, artifact in self.pending:
            try:
                artifact.wait(timeout=max(int(deadline - time.monotonic()), 1))
            except Exception as error:
                self._failed(error, folder)
        self.pending.clear()
        if self.failures > 1:
            _tell(f"{self.failures} checkpoints did not reach Weights & Biases; they are in {args.output_dir}")

    def _failed(self, error: Exception, folder: Path) -> None:
        self.failures += 1
        if self.failures == 1:
            _tell(_explained(error, f"{folder.name} did not reach Weights & Biases; training continues"))


def artifact_name(run_id: str) -> str:
    """The name of the artifact whose versions are a run's checkpoints."""
    return "checkpoint-" + re.sub(r"[^A-Za-z0-9_.-]", "-", run_id)[:100]


def checkpoint_metadata(folder: Path, state: Any) -> dict[str, Any]:
    """The metadata of an artifact, from the checkpoint's manifest and the Trainer's state."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    losses = [log["eval_loss"] for log in state.log_history if "eval_loss" in log and log["step"] == state.global_step]
    return {
        "step": state.global_step,
        "epoch": state.epoch,
        "eval_loss": losses[-1] if losses else None,
        "base": manifest["base"]["id"],
        "experts": [expert["name"] for expert in manifest["experts"]],
        "format_version": manifest["format_version"],
    }


# A download.


def download_checkpoint(reference: str, into: Path) -> Path:
    """Download a checkpoint that was uploaded as an artifact.

    The names of all files are checked before the first one is downloaded. Their contents are not checked here: the
    caller must call `checkpoint.read_manifest`.

    Args:
        reference: ENTITY/PROJECT/NAME:ALIAS.
        into: a new or empty folder; it is filled by one rename, so that a failure leaves nothing in it.

    Raises:
        ValueError: a malformed reference, a folder that is taken, a file that no checkpoint of ours holds; wandb is not
            installed; no key, no server, no such artifact, or no permission.
    """
    if not REFERENCE.fullmatch(reference):
        raise ValueError(
            f"wandb_checkpoint_artifact is {reference!r}; it must be ENTITY/PROJECT/NAME:ALIAS, of letters, digits, "
            "'_', '-' and '.', such as team/dylora-moe/checkpoint-1a2b3c4d:best"
        )
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ValueError(f"cannot download {reference} into {into}: it is not empty")
    wandb = _client()
    what = f"cannot download {reference}"
    if _offline(wandb):
        raise ValueError(f"{what}: WANDB_MODE is offline, and a download needs the server; unset it")
    _check_key(wandb)
    try:
        artifact = wandb.Api(timeout=API_TIMEOUT_SECONDS).artifact(reference, type=ARTIFACT_TYPE)
        members = dict(artifact.manifest.entries)
    except Exception as error:  # the client raises errors of many kinds, of its own and of those below it
        raise ValueError(_explained(error, what)) from error
    problems = member_problems(members)
    if problems:
        raise ValueError(f"{what}: it is no checkpoint of DyLoRA-MoE: {'; '.join(problems)}. Nothing was fetched")
    into.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(into) as aside:
        try:
            artifact.download(root=str(aside), skip_cache=True)
        except Exception as error:
            raise ValueError(_explained(error, what)) from error
        problems = list(_download_problems(aside, members))
        if problems:
            raise ValueError(f"{what}: what arrived is not what it lists: {'; '.join(problems)}")
        replace_folder(aside, into)
    return into


def member_problems(members: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names in an artifact's manifest; nothing may be downloaded before this is empty."""
    problems = []
    for name, entry in members.items():
        if not MEMBER.fullmatch(name) or str(getattr(entry, "path", name)) != name:
            problems.append(f"it would write {name!r}")
        elif getattr(entry, "ref", None) is not None:
            problems.append(f"{name} is a reference to another place, not a file of the artifact")
    if MANIFEST not in members:
        problems.append(f"it has no {MANIFEST}")
    return problems[:5] + ([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])


def _download_problems(folder: Path, members: Mapping[str, Any]) -> Iterator[str]:
    found = set()
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent) / name for name in [*folders, *files]):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                yield f"{name} is a link"
            elif path.is_file():
                found.add(name)
    yield from (f"{name} is missing" for name in sorted(members.keys() - found))
    yield from (f"{name} was not listed" for name in sorted(found - members.keys()))


# The client.


def _client() -> Any:
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(NOT_INSTALLED)
    import wandb

    return wandb


def _check_no_model_log() -> None:
    if os.environ.get("WANDB_LOG_MODEL", "false").lower() not in ("false", "0", ""):
        raise ValueError("WANDB_LOG_MODEL is set; checkpoints are uploaded without it, and twice with it: unset it")


def _run() -> Any:
    """The running run of Weights & Biases; None where there is none, or it is disabled."""
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    return None if run is None or run.disabled else run


def _offline(wandb: Any) -> bool:
    return wandb.setup().settings.mode in ("offline", "dryrun")


def _check_key(wandb: Any) -> None:
    """Raises ValueError where there is no key; it never asks for one, because no user can answer in a job."""
    try:
        found = wandb.login(prompt=False, verify=False)
    except TypeError:  # older clients know no `verify`, and raise by themselves where a key is needed
        return
    except (wandb.Error, ValueError) as error:
        raise ValueError(_explained(error, "the key of Weights & Biases cannot be used")) from error
    if not found:
        raise ValueError(NO_KEY)


def _explained(error: BaseException, what: str) -> str:
    """One line that explains a failure of the client, whose exception types say little. Secrets are left out."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = str(error).strip().partition("\n")[0]
    said = " ".join(str(link) for link in chain).lower()
    unreachable = re.search(r"dial tcp|connection refused|timed out|did not respond|no such host|unreachable", said)
    if re.search(r"no api key|api_key not configured|not logged in", said):
        return f"{what}: {NO_KEY}"
    if any(isinstance(link, (ConnectionError, TimeoutError)) for link in chain) or unreachable:
        return f"{what}: its server does not answer; is there a network, and is WANDB_BASE_URL right? ({_safe(text)})"
    if re.search(r"permission|forbidden|unauthorized|verify credentials|\b40[13]\b", said):
        return f"{what}: the key has no permission for it, or is no longer valid ({_safe(text)})"
    if re.search(r"not found|\b404\b", said):
        return f"{what}: there is no such artifact, or this key may not see it ({_safe(text)})"
    return f"{what}: {_safe(text) or type(error).__name__}"


def _safe(text: str) -> str:
    """The text with the secrets of the environment replaced by their names."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, f"<{name}>")
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if not SECRET_NAME.search(str(name))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _safe(value) if isinstance(value, str) else value


def _tell(sentence: str) -> None:
    Screen("tracking").warn(sentence)
