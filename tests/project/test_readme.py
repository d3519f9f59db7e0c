"""The example of the README runs as it stands, and does what the page says of it."""

from __future__ import annotations

import re

import pytest
import torch
from reference.paths import ROOT

pytestmark = pytest.mark.end_to_end


def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys, laws):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    shown = re.findall(r"after (\w+) +python ([\d.]+)  cpp ([\d.]+)  english ([\d.]+)", capsys.readouterr().out)
    losses = {stage: tuple(map(float, values)) for stage, *values in shown}
    base, first, second = (losses[stage] for stage in ("nothing", "python", "cpp"))
    assert first[0] < base[0] - 0.1 and second[1] < first[1] - 0.1  # each skill is learned
    assert abs(second[0] - first[0]) < 0.02 and abs(second[2] - base[2]) < 0.05  # nothing is forgotten
    model, stock, prompt = names["model"].eval(), names["stock"].eval(), names["prompt"]
    with torch.no_grad(), model.route_to("cpp"):
        laws.close(
            "one expert = stock PEFT", model(**prompt).logits, stock(**prompt).logits, family="SmolLM2-135M", atol=2e-3
        )
