"""`dylora report`: the page tells what the run's files tell, is whole without a network, and runs nothing."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.browser import BROWSER, needs_browser, open_page, screenshot
from reference.pages import HOSTILE, KNOWN_TAGS, Reader, read, shown_and_written
from reference.paths import ROOT
from reference.runs import flags, tiny_run_folder

from dylo_moe.cli import main
from dylo_moe.commands.train.request import parse_train
from dylo_moe.commands.train.run import train as train
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    colour_class,
    heatmap,
    line_chart,
    number,
    thinned,
)
from dylo_moe.report.interval_charts import SHIFT, Measured, curve_chart, interval_chart
from dylo_moe.report.pages import write_report
from dylo_moe.training.charts import Series, step_ticks, tick_labels, ticks
from dylo_moe.utils.harmless import harmless
from dylo_moe.utils.redact import short_name

SECTIONS = ["summary", "losses", "benchmarks", "experts", "entropy", "load", "drift", "gradients", "alarms"]
SECTIONS += ["samples", "data", "configuration", "versions", "hardware", "metrics"]

EXPERTS = ["expert_0", f"b{HOSTILE}"]
DOMAINS = ["data/a_b.jsonl", f"c {HOSTILE}"]


def write_run(folder: Path, *, num_logs: int = 12) -> Path:
    """The folder of a finished run whose every text is hostile."""
    folder.mkdir(parents=True)
    facts = {
        "started": HOSTILE,
        "versions": {"torch": "2.0", HOSTILE: HOSTILE},
        "hardware": {"platform": HOSTILE, "cpu": HOSTILE, "cores": 3, "gpus": [{"name": HOSTILE, "memory": 1}]},
        "base": {"id": HOSTILE, "revision": None, "class": HOSTILE, "parameters": 1234},
        "experts": [{"name": name, "rank": 4, "parameters": 5} for name in EXPERTS],
        "router": {"parameters": 6, "top_k": 1},
        "trainable": 16,
        "frozen": 1234,
        "data": [
            {"name": name, "origin": HOSTILE, "train": 7, "evaluation": 3, "share": 0.5, "licence": HOSTILE}
            for name in DOMAINS
        ],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    settings = {"model": HOSTILE, "max_steps": num_logs, "hub_token": "planted", "data_dir": "https://u:planted@host/x"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [{"step": 0, "time": 0, **{f"eval_{name}_loss": 3.0 for name in DOMAINS}}]
    for step in range(1, num_logs + 1):
        line = {"step": step, "time": step, "epoch": step / 4, "lm_loss": 3 - step / 100, "token_entropy": 0.5}
        for place, name in enumerate(DOMAINS):
            share = (place + step / num_logs) / 2
            line |= {f"loss_{name}": 2.5 - step / 97 - place, f"share_{name}_{EXPERTS[0]}": share}
            line[f"share_{name}_{EXPERTS[1]}"] = 1 - share
        for place, name in enumerate(EXPERTS):
            line |= {f"gate_drift_{name}": step / 89, f"grad_norm_{name}": 1 / (step + place), f"share_{name}": 0.5}
        lines.append(line)
    lines.append({"step": num_logs, "alarms": [HOSTILE]})
    lines.append({"step": num_logs, **{f"eval_{name}_loss": 2.0 for name in DOMAINS}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"domain": DOMAINS[1], "prompt_length": 2, "tokens": ["a", "\n b", HOSTILE, "\ud800", "e"]}
    sample["experts"] = [EXPERTS[0], EXPERTS[1], EXPERTS[1], None, EXPERTS[0]]
    (folder / "samples.json").write_text(json.dumps([sample]))
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("hostile") / "out")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tiny_run_folder(tmp_path_factory.mktemp("tiny"))
    train(parse_train(flags(folder, folder / "out", "--eval_strategy", "steps", "--eval_steps", "6")))
    return folder / "out"


# What it tells.


def test_every_logged_value_is_on_the_page(finished):
    """Each training loss, share, drift and gradient, each held-out loss: in the hover title of its step."""
    page = html.unescape(read(write_report(str(finished))))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    checked = 0
    for line in lines:
        for domain in ("low", "high"):
            for key, name in ((f"loss_{domain}", "training"), (f"eval_{domain}_loss", "held out")):
                if key in line:
                    assert f"{name}, step {line['step']}: {number(line[key])}<" in page
                    checked += 1
            for expert in ("expert_0", "expert_1"):
                if f"share_{domain}_{expert}" in line:
                    assert f"{expert}, step {line['step']}: {line[f'share_{domain}_{expert}']:.1%}<" in page
        for expert in ("expert_0", "expert_1"):
            for key in (f"gate_drift_{expert}", f"grad_norm_{expert}"):
                if key in line:
                    assert f"{expert}, step {line['step']}: {number(line[key])}<" in page
                    checked += 1
    assert checked > 40
    facts = json.loads((finished / "run.json").read_text())
    for value in [*facts["versions"].values(), facts["hardware"]["cpu"], f"{facts['hardware']['cores']} cores"]:
        assert str(value) in page
    for name, value in yaml.safe_load((finished / "config.yaml").read_text()).items():
        if value is not None and not isinstance(value, (list, dict)):
            assert (
                f"<td>{name}</td><td class='long'>{value if isinstance(value, str) else json.dumps(value)}</td>" in page
            )


def test_code_benchmarks_that_were_run_while_it_trained_are_on_the_page(finished, tmp_path):
    assert "No code benchmark was run during training." in read(
        write_report(str(finished), str(tmp_path / "plain.html"))
    )
    folder = write_run(tmp_path / "out")
    rates = {4: 0.05, 8: 0.15}
    lines = [
        {"step": step, "eval_humaneval_pass_at_1": rate, "eval_humaneval_num_tasks": 20} for step, rate in rates.items()
    ]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = html.unescape(read(write_report(str(folder))))
    for step, rate in rates.items():
        assert f"pass@1, step {step}: {number(rate)}<" in page
    assert "20 tasks, one greedy answer each." in page


def test_each_token_of_a_sample_has_its_experts_colour_and_name(hostile):
    reader = Reader(read(write_report(str(hostile))))
    sample = json.loads((hostile / "samples.json").read_text())[0]
    spans = [(attrs, text) for attrs, text in reader.of("span") if "title" in attrs]
    assert [text for _, text in spans] == [harmless(token) for token in sample["tokens"]]
    for position, ((attrs, _), expert) in enumerate(zip(spans, sample["experts"], strict=True)):
        assert attrs["title"] == (expert or "the base alone")
        kind = colour_class(EXPERTS.index(expert)) if expert else "base"
        assert attrs["class"] == kind + (" prompt" if position < sample["prompt_length"] else "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run.json", "run.json is missing"),
        ("config.yaml", "config.yaml is missing"),
        ("metrics.jsonl", "metrics.jsonl is missing"),
        ("samples.json", "the run has not ended"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_page_is_made_of_what_is_there_and_says_what_is_not(name, said, how, hostile, tmp_path):
    """A killed run may have left any file unwritten, or, by another program's hand, half of it."""
    folder = write_run(tmp_path / "out")
    if how == "missing":
        (folder / name).unlink()
    else:
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) // 2] if name != "config.yaml" else "a: [")
        said = "are cut off|is cut off" if name == "metrics.jsonl" else f"{re.escape(name)} cannot be read"
    whole, page = read(write_report(str(hostile))), read(write_report(str(folder)))
    assert re.search(said, page) and not re.search(said, whole)
    assert re.findall("<section id='(.*?)'", page) == SECTIONS
    if name == "run.json":  # the metrics' keys name the datasets and experts too
        charts = r"<section id='losses'>.*?</section>"
        counts = [re.search(charts, text, re.DOTALL)[0].count("<use") for text in (page, whole)]
        assert counts[0] == counts[1] > 20


