"""The report of skills that the detector cannot tell apart: it names them, and no others."""

import itertools

import pytest
import torch
from test_novelty import SIZE, Kind

from dylo_moe.continual.config import GrowthConfig
from dylo_moe.continual.confusable import confusable_skills
from dylo_moe.continual.novelty_detector import judge
from dylo_moe.continual.skill_library import SkillLibrary

CONFIG = GrowthConfig()


def library_of(*skills, count=128):
    """A library of skills, each given as (name, seed of its kind, expert)."""
    library = SkillLibrary(SIZE)
    kinds = {seed: Kind(seed) for _, seed, _ in skills}
    for name, seed, expert in skills:
        library.learn(name, kinds[seed].texts(count), expert=expert)
    return library, kinds


def named(library, config=CONFIG, **options):
    return [(pair.first, pair.second) for pair in confusable_skills(library, config, **options)]


@pytest.mark.parametrize("novelty", ["mahalanobis", "cosine"])
def test_two_samples_of_one_kind_are_reported_and_nothing_else(novelty):
    config = GrowthConfig(novelty=novelty)
    library, _ = library_of(("a", 1, "a"), ("b", 2, "b"), ("again", 1, "c"), ("d", 4, "d"))
    assert named(library, config) == [("a", "again")]
    assert named(library, config, of="again") == [("a", "again")] and named(library, config, of="b") == []
    (pair,) = confusable_skills(library, config)
    assert pair.experts == ("a", "c") and "cannot tell a from again" in pair.in_words()


def test_skills_of_one_expert_are_not_reported():
    library, _ = library_of(("a", 1, "a"), ("again", 1, "a"), ("b", 2, "b"))
    assert named(library) == []


def test_an_empty_library_and_one_skill_have_no_pairs():
    assert named(SkillLibrary(SIZE)) == []
    assert named(library_of(("a", 1, "a"))[0]) == []


def test_the_report_agrees_with_the_detector():
    """For kinds ever nearer to each other: where a pair is reported, batches of the later one are known to a library
    that has only the first; where batches are always new to it, no pair is reported."""
    near, far, verdicts = Kind(1), Kind(2), set()
    for step in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        moved = Kind(3)
        moved.scale, moved.mean = near.scale, near.mean + step * (far.mean - near.mean)
        alone = SkillLibrary(SIZE)
        alone.learn("a", near.texts(128), expert="a")
        both = SkillLibrary.restore({name: t.clone() for name, t in alone.tensors().items()}, alone.record())
        both.learn("b", moved.texts(128), expert="b")
        news = sum(judge(alone, moved.texts(16)).novel for _ in range(40))
        is_reported = named(both) == [("a", "b")]
        verdicts.add(is_reported)
        assert not is_reported or news < 20, (step, news)
        assert is_reported or news > 0, (step, news)
    assert verdicts == {True, False}


def test_samples_too_small_for_batches_of_two_say_nothing():
    library, _ = library_of(("a", 1, "a"), ("again", 1, "b"), count=8)
    assert library["a"].scores[1].isnan().all() and named(library) == []


def test_every_pair_of_three_samples_of_one_kind_is_reported_nearest_first():
    library, _ = library_of(("a", 1, "a"), ("b", 1, "b"), ("c", 1, "c"))
    pairs = confusable_skills(library, CONFIG)
    assert {(pair.first, pair.second) for pair in pairs} == set(itertools.combinations("abc", 2))
    assert [pair.distance for pair in pairs] == sorted(pair.distance for pair in pairs)
    whitened = library.whitened(torch.stack([library[name].mean for name in "abc"]))
    assert min(pair.distance for pair in pairs) == pytest.approx(
        min(float((one - other).square().sum()) for one, other in itertools.combinations(whitened, 2))
    )
