"""Laws of the search in `dylora compare`: every arm at its own best, chosen on rows that nobody trains or judges."""

import itertools
import json
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.runs import flags, tiny_run_folder

from dylo_moe.cli import main
from dylo_moe.commands.compare import train_arms
from dylo_moe.commands.compare.arguments import ARMS, CompareArguments
from dylo_moe.commands.compare.arm_folder import tokens_and_seconds
from dylo_moe.commands.compare.grid import Cell, best_cell, grid_cells, open_ends
from dylo_moe.commands.compare.grid_table import Found, grid_json, grid_sentences, grid_table
from dylo_moe.commands.compare.request import parse_compare, settings_of_arm
from dylo_moe.commands.compare.trainings import choose, preview, to_judge, to_search, tokens_at_most, total, total_steps
from dylo_moe.evaluation.losses import from_json
from dylo_moe.experts.config import lora_scale
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.utils.errors import Stopped
from dylo_moe.utils.screen import in_letters

INFINITE = float("inf")


def options(**more):
    return CompareArguments(**{"seeds": ["3", "4"], "learning_rates": ["1e-3", "2e-3"], "scales": ["1", "4"], **more})


# --- what is trained


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("budgets", [[], ["2"], ["2", "5", "9"]])
@pytest.mark.parametrize(
    "grid", [{}, {"scales": []}, {"learning_rates": ["1e-3"]}, {"learning_rates": [], "scales": []}]
)
def test_the_number_of_trainings_is_that_of_their_folders(grid, budgets, every):
    every = every and bool(budgets) and grid != {"learning_rates": [], "scales": []}
    asked = options(**grid, budgets=budgets, search_every_budget=every)
    search = to_search(asked, Path("out"))
    losses = {(place.arm, place.steps, place.cell): number % 3 for number, place in enumerate(search)}
    judged = to_judge(asked, Path("out"), choose(asked, losses))
    places = [*search, *(place for of_seed in judged.values() for part in of_seed.values() for place in part)]
    trained = {place.run: place.steps or 1 for place in places if place.arm != "base"}
    assert total_steps(asked) == sum(trained.values())
    runs = set(trained)
    assert len(runs) == total(asked) and len({place.run for place in search}) == len(search)
    assert {place.run for place in places if place.arm == "base"} == {Path(f"out/seed-{seed}/base") for seed in (3, 4)}
    assert {place.seed for place in search} <= {3}


def test_each_budget_takes_the_best_of_its_own_search_or_else_the_first_one_s():
    asked = options(budgets=["2", "5"], search_every_budget=True)
    cells = asked.cells
    losses = {(place.arm, place.steps, place.cell): 1.0 for place in to_search(asked, Path("out"))}
    losses |= {("ours", 2, cells[1]): 0.5, ("ours", 5, cells[2]): 0.1, ("random", 2, cells[0]): INFINITE}
    assert [choose(asked, losses)["ours", steps] for steps in (2, 5)] == [cells[1], cells[2]]
    assert choose(asked, losses)["random", 2] == cells[1]
    once = options(budgets=["2", "5"])
    assert [choose(once, losses)["ours", steps] for steps in (2, 5)] == [cells[1], cells[1]]
    losses |= {("uniform", 2, cell): INFINITE for cell in cells}
    with pytest.raises(ValueError, match="uniform diverged at every cell"):
        choose(once, losses)


values = st.lists(st.integers(-8, 8).map(lambda power: 2.0**power), min_size=1, max_size=4, unique=True)