def test_a_run_without_any_log_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("model: x\n")
    (tmp_path / "metrics.jsonl").write_text("")
    page = read(write_report(str(tmp_path)))
    assert "metrics.jsonl is empty" in page and "not finished" in page


def test_what_is_not_finite_breaks_the_line(tmp_path):
    svg = line_chart("x", [Series("a", [(0, 1.0), (1, None), (2, 2.0), (3, 3.0)], 0)], unit="nats").svg
    (path,) = lines_of(svg)
    assert path.count("M") == 2 and path.count("L") == 1 and svg.count("<title>") == 3
    assert len(spots(svg, "points")) == 3


@pytest.mark.parametrize("values", [[1.0], [None, 1.0, None], [None, 1.0], [2.0, None, 1.0, None, None]])
def test_a_point_without_a_neighbour_is_a_diamond(values):
    """A line of one point is no line: without a marker, nothing of it would be seen. Its legend has the marker too."""
    lone, dots = Series("a", list(enumerate(values)), 0), Series("b", list(enumerate(values)), 0, dots=True)
    assert [key.kind for key in line_chart("x", [lone, dots], unit="").legend] == ["s0 d0 lone", "s0 d0 point"]
    svg = line_chart("x", [Series("a", list(enumerate(values)), 0)], unit="nats").svg
    assert len(spots(svg, "dots")) == sum(value is not None for value in values)
    svg = line_chart("x", [Series("a", [*enumerate(values), (8, 1.0), (9, 1.0)], 0)], unit="nats").svg
    before_the_line = 1 if values[-1] is not None else 0
    assert len(spots(svg, "dots")) == sum(value is not None for value in values) - before_the_line


