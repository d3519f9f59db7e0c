"""build_and_push.sh in a small repository, with a stub of docker that writes down how it was called."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from reference.paths import ROOT

REGISTRY = "europe-west4-docker.pkg.dev/some-project/images/dylora"
HUB = "somebody/dylora"
STUB = """#!/bin/sh
printf '%s\\n' "docker $*" >> "{log}"
case "$1" in
    version) exit {engine} ;;
    push) exit {push} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A clean commit with what the script reads, and a remote whose address holds a password."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copy(ROOT / "build_and_push.sh", folder)
    (folder / "pyproject.toml").write_text('[project]\nname = "dylora-moe"\nversion = "1.2.3"\n')
    (folder / ".gitignore").write_text("runs/\n")
    git(folder, "init", "--quiet")
    git(folder, "remote", "add", "origin", "https://user:password@example.org/dylora.git")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "one")
    return folder


@pytest.fixture(autouse=True)
def _no_destination_of_the_caller(monkeypatch):
    for name in ("ARTIFACT_REGISTRY_IMAGE", "DOCKER_HUB_IMAGE"):
        monkeypatch.delenv(name, raising=False)


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def stub(folder: Path, *, engine: int = 0, push: int = 0, registries: tuple[str, ...] = ()) -> dict[str, str]:
    """The environment in which docker is a stub with these exit statuses, logged in at these registries."""
    tools, log = folder.parent / "tools", folder.parent / "log"
    tools.mkdir()
    (tools / "docker").write_text(STUB.format(log=log, engine=engine, push=push))
    (tools / "docker").chmod(0o755)
    (folder.parent / "config.json").write_text(json.dumps({"auths": {name: {} for name in registries}}))
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "DOCKER_CONFIG": str(folder.parent)}


