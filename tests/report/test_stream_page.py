"""`dylora report` of a stream's folder: the matrix with its numbers, decisions and links, made of what is there."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from reference.browser import BROWSER, needs_browser, screenshot
from reference.pages import HOSTILE, KNOWN_TAGS, Reader, read, shown_and_written

from dylo_moe.cli import main
from dylo_moe.evaluation.loss_matrix import FIGURES, Matrix, Stage, write_matrix
from dylo_moe.report.pages import write_report
from dylo_moe.utils.redact import short_name

SKILLS = ["python", "cpp", "sql", "legal_text"]
SECTIONS = ["summary", "figures", "gains", "changes", "decisions", "losses", "alone", "accuracy", "configuration"]


def a_matrix(skills=SKILLS, unlearned=("english",)) -> Matrix:
    """A stream as they come: each skill falls by much when learned, and drifts a little afterwards."""
    numbers = np.random.default_rng(3)
    columns = [*skills, *unlearned]
    now = {name: 2 + numbers.random() for name in columns}
    matrix = Matrix(list(skills), list(unlearned), dict(now), [])
    alone: dict[str, float] = {}
    for place, skill in enumerate(skills):
        now = {name: loss + numbers.normal(0, 0.01) for name, loss in now.items()}
        alone[skill] = now[skill] - 0.5
        now[skill] = alone[skill] + 0.02
        nearest = skills[place - 1] if place else None
        decision = {"skill": skill, "novel": True, "score": 5.25 + place, "threshold": 1.125, "nearest": nearest}
        decision |= {"entropy": 0.0625, "action": "grown", "expert": skill}
        accuracy = {name: 0.9 + min(place, 9) / 100 for name in (*alone, *unlearned)}
        matrix.stages.append(Stage(skill, dict(now), dict(alone), accuracy, 31.0, 32768, decision))
    return matrix


def write_stream(folder: Path, matrix: Matrix, *, state="finished", pages=(), folders=None, settings=None) -> Path:
    """A stream's folder; `pages`: the stages that have a page of their own."""
    folder.mkdir(parents=True)
    write_matrix(folder / "matrix.json", matrix)
    names = folders or [f"stages/{place:02d}_{stage.name}" for place, stage in enumerate(matrix.stages, start=1)]
    stages = [
        {"name": stage.name, "folder": name, "decision": stage.decision}
        for name, stage in zip(names, matrix.stages, strict=True)
    ]
    stream = {"state": state, "skills": matrix.skills, "next": len(stages), "stages": stages, "version": 1}
    (folder / "stream.json").write_text(json.dumps(stream))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or {"model": "org/base", "datasets": matrix.skills}))
    for place in pages:
        (folder / names[place]).mkdir(parents=True)
        (folder / names[place] / "report.html").write_text("x")
    return folder


def section(page: str, name: str) -> str:
    return re.search(f"<section id='{name}'>.*?</section>", page, re.DOTALL)[0]


