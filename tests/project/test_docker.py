"""The container's files, checked without an engine: linters, their formats' schemas, and what they promise each other.

`make image-check` runs the image's own install steps for real, in a fresh environment. It may fetch gigabytes, so the
suite only proves that the steps it runs are those of the Dockerfile.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from reference.paths import ROOT

from dylo_moe.cli import COMMANDS

BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENTRY_POINT = ROOT / "docker-entrypoint.sh"
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SECRET = re.compile(r"TOKEN|KEY|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)


def lint(*words: str) -> subprocess.CompletedProcess[str]:
    tool = BIN / words[0]
    if not tool.exists():
        pytest.skip(f"{words[0]} is not installed for this Python")
    return subprocess.run([tool, *words[1:]], cwd=ROOT, capture_output=True, text=True)


def instructions(text: str = DOCKERFILE) -> list[tuple[str, str]]:
    """(instruction, its words) in order, lines joined and comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def values(name: str) -> list[str]:
    return [words for instruction, words in instructions() if instruction == name]


@pytest.mark.parametrize(
    "words",
    [
        ("hadolint", "Dockerfile"),
        ("shellcheck", "build_and_push.sh", "docker-entrypoint.sh"),
        ("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"),
        *(
            ("check-jsonschema", "--builtin-schema", schema, str(path))
            for path in WORKFLOWS
            for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout")
        ),
    ],
    ids=lambda words: f"{words[0]} {Path(words[-1]).name} {words[-2] if len(words) > 2 else ''}".strip(),
)
def test_linters_find_nothing(words):
    done = lint(*words)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("hadolint",), "FROM python:latest\nRUN pip install torch\n"),
        (("shellcheck",), "#!/bin/bash\nrm $1\n"),
        (("check-jsonschema", "--builtin-schema", "vendor.compose-spec"), "services: {a: {imag: b}}\n"),
        (("check-jsonschema", "--builtin-schema", "vendor.github-workflows"), "on: push\njobs: {a: {step: []}}\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_linters_find_what_is_wrong(tmp_path, words, text):
    """Else the law above would hold for any file."""
    (tmp_path / "file.yaml").write_text(text)
    assert lint(*words, str(tmp_path / "file.yaml")).returncode == 1


def test_the_base_and_every_system_package_have_a_version():
    [base] = values("FROM")
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)
    [installed] = re.findall(r"apt-get install -y --no-install-recommends (.*?) +&&", values("RUN")[0])
    assert installed and all(re.fullmatch(r"'[a-z0-9-]+=[0-9.]+-\*'", word) for word in installed.split())


def test_every_package_of_the_image_is_pinned():
    """Each pip takes constraints.txt, which names all that dylora-moe and the image's extras ask for themselves."""
    pips = [step for words in values("RUN") for step in words.split("&&") if "pip install" in step]
    assert pips and all(" -c constraints.txt " in step for step in pips)
    [extras] = re.findall(r"-e '\.\[(.*)\]'", DOCKERFILE)
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(item for name in extras.split(",") for item in project["optional-dependencies"][name]),
    ]
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    assert {re.match(r"[\w.-]+", item)[0].lower() for item in asked} <= pinned
    assert {"wandb", "tensorboard", "eval", "quantized"} <= set(extras.split(","))


def test_a_change_of_code_installs_nothing_again():
    """No file of ours but the two that say what is installed is in the image before the last install."""
    order = instructions()
    last = max(index for index, (_, words) in enumerate(order) if "pip install" in words or "apt-get install" in words)
    before = [words for name, words in order[:last] if name in ("COPY", "ADD")]
    assert before == ["pyproject.toml constraints.txt ./"]


