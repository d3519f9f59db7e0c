"""`dylora report` of the folder of `dylora compare`: arms, intervals and verdicts as in compare.json."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from reference.browser import BROWSER, needs_browser, screenshot
from reference.pages import HOSTILE, KNOWN_TAGS, Reader, read, shown_and_written

from dylo_moe.commands.compare.arguments import ARMS
from dylo_moe.commands.compare.table import ArmRun, Rate, as_json, make_lines, sentences
from dylo_moe.evaluation.losses import DatasetLosses
from dylo_moe.report.pages import write_report

SECTIONS = ["summary", "verdict", "arms", "datasets", "trainings", "configuration"]
SHIFTS = dict(zip(ARMS, (0.5, -0.1, 0.0, 0.02, 0.07, 0.0), strict=True))
"""How much worse each arm is than ours, in nats per token."""


def write_comparison(folder: Path, *, seeds=(1, 2, 3), datasets=("low", "high"), text="x") -> Path:
    """The folder of a comparison whose arms differ by `SHIFTS`, with noise that makes the third a tie."""
    runs: dict[str, list[ArmRun]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        numbers = np.random.default_rng(seed)
        base = {name: 2 + place + numbers.random(30) for place, name in enumerate(datasets)}
        for arm in ARMS:
            noise = 0 if arm == "ours" else numbers.normal(0, 0.01, 30)
            found = {
                name: DatasetLosses(
                    [str(row) for row in range(30)], ((values + SHIFTS[arm] + noise) * 9).tolist(), [9] * 30
                )
                for name, values in base.items()
            }
            size = 0 if arm == "base" else 1000
            runs[arm].append(ArmRun(found, size, size // 2, size * 77, {"humaneval": Rate(0.25, [0.125, 0.5])}))
            if arm != "base":
                (folder / f"seed-{seed}" / arm / "checkpoint").mkdir(parents=True)
                (folder / f"seed-{seed}" / arm / "checkpoint" / "dylora.json").write_text("{}")
    lines = make_lines(runs)
    settings = {"model": text, "hub_token": "planted", "data_dir": "https://u:planted@host/x", "note": text}
    asked = {
        "settings": settings,
        "evaluation": {"limit": 2},
        "seeds": [str(seed) for seed in seeds],
        "arms": list(ARMS),
    }
    (folder / "settings.json").write_text(json.dumps(asked))
    result = {"seeds": list(seeds), "settings": settings, **as_json(lines, [*sentences(lines, seeds), text])}
    (folder / "compare.json").write_text(json.dumps(result))
    return folder


def texts_of(page: str, section: str) -> list[list[list[str]]]:
    """The cells of each row of each table of a section."""
    part = re.search(f"<section id='{section}'>.*?</section>", page, re.DOTALL)[0]
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in part.split("<table>")[1:]]
    cells = [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table] for table in rows]
    return [[[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in table] for table in cells]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("compared") / "out")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    folder = write_comparison(tmp_path_factory.mktemp("h") / "out", datasets=(f"a{HOSTILE}", "b"), text=HOSTILE)
    content = json.loads((folder / "compare.json").read_text())
    content["arms"]["uniform"]["title"] = HOSTILE
    (folder / "compare.json").write_text(json.dumps(content))
    return folder


def test_each_figure_of_the_result_is_in_its_row(compared):
    page, content = read(write_report(str(compared))), json.loads((compared / "compare.json").read_text())
    ((_, *arms), (_, *costs)), (losses, differences) = texts_of(page, "arms"), texts_of(page, "datasets")
    assert losses[0] == differences[0] == ["arm", "low", "high"]

    def shown(item, form):
        return f"{form.format(item['value'])}\n[{', '.join(form.format(end) for end in item['interval'])}]"

    verdicts = {"wins": "ours wins", "ties": "a tie", "loses": "ours loses", None: ""}
    for row, loss, (arm, item) in zip(arms, losses[1:], content["arms"].items(), strict=True):
        assert [f"{item[name]:,}" for name in ("parameters", "active")] == costs.pop(0)[1:3]
        assert row[0] == loss[0] == ARMS[arm] and row[1] == verdicts[item["ours"]]
        assert row[2] == shown(item["losses"]["mean"], "{:.4f}")
        assert row[3] == f"{min(item['by_seed']):.4f} to\n{max(item['by_seed']):.4f}"
        assert loss[1:] == [shown(found, "{:.4f}") for found in item["losses"]["datasets"].values()]
        assert f"<title>{ARMS[arm]}: {item['losses']['mean']['value']:.4g} [" in page
        if arm != "ours":
            assert row[4] == shown(item["difference"]["mean"], "{:+.4f}")
            (found,) = [cells[1:] for cells in differences if cells[0] == ARMS[arm]]
            assert found == [shown(part, "{:+.4f}") for part in item["difference"]["datasets"].values()]
    assert [row[1] for row in arms] == ["ours wins", "ours loses", "a tie", "ours wins", "ours wins", ""]
    assert all(html.escape(sentence, quote=False) in page for sentence in content["sentences"])
    assert "<span>ours wins against</span><b>3 of 5</b>" in page and "<span>state</span><b>finished</b>" in page
    assert "<td>limit</td><td class='long'>2</td>" in page


def test_a_page_is_made_of_what_is_there_and_says_what_is_not(compared, tmp_path):
    whole = read(write_report(str(compared)))
    assert "alarm'>" not in whole and re.findall("<section id='(.*?)'", whole) == SECTIONS
    folder = tmp_path / "out"
    for name, how, said in (
        ("compare.json", "missing", "compare.json is missing: there is no table yet"),
        ("compare.json", "{", "compare.json cannot be read"),
        ("compare.json", '{"arms": {"ours": {}}}', "compare.json cannot be read: KeyError"),
        ("settings.json", "missing", "settings.json is missing"),
        ("settings.json", "[1]", "settings.json holds no settings"),
    ):
        shutil.copytree(compared, folder)
        (folder / name).unlink()
        if how != "missing":
            (folder / name).write_text(how)
        page = html.unescape(read(write_report(str(folder))))
        assert said in page and re.findall("<section id='(.*?)'", page) == SECTIONS
        assert ("There is no result yet" in page) == (name == "compare.json")
        shutil.rmtree(folder)


def test_a_comparison_that_was_asked_for_more_seeds_has_not_ended(compared, tmp_path):
    """The table of the seeds before stays on the page, with a page's link for each training that has one."""
    folder = shutil.copytree(compared, tmp_path / "out")
    asked = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**asked, "seeds": ["1", "2", "3", "4", "../.."]}))
    (folder / "seed-4" / "random").mkdir(parents=True)
    (folder / "seed-1" / "ours" / "report.html").write_text("x")
    page = read(write_report(str(folder)))
    assert "15 of 25 trainings are done" in page and "<b>not finished</b>" in page and "ours wins" in page
    ((_, first, *_, fourth, outside),) = texts_of(page, "trainings")
    assert first == ["1", *4 * ["trained"], "trained: page"] and outside == ["../..", *5 * ["not begun"]]
    assert fourth == ["4", *3 * ["not begun"], "begun", "not begun"]
    assert re.findall("<a href='(.*?)'", page) == ["./seed-1/ours/report.html"]


def test_hostile_text_stays_text_and_secrets_are_left_out(hostile):
    page = read(write_report(str(hostile)))
    reader = Reader(page)
    assert reader.tags <= KNOWN_TAGS and "planted" not in page
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    for name in ("verdict", "arms", "datasets", "configuration"):
        assert HOSTILE in html.unescape(re.search(f"<section id='{name}'>.*?</section>", page, re.DOTALL)[0]), name


@needs_browser
def test_a_real_browser_shows_it_whole_and_it_fits_a_phone(hostile, tmp_path):
    from PIL import Image

    page, picture = write_report(str(hostile)), tmp_path / "page.png"
    shown, written = shown_and_written(page, tmp_path)
    for tag in ("td", "th", "use", "path", "text", "title", "p"):
        texts = [[text.rstrip("\n") for _, text in reader.of(tag)] for reader in (shown, written)]
        assert texts[0] == texts[1], tag
    screenshot(BROWSER, page, picture, width=390, height=4500)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert (pixels[:, -6:] == pixels[0, -1]).all()
