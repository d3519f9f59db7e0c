"""The continual matrix: its figures are those of their papers, its file comes back as it was, its table is whole."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dylo_moe.evaluation.loss_matrix import ACTIONS, FIGURES, Matrix, Stage, read_matrix, write_matrix
from dylo_moe.report.loss_matrix_table import MatrixTable, show_matrix
from dylo_moe.utils.screen import Screen

# Values that are exact in binary, so that the figures can be compared with ==.
BY_HAND = {
    "skills": ["a", "b", "c"],
    "unlearned": ["u"],
    "base": {"a": 4.0, "b": 3.0, "c": 2.0, "u": 5.0},
    "stages": [
        {
            "name": "a",
            "losses": {"a": 2.0, "b": 2.5, "c": 2.25, "u": 5.0},
            "alone": {"a": 1.5},
            "accuracy": {"a": 1.0},
            "seconds": 31.5,
            "tokens": 32768,
            "decision": {"novel": True, "score": 3.0, "threshold": 1.0, "nearest": None, "expert": "a"},
        },
        {
            "name": "b",
            "losses": {"a": 2.5, "b": 1.0, "c": 1.75, "u": 5.125},
            "alone": {"a": 1.5, "b": 0.5},
            "accuracy": {"a": 0.75, "b": 0.875},
            "seconds": 30.0,
            "tokens": 32768,
            "decision": {"novel": True, "score": 2.0, "nearest": "a", "expert": "b", "action": "grown"},
        },
        {
            "name": "c",
            "losses": {"a": 2.25, "b": 1.5, "c": 1.0, "u": 5.25},
            "alone": {"a": 1.5, "b": 0.5, "c": 1.5},
            "accuracy": {"a": 0.5, "b": 0.75, "c": 0.25, "u": 0.625},
            "seconds": 0.0,
            "tokens": 0,
            "decision": {},
        },
    ],
}


def matrix(record=BY_HAND) -> Matrix:
    own = json.loads(json.dumps(record))
    return Matrix(**{**own, "stages": [Stage(**stage) for stage in own["stages"]]})


def stage(name, losses, *, expert=None, action="grown", alone=()) -> Stage:
    return Stage(name, losses, {skill: 1.0 for skill in alone}, decision={"expert": expert, "action": action})


@st.composite
def streams(draw):
    """Every skill once, in some order, with losses of all; some cells may be missing."""
    skills = [f"s{index}" for index in range(draw(st.integers(1, 5)))]
    losses = st.floats(0, 20)
    base = {skill: draw(losses) for skill in skills}
    stages = []
    for place, skill in enumerate(skills):
        known = draw(st.sets(st.sampled_from(skills))) if draw(st.booleans()) else set(skills)
        stages.append(Stage(skill, {name: draw(losses) for name in skills if name in known}))
        stages[-1].alone = {name: draw(losses) for name in skills[: place + 1]}
        stages[-1].accuracy = {name: draw(st.floats(0, 1)) for name in skills[: place + 1]}
    return Matrix(skills, [], base, stages)


# The figures.


def test_the_figures_of_an_example_by_hand():
    found = {name: kind.of(matrix()) for name, kind in FIGURES.items()}
    values = {name: figure.values for name, figure in found.items()}
    assert values == {
        "loss": {"a": 2.25, "b": 1.5, "c": 1.0},
        "forgetting": {"a": 0.25, "b": 0.5},  # c was learned last
        "backward_transfer": {"a": -0.25, "b": -0.5},
        "forward_transfer": {"b": 0.5, "c": 0.25},  # a was learned first
        "gain_kept": {"a": 1.75 / 2.5, "b": 1.5 / 2.5, "c": 2.0},
        "routing_accuracy": {"a": 0.5, "b": 0.75, "c": 0.25},
        "left_to_base": {"u": 0.625},
        "drift": {"u": 0.25},
    }
    assert {name: figure.mean for name, figure in found.items()} == pytest.approx(
        {
            "loss": 4.75 / 3,
            "forgetting": 0.375,
            "backward_transfer": -0.375,
            "forward_transfer": 0.375,
            "gain_kept": 1.1,
            "routing_accuracy": 0.5,
            "left_to_base": 0.625,
            "drift": 0.25,
        }
    )
    worst = {name: figure.worst[0] for name, figure in found.items()}
    assert worst == {
        "loss": "a",
        "forgetting": "b",
        "backward_transfer": "b",
        "forward_transfer": "c",
        "gain_kept": "b",
        "routing_accuracy": "c",
        "left_to_base": "u",
        "drift": "u",
    }


@given(streams(), st.randoms())
def test_another_order_of_the_skills_changes_no_figure(stream, random):
    other = dataclasses.replace(stream, skills=random.sample(stream.skills, len(stream.skills)))
    other = dataclasses.replace(
        other,
        base=dict(reversed(stream.base.items())),
        stages=[dataclasses.replace(stage, losses=dict(reversed(stage.losses.items()))) for stage in stream.stages],
    )
    for name, kind in FIGURES.items():
        before, after = kind.of(stream), kind.of(other)
        assert before.values == after.values, name
        assert before.mean == after.mean, name
        assert (before.worst or [0, 0])[1] == (after.worst or [0, 0])[1], name


@given(streams())
def test_other_names_of_the_skills_rename_the_figures(stream):
    def new(cells):
        return {f"x{name}": value for name, value in cells.items()}

    stages = [
        dataclasses.replace(
            stage,
            name=f"x{stage.name}",
            losses=new(stage.losses),
            alone=new(stage.alone),
            accuracy=new(stage.accuracy),
        )
        for stage in stream.stages
    ]
    renamed = Matrix([f"x{skill}" for skill in stream.skills], [], new(stream.base), stages)
    for kind in FIGURES.values():
        assert kind.of(renamed).values == new(kind.of(stream).values)


@given(st.lists(st.floats(0, 20), min_size=2, max_size=5))
def test_what_never_changes_is_neither_forgotten_nor_transferred(losses):
    cells = {f"s{place}": loss for place, loss in enumerate(losses)}
    still = Matrix(list(cells), [], dict(cells), [Stage(skill, dict(cells), dict(cells)) for skill in cells])
    for figure in (still.forgetting(), still.backward_transfer(), still.forward_transfer()):
        assert len(figure.known) == len(losses) - 1
        assert set(figure.values.values()) == {0}
    assert still.gain_kept().values == {}  # the experts gained nothing, so there is no share of it


@given(streams(), st.floats(0.125, 4))
def test_the_signs_better_later_is_positive_transfer_and_negative_forgetting(stream, gain):
    """All losses of the last stage fall by `gain`: forgetting falls by it, backward transfer rises by it."""
    before = stream.forgetting(), stream.backward_transfer()
    last = stream.stages[-1]
    last.losses = {name: value - gain for name, value in last.losses.items()}
    after = stream.forgetting(), stream.backward_transfer()
    for sign, old, new in zip((-1, 1), before, after, strict=True):
        assert old.values.keys() == new.values.keys()
        for skill, value in old.known.items():
            assert new.values[skill] == pytest.approx(value + sign * gain)


@given(streams(), st.floats(0.125, 4))
def test_a_lower_loss_before_learning_is_positive_forward_transfer(stream, gain):
    first = stream.forward_transfer()
    for place, stage in enumerate(stream.stages):
        stage.losses = {
            name: value - gain if stream.taught(name)[0] > place else value for name, value in stage.losses.items()
        }
    for skill, value in stream.forward_transfer().known.items():
        assert value == pytest.approx(first.values[skill] + gain)


def test_a_skill_that_is_as_good_as_its_expert_keeps_all_and_one_that_is_as_good_as_the_base_nothing():
    stream = matrix()
    stream.stages[-1].losses |= {"a": 1.5, "b": 3.0, "c": 2.5}
    assert stream.gain_kept().values == {"a": 1.0, "b": 0.0, "c": -1.0}


# When a skill was learned.


def test_a_skill_that_comes_again_is_learned_anew():
    """Forgetting is measured from the last visit, forward transfer from before the first."""
    stream = Matrix(
        ["a", "b"],
        base={"a": 4.0, "b": 4.0},
        stages=[
            stage("b", {"a": 3.5, "b": 2.0}, expert="b"),
            stage("a", {"a": 2.0, "b": 2.25}, expert="a"),
            stage("b", {"a": 2.5, "b": 1.0}, expert="b", action="consolidated"),
            stage("a", {"a": 1.5, "b": 1.5}, expert="a", action="consolidated"),
            stage("b", {"a": 1.75, "b": 1.25}, expert="b", action="skipped"),
        ],
    )
    assert stream.taught("a") == [1, 3] and stream.taught("b") == [0, 2]
    assert stream.forgetting().values == {"a": 0.25, "b": 0.25}
    assert stream.forward_transfer().values == {"a": 0.5}
    stream.stages[1].alone, stream.stages[3].alone = {"a": 2.0}, {"a": 1.5}
    assert stream.gain_kept().values["a"] == (4.0 - 1.75) / (4.0 - 1.5)  # of what its expert was when learned anew


def test_what_another_skills_data_does_to_an_expert_counts_as_forgetting():
    """Bug this guards against: the harm is hidden by measuring from the stage that did it."""
    stream = Matrix(
        ["a", "b"],
        base={"a": 4.0, "b": 4.0},
        stages=[
            stage("a", {"a": 2.0, "b": 3.0}, expert="a"),
            stage("b", {"a": 2.5, "b": 2.0}, expert="a", action="consolidated"),
        ],
    )
    assert stream.learned_at("a") == 0 and stream.learned_at("b") == 1
    assert stream.forgetting().values == {"a": 0.5}


@pytest.mark.parametrize("action", ["skipped", "reported"])
def test_a_stage_that_trained_nothing_teaches_nothing(action):
    losses = {"a": 3.0, "b": 2.0}
    stream = Matrix(["a", "b"], base={"a": 4.0, "b": 4.0})
    stream.stages = [stage("a", losses, expert="a"), stage("b", losses, expert="a", action=action)]
    assert stream.taught("b") == []
    for figure in (stream.forgetting(), stream.forward_transfer(), stream.gain_kept(), stream.routing_accuracy()):
        assert "b" not in figure.values
    assert stream.losses().values == losses


@pytest.mark.parametrize("skills", [["x", "y"], ["chunk_1", "chunk_2"], ["code", "law"]])
def test_in_an_unlabelled_stream_the_expert_tells_which_chunks_taught_a_skill(skills):
    """Skills called like the experts, like the chunks that grew them, or like neither: `alone` then tells whose."""
    one, two = skills
    experts = ["x", "y"] if one == "code" else skills
    stages = [
        stage("chunk_1", {one: 2.0, two: 3.5}, expert=experts[0], alone=[one]),
        stage("chunk_2", {one: 2.25, two: 2.0}, expert=experts[1], alone=[one, two]),
        stage("chunk_3", {one: 1.5, two: 2.5}, expert=experts[0], action="consolidated", alone=[one, two]),
        stage("chunk_4", {one: 1.75, two: 2.75}, expert=experts[1], action="skipped", alone=[one, two]),
    ]
    stream = Matrix([one, two], base={one: 4.0, two: 4.0}, stages=stages)
    assert stream.taught(one) == [0, 2] and stream.taught(two) == [1]
    assert stream.forgetting().values == {one: 0.25, two: 0.75}


def test_an_expert_that_was_there_before_the_stream_was_not_learned_in_it():
    """A stream continues from a joint checkpoint: its skills have experts from the first stage on, whichever was
    trained."""
    stages = [stage("new", {"old": 2.0, "new": 2.0}, expert="new", alone=["old", "new"])]
    stream = Matrix(["old", "new"], base={"old": 4.0, "new": 4.0}, stages=stages)
    assert stream.taught("old") == [] and stream.taught("new") == [0]
    stages[0].name, stages[0].decision["action"] = "chunk_1", "skipped"
    assert stream.taught("old") == [] and stream.taught("new") == []


# What was not measured.


def test_a_missing_cell_is_not_measured_and_never_0():
    stream = matrix()
    del stream.stages[2].losses["a"], stream.base["b"], stream.stages[2].accuracy["c"]
    assert stream.forgetting().values == {"a": None, "b": 0.5}
    assert stream.forgetting().mean == 0.5
    assert stream.losses().values == {"a": None, "b": 1.5, "c": 1.0}
    assert stream.losses().mean == 1.25
    assert stream.forward_transfer().values == {"b": None, "c": 0.25}
    assert stream.gain_kept().values == {"a": None, "b": None, "c": 2.0}
    assert stream.routing_accuracy().values == {"a": 0.5, "b": 0.75, "c": None}


def test_an_own_experts_loss_may_be_measured_later():
    stream = matrix()
    stream.stages[0].alone = {}
    stream.stages[2].alone["a"] = 2.0  # what happens to the expert afterwards does not count
    assert stream.gain_kept().values["a"] == 1.75 / 2.5


@pytest.mark.parametrize("stages", [0, 1])
def test_a_stream_that_has_hardly_begun_has_no_forgetting(stages):
    stream = dataclasses.replace(matrix(), stages=matrix().stages[:stages])
    for figure in (stream.forgetting(), stream.backward_transfer(), stream.forward_transfer()):
        assert (figure.values, figure.mean, figure.worst) == ({}, None, None)


def test_what_is_not_finite_is_the_worst_and_spoils_the_mean():
    stream = matrix()
    stream.stages[2].losses["b"] = math.nan
    for figure in (stream.losses(), stream.forgetting(), stream.backward_transfer(), stream.gain_kept()):
        assert figure.worst[0] == "b" and math.isnan(figure.mean)


# The file.


@given(streams())
def test_a_matrix_comes_back_as_it_was(tmp_path_factory, stream):
    path = tmp_path_factory.mktemp("matrix") / "matrix.json"
    write_matrix(path, stream)
    assert read_matrix(path) == stream


def test_the_file_is_what_it_is_said_to_be(tmp_path):
    """Others read and write it: the benchmarks, the page."""
    path = tmp_path / "matrix.json"
    write_matrix(path, matrix())
    assert json.loads(path.read_text()) == BY_HAND
    path.write_text(json.dumps(BY_HAND))
    assert read_matrix(path) == matrix()
    assert [file.name for file in tmp_path.iterdir()] == ["matrix.json"]


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    stream = matrix()
    stream.stages[2].losses |= {"a": math.nan, "b": math.inf}
    stream.stages[2].decision = {"score": math.inf}
    write_matrix(tmp_path / "matrix.json", stream)
    text = (tmp_path / "matrix.json").read_text()
    assert not re.search("NaN|Infinity", text)
    found = read_matrix(tmp_path / "matrix.json").stages[2]
    assert math.isnan(found.losses["a"]) and math.isnan(found.losses["b"]) and found.losses["c"] == 1.0
    assert found.decision == {"score": None}


def changed(where, value):
    """The example with one value replaced; `...` takes it out."""
    record = json.loads(json.dumps(BY_HAND))
    inner = record
    for name in where[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return record


REFUSED = [
    (["skills"], ..., "it has no skills"),
    (["version"], 2, "it has an unknown entry 'version'"),
    (["skills"], ["a", "b", "c", "a"], "name something twice"),
    (["skills"], [1], "skills is not a list of names"),
    (["unlearned"], "u", "unlearned is not a list of names"),
    (["base"], [], "base is no object"),
    (["base", "d"], 1.0, "base name 'd'"),
    (["base", "a"], "4", "base of 'a' is '4'"),
    (["base", "a"], True, "base of 'a' is True"),
    (["stages"], {}, "stages is not a list"),
    (["stages", 0], 1, "stage 1 is no object"),
    (["stages", 1, "losses"], ..., "stage 2 has no losses"),
    (["stages", 1, "loss"], {}, "stage 2 has an unknown entry 'loss'"),
    (["stages", 1, "name"], None, "stage 2's name is None"),
    (["stages", 1, "losses", "a"], -0.5, "stage 2's losses of 'a' is -0.5"),
    (["stages", 1, "alone", "u"], 1.0, "stage 2's alone name 'u'"),
    (["stages", 2, "accuracy", "a"], 1.5, "stage 3's accuracy of 'a' is 1.5; it must be a number from 0 to 1"),
    (["stages", 2, "seconds"], -1, "stage 3's seconds is -1"),
    (["stages", 2, "tokens"], None, "stage 3's tokens is None"),
    (["stages", 2, "decision"], "grown", "stage 3's decision is 'grown'"),
    (["stages", 2, "decision", "action"], "grew", f"'grew'; it must be one of {', '.join(ACTIONS)}"),
]


@pytest.mark.parametrize(("where", "value", "said"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_file_that_is_no_matrix_is_refused(where, value, said, tmp_path):
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps(changed(where, value)))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(said)}"):
        read_matrix(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"skills": '])
def test_a_file_that_is_cut_or_something_else_is_refused(text, tmp_path):
    (tmp_path / "matrix.json").write_text(text)
    with pytest.raises(ValueError, match=r"matrix\.json is no"):
        read_matrix(tmp_path / "matrix.json")


def test_all_problems_are_told_at_once_and_nothing_is_written(tmp_path):
    path = tmp_path / "matrix.json"
    write_matrix(path, matrix())
    before, wrong = path.read_bytes(), matrix()
    wrong.base["d"], wrong.stages[0].accuracy["a"], wrong.stages[1].tokens = 1.0, 2, -1
    with pytest.raises(ValueError, match=r"base name 'd'.*stage 1's accuracy.*stage 2's tokens"):
        write_matrix(path, wrong)
    assert path.read_bytes() == before


# The table.


def shown_in(width, stream, **options):
    console = Console(width=width, **options)
    with console.capture() as capture:
        show_matrix(Screen("test", console=console), stream)
    return capture.get()


@pytest.mark.parametrize("width", [28, 40, 63, 64, 80, 200])
@pytest.mark.parametrize("num_skills", [1, 3, 20])
def test_every_number_is_whole_and_no_line_too_long(width, num_skills):
    skills = [f"skill_{place}" for place in range(num_skills)]
    losses = [
        {skill: 10 + (row * num_skills + place) / 1000 for place, skill in enumerate(skills)}
        for row in range(num_skills + 1)
    ]
    stages = [Stage(skill, losses[place + 1]) for place, skill in enumerate(skills)]
    text = shown_in(width, Matrix(skills, [], losses[0], stages))
    assert max(map(len, text.splitlines())) <= width
    numbers = re.findall(r"(?<!\d)1\d\.\d{3}(?!\d)", text)
    assert sorted(numbers) == sorted(f"{value:.3f}" for row in losses for value in row.values())
    for skill in stages:  # where it was learned
        assert f"{skill.losses[skill.name]:.3f}*" in text
    for kind in FIGURES.values():
        figure = kind.of(Matrix(skills, [], losses[0], stages))
        if figure.known:
            assert kind.show(figure.mean) in text and kind.show(figure.worst[1]) in text


@pytest.mark.parametrize(("width", "most_lines"), [(28, 140), (80, 40), (200, 40)])
def test_of_64_skills_the_newest_and_those_that_lost_most_are_listed(width, most_lines):
    """Eight rows, whatever the width: 64 columns of figures take hundreds of lines after each of 64 stages."""
    skills = [f"skill_{place:02d}" for place in range(64)]
    lost = {skill: (place * 37 % 64) / 100 for place, skill in enumerate(skills)}
    stages = [Stage(skill, {name: 3.0 for name in skills}) for skill in skills]
    stages[-1].losses = {name: 3.0 + lost[name] for name in skills} | {skills[-1]: 1.5}
    text = shown_in(width, Matrix(skills, ["prose"], {name: 4.0 for name in (*skills, "prose")}, stages))
    assert max(map(len, text.splitlines())) <= width and len(text.splitlines()) < most_lines
    # At 28 columns the table is several blocks, each with all names.
    names = re.findall(r"skill_\d\d|prose", text.split("figures of the matrix")[0])
    most = sorted(skills[:-1], key=lambda name: -lost[name])[:7]
    assert names[:9] == [skills[-1], *most, "prose"]
    for name in most:
        assert f"{3 + lost[name]:.3f}" in text and f"+{lost[name]:.3f}" in text
    assert "1.500*" in text


def test_no_line_is_too_long_for_any_terminal():
    """Bug this guards against: one column too many, whose numbers rich then cuts."""
    stages = [Stage(skill, {name: 1.5 for name in "abcdef"}) for skill in "abcdef"]
    for width in range(28, 100):
        text = shown_in(width, Matrix(list("abcdef"), [], {name: 2.0 for name in "abcdef"}, stages))
        assert max(map(len, text.splitlines())) <= width
        assert text.count("1.500") == 38 and "…" not in text  # 36 cells, mean and worst


def test_a_cell_that_is_missing_is_no_number_in_the_table():
    stream = matrix()
    stream.stages[2].losses = {"b": math.nan}
    rows = [line.split() for line in shown_in(100, stream).splitlines()]
    assert ["3", "c", "-", "not", "finite", "-*", "-"] in rows
    assert ["forgetting", "not", "finite", "not", "finite", "b", "1", "of", "3"] in rows
    assert ["unlearned", "text", "against", "the", "base", "not", "measured", "not", "measured", "0", "of", "1"] in rows
    assert ["1", "a", "2.000*", "2.500", "2.250", "5.000"] in rows


def test_better_is_green_and_worse_is_red_and_before_it_was_learned_faint():
    stream = matrix()
    stream.stages[1].losses |= {"a": 1.875, "c": 2.125}
    stream.stages[2].losses["a"] = 2.375
    text = shown_in(100, stream, force_terminal=True, color_system="standard", legacy_windows=False)
    styles = {value: code for code, value in re.findall(r"\x1b\[([\d;]+)m *(\d\.\d{3})", text)}
    assert styles["1.875"] == "32" and styles["2.375"] == "31"  # of a, better and worse than its 2.000
    assert styles["2.000"] == "1" and styles["2.125"] == "2"


def test_names_are_text_not_markup():
    name = "[b]x[/b]"
    stream = Matrix([name], [f"u{name}"], {name: 3.0}, [stage(name, {name: 2.0}, expert="[bold]y")])
    rows = [line.split() for line in shown_in(120, stream).splitlines()]
    assert ["after", "stage", name, f"u{name}"] in rows
    assert ["1", name, "→", "[bold]y", "2.000*", "-"] in rows
    assert any(row[-4:] == [name, "1", "of", "1"] for row in rows)


def test_a_live_table_shows_the_matrix_as_it_is_now():
    stream = dataclasses.replace(matrix(), stages=[])
    table, console = MatrixTable(stream), Console(width=80)
    with console.capture() as before:
        console.print(table)
    stream.stages.append(matrix().stages[0])
    with console.capture() as after:
        console.print(table)
    assert "1 a" not in before.get() and "1 a" in after.get()