def table_of(page: str, name: str) -> list[list[str]]:
    """The first table of a section, as texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", section(page, name).split("<table>")[1].split("</table>")[0], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in cells]


def hostile_matrix() -> Matrix:
    matrix = a_matrix([f"a{HOSTILE}", f"b{HOSTILE}"], [f"u{HOSTILE}"])
    for stage in matrix.stages:
        stage.decision |= {"nearest": HOSTILE, "score": HOSTILE, "skill": HOSTILE, HOSTILE: HOSTILE}
    return matrix


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream") / "out", a_matrix(), pages=[0, 2])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    settings = {"model": HOSTILE, "hub_token": "planted", "data_dir": "https://u:planted@host/x", "x": HOSTILE}
    folders = [HOSTILE, "stages/..\0"]
    return write_stream(tmp_path_factory.mktemp("h") / "out", hostile_matrix(), folders=folders, settings=settings)


# What it tells.


def test_every_number_of_the_matrix_is_in_its_place(stream):
    page, matrix = read(write_report(str(stream))), a_matrix()
    columns = [*SKILLS, "english"]
    labels = [f"{place} {skill}" for place, skill in enumerate(SKILLS, start=1)]
    losses = [[f"{stage.losses[name]:.4f}" for name in columns] for stage in matrix.stages]
    base = ["base", *(f"{matrix.base[name]:.4f}" for name in columns)]
    rows = [[label, *row] for label, row in zip(labels, losses, strict=True)]
    assert table_of(page, "losses") == [["after stage", *columns], base, *rows]
    gains = [[f"{stage.losses[name] - matrix.base[name]:+.3f}" for name in columns] for stage in matrix.stages]
    rows = [[label, *row] for label, row in zip(labels, gains, strict=True)]
    assert table_of(page, "gains") == [["after stage", *columns], *rows]
    for place, row in enumerate(table_of(page, "changes")[1:]):
        for index, skill in enumerate(SKILLS):
            change = matrix.stages[place].losses[skill] - matrix.stages[index].losses[skill]
            assert row[index + 1] == (f"{change:+.3f}" if place >= index else "")
        assert row[-1] == gains[place][-1]
    alone = [[f"{stage.alone[name]:.4f}" if name in stage.alone else "" for name in SKILLS] for stage in matrix.stages]
    assert [row[1:] for row in table_of(page, "alone")[1:]] == alone
    assert table_of(page, "accuracy")[4][1:] == ["93.0%"] * 5
    figures = {row[0]: row[1:3] for row in table_of(page, "figures")[1:]}
    for kind in FIGURES.values():
        figure = kind.of(matrix)
        assert figures[kind.title] == [kind.show(figure.mean), kind.show(figure.worst[1])]


def test_a_cell_is_as_blue_as_it_is_better_and_as_orange_as_it_is_worse(stream):
    """The tint is in proportion to the change, of the largest of the page or of 0.05, whichever is larger."""
    page, matrix = read(write_report(str(stream))), a_matrix()
    for name, before in (("gains", lambda skill, place: matrix.base), ("changes", None)):
        found, wanted = [], []
        tints = re.findall(r"<td class='tint (better|worse)( learned)?' style='--p:(\d+)%'", section(page, name))
        for place, stage in enumerate(matrix.stages):
            for index, skill in enumerate([*SKILLS, "english"]):
                if name == "changes" and index > place and skill != "english":
                    continue
                learned = matrix.base if before or skill == "english" else matrix.stages[index].losses
                wanted.append((stage.losses[skill] - learned[skill], place == index))
        found = [(-1 if tone == "better" else 1, bool(learned), int(part)) for tone, learned, part in tints]
        scale = max(0.05, *(abs(change) for change, _ in wanted))
        for (sign, learned, part), (change, is_learned) in zip(found, wanted, strict=True):
            assert sign * part == pytest.approx(50 * change / scale, abs=0.51)
            assert learned == is_learned
        assert f"-{scale:.3g} <span class='two'>" in page


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return write_stream(tmp_path_factory.mktemp("many") / "out", a_matrix([f"skill_{place}" for place in range(64)]))


def test_64_skills_are_a_map_whose_cells_tell_their_numbers_and_details_that_are_closed(many):
    page, matrix = read(write_report(str(many))), a_matrix([f"skill_{place}" for place in range(64)])
    columns = [*matrix.skills, "english"]
    hover = re.findall(r"<td class='tint (better|worse)[^>]*title='([^']*)'></td>", section(page, "gains"))
    assert [text for _, text in hover] == [
        f"{name} after {stage.name}: {stage.losses[name] - matrix.base[name]:+.3f}"
        for stage in matrix.stages
        for name in columns
    ]
    assert [tone for tone, _ in hover] == [
        "better" if stage.losses[name] < matrix.base[name] else "worse" for stage in matrix.stages for name in columns
    ]
    shares = re.findall(r"<td class='share' style='--p:(\d+)%' title='([^']*)'></td>", section(page, "accuracy"))
    assert len(shares) == 64 * 65 // 2 + 64
    assert shares[0] == ("72", "skill_0 after skill_0: 90.0%")
    outside = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert outside.count("<table") == 6  # figures, the skills that keep least, three maps, and the configuration
    assert all(f"{stage.losses[name]:.4f}" in section(page, "losses") for stage in matrix.stages for name in columns)
    kept = matrix.gain_kept().known
    behind = section(page, "figures").split("keep least")[1]
    assert re.findall(r"<td class='stage'>([^<]*)</td>", behind)[:8] == sorted(kept, key=kept.__getitem__)[:8]


def test_each_decision_is_shown_with_what_it_rests_on(stream):
    rows = table_of(read(write_report(str(stream))), "decisions")
    assert rows[1] == [
        "1 python",
        "yes",
        "5.25",
        "1.125",
        "",
        "0.0625",
        "grown",
        "python",
        "python",
        "32,768",
        "31",
        "page",
    ]
    assert rows[2][:5] == ["2 cpp", "yes", "6.25", "1.125", "python"] and rows[2][-1] == ""


def test_a_stage_that_trained_nothing_says_so(tmp_path):
    matrix = a_matrix()
    decision = {"novel": False, "score": 0.5, "nearest": "cpp", "action": "skipped", "expert": None, "chunk": 7}
    matrix.stages.append(Stage("chunk_7", dict(matrix.stages[-1].losses), decision=decision))
    page = read(write_report(str(write_stream(tmp_path / "out", matrix))))
    assert table_of(page, "losses")[-1][0] == "5 chunk_7 (skipped)"
    assert table_of(page, "decisions")[-1][:3] == ["5 chunk_7", "no", "0.5"]
    assert table_of(page, "decisions")[-1][-1] == "chunk 7"


def test_a_missing_cell_is_not_measured_and_never_0(tmp_path):
    matrix = a_matrix()
    del matrix.stages[3].losses["python"], matrix.stages[1].losses["cpp"], matrix.base["sql"]
    page = read(write_report(str(write_stream(tmp_path / "out", matrix))))
    losses, gains, changes = (table_of(page, name) for name in ("losses", "gains", "changes"))
    assert losses[5][1] == losses[3][2] == losses[1][3] == "not measured"
    assert gains[4][1] == gains[2][2] == "not measured"
    assert {row[3] for row in gains[1:]} == {"not measured"}
    assert [row[2] for row in changes[1:]] == ["", *3 * ["not measured"]]  # cpp's just after learning is missing
    assert changes[4][1] == "not measured"
    assert table_of(page, "figures")[2][3].endswith("; 1 of 4")  # only sql's forgetting is known
    each = section(page, "figures").split("<table>")[2]
    assert each.count("not measured") == 3 + 2 + 3  # python's loss now, cpp's just after learning, sql's of the base


# Whole, cut and unfinished streams.


def test_an_unfinished_stream_says_so(tmp_path, stream):
    matrix = a_matrix()
    del matrix.stages[2:]
    page = read(write_report(str(write_stream(tmp_path / "out", matrix, state="running"))))
    assert "the stream has not ended, or did not end well: 2 stages are measured" in page
    assert "<span>state</span><b>not finished</b>" in page
    assert "<span>skills learned</span><b>2 of 4</b>" in page
    whole = read(write_report(str(stream)))
    assert "has not ended" not in whole and "<span>state</span><b>finished</b>" in whole


@pytest.mark.parametrize("name", ["stream.json", "matrix.json", "config.yaml"])
@pytest.mark.parametrize("how", ["missing", "cut", "another"])
def test_a_page_is_made_of_what_is_there_and_says_what_is_not(name, how, stream, tmp_path):
    folder = write_stream(tmp_path / "out", a_matrix(), pages=[0])
    path = folder / name
    if how == "missing":
        path.unlink()
        said = f"{name} is missing"
    elif how == "cut":
        path.write_text("a: [" if name == "config.yaml" else path.read_text()[: path.stat().st_size // 2])
        said = f"{name} cannot be read"
    else:
        path.write_text("[1]")
        said = "it is no object" if name == "matrix.json" else f"{name} holds no settings"
    page, whole = read(write_report(str(folder))), read(write_report(str(stream)))
    assert said in page and said not in whole
    assert re.findall("<section id='(.*?)'", page) == SECTIONS
    assert ("<span>state</span><b>not known</b>" in page) == (name == "stream.json")
    assert ("Nothing was measured yet" in page) == (name == "matrix.json")


@pytest.mark.parametrize("stages", [None, "x", [], [1], [{"folder": 3}], [{"folder": "../.."}], [{}]])
def test_what_is_odd_in_stream_json_does_no_harm(stages, tmp_path):
    """A stage's folder is found by its number too; the page is about what matrix.json says."""
    folder = write_stream(tmp_path / "out", a_matrix(), pages=[0])
    (folder / "stream.json").write_text(json.dumps({"state": "finished", "stages": stages}))
    page = read(write_report(str(folder)))
    assert "./stages/01_python/report.html" in page
    assert table_of(page, "losses") == table_of(read(write_report(str(folder))), "losses")