def test_a_page_needs_no_pytorch_and_a_stream_without_charts_no_matplotlib():
    """They would take most of the time of the command."""
    code = "import sys, dylo_moe.report.pages; print(*{'torch', 'transformers', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_what_is_nothing_of_the_kind_is_refused_with_what_was_found_and_what_is_expected(tmp_path, capsys):
    folder, other = write_run(tmp_path / "runs" / "out"), tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text("{}")
    for argument, said in (
        (tmp_path / "nothing", "there is no folder"),
        (folder / "metrics.jsonl", "is a file; name the folder of a run (config.yaml"),
        (other, "holds adapter_config.json, and is not the folder of a run (config.yaml"),
        (folder.parent, f"name one of the folders in it, such as {folder}"),
    ):
        assert main(["report", str(argument)]) == 2
        error = capsys.readouterr().err
        assert str(argument) in error and said in error and "a comparison (compare.json)" in error
        assert error.startswith("dylora report: ") and error.count("\n") == 1
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "page.html")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["page.html"]


def test_a_checkpoint_stands_for_its_run_and_stays_whole(finished, tmp_path):
    """Bug this guards against: a page inside a checkpoint, whose own list of files then no longer holds."""
    page = write_report(str(finished / "checkpoint"))
    assert page == finished / "report.html" and read(page) == read(write_report(str(finished)))
    alone = shutil.copytree(finished / "checkpoint", tmp_path / "alone")
    page = write_report(str(alone))
    assert page == tmp_path / "alone-report.html"
    read_manifest(alone)
    text = html.unescape(read(page))
    lines = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    before = {key: value for line in lines if line["step"] == 0 for key, value in line.items()}
    for name in ("low", "high"):
        assert f"held out, step 0: {number(before[f'eval_{name}_loss'])}<" in text
    assert "a checkpoint without the folder of its run" in text
    assert "<td>num_experts</td><td class='long'>2</td>" in text


# What its charts draw.


def spots(svg: str, kind: str) -> list[list[float]]:
    """Where the markers of all groups of a kind are: "dots" are seen, "points" are invisible and have hover titles."""
    groups = re.findall(rf'<g class="{kind}".*?</g></g>', svg)
    places = [place for group in groups for place in re.findall(r'<use [^>]*?x="([\d.-]+)" y="([\d.-]+)"', group)]
    return [[float(x), float(y)] for x, y in places]


def lines_of(svg: str) -> list[str]:
    """The path of each series' line."""
    return re.findall(r'<g class="line2d"><path d="([^"]*)" style="[^"]*stroke: var\(--c\d\)', svg)


def value_of(label: str) -> float:
    return float(label.replace(",", ""))


VALUES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)


@settings(deadline=None)
@given(VALUES)
@example([0.0, 1e-300])
@example([0.0, 3e-280])
def test_a_point_lies_where_its_value_says(values):
    """Heights are an affine map of the values, and steps go to the right."""
    svg = line_chart("x", [Series("a", list(enumerate(values)), 0)], unit="nats").svg
    places = np.array(spots(svg, "points"))
    assert len(places) == len(values) and (np.diff(places[:, 0]) > 0).all()
    assert (places >= np.array((LEFT, TOP)) - 1e-6).all()
    assert (places <= np.array((WIDTH - RIGHT, HEIGHT - BOTTOM)) + 1e-6).all()
    axis = re.findall(r'<g class="ytick"><g class="line2d"><path d="M [\d.]+ ([\d.]+).*?<text[^>]*>([^<]+)<', svg)
    (low, low_value), (high, high_value) = [(float(y), value_of(text)) for y, text in (axis[0], axis[-1])]
    wanted = low + (np.array(values) - low_value) / (high_value - low_value) * (high - low)
    assert np.abs(places[:, 1] - wanted).max() < 0.02 * (low - high)  # the labels are rounded
    assert ">nats<" in svg and ">optimizer step<" in svg


ENDS = st.one_of(
    st.tuples(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300)),
    st.tuples(st.floats(-10, 10), st.floats(0, 1e-4)).map(lambda pair: (pair[0], sum(pair))),
    st.tuples(st.floats(-1e9, 1e9), st.floats(0, 1)).map(lambda pair: (pair[0], pair[0] * (1 + 1e-4 * pair[1]))),
)


