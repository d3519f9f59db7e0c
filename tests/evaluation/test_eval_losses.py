"""Laws of held-out losses and their intervals: they equal a naive loop's, are on the run's rows, and cover as
stated."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.runs import WORDS, flags, tiny_run_folder
from reference.tiny import tiny_base, tiny_moe
from transformers import AutoTokenizer

from dylo_moe import DyLoRAMoE
from dylo_moe.cli import main
from dylo_moe.evaluation.held_out import HeldOut, held_out
from dylo_moe.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    resampled_means,
    student_quantile,
    wilson_interval,
)
from dylo_moe.evaluation.losses import (
    DatasetLosses,
    estimates,
    from_json,
    mean_loss,
    measure,
    run_losses,
    show_losses,
    to_json,
)
from dylo_moe.utils.screen import Screen

# --- intervals


@pytest.mark.parametrize(
    "passed, tasks, low, high",
    [
        (8, 10, 0.49016, 0.94332),  # by hand: (0.8 + 0.19207 -+ 1.95996 sqrt(0.016 + 0.0096036)) / 1.38415
        (0, 164, 0.0, 0.022887),  # z^2 / (n + z^2)
        (164, 164, 0.977113, 1.0),
        (1, 1, 0.206549, 1.0),  # 1 / (1 + z^2)
    ],
)
def test_wilson_equals_values_by_hand(passed, tasks, low, high):
    assert wilson_interval(passed, tasks) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(
    "level, freedom, value",
    [
        (0.95, 1, 12.7062),
        (0.95, 4, 2.7764),
        (0.95, 30, 2.0423),
        (0.99, 2, 9.9248),
        (0.9, 9, 1.8331),
        (0.95, 5000, 1.96),
    ],
)
def test_students_quantiles_are_those_of_the_tables(level, freedom, value):
    assert student_quantile(level, freedom) == pytest.approx(value, rel=2e-4)


def test_resamples_of_two_units_come_out_as_often_as_they_must():
    """Means 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4; with weights 3 and 1 the mean of both is 1/4."""
    for weights, middle in ((None, 0.5), ([3, 1], 0.25)):
        means = resampled_means([0.0, 1.0], weights, seed=0)
        shares = [(means == value).mean() for value in (0.0, middle, 1.0)]
        assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@pytest.mark.parametrize("num_units, least", [(5, 0.9), (12, 0.93)])
def test_the_interval_holds_the_mean_as_often_as_it_says(num_units, least):
    """Also of few units, where plain percentiles hold it less often; no more than 95 % and three deviations."""
    generator = np.random.default_rng(0)
    samples = [generator.normal(size=num_units) for _ in range(600)]

    def share(intervals):
        return np.mean([low <= 0 <= high for low, high in intervals])

    ours = share(bootstrap_interval(sample, seed=seed) for seed, sample in enumerate(samples))
    plain = share(
        np.quantile(resampled_means(sample, seed=seed), [0.025, 0.975]) for seed, sample in enumerate(samples)
    )
    assert least < ours < 0.977 and plain < ours - 0.02


def test_strata_are_resampled_among_themselves():
    """What strata differ in adds nothing; without them it does."""
    noise = np.random.default_rng(0).normal(size=40)
    shifted, strata = noise + 100 * (np.arange(40) % 2), np.arange(40) % 2
    alone, apart = bootstrap_interval(noise, seed=1, strata=strata), bootstrap_interval(shifted, seed=1, strata=strata)
    assert np.subtract(apart, 50) == pytest.approx(alone, abs=1e-9)
    assert np.ptp(bootstrap_interval(shifted, seed=1)) > 10 * np.ptp(apart)


def test_one_unit_tells_nothing():
    for interval in (bootstrap_interval([1.0], seed=0), bootstrap_interval([1.0, 2, 3], seed=0, strata=[0, 0, 1])):
        assert np.isnan(interval).all() and interval.as_json() is None and not interval.excludes_zero
    assert [Interval(*ends).excludes_zero for ends in ((1, 2), (-2, -1), (-1, 1), (0, 1))] == [True, True, False, False]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: wilson_interval(3, 2), "num_passed is 3 of num_tasks 2"),
        (lambda: wilson_interval(0, 0), "num_tasks 0"),
        (lambda: wilson_interval(1, 2, 1.0), "level is 1.0"),
        (lambda: bootstrap_interval([], seed=0), "1 unit or more"),
        (lambda: bootstrap_interval([1, 2], [1], seed=0), "one length"),
        (lambda: bootstrap_interval([1, float("nan")], seed=0), "NaN"),
        (lambda: bootstrap_interval([1, 2], [1, 0], seed=0), "above 0"),
    ],
)
def test_what_has_no_interval_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- what follows from the losses of rows


def test_estimates_are_those_by_hand():
    """A dataset's mean counts tokens, a document is one unit, and the mean over datasets counts datasets."""
    run = {
        "a": DatasetLosses(["x", "x", "y"], [10.0, 2.0, 6.0], [5, 1, 2]),
        "b": DatasetLosses(["p", "q", "r"], [1.0, 1.0, 4.0], [1, 1, 1]),
    }
    found = estimates([run], seed=0)
    assert found.datasets["a"].value == pytest.approx(18 / 8) and found.datasets["a"].num_units == 2
    assert found.datasets["b"].value == pytest.approx(2.0) and found.datasets["b"].unit == "documents"
    assert found.mean.value == pytest.approx((18 / 8 + 2) / 2) == mean_loss(run)
    by_hand = bootstrap_interval([12 / 6, 6 / 2], [6, 2], seed=0)
    assert found.datasets["a"].interval == by_hand
    one_document = {"a": run["a"]._replace(documents=["x"] * 3)}
    assert (estimates([one_document], seed=0).datasets["a"].unit, estimates([one_document], seed=0).mean.num_units) == (
        "rows",
        3,
    )
    assert from_json(json.loads(json.dumps(to_json(run)))) == run