@given(rates=values, scales=values, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_best_cell_and_the_ends_it_lies_at_are_those_of_a_loop(rates, scales, seed):
    cells = grid_cells(rates, scales)
    assert set(cells) == set(itertools.product(rates, scales)) and len({cell.folder for cell in cells}) == len(cells)
    losses = {cell: (INFINITE, 1.0, 2.0, 3.0)[hash((seed, cell)) % 4] for cell in cells}
    best = None
    for cell in cells:
        if losses[cell] < (INFINITE if best is None else losses[best]):
            best = cell
    assert best_cell(losses) == best
    if best is None:
        return
    wider = {end.axis: [] for end in open_ends(best, rates, scales)}
    for end in open_ends(best, rates, scales):
        wider[end.axis].append(end.beyond)
    assert all(len(found) == 1 for found in wider.values())
    for axis, value, axis_values in (("learning_rates", best[0], rates), ("scales", best[1], scales)):
        is_at_end = len(axis_values) > 1 and value in (min(axis_values), max(axis_values))
        assert (axis in wider) == is_at_end
        if is_at_end:
            assert wider[axis][0] > max(axis_values) or 0 < wider[axis][0] < min(axis_values)
            again = open_ends(best, rates + wider.get("learning_rates", []), scales + wider.get("scales", []))
            assert axis not in {end.axis for end in again}


def test_every_arm_is_trained_at_the_rate_the_scale_and_the_steps_of_its_cell(tmp_path):
    for rslora in ("true", "false"):
        words = ["--lora_r", "6", "--top_k", "2", "--use_rslora", rslora, "--scales", "0.7", "3", "--budgets", "5", "7"]
        words += ["--shared_r", "5"]
        request = request_of(tmp_path, *words, "--learning_rates", "1e-3", "3e-3")
        assert not {"lora_alpha", "learning_rate", "max_steps"} & request.settings.keys()
        assert request.settings["search_subset"] == 10
        for arm, cell, steps in itertools.product(ARMS, request.options.cells, (5, 7)):
            if arm == "base":
                continue
            own = settings_of_arm(arm, request.settings, seed=3, steps=steps, cell=cell)
            scale = lora_scale(own["lora_alpha"], own["lora_r"], use_rslora=own["use_rslora"])
            assert (own["learning_rate"], own["max_steps"]) == (cell.learning_rate, steps)
            assert scale == pytest.approx(cell.scale, rel=1e-15)
            assert own["lora_r"] == {"lora_total": 29, "lora_active": 17}.get(arm, 6)
            assert arm.startswith("lora") == ("shared_r" not in own) and "shared_alpha" not in own


def test_without_a_scale_rslora_keeps_the_alpha_and_plain_lora_the_scale(tmp_path):
    for rslora, alphas in (("true", (9, 9)), ("false", (40.5, 9))):
        words = ["--lora_r", "6", "--lora_alpha", "9", "--use_rslora", rslora, "--shared_r", "3"]
        found = request_of(tmp_path, *words).settings
        assert tuple(settings_of_arm(arm, found, seed=1)["lora_alpha"] for arm in ("lora_total", "ours")) == alphas


# --- what is refused


def request_of(tmp_path, *more):
    words = ["--model", "smollm2-135m", "--use_cpu", "true", "--output_dir", str(tmp_path / "x")]
    return parse_compare([*words, *more])


@pytest.mark.parametrize(
    "words, problems",
    [
        ("--learning_rates 0 1e-3 x --scales -1 inf --budgets 0 1.5", ("learning_rates has 0, x; it must be finite",
         "scales has -1, inf", "budgets has 0, 1.5; it must be whole numbers above 0")),
        ("--learning_rates 1e-3,0.001 --scales 2 2.0", ("learning_rates has 0.001 more", "scales has 2 more")),
        ("--budgets 60 30", ("budgets is 60 30; they must rise",)),
        ("--budgets 60 60", ("budgets has 60 more than once",)),
        ("--scales 1 2 --shared_alpha 2 --shared_r 3", ("shared_alpha is given with scales",)),
        ("--scales 1 2 --lora_alpha 16 --budgets 3 --max_steps 9 --learning_rates 1e-3 --learning_rate 1e-3 --seeds x",
         ("lora_alpha is given with scales", "max_steps is given with budgets", "learning_rate is given with",
          "seeds is x")),
        ("--budgets 2 4 --search_every_budget", ("search_every_budget is given without",)),
        ("--search_subset 5", ("search_subset is 5; a grid",)),
        ("--learning_rates 1e-3 --search_subset 0", ("search_subset is 0; a grid",)),
        ("--learning_rates 1e-3 --search_subset 60", ("search_subset is 60.0; it must be a percentage from 0 to 50",)),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_refused_in_one_message(words, problems, tmp_path):
    with pytest.raises(ValueError) as caught:
        request_of(tmp_path, *words.split())
    assert all(problem in str(caught.value) for problem in problems), caught.value


def test_a_list_that_is_typed_replaces_the_one_value_of_a_recipe(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("lora_alpha: 16\nlearning_rate: 1.0e-3\n")
    request = request_of(tmp_path, "--config", str(recipe), "--scales", "2")
    assert request.options.cells == [Cell(None, 2.0)] and request.settings["learning_rate"] == 1e-3
    recipe.write_text("scales: [1, 2]\n")
    with pytest.raises(ValueError, match="lora_alpha is given with scales"):
        request_of(tmp_path, "--config", str(recipe), "--lora_alpha", "16")


# --- what is said


def test_the_preview_counts_trainings_and_tokens():
    asked = options(budgets=["60", "120"], seeds=["0", "1", "2"])
    settings_of = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_seq_length": 128}
    text = " ".join(preview(asked, settings_of))
    assert "5 arms at 4 cells of the grid at 60 optimizer steps, with seed 0: 20 trainings" in text
    assert "60, 120 optimizer steps with 3 seeds: 30 trainings, of which the search makes 5" in text
    assert "at most 122,880, 245,760 tokens" in text and total(asked) == 20 + 30 - 5
    assert tokens_at_most(settings_of, None) is None and tokens_at_most({**settings_of, "max_steps": 3}, None) == 6144


def test_every_cell_is_told_the_best_is_marked_and_open_ends_are_warned_of():
    asked = options(learning_rates=["1e-3", "2e-3", "4e-3"], arms=["base", "lora_total", "ours"])
    losses = {
        (place.arm, None, place.cell): 2 + number / 100 for number, place in enumerate(to_search(asked, Path("x")))
    }
    losses["ours", None, Cell(2e-3, 4.0)], losses["ours", None, Cell(4e-3, 1.0)] = 1.25, INFINITE
    found = Found(losses, choose(asked, losses), {"code": 7, "text": 5})
    text = in_letters(grid_table(asked, found), width=70)
    assert all(f"{loss:.4f}" in text for loss in losses.values() if loss < INFINITE)
    assert text.count("*") == 3 and "1.2500*" in text and "diverged" in text
    first, *warned = grid_sentences(asked, found)
    assert "12 rows (code 7, text 5)" in first and "learning rate 0.001, 0.002, 0.004 x scale 1, 4" in first
    assert [sentence.partition(":")[0] for sentence in warned] == [
        "The best learning rate lies at the lowest of the grid, 0.001, for one LoRA of equal total size",
        "The best scale lies at the lowest of the grid, 1, for one LoRA of equal total size",
        "The best scale lies at the highest of the grid, 4, for ours",
    ]
    content = json.loads(json.dumps(grid_json(asked, found), allow_nan=False))
    assert sum(cell["best"] for cell in content["cells"]) == 2 and content["warnings"] == warned


def test_the_seconds_of_a_run_are_those_of_its_steps(tmp_path):
    logs = [(0, None, None), (2, 100, 50.0), (4, 300, 100.0), (4, 300, None)]
    lines = [{"step": step, "num_input_tokens_seen": seen or 0} | ({"tokens_per_second": speed} if speed else {})
             for step, seen, speed in logs]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert tokens_and_seconds(tmp_path) == (300, 4.0)


# --- the whole command


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of 2 x 2 cells and two budgets, stopped in its third training and started again.

    Trainings run in this process, which is what makes them quick; test_compare.py kills real ones. One cell diverges.
    """
    folder = tiny_run_folder(tmp_path_factory.mktemp("grid"))
    own = flags(
        folder, folder / "out", "--seeds", "7", "--arms", "base,ours", "--budgets", "2", "3", "--save_steps", "1"
    )
    at = own.index("--learning_rate")
    words = ["compare", *own[:at], *own[at + 2 :], "--learning_rates", "1e-2", "1e30", "--scales", "1", "4"]
    made, stopped = [], []

    def train_here(words, *, log, title, screen):
        made.append(title)
        if len(made) == 3 and not stopped:
            stopped.append(title)
            raise Stopped(signal.SIGINT, "")
        try:
            status = main(list(words[3:]))
        except ValueError as error:
            raise ValueError(f"{title} failed: {error}") from None
        if status:
            raise ValueError(f"{title} failed: the output is NaN")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_arms, "run_program", train_here)
        assert main(words) == 128 + signal.SIGINT
        times = {
            path: path.stat().st_mtime_ns for path in (folder / "out").glob("seed-7/*/*/ours/checkpoint/dylora.json")
        }
        assert main(words) == 0
        assert len(times) == 1 and all(path.stat().st_mtime_ns == time for path, time in times.items())
        num_made = len(made)
        assert main(words) == 0 and len(made) == num_made
    return folder / "out", made


def test_a_stopped_search_trains_what_is_left_and_nothing_twice(searched):
    _, made = searched
    assert [title.partition(",")[0] for title in made] == [
        "training 1 of 5: seed 7", "training 2 of 5: seed 7", "training 3 of 5: seed 7",
        "training 3 of 5: seed 7", "training 4 of 5: seed 7", "training 5 of 5: seed 7",
    ]  # fmt: skip
    assert "3 steps" in made[-1] and all("2 steps" in title for title in made[:-1])


def test_the_best_cell_is_chosen_on_rows_of_its_own_and_judged_on_the_held_out_ones(searched):
    output, _ = searched
    content = json.loads((output / "compare.json").read_text())
    cells = {(cell["learning_rate"], cell["scale"]): cell for cell in content["search"]["cells"]}
    assert len(cells) == 4 and [cells[1e30, scale]["loss"] for scale in (1, 4)] == [None, None]
    losses = {}
    for (rate, scale), cell in cells.items():
        stored = json.loads((output / f"seed-7/steps-2/rate-{rate:g}-scale-{scale:g}/search/ours.json").read_text())
        if cell["loss"] is None:
            assert "NaN" in stored["diverged"] or "not finite" in stored["diverged"]
            continue
        found = from_json(stored["losses"])
        assert {name: len(item.tokens) for name, item in found.items()} == content["search"]["rows"]
        losses[rate, scale] = sum(sum(item.sums) / sum(item.tokens) for item in found.values()) / 2
        assert cell["loss"] == pytest.approx(losses[rate, scale], rel=1e-12)
    best = min(losses, key=losses.get)
    assert [key for key, cell in cells.items() if cell["best"]] == [best]
    for number, steps in enumerate((2, 3)):
        run = output / f"seed-7/steps-{steps}/rate-{best[0]:g}-scale-{best[1]:g}/ours"
        manifest = read_manifest(run / "checkpoint")
        assert manifest["training"]["step"] == steps and manifest["lora"]["lora_alpha"] == best[1] * 4
        held = from_json(json.loads((run.parent / "losses" / "ours.json").read_text())["losses"])
        arm = content["budgets"][number]["arms"]["ours"]
        assert arm["by_seed"] == pytest.approx([sum(sum(i.sums) / sum(i.tokens) for i in held.values()) / 2])
        assert arm["cell"] == {"learning_rate": best[0], "scale": best[1]} and arm["tokens"][0] > 0
    assert content["arms"] == content["budgets"][1]["arms"]
    assert content["budgets"][0]["arms"]["base"]["by_seed"] == content["arms"]["base"]["by_seed"]


def test_its_page_shows_every_cell_and_the_loss_over_tokens(searched):
    output, _ = searched
    assert main(["report", str(output)]) == 0
    page, content = (output / "report.html").read_text(), json.loads((output / "compare.json").read_text())
    assert "<b>finished</b>" in page and page.count("diverged</td>") == 2 and page.count("tint worse learned") == 1
    assert all(f"{cell['loss']:.4f}</td>" in page for cell in content["search"]["cells"] if cell["loss"] is not None)
    for budget in content["budgets"]:
        arm = budget["arms"]["ours"]
        assert f"<title>ours, {arm['tokens'][0]:,}: {arm['losses']['mean']['value']:.4g} [" in page
    asked = json.loads((output / "settings.json").read_text())
    (output / "settings.json").write_text(json.dumps({**asked, "scales": [*asked["scales"], "9"]}))
    assert main(["report", str(output)]) == 0
    assert "3 of 7 trainings are done" in (output / "report.html").read_text()