@given(ENDS, st.integers(5, 9))
@example((2.3, 2.3), 6)
@example((0.0, 0.0), 6)
@example((2.3, 2.3 + 1e-12), 6)
@example((1.2e-5, 2e-5), 6)
@example((-1.1806804616678829e-276, -1.1806952201736537e-276), 5)
def test_the_ticks_of_an_axis_cover_its_values_and_all_read_differently(ends, most):
    low, high = sorted(ends)
    found = ticks(low, high, most=most)
    assert 3 <= len(found) <= most
    size = found[-1] - found[0]
    assert np.diff(found) / size == pytest.approx(1 / (len(found) - 1), rel=1e-3)
    assert found[0] <= low + 1e-6 * size and found[-1] >= high - 1e-6 * size
    labels = tick_labels(found)
    read_back = [value_of(label) for label in labels]
    assert read_back == sorted(set(read_back)) and "-0" not in labels
    assert np.abs(np.array(read_back) - found).max() < 1e-2 * size
    assert max(map(len, labels)) <= 13


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_the_steps_below_an_axis_are_whole_and_all_read_differently(first, length):
    found = step_ticks(first, first + length)
    assert 1 <= len(found) <= 6 and all(first <= step <= first + length and step == int(step) for step in found)
    read_back = [value_of(label) for label in tick_labels(found)]
    assert read_back == sorted(set(read_back))
    if max(found, default=0) < 1e6:
        assert read_back == found


def test_an_interval_lies_where_its_ends_say():
    rows = [Measured("a", 2.0, (1.5, 2.75), 0), Measured("b", 1.25, None, 1), Measured("c", math.nan, None, 2)]
    svg = interval_chart("x", rows, unit="nats", mark=1.75).svg
    axis = re.findall(r'<g class="xtick"><g class="line2d"><path d="M ([\d.]+) .*?<text[^>]*>([^<]+)<', svg)
    (left, low), (right, high) = [(float(x), value_of(text)) for x, text in (axis[0], axis[-1])]
    (bar,) = [path for path in lines_of(svg) if " L " in path]
    found = [float(x) for x in re.findall(r"[ML] ([\d.]+)", bar)] + [x for x, _ in spots(svg, "dots")]
    wanted = [left + (value - low) / (high - low) * (right - left) for value in (1.5, 2.75, 2.0, 1.25)]
    assert found == pytest.approx(wanted, abs=0.01)
    assert ">a: 2 [1.5, 2.75]<" in svg and ">b: 1.25<" in svg and ">nats<" in svg


def test_a_curve_has_its_values_and_their_ends_at_their_places():
    """Both curves have values at 100 and 400; they stand `SHIFT` of the axis apart, half to each side."""
    one = [(100.0, Measured("a", 2.0, (1.5, 2.75), 0)), (400.0, Measured("a", 1.0, None, 0))]
    two = [(100.0, Measured("b", 3.0, (2.5, 3.25), 1)), (400.0, Measured("b", math.nan, None, 1))]
    svg = curve_chart("x", [one, two], unit="nats", xlabel="tokens").svg
    axes = [
        [(float(at), value_of(text)) for at, text in re.findall(pattern, svg)]
        for pattern in (
            r'<g class="xtick">.*?<text [^>]*?x="([\d.]+)"[^>]*>([^<]+)<',
            r'<g class="ytick"><g class="line2d"><path d="M [\d.]+ ([\d.]+) .*?<text[^>]*>([^<]+)<',
        )
    ]

    def at(axis, value):
        (first, low), (last, high) = axis[0], axis[-1]
        return first + (value - low) / (high - low) * (last - first)

    assert [value for _, value in axes[0]] == [100, 400]
    shift = SHIFT * 300 / 2
    wanted = [(100 - shift, 2.0), (400 - shift, 1.0), (100 + shift, 3.0)]
    assert spots(svg, "dots") == [pytest.approx([at(axes[0], x), at(axes[1], y)], abs=0.01) for x, y in wanted]
    bars = [[float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)] for path in lines_of(svg)]
    for ends in ((1.5, 2.75), (2.5, 3.25)):
        assert pytest.approx([at(axes[1], end) for end in ends], abs=0.01) in bars
    assert ">a, 100: 2 [1.5, 2.75]<" in svg and ">b, 100: 3 [2.5, 3.25]<" in svg and ">tokens<" in svg