def test_a_stream_that_has_only_begun_has_a_page(tmp_path):
    folder = write_stream(tmp_path / "out", Matrix(SKILLS, [], {}, []), state="running")
    page = read(write_report(str(folder)))
    assert re.findall("<section id='(.*?)'", page) == SECTIONS
    assert "0 stages are measured" in page and "<span>skills learned</span><b>0 of 4</b>" in page


# Links.


@pytest.mark.parametrize("where", ["out/report.html", "elsewhere/deep/page.html", "page.html"])
def test_links_lead_to_the_pages_of_the_stages_from_wherever_the_page_lies(where, tmp_path):
    folder = write_stream(tmp_path / "out", a_matrix(["a b", "c#d%20"]), pages=[0, 1])
    written = write_report(str(folder), str(tmp_path / where))
    links = re.findall(r"<a href='(.*?)'", read(written))
    found = [(written.parent / unquote(html.unescape(link))).resolve() for link in links]
    assert found == [(folder / "stages" / name / "report.html").resolve() for name in ("01_a b", "02_c#d%20")]
    assert all(path.is_file() for path in found)


def test_no_link_leads_out_of_the_stream_or_nowhere(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "report.html").write_text("x")
    folders = ["../secret", str(tmp_path / "secret"), "javascript:alert(1)", "stages/../../secret"]
    page = read(write_report(str(write_stream(tmp_path / "out", a_matrix(), folders=folders))))
    assert "<a " not in page and "makes a page for a stage's run" in page


