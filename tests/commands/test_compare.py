"""Laws of `dylora compare`: arms of the sizes they are called by, on the same tokens and rows, and plain words."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from reference.paths import ROOT
from reference.runs import files_of, flags, tiny_run_folder

from dylo_moe import DyLoRAMoE
from dylo_moe.cli import main
from dylo_moe.commands.compare.arguments import ARMS
from dylo_moe.commands.compare.request import parse_compare, settings_of_arm
from dylo_moe.commands.compare.table import ArmRun, as_json, as_markdown, as_table, make_lines, sentences
from dylo_moe.evaluation.losses import DatasetLosses, from_json
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.utils.screen import in_letters

TRAINED = [arm for arm in ARMS if arm != "base"]


def words_of(folder, output, *more):
    """Two experts of four numbers of rank; eight steps."""
    own = flags(folder, output, "--max_steps", "8", "--save_strategy", "steps", "--save_steps", "2", *more)
    return ["compare", *own]


def start(words):
    command = [sys.executable, "-m", "dylo_moe.cli", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(path, seconds=120.0):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of all arms that was killed in its second training, and started again."""
    folder = tiny_run_folder(tmp_path_factory.mktemp("compare"))
    output = folder / "out"
    words = words_of(folder, output, "--seeds", "7")
    first = start(words)
    wait_for(output / "seed-7" / "lora_active" / "checkpoint-2")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    whole = files_of(output / "seed-7" / "lora_total" / "checkpoint")
    was = (output / "seed-7" / "lora_total" / "checkpoint" / "dylora.json").stat().st_mtime_ns
    second = start(words)
    said, _ = second.communicate(timeout=400)
    assert second.returncode == 0, said
    assert (output / "seed-7" / "lora_total" / "checkpoint" / "dylora.json").stat().st_mtime_ns == was
    assert files_of(output / "seed-7" / "lora_total" / "checkpoint") == whole
    return folder, output, said


def test_a_killed_comparison_keeps_what_is_done_and_goes_on_with_the_rest(compared):
    folder, output, said = compared
    assert "1 of 5 trainings is already done" in said
    assert said.count("training 2 of 5: ") == 1
    log = (output / "seed-7" / "lora_active.log").read_text()
    assert "resuming from" in log
    alone = folder / "alone"
    recipe = output / "seed-7" / "lora_active.yaml"
    process = start(["train", "--config", str(recipe), "--output_dir", str(alone)])
    process.communicate(timeout=100)
    assert process.returncode == 0
    runs = [files_of(run / "checkpoint") for run in (alone, output / "seed-7" / "lora_active")]
    # The router of a single expert has nothing but a count of tokens, which begins anew when training goes on.
    assert runs[0].pop("router.safetensors") and runs[1].pop("router.safetensors")
    assert runs[0] == runs[1]


def test_arms_have_the_sizes_that_they_are_called_by(compared):
    _, output, _ = compared
    arms = json.loads((output / "compare.json").read_text())["arms"]
    adapters = {
        arm: sum(
            expert.parameters
            for expert in DyLoRAMoE.from_pretrained(str(output / "seed-7" / arm / "checkpoint")).experts
        )
        for arm in TRAINED
    }
    gate = 2 * (32 + 1)
    assert adapters["lora_total"] == adapters["ours"] == adapters["uniform"] == adapters["random"]
    assert adapters["lora_active"] == adapters["ours"] // 2
    sizes = {arm: (item["parameters"], item["active"]) for arm, item in arms.items()}
    one = adapters["lora_active"]
    assert sizes == {
        "base": (0, 0),
        "lora_total": (2 * one, 2 * one),
        "lora_active": (one, one),
        "uniform": (2 * one, 2 * one),
        "random": (2 * one, one),
        "ours": (2 * one + gate, one + gate),
    }
    for arm in TRAINED:
        manifest = read_manifest(output / "seed-7" / arm / "checkpoint")
        assert manifest["lora"]["lora_alpha"] / manifest["lora"]["r"] == 32 / 4
        assert manifest["router"]["policy"] == {"uniform": "uniform", "random": "random"}.get(arm, "learned")