@given(st.lists(st.floats(-1e3, 1e3), max_size=700))
def test_a_long_line_becomes_means_of_neighbours(values):
    points = thinned(list(enumerate(values)))
    assert len(points) <= MAX_POINTS
    size = math.ceil(len(values) / MAX_POINTS) or 1
    for place, (step, value) in enumerate(points):
        part = range(len(values))[place * size : (place + 1) * size]
        assert step == pytest.approx(np.mean(part))
        assert value == pytest.approx(np.mean([values[index] for index in part]), abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_cell_is_as_full_as_its_share(shares):
    svg = heatmap(
        "x", [("a", list(enumerate(shares))), ("b", [(step, 1 - share) for step, share in enumerate(shares)])]
    ).svg
    cells = re.findall(r"<path [^>]*>", re.search(r'<g class="cells">.*?</g>', svg)[0])
    opacities = [re.search(r"fill-opacity: ([\d.]+)", cell) for cell in cells]
    found = [
        float(match[1]) if match else float("fill: none" not in cell)
        for match, cell in zip(opacities, cells, strict=True)
    ]
    assert found == pytest.approx([*shares, *(1 - share for share in shares)], abs=6e-4)


def test_experts_beyond_the_colours_have_another_kind_of_line():
    assert len({colour_class(index) for index in range(28)}) == 28
    svg = line_chart("x", [Series(str(index), [(0, 0.0), (1, 1.0)], index) for index in range(28)], unit="").svg
    assert len(set(re.findall(r'<g class="line2d"><path [^>]*style="([^"]*stroke: var\(--c[^"]*)"', svg))) == 28


def test_the_same_log_gives_the_same_charts():
    """No date, no random identifiers: two pages about one run are equal, letter for letter."""
    series = [Series("a", [(0, 1.0), (1, 2.0)], 0), Series("b", [(0, 3.0)], 1, dots=True)]
    assert line_chart("x", series, unit="") == line_chart("x", series, unit="")
    assert heatmap("x", [("a", [(0, 0.5)])]) == heatmap("x", [("a", [(0, 0.5)])])


# What it must not do.


def test_hostile_text_stays_text(hostile):
    """Bug this guards against: one value that is written into the page as it is."""
    page = read(write_report(str(hostile)))
    reader = Reader(page)
    assert reader.tags <= KNOWN_TAGS
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    assert [value for name, value in reader.attributes if name == "href"] == ["data:,"]
    # Inside an SVG a marker is drawn once and used at every point, by a name that no page can be at.
    assert all(value.startswith("#m") for name, value in reader.attributes if name == "xlink:href")
    for identity in ("summary", "alarms", "samples", "data", "configuration", "versions", "hardware", "metrics"):
        section = re.search(f"<section id='{identity}'>.*?</section>", page, re.DOTALL)[0]
        shown = html.unescape(section)
        assert any(text in shown for text in (HOSTILE, json.dumps(HOSTILE)[1:-1], short_name(HOSTILE))), identity


def test_secrets_are_left_out(hostile):
    page = read(write_report(str(hostile)))
    assert "planted" not in page and "https://host/x" in page


@needs_browser
@pytest.mark.parametrize("which", ["hostile", "finished"])
def test_a_real_browser_shows_it_whole_without_network_or_script(which, request, tmp_path):
    shown, written = shown_and_written(write_report(str(request.getfixturevalue(which))), tmp_path)
    assert [attrs["id"] for attrs, _ in shown.of("section")] == list(SECTIONS)
    # Nothing that was written was dropped, moved or added by the browser's parser.
    for tag in ("use", "path", "text", "td", "span", "title", "figure"):
        assert [text for _, text in shown.of(tag)] == [text for _, text in written.of(tag)], tag
    assert len(shown.of("use")) > 20 and len(shown.of("path")) > 20


@needs_browser
def test_the_browser_test_would_see_requests_and_script_errors(tmp_path):
    """Else the law above would hold for any page."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://outside.invalid/canary.png'><script>throw Error('canary')</script>")
    opened = open_page(BROWSER, page, tmp_path)
    assert any("outside.invalid" in line for line in opened.requests)
    assert any("canary" in line for line in opened.console)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_drawn_and_fits_the_screen(width, finished, tmp_path):
    """The picture has the charts' colours, and nothing sticks out to the right of the page's margin."""
    from PIL import Image

    picture = tmp_path / "page.png"
    screenshot(BROWSER, write_report(str(finished)), picture, width=width, height=3000)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (3000, width, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # the first two datasets'
        assert (np.abs(pixels - colour).sum(-1) < 30).sum() > 200
    margin = pixels[:, -8:]
    assert (margin == margin[0, 0]).all()