# What it must not do.


def test_hostile_text_stays_text(hostile):
    page = read(write_report(str(hostile)))
    reader = Reader(page)
    assert reader.tags <= KNOWN_TAGS
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    assert [value for name, value in reader.attributes if name == "href"] == ["data:,"]
    for name in SECTIONS:
        shown = html.unescape(section(page, name))
        assert HOSTILE in shown or short_name(HOSTILE) in shown, name


def test_secrets_are_left_out(hostile):
    page = read(write_report(str(hostile)))
    assert "planted" not in page and "https://host/x" in page


def test_the_command_writes_it(stream, tmp_path, capsys):
    assert main(["report", str(stream), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert read(tmp_path / "page.html").count("<section") == len(SECTIONS)


@needs_browser
@pytest.mark.parametrize("which", ["hostile", "stream"])
def test_a_real_browser_shows_it_whole_without_network_or_script(which, request, tmp_path):
    shown, written = shown_and_written(write_report(str(request.getfixturevalue(which))), tmp_path)
    for tag in ("td", "th", "span", "a", "section", "p"):
        texts = [[text.rstrip("\n") for _, text in reader.of(tag)] for reader in (shown, written)]
        assert texts[0] == texts[1], tag
    assert len(shown.of("td")) > 60


@needs_browser
@pytest.mark.parametrize("width", [1440, 900])
def test_a_map_of_64_skills_fits_the_screen_whole(width, tmp_path):
    """The cells of the last column are as far from the edge as every section's text; nothing has to be scrolled."""
    from PIL import Image

    matrix = a_matrix([f"skill_{place}" for place in range(64)])
    matrix.base["english"] += 30  # the strongest tint stands in the last column
    picture = tmp_path / "page.png"
    screenshot(BROWSER, write_report(str(write_stream(tmp_path / "out", matrix))), picture, width=width, height=3000)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    half = (np.array([0x00, 0x72, 0xB2]) + 255) / 2  # half blue, half white
    _, places = np.nonzero(np.abs(pixels - half).sum(-1) < 6)
    right = (width + min(width - 32, 1088)) / 2  # of the section
    assert len(places) > 64 * 12 * 8 and right - 40 < places.max() < right - 17


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_drawn_and_fits_the_screen(width, tmp_path):
    """A stream of many skills: the tables scroll by themselves, and the strongest tint is there."""
    from PIL import Image

    matrix = a_matrix([f"skill_{place}" for place in range(20)])
    matrix.base["skill_0"] += 1  # the largest gain stands in the first column
    picture = tmp_path / "page.png"
    screenshot(BROWSER, write_report(str(write_stream(tmp_path / "out", matrix))), picture, width=width, height=4500)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    half = (np.array([0x00, 0x72, 0xB2]) + 255) / 2  # half blue, half white
    assert (np.abs(pixels - half).sum(-1) < 6).sum() > 200
    margin = pixels[:, -8:]
    assert (margin == margin[0, 0]).all()