def call(folder: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([folder / "build_and_push.sh", *words], capture_output=True, text=True, env=env)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that it says."""
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    return line.removeprefix("build_and_push.sh: ")


def test_a_dry_run_prints_what_a_real_run_calls(checkout):
    words = ["--artifact-registry", REGISTRY, "--docker-hub", HUB, "--latest"]
    env = stub(checkout, registries=("europe-west4-docker.pkg.dev", "https://index.docker.io/v1/"))
    log = checkout.parent / "log"
    dry = call(checkout, *words, "--dry-run", env=env)
    assert (dry.returncode, dry.stderr, log.exists()) == (0, "", False)
    real = call(checkout, *words, env=env)
    assert real.returncode == 0, real.stderr
    called = [line for line in log.read_text().splitlines() if line != "docker version"]
    assert real.stdout == dry.stdout
    assert called == dry.stdout.splitlines()


def test_the_tags_and_labels_say_version_and_commit(checkout):
    build, *pushes = call(checkout, "--docker-hub", HUB, "--dry-run").stdout.splitlines()
    commit = git(checkout, "rev-parse", "HEAD")
    tags = [f"{HUB}:1.2.3", f"{HUB}:{commit[:12]}"]
    assert pushes == [f"docker push {tag}" for tag in tags]
    labels = {
        "version": "1.2.3",
        "revision": commit,
        "source": "https://example.org/dylora.git",
        "licenses": "Apache-2.0",
    }
    asked = [word for key, value in labels.items() for word in ("--label", f"org.opencontainers.image.{key}={value}")]
    assert build.split() == [
        "docker",
        "build",
        "--platform",
        "linux/amd64",
        *asked,
        *(f"--tag={tag}" for tag in tags),
        ".",
    ]


def test_every_registry_gets_every_tag(checkout):
    done = call(checkout, "--docker-hub", HUB, "--artifact-registry", REGISTRY, "--latest", "--dry-run")
    short = git(checkout, "rev-parse", "HEAD")[:12]
    expected = [f"docker push {image}:{tag}" for image in (REGISTRY, HUB) for tag in ("1.2.3", short, "latest")]
    assert done.stdout.splitlines()[1:] == expected


def test_variables_say_where_a_bare_call_pushes_and_flags_win(checkout):
    env = {**os.environ, "ARTIFACT_REGISTRY_IMAGE": REGISTRY, "DOCKER_HUB_IMAGE": ""}
    assert call(checkout, "--dry-run", env=env).stdout == (
        call(checkout, "--artifact-registry", REGISTRY, "--dry-run").stdout
    )
    other = f"{REGISTRY}-other"
    assert call(checkout, "--artifact-registry", other, "--dry-run", env=env).stdout == (
        call(checkout, "--artifact-registry", other, "--dry-run").stdout
    )


def test_constants_for_vertex_are_no_change_of_the_image(checkout):
    (checkout / "submit_full_training.py").write_text('PROJECT_ID = "mine"')
    assert call(checkout, "--docker-hub", HUB, "--dry-run").returncode == 0
    (checkout / "train.py").write_text("")
    assert refused(call(checkout, "--docker-hub", HUB)).endswith(": train.py")


def test_a_printed_command_can_be_pasted(checkout):
    source = "https://example.org/a b"
    build = call(checkout, "--docker-hub", HUB, "--source", source, "--dry-run").stdout.splitlines()[0]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {build}"], capture_output=True, text=True, check=True).stdout
    assert f"org.opencontainers.image.source={source}" in words.splitlines()


@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_a_dirty_tree_is_refused_and_its_files_are_named(checkout, dry):
    (checkout / "pyproject.toml").write_text("changed")
    (checkout / "new").mkdir()
    (checkout / "new" / "file.py").write_text("")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "ignored").write_text("")
    line = refused(call(checkout, "--docker-hub", HUB, *dry, env=stub(checkout)))
    assert line.endswith(": pyproject.toml new/file.py") and "commit or remove" in line
    assert not (checkout.parent / "log").exists()


def test_a_folder_without_git_is_refused(checkout):
    shutil.rmtree(checkout / ".git")
    done = call(
        checkout, "--docker-hub", HUB, "--dry-run", env={**os.environ, "GIT_CEILING_DIRECTORIES": str(checkout.parent)}
    )
    assert done.returncode == 2 and "not a git checkout" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "nowhere to push to: give --artifact-registry REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME or"),
        (("--docker-hub", HUB, "--push"), "--push is not a flag"),
        (("--docker-hub", HUB, "extra"), "extra is not a flag"),
        (("--docker-hub",), "--docker-hub needs a value"),
        (("--docker-hub", "--dry-run"), "--docker-hub needs a value"),
        (("--docker-hub", f"{HUB}:tag"), "without a tag"),
        (("--docker-hub", "Somebody/Dylora"), "it must be ACCOUNT/NAME"),
        (("--docker-hub", "a/b --privileged"), "it must be ACCOUNT/NAME"),
        (("--docker-hub", REGISTRY), "it must be ACCOUNT/NAME"),
        (("--artifact-registry", HUB), "it must be REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME"),
        (("--artifact-registry", REGISTRY.rsplit("/", 1)[0]), "it must be REGION-docker.pkg.dev/"),
        (("--artifact-registry", f"{REGISTRY}@sha256:0"), "without a tag"),
    ],
)
def test_wrong_words_are_refused(checkout, words, says):
    assert says in refused(call(checkout, *words))


def test_a_checkout_without_a_remote_needs_a_source(checkout):
    git(checkout, "remote", "remove", "origin")
    assert "--source URL" in refused(call(checkout, "--docker-hub", HUB, "--dry-run"))
    assert call(checkout, "--docker-hub", HUB, "--dry-run", "--source", "https://example.org/x").returncode == 0


def test_what_is_missing_for_a_push_is_said_before_anything_is_built(checkout):
    words = ["--artifact-registry", REGISTRY, "--docker-hub", HUB]
    env = stub(checkout, registries=("europe-west4-docker.pkg.dev",))
    log = checkout.parent / "log"
    assert "'docker login'" in refused(call(checkout, *words, env=env))
    (checkout.parent / "config.json").unlink()
    line = refused(call(checkout, *words, env=env))
    assert "'gcloud auth configure-docker europe-west4-docker.pkg.dev'" in line
    assert set(log.read_text().splitlines()) == {"docker version"}


def test_an_engine_that_does_not_answer_and_a_docker_that_is_not_there(checkout):
    assert "engine does not answer" in refused(call(checkout, "--docker-hub", HUB, env=stub(checkout, engine=1)))
    bare = checkout.parent / "bare"
    bare.mkdir()
    for tool in ("bash", "env", "git", "sed", "cut", "paste", "dirname", "cat", "grep"):
        (bare / tool).symlink_to(shutil.which(tool))
    assert "docker is not installed" in refused(
        call(checkout, "--docker-hub", HUB, env={**os.environ, "PATH": str(bare)})
    )


def test_a_push_that_fails_ends_the_script(checkout):
    env = stub(checkout, push=7, registries=("https://index.docker.io/v1/",))
    assert call(checkout, "--docker-hub", HUB, env=env).returncode == 7
    assert (checkout.parent / "log").read_text().count("docker push") == 1


def test_help_names_every_flag(checkout):
    done = call(checkout, "--help")
    assert done.returncode == 0
    for flag in ("--artifact-registry", "--docker-hub", "--latest", "--source", "--dry-run", "--help"):
        assert f"\n  {flag}" in done.stdout