def test_differences_are_taken_row_by_row_and_pooled_over_runs():
    """Runs that differ by one constant per token differ by it exactly, however much their rows vary."""
    generator = np.random.default_rng(0)

    def run(seed, shift):
        tokens = np.random.default_rng(seed).integers(1, 50, 30)
        sums = np.random.default_rng(seed + 100).normal(3, 1, 30) * tokens + shift * tokens
        return {"a": DatasetLosses([f"{place // 3}" for place in range(30)], sums.tolist(), tokens.tolist())}

    worse, better = [run(seed, 0.25) for seed in (1, 2, 3)], [run(seed, 0.0) for seed in (1, 2, 3)]
    found = estimates(worse, better, seed=0).datasets["a"]
    assert found.value == pytest.approx(0.25) and found.interval == pytest.approx((0.25, 0.25))
    assert found.num_units == 30
    pooled = estimates(better, seed=0).datasets["a"]
    assert pooled.value == pytest.approx(
        sum(sum(one["a"].sums) for one in better) / sum(sum(one["a"].tokens) for one in better)
    )
    assert np.ptp(pooled.interval) < np.ptp(estimates(better[:1], seed=0).datasets["a"].interval)
    shuffled = {"a": worse[0]["a"]._replace(documents=[str(generator.integers(9)) for _ in range(30)])}
    with pytest.raises(ValueError, match="same held-out rows"):
        estimates([shuffled], better[:1], seed=0)
    with pytest.raises(ValueError, match="on different datasets: a, b"):
        estimates([better[0], {"b": better[0]["a"]}], seed=0)


