"""The plots of a run: every series is seen, whatever the datasets are called, and matplotlib is not imported before."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from reference.paths import ROOT

from dylo_moe.training.charts import COLOURS, HEAT, printable
from dylo_moe.training.metrics import MeterReading
from dylo_moe.training.plots import write_plots


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])


def pixels_like(path, colour: str) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - rgb(colour)).sum(-1) < 30).sum())


@pytest.mark.parametrize("names", [["low", "high"], ["$x$", "<b>\x00_"], ["a_{", "\U0001f600 \\frac"]])
def test_a_run_of_any_names_has_its_plots(names, tmp_path, recwarn):
    """The first dataset has a line with a gap, the second only one held-out loss; a name is no formula of TeX."""
    logs = [(1, 2.0), (2, 1.9), (3, float("nan")), (4, 1.8)]
    lines = [{"step": step, f"loss_{names[0]}": loss} for step, loss in logs]
    lines += [{"step": 0, f"eval_{names[1]}_loss": 2.5}, {"step": 4, f"eval_{names[1]}_loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shares = {"e0": 1.0, f"e1{names[1]}": 0.0}
    readings = {name: MeterReading(1.0, {}, shares, {}, 0.5, 3, 0.5, 3) for name in names}
    losses, routing = write_plots(tmp_path / "plots", tmp_path / "metrics.jsonl", readings)
    assert pixels_like(losses, COLOURS[0]) > 500  # a line
    assert pixels_like(losses, COLOURS[1]) > 100  # its dot, and that of the legend
    assert pixels_like(losses, COLOURS[2]) == 0
    assert pixels_like(routing, HEAT) > 5000
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_one_log_of_nine_datasets_with_long_names_is_seen_whole(tmp_path):
    """Bugs this guards against: an empty chart of lines with one point; names that end outside the picture."""
    names = [f"organisation/dataset_number_{place}_with_a_name_{'that_goes_on_and_' * 4}on" for place in range(9)]
    line = {"step": 4} | {f"loss_{name}": 2.0 + place for place, name in enumerate(names)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    shares = {"an_expert_with_a_long_name_" * 3: 1.0, "e1": 0.0}
    readings = {name: MeterReading(1.0, {}, shares, {}, 0.5, 3, 0.5, 3) for name in names}
    for path in write_plots(tmp_path / "plots", tmp_path / "metrics.jsonl", readings):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        edges = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
        assert all((edge == 255).all() for edge in edges), path
    assert all(pixels_like(tmp_path / "plots" / "losses.png", colour) > 50 for colour in COLOURS)


def test_what_cannot_be_drawn_is_replaced():
    assert printable("a\x00\ud800\nb ü") == "a\ufffd\ufffd\ufffdb ü"


def test_matplotlib_is_imported_only_to_draw():
    """It takes half a second, which a command that draws nothing should not wait for."""
    files = [*(ROOT / "dylo_moe").rglob("*.py")]
    assert not [path for path in files if re.search("^(import|from) matplotlib", path.read_text(), re.MULTILINE)]