def test_the_context_holds_what_is_copied_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    copied = {word for words in values("COPY") for word in words.split()[:-1]}
    assert lines[0] == "*"
    assert {line[1:] for line in lines[1:] if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_holds_no_secret_and_takes_none_to_be_built():
    assert not values("ARG")
    assert not [words for name in ("ENV", "LABEL", "RUN") for words in values(name) if SECRET.search(words)]


def test_the_image_runs_as_a_user_and_hears_signals():
    order = [name for name, _ in instructions()]
    [user] = values("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # as numbers, so that a cluster can see it is not root
    assert order.index("USER") > max(index for index, name in enumerate(order) if name in ("RUN", "COPY"))
    assert values("ENTRYPOINT") == ['["tini", "--", "/app/docker-entrypoint.sh"]']
    assert values("CMD") == ['["--help"]']


def test_the_entry_point_knows_every_command():
    [line] = [line for line in ENTRY_POINT.read_text().splitlines() if "train |" in line]
    assert line.strip().partition(")")[0].split(" | ") == ["-*", *COMMANDS]


@pytest.mark.parametrize(
    ("words", "started"),
    [
        (["--help"], ["dylora", "--help"]),
        ([], ["dylora"]),
        *([[name, "--flag", "a b"], ["dylora", name, "--flag", "a b"]] for name in COMMANDS),
        (["dylora", "train", "--help"], ["dylora", "train", "--help"]),
        (["python", "train.py", "a b"], ["python", "train.py", "a b"]),
        (["bash"], ["bash"]),
        (["trian", "x"], ["dylora", "trian", "x"]),
        (["cd"], ["dylora", "cd"]),
        ([""], ["dylora", ""]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_the_entry_point_becomes_the_right_program(tmp_path, words, started):
    """It execs, so that tini's signals reach the program itself; the programs are stubs that print how they began."""
    for name in ("dylora", "python", "bash"):
        stub = tmp_path / name
        stub.write_text('#!/bin/sh\nprintf "%s\\n" $$ "${0##*/}" "$@"\n')
        stub.chmod(0o755)
    running = subprocess.Popen(
        ["/bin/bash", ENTRY_POINT, *words], env={"PATH": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    assert running.communicate()[0].split("\n")[:-1] == [str(running.pid), *started]
    assert os.access(ENTRY_POINT, os.X_OK)


def test_every_form_of_the_page_works_with_the_real_programs():
    """As `make image-check` calls them in an environment of their own; here in that of the tests, from this clone."""
    spec = importlib.util.spec_from_file_location("image_check", ROOT / "benchmarks" / "deployment" / "image_check.py")
    image_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(image_check)
    image_check.check_forms(ROOT, {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"})


def test_volumes_are_where_the_image_lets_anyone_write():
    [volumes] = values("VOLUME")
    assert yaml.safe_load(volumes) == ["/home/dylora/.cache", "/app/runs"]
    assert "chmod 1777 /home/dylora /home/dylora/.cache runs" in DOCKERFILE
    assert re.search(r"^ENV HOME=/home/dylora", DOCKERFILE, re.MULTILINE)
    assert values("WORKDIR") == ["/app"]
    for service in COMPOSE["services"].values():
        targets = {mount.split(":")[1] if isinstance(mount, str) else mount["target"] for mount in service["volumes"]}
        assert targets == {"/home/dylora/.cache", "/app/runs", "/app/data"}


def test_compose_hands_on_the_callers_secrets_and_keeps_none():
    for service in COMPOSE["services"].values():
        assert {"HF_TOKEN", "WANDB_API_KEY"} <= set(service["environment"])
        assert not [item for item in service["environment"] if "=" in item]


def test_compose_asks_for_one_gpu_and_gives_time_to_save():
    for service in COMPOSE["services"].values():
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        assert service["stop_grace_period"] == "2m"


def test_only_the_service_that_judges_gives_up_the_filter_of_system_calls():
    services = COMPOSE["services"]
    assert [name for name in services if "seccomp=unconfined" in services[name]["security_opt"]] == ["judge"]
    assert all(service["cap_drop"] == ["ALL"] for service in services.values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_read_only_and_pin_what_they_use(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in workflow["jobs"].values())
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", name) and "# v" in note for name, note in used)


def test_secrets_reach_only_the_steps_that_log_in_or_publish_on_a_tag():
    """Each as an environment variable of one step, whose shell script reads it without the workflow's own brackets."""
    workflows = {path.name: yaml.safe_load(path.read_text()) for path in WORKFLOWS}
    jobs = workflows["ci.yml"]["jobs"]
    assert jobs["image"]["needs"] == jobs["package"]["needs"] == "test"
    assert {"run": "make test"} in jobs["test"]["steps"]
    allowed = {"image": ("docker login", "--password-stdin"), "package": ("twine upload", "--non-interactive")}
    for workflow in workflows.values():
        for name, job in workflow["jobs"].items():
            assert "secrets." not in str({key: value for key, value in job.items() if key != "steps"})
            for step in job["steps"]:
                if "secrets." in str(step):
                    assert workflow is workflows["ci.yml"] and step["if"].startswith("github.ref_type == 'tag' && ")
                    assert all(words in step["run"] for words in allowed[name]) and "${{" not in step["run"]


def test_make_image_check_runs_the_steps_of_the_dockerfile():
    """The Makefile takes them out of the Dockerfile when it runs; here the same words are read another way."""
    done = subprocess.run(
        [sys.executable, "benchmarks/deployment/image_check.py", "--show"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    [install] = [words for words in values("RUN") if "pip install" in words]
    entry = yaml.safe_load(values("ENTRYPOINT")[0])
    assert [line.split() for line in done.stdout.splitlines()] == [install.split(), [*entry[2:], "--help"]]
    assert "benchmarks/deployment/image_check.py" in (ROOT / "Makefile").read_text()