def test_all_arms_see_the_same_rows_in_the_same_order(compared):
    """Rows of many lengths: where all arms have seen as many tokens at every step, they saw the same batches."""
    _, output, _ = compared
    arms = json.loads((output / "compare.json").read_text())["arms"]
    counts = {arm: arms[arm]["tokens"] for arm in TRAINED}
    assert len({tuple(count) for count in counts.values()}) == 1 and counts["ours"][0] > 0
    prints = {arm: read_manifest(output / "seed-7" / arm / "checkpoint")["training"]["data"] for arm in TRAINED}
    assert all(item == prints["ours"] for item in prints.values())
    seen = {}
    for arm in TRAINED:
        for line in map(json.loads, (output / "seed-7" / arm / "metrics.jsonl").read_text().splitlines()):
            if "lm_loss" in line:
                seen.setdefault(line["step"], set()).add(line["num_input_tokens_seen"])
    assert len(seen) >= 4 and all(len(counts) == 1 for counts in seen.values()), seen


def test_the_losses_are_those_that_the_runs_ended_with(compared):
    _, output, _ = compared
    files = {arm: output / "seed-7" / "losses" / f"{arm}.json" for arm in ARMS}
    stored = {arm: from_json(json.loads(path.read_text())["losses"]) for arm, path in files.items()}
    for arm in TRAINED:
        lines = [json.loads(line) for line in (output / "seed-7" / arm / "metrics.jsonl").read_text().splitlines()]
        for name, item in stored[arm].items():
            last = [line[f"eval_{name}_loss"] for line in lines if f"eval_{name}_loss" in line][-1]
            assert sum(item.sums) / sum(item.tokens) == pytest.approx(last, rel=1e-5)
    first = [json.loads(line) for line in (output / "seed-7" / "ours" / "metrics.jsonl").read_text().splitlines()]
    for name, item in stored["base"].items():
        before = next(line[f"eval_{name}_loss"] for line in first if f"eval_{name}_loss" in line)
        assert sum(item.sums) / sum(item.tokens) == pytest.approx(before, rel=1e-5)


def test_the_table_holds_the_figures_of_the_file(compared):
    _, output, said = compared
    content = json.loads((output / "compare.json").read_text())
    markdown = (output / "compare.md").read_text()
    for arm, item in content["arms"].items():
        for estimate in (*item["losses"]["datasets"].values(), item["losses"]["mean"]):
            assert f"{estimate['value']:.3f}" in said and f"{estimate['value']:.3f}" in markdown
        assert ARMS[arm] in markdown and (item["ours"] is None) == (arm == "ours")
    assert all(sentence in said.replace("\n", " ") and sentence in markdown for sentence in content["sentences"])


def test_its_folder_has_a_page(compared, tmp_path, capsys):
    _, output, _ = compared
    page = tmp_path / "page.html"
    assert main(["report", str(output), "--output", str(page)]) == 0 and str(page) in capsys.readouterr().out
    text, content = page.read_text(), json.loads((output / "compare.json").read_text())
    assert "<b>finished</b>" in text and all(sentence in text for sentence in content["sentences"])
    for item in content["arms"].values():
        assert f">{item['losses']['mean']['value']:.4f}\n[" in text


def test_again_it_shows_the_same_and_trains_nothing(compared, capsys, monkeypatch):
    folder, output, said = compared
    monkeypatch.setenv("COLUMNS", "200")
    before = (output / "compare.json").read_bytes()
    assert main(words_of(folder, output, "--seeds", "7")) == 0
    again = capsys.readouterr().out
    assert "5 of 5 trainings are already done" in again and (output / "compare.json").read_bytes() == before
    title = "held-out loss, nats per token, with 95 % intervals"
    assert again.partition(title)[2] == said.partition(title)[2] != ""