# --- measuring


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder / "base")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on two datasets; in one of them questions are asked several times."""
    folder = tiny_run_folder(tmp_path_factory.mktemp("losses"))
    generator = torch.Generator().manual_seed(3)
    with open(folder / "high.jsonl", "w") as file:
        for row in range(80):
            picks = (torch.randint(0, 45, (12,), generator=generator) + 45).tolist()
            question = " ".join(WORDS[(row // 4 + step) % 45] for step in range(4))
            file.write(json.dumps({"prompt": question, "response": " ".join(WORDS[pick] for pick in picks)}) + "\n")
    assert main(["train", *flags(folder, folder / "run", "--num_epochs", "1", "--seed", "5")]) == 0
    return folder


def loaded(folder, name="run"):
    return DyLoRAMoE.from_pretrained(str(folder / name / "checkpoint")), tokenizer_of(folder)


def test_each_rows_loss_is_that_of_a_loop():
    model, folder_rows = tiny_moe(), []
    for length in (5, 17, 9):
        ids = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        folder_rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "length": length, "domain": 0})

    class Rows(list):
        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    class Tokenizer:
        pad_token_id, eos_token_id = 0, None

    held = HeldOut({"a": Rows(folder_rows)}, {"a": ["x", "y", "z"]}, [])
    model.train()
    with model.route_to("expert_1"):
        found = measure(model, held, Tokenizer(), batch_size=2)["a"]
    assert model.training
    model.eval()
    assert found.documents == ["x", "y", "z"] and found.tokens == [3, 15, 7]
    for row, total in zip(folder_rows, found.sums, strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad(), model.route_to("expert_1"):
            logits = model(input_ids=ids).logits[0]
        by_hand = sum(float(F.cross_entropy(logits[place - 1], ids[0, place])) for place in range(2, row["length"]))
        assert total == pytest.approx(by_hand, rel=1e-5)


def test_the_default_rows_are_those_of_the_run(trained):
    """The same losses that the run itself ended with, and rows of one question are one document."""
    model, tokenizer = loaded(trained)
    held = held_out(trained / "run" / "checkpoint", tokenizer)
    losses = measure(model, held, tokenizer, batch_size=7)
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    for name, item in losses.items():
        after = [line[f"eval_{name}_loss"] for line in lines if f"eval_{name}_loss" in line][-1]
        assert sum(item.sums) / sum(item.tokens) == pytest.approx(after, rel=1e-5)
    low, high = (next(name for name in losses if part in name) for part in ("low", "high"))
    questions = [tuple(row["input_ids"][: row["labels"].count(-100)]) for row in held.rows[high]]
    pairs = set(zip(questions, held.documents[high], strict=True))
    assert len(pairs) == len(set(questions)) == len(set(held.documents[high])) < len(questions)
    assert len(set(held.documents[low])) == len(held.rows[low])


def test_the_command_shows_the_base_beside_the_model(trained, capsys):
    model, tokenizer = loaded(trained)
    options = {"batch_size": 8, "seed": 0, "screen": Screen("eval")}
    held = held_out(trained / "run" / "checkpoint", tokenizer)
    found = run_losses(model, tokenizer, held, **options, expert=None)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, item in found["difference"]["datasets"].items():
        sides = [found[side]["datasets"][name]["value"] for side in ("model", "base")]
        assert item["value"] == pytest.approx(sides[0] - sides[1], abs=1e-9)
    base = run_losses(model, tokenizer, held, **options, expert="base")
    assert base["difference"]["mean"]["value"] == 0.0 and base["model"] == base["base"] == found["base"]
    alone = measure_plain_base(trained, tokenizer)
    assert {name: item["value"] for name, item in base["base"]["datasets"].items()} == pytest.approx(alone, rel=1e-5)
    show_losses(Screen("eval"), json.loads(json.dumps(base)))
    shown = capsys.readouterr().out
    assert f"{base['base']['mean']['value']:.3f}" in shown and "documents" in shown


def measure_plain_base(folder, tokenizer):
    """Loss per token of the base itself, without any model of ours."""
    base, found = tiny_base("llama", eos_token_id=2), {}
    for name, rows in held_out(folder / "run" / "checkpoint", tokenizer).rows.items():
        total, count = 0.0, 0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                logits = base(input_ids=ids).logits[0, :-1]
            total += float(F.cross_entropy(logits, labels[0, 1:], reduction="sum"))
            count += int((labels[:, 1:] != -100).sum())
        found[name] = total / count
    return found


def test_a_part_of_the_rows_lies_inside_all_of_them(trained):
    tokenizer, checkpoint = tokenizer_of(trained), trained / "run" / "checkpoint"
    whole, part = held_out(checkpoint, tokenizer), held_out(checkpoint, tokenizer, eval_subset=40)
    for name in whole.rows:
        ids = [tuple(row["input_ids"]) for row in whole.rows[name]]
        some = [tuple(row["input_ids"]) for row in part.rows[name]]
        assert set(some) < set(ids) and len(some) == max(1, round(0.4 * len(ids)))
    assert not whole.notes and "40 %" in part.notes[0]


def test_other_data_than_the_runs_is_refused_unless_asked_for(trained, tmp_path):
    tokenizer = tokenizer_of(trained)
    folder = tmp_path / "moved"
    shutil.copytree(trained / "run", folder / "run")
    path = trained / "low.jsonl"
    before = path.read_text()
    try:
        path.write_text("".join(before.splitlines(keepends=True)[1:]))
        with pytest.raises(ValueError, match=r"low has \d+ (training|held-out) rows, .*--datasets"):
            held_out(folder / "run" / "checkpoint", tokenizer)
        given = held_out(folder / "run" / "checkpoint", tokenizer, datasets=[str(path)])
        assert len(given.rows) == 1 and "trained on" in given.notes[0]
    finally:
        path.write_text(before)


def test_a_checkpoint_without_a_run_needs_datasets(trained, tmp_path):
    model, tokenizer = loaded(trained)
    model.save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"not from dylora train.*--datasets"):
        held_out(tmp_path / "bare", tokenizer)
    given = held_out(tmp_path / "bare", tokenizer, datasets=[str(trained / "low.jsonl")])
    assert "does not say what it was trained on" in given.notes[0]
