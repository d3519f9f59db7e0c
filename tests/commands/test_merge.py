"""`dylora experts merge`, from the stream that reports two experts of one kind to the stream that goes on without."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from reference.runs import files_of
from test_stream import on, skill_files, stream

from dylo_moe import DyLoRAMoE
from dylo_moe.cli import main
from dylo_moe.evaluation.loss_matrix import read_matrix
from dylo_moe.model.checkpoint import read_manifest


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The folder of a stream that was made to grow an expert for each half of one skill, and one for another skill."""
    folder = skill_files(tmp_path_factory.mktemp("merge"), rows=100)
    lines = (folder / "sea.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("lake", lines[:50]), ("pond", lines[50:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    words = stream(folder, folder / "run", "--known_skill", "grow", datasets=("lake", "sky", "pond"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*words, "--num_train_epochs", "1"]) == 0
    (folder / "said.txt").write_text(out.getvalue())
    return folder


def named(folder: Path, skill: str) -> str:
    """The expert that a skill's file became."""
    names = [entry["name"] for entry in read_manifest(folder)["experts"]]
    return next(name for name in names if skill in name)


def words_of(text: str) -> str:
    """A text as one line."""
    return " ".join(text.split())


def test_a_stream_and_the_list_report_the_two_halves_and_nothing_else(grown, capsys):
    lake, pond = named(grown / "run", "lake"), named(grown / "run", "pond")
    sentence = f"The detector cannot tell {lake} from {pond} ("
    stages = re.split(r"stage \d: ", words_of((grown / "said.txt").read_text()))
    assert [stage.count("cannot tell") for stage in stages] == [0, 0, 0, 1]
    assert sentence in stages[3] and f"experts merge {grown / 'run'} {lake} {pond} --output merged" in stages[3]
    assert main(["experts", "list", str(grown / "run")]) == 0
    listed = words_of(capsys.readouterr().out)
    assert listed.count("cannot tell") == 1 and sentence in listed


def test_two_experts_become_one_and_a_stream_goes_on(grown, tmp_path, capsys):
    run = grown / "run" / "checkpoint"
    lake, pond, sky = (named(run, name) for name in ("lake", "pond", "sky"))
    assert main(["experts", "merge", str(run), lake, pond, "--name", "water", "--output", str(tmp_path / "one")]) == 0
    out, err = capsys.readouterr()
    told = words_of(out)
    assert not [line for line in err.splitlines() if not line.startswith("Note: ")]
    assert f"{lake} and {pond} became water, of rank 4: their mean with weights 0.5" in told
    before, after = files_of(run), files_of(tmp_path / "one")
    assert {name for name in after if name.startswith("experts/")} == {
        f"experts/{expert}/adapter_model.safetensors" for expert in (sky, "water")
    }
    assert all(after[name] == before[name] for name in after if name.startswith(f"experts/{sky}/"))
    assert (
        f"| water | 4 | {read_manifest(tmp_path / 'one')['experts'][1]['parameters']:,} | mature"
        in (tmp_path / "one" / "README.md").read_text()
    )
    assert main(["experts", "list", str(tmp_path / "one")]) == 0
    listed = words_of(capsys.readouterr().out)
    assert "water" in listed and f"{lake}:" in listed and f"{pond}:" in listed and "cannot tell" not in listed
    more = on(tmp_path / "one", grown, tmp_path / "more", "sea", "soil", more=("--num_train_epochs", "1"))
    assert main(more) == 0
    first, second = read_matrix(tmp_path / "more" / "matrix.json").stages
    assert (first.decision["action"], first.decision["expert"]) == ("consolidated", "water")
    assert second.decision["action"] == "grown"
    assert DyLoRAMoE.from_pretrained(str(tmp_path / "more")).experts.names[:2] == (sky, "water")


def test_a_merge_of_unlike_skills_and_a_rank_that_is_too_small_are_warned_of(grown, tmp_path, capsys):
    lake, sky = (named(grown / "run", name) for name in ("lake", "sky"))
    words = ["experts", "merge", str(grown / "run"), lake, sky, "--rank", "1", "--output", str(tmp_path / "odd")]
    assert main(words) == 0
    err = words_of(capsys.readouterr().err)
    assert f"The detector tells the skills of {lake} from those of {sky}, and" in err
    assert "The rank 1 keeps only " in err and read_manifest(tmp_path / "odd")["experts"][-1]["rank"] == 1


def test_what_cannot_be_merged_is_refused_before_weights_are_read(grown, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DyLoRAMoE, "from_pretrained", lambda *args, **options: pytest.fail("weights are read"))
    run, new = str(grown / "run"), str(tmp_path / "new")
    lake, pond, sky = (named(grown / "run", name) for name in ("lake", "pond", "sky"))
    for words, parts in (
        ([run, lake, lake, "--output", run], (f"output {run} exists", "is named twice")),
        ([run, lake, "nobody", "--output", new], ("expert is 'nobody'; the checkpoint has",)),
        ([run, "base", lake, "--output", new], ("expert is 'base'; the checkpoint has",)),
        ([run, lake, pond, "--rank", "0", "--output", new], ("rank is 0",)),
        ([run, lake, pond, "--name", sky, "--output", new], (f"already an expert '{sky}'",)),
        ([run, lake, pond], ("--output must be given",)),
    ):
        assert main(["experts", "merge", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert [part for part in parts if part not in line] == []
    assert not Path(new).exists()