def test_losses_of_another_checkpoint_are_measured_anew(compared):
    """As where the user removed a run, and it was trained again."""
    folder, output, _ = compared
    path = output / "seed-7" / "losses" / "ours.json"
    before = path.read_text()
    wrong = json.loads(before)
    for item in wrong["losses"].values():
        item["sums"] = [0.0] * len(item["sums"])
    path.write_text(json.dumps({**wrong, "of": "0" * 64}))
    assert main(words_of(folder, output, "--seeds", "7")) == 0
    assert json.loads(path.read_text()) == json.loads(before)


def test_other_settings_in_the_same_folder_are_refused(compared, capsys):
    folder, output, _ = compared
    assert main(words_of(folder, output, "--seeds", "7", "--learning_rate", "1e-3", "--lora_r", "8")) == 2
    error = capsys.readouterr().err
    assert "learning_rate is 0.001, was 0.01; lora_r is 8, was 4" in error
    assert main(words_of(folder, folder, "--seeds", "7")) == 2 and not (folder / ".lock").exists()
    assert "is not empty, and holds no comparison" in capsys.readouterr().err


def test_a_failed_training_is_told_with_its_last_words(compared, tmp_path, capsys):
    folder, _, _ = compared
    (tmp_path / "lonely.jsonl").write_text('{"text": "one row"}\n')
    words = words_of(folder, tmp_path / "out", "--seeds", "7", "--arms", "ours,base")
    assert main([*words, "--datasets", str(tmp_path / "lonely.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "ours failed with status 2" in error and "lonely" in error and str(tmp_path / "out") in error


def test_a_training_that_cannot_be_is_refused_before_the_folder_is_made(compared, tmp_path, capsys):
    folder, _, _ = compared
    words = words_of(folder, tmp_path / "out", "--seeds", "7", "--lora_targets", "nothing_here", "--top_k", "5")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "nothing_here" in error and "top_k is 5, but num_experts is" in error
    assert not (tmp_path / "out").exists()


def test_other_tasks_come_as_columns(compared, capsys):
    """Of arms that are trained already; each is judged by `dylora eval`, the base as the unchanged model."""
    folder, output, _ = compared
    words = words_of(folder, output, "--seeds", "7", "--arms", "base,ours", "--tasks", "losses,humaneval")
    words += ["--limit", "2", "--max_new_tokens", "4", "--allow_code_execution", "true", "--sandbox", "rlimits_only"]
    table = output / "compare.md"
    before = table.read_text()
    try:
        assert main(words) == 0
        assert "5 of 5" not in capsys.readouterr().out
        assert "humaneval pass@1" in table.read_text().splitlines()[0]
        assert all("0.0% [0.0%, " in row for row in table.read_text().splitlines()[2:4])
        settings = [
            json.loads(path.read_text()) for path in sorted((output / "seed-7").glob("evaluation/*/settings.json"))
        ]
        assert [item["model"]["expert"] for item in settings] == ["base", None]
    finally:
        table.write_text(before)


def test_a_signal_ends_the_training_too_and_the_folder_is_free(compared, tmp_path):
    folder, _, _ = compared
    output = tmp_path / "out"
    process = start(words_of(folder, output, "--seeds", "7", "--arms", "ours,base", "--max_steps", "5000"))
    wait_for(output / "seed-7" / "ours" / "checkpoint-2")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "type the same command again" in said
    saved = sorted(path.name for path in (output / "seed-7" / "ours").glob("checkpoint-*"))
    assert saved and "saved" in (output / "seed-7" / "ours.log").read_text()
    assert not _running(output), "the training goes on"


def _running(output):
    commands = [path.read_bytes().decode(errors="replace") for path in _command_lines()]
    return [line for line in commands if str(output) in line]


def _command_lines():
    return [
        path for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid()) and path.exists()
    ]


# --- recipes of the arms


def settings_with(tmp_path, *more):
    words = ["--model", "smollm2-135m", "--use_cpu", "true", "--output_dir", str(tmp_path / "x")]
    return parse_compare([*words, *more]).settings


def test_recipes_leave_out_what_has_no_meaning(tmp_path):
    settings = settings_with(
        tmp_path,
        *("--top_k", "2", "--lora_r", "6", "--lora_alpha", "9", "--router_layer", "final", "--granularity", "sequence"),
        *("--router_top_p", "0.9", "--z_loss_coefficient", "0.1", "--balance_coefficient", "0.3", "--num_experts", "5"),
    )
    arms = {arm: settings_of_arm(arm, settings, seed=3) for arm in TRAINED}
    assert [arms[arm]["seed"] for arm in TRAINED] == [3] * 5
    kept = {"lora_total": (1, 30, 45), "lora_active": (1, 12, 18), "uniform": (5, 6, 9), "random": (5, 6, 9)}
    for arm, sizes in kept.items():
        assert tuple(arms[arm][name] for name in ("num_experts", "lora_r", "lora_alpha")) == sizes
        assert not {"router_top_p", "z_loss_coefficient", "balance_coefficient"} & arms[arm].keys()
    assert arms["ours"] == {
        **settings,
        "seed": 3,
        "router_policy": "learned",
        "include_num_input_tokens_seen": "non_padding",
    }
    assert arms["random"]["router_layer"] == "final" and "router_layer" not in arms["uniform"]
    same = settings.keys() - {"num_experts", "lora_r", "lora_alpha", "top_k", "router_layer", "granularity"}
    same -= {"router_half_life", "router_top_p", "balance_coefficient", "z_loss_coefficient", "entropy_coefficient"}
    same -= {"shared_r", "shared_alpha"}
    assert all(arms[arm][name] == settings[name] for arm in TRAINED for name in same)


def test_single_loras_have_the_rank_of_a_shared_expert_too(tmp_path):
    sizes = ("--num_experts", "4", "--lora_r", "4", "--lora_alpha", "8", "--shared_r", "16", "--shared_alpha", "16")
    settings = settings_with(tmp_path, *sizes)
    arms = {arm: settings_of_arm(arm, settings, seed=3) for arm in TRAINED}
    for arm, rank in (("lora_total", 4 * 4 + 16), ("lora_active", 4 + 16)):
        assert (arms[arm]["lora_r"], arms[arm]["lora_alpha"]) == (rank, 2 * rank)
        assert not {"shared_r", "shared_alpha"} & arms[arm].keys()
    for arm in ("uniform", "random", "ours"):
        assert (arms[arm]["shared_r"], arms[arm]["shared_alpha"]) == (16, 16)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--seed", "3"], "seed is not offered: give --seeds"),
        (["--seeds", "1,x"], "seeds is 1,x"),
        (["--arms", "ours"], "something to compare with"),
        (["--arms", "base,theirs,ours"], "arms has theirs"),
        (["--tasks", "humaneval"], "allow_code_execution"),
        (["--limit", "3"], "limit would change nothing"),
        (["--num_experts", "1"], "no routing to compare"),
        (["--early_stopping_patience", "2"], "all arms train on the same tokens"),
        (["--load_best_model_at_end", "true"], "the very rows"),
        (["--router_policy", "random"], "an arm of its own"),
    ],
)
def test_what_cannot_be_compared_is_refused(more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        settings_with(tmp_path, *more)


def test_a_comparison_needs_a_folder():
    with pytest.raises(ValueError, match="output_dir is not given"):
        parse_compare(["--model", "smollm2-135m", "--use_cpu", "true"])


def test_the_recipe_is_one_that_can_be_run(tmp_path):
    path = ROOT / "recipes" / "compare.yaml"
    request = parse_compare(["--config", str(path), "--output_dir", str(tmp_path / "x")])
    assert request.options.seeds == [str(seed) for seed in yaml.safe_load(path.read_text())["seeds"]]
    assert request.options.arms == list(ARMS)


# --- what is said


def runs_with(shifts, *, num_seeds=3, noise=0.02):
    """Runs of each arm on the same rows, whose losses lie `shifts` above ours."""
    runs = {}
    for place, (arm, shift) in enumerate(shifts.items()):
        runs[arm] = []
        for seed in range(num_seeds):
            rows, own = np.random.default_rng(seed), np.random.default_rng(1000 * place + seed)
            tokens = rows.integers(10, 90, 40)
            losses = rows.normal(2, 0.5, 40) + shift + own.normal(0, noise, 40)
            item = DatasetLosses([str(row) for row in range(40)], (losses * tokens).tolist(), tokens.tolist())
            runs[arm].append(ArmRun({"code": item}, 100, 50, 0 if arm == "base" else 7000 + seed, {}))
    return runs


@pytest.mark.parametrize(
    "shift, verdict, words",
    [
        (0.1, "wins", "Against uniform routing, ours wins: its mean loss is 0."),
        (0.0, "ties", "Against uniform routing, ours ties: the interval holds 0"),
        (-0.1, "loses", "Against uniform routing, ours loses: its mean loss is 0."),
    ],
)
def test_it_says_whether_ours_wins(shift, verdict, words):
    lines = make_lines(runs_with({"base": 0.5, "uniform": shift, "ours": 0.0}))
    said = sentences(lines, [1, 2, 3])
    assert lines[1].verdict == verdict and lines[0].verdict == "wins" and lines[2].verdict is None
    assert said[1].startswith(words)
    all_in_all = (
        "ours wins against everything" if verdict == "wins" else "ours does not win: it does not beat uniform routing"
    )
    assert all_in_all in said[2] and said[3].startswith("Not compared with: one LoRA of equal total size, one LoRA")
    assert as_json(lines, said)["arms"]["uniform"]["ours"] == verdict


def test_differences_and_ranges_are_those_of_the_seeds():
    runs = runs_with({"base": 0.5, "ours": 0.0}, noise=0.0)
    lines = make_lines(runs)
    assert lines[0].difference.mean.value == pytest.approx(0.5) and lines[0].difference_by_seed == pytest.approx(
        [0.5] * 3
    )
    by_hand = [sum(run.losses["code"].sums) / sum(run.losses["code"].tokens) for run in runs["base"]]
    assert lines[0].by_seed == pytest.approx(by_hand)
    text = as_markdown(lines, ["said"])
    assert f"{min(by_hand):.3f} to {max(by_hand):.3f}" in text and "- said" in text
    assert all(row.count("|") == text.splitlines()[0].count("|") for row in text.splitlines()[:4])


def test_no_figure_is_cut_on_a_narrow_terminal():
    lines = make_lines(runs_with({"base": 0.5, "uniform": 0.1, "ours": 0.0}))
    for width in (60, 80, 120):
        text = in_letters(as_table(lines), width=width)
        assert max(map(len, text.splitlines())) <= width
        for line in lines:
            assert f"{line.losses.datasets['code'].value:.3f}" in text and f"{line.losses.mean.value:.3f}" in text


def test_arms_on_other_tokens_or_rows_are_not_compared():
    runs = runs_with({"uniform": 0.1, "ours": 0.0})
    runs["uniform"][0] = runs["uniform"][0]._replace(tokens=3)
    with pytest.raises(ValueError, match=r"trained on .* tokens"):
        make_lines(runs)
    runs = runs_with({"uniform": 0.1, "ours": 0.0})
    other = runs["uniform"][1].losses["code"]
    runs["uniform"][1] = runs["uniform"][1]._replace(losses={"code": other._replace(tokens=other.tokens[::-1])})
    with pytest.raises(ValueError, match="same held-out rows"):
        make_lines(runs)
