"""The novelty detector: the false-alarm rate is the one that was set, and what is new is found."""

import pytest
import torch

from dylo_moe.continual.novelty_detector import judge
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.routing.config import BASE

SIZE = 24


class Kind:
    """A source of texts: a mean of its own, and texts that differ from each other."""

    def __init__(self, seed, *, far=3.0):
        self.generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(SIZE, generator=self.generator)
        self.mean = far * direction / direction.norm()
        self.scale = 0.3 + torch.rand(SIZE, generator=self.generator)

    def texts(self, count):
        own = torch.randn(count, 1, SIZE, generator=self.generator) * self.scale * 0.5
        tokens = torch.randn(count, 12, SIZE, generator=self.generator) * self.scale
        return list(self.mean + own + tokens)


def known(*seeds, count=200):
    library, kinds = SkillLibrary(SIZE), [Kind(seed) for seed in seeds]
    for seed, kind in zip(seeds, kinds, strict=True):
        library.learn(str(seed), kind.texts(count), expert=str(seed), seed=seed)
    return library, kinds


@pytest.mark.parametrize("size", [1, 2, 5, 16, 32, 100])
@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_known_data_is_called_new_no_oftener_than_was_set(seeds, size):
    """300 batches at 5 %: at most 15 + 3.5 standard deviations, over the skills that were first and later."""
    library, kinds = known(*seeds)
    alarms = sum(
        judge(library, kinds[index % len(kinds)].texts(size), false_alarm_rate=0.05).novel for index in range(300)
    )
    assert alarms <= 15 + 3.5 * (300 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_rate_is_not_empty(size):
    """Where the sizes were calibrated, about as many alarms come as were asked for: the level is not just high."""
    library, (kind,) = known(1, count=400)
    alarms = sum(judge(library, kind.texts(size), false_alarm_rate=0.2).novel for _ in range(300))
    assert 60 - 30 <= alarms <= 60 + 3.5 * (300 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize("size", [8, 32, 100])
def test_a_new_kind_is_always_found(size):
    library, _ = known(1, 2, 3)
    for seed in range(10, 30):
        assert judge(library, Kind(seed).texts(size)).novel, seed


def test_a_far_kind_is_new_from_one_text_on():
    library, _ = known(1, 2)
    far = Kind(9, far=30.0)
    for size in (1, 2, 3, 32):
        found = judge(library, far.texts(size))
        assert found.novel and found.score > 10 * found.threshold


@pytest.mark.parametrize("method", ["mahalanobis", "cosine"])
def test_the_first_skill_is_new(method):
    library = SkillLibrary(SIZE)
    assert judge(library, Kind(1).texts(3), method=method)[::3] == (True, None)
    library.learn(BASE, Kind(2).texts(10), expert=BASE)
    assert judge(library, Kind(2).texts(3), method=method)[::3] == (True, None)


@pytest.mark.parametrize("method", ["mahalanobis", "cosine"])
def test_nearest_is_the_kind_that_it_is(method):
    library, kinds = known(1, 2, 3)
    for seed, kind in zip((1, 2, 3), kinds, strict=True):
        found = judge(library, kind.texts(32), method=method)
        assert (found.novel, found.nearest) == (False, str(seed))


def test_names_and_their_order_decide_nothing():
    """Relabelling: the same skills after the first under other names and in another order give the same answer."""
    samples = {seed: Kind(seed).texts(60) for seed in (1, 2, 3, 4)}
    one, other = SkillLibrary(SIZE), SkillLibrary(SIZE)
    for seed in (1, 2, 3, 4):
        one.learn(f"s{seed}", samples[seed], expert="x")
    for seed in (1, 4, 3, 2):
        other.learn(f"t{seed}", samples[seed], expert=f"y{seed}")
    for seed in (1, 2, 3, 4, 5):
        batch = Kind(seed).texts(16)
        left, right = judge(one, batch), judge(other, batch)
        assert left[:3] == right[:3]
        assert left.nearest[1:] == right.nearest[1:]


def test_a_growing_library_leaves_the_first_skills_level_where_it_was():
    library, (kind,) = known(1)
    batch = kind.texts(32)
    before = judge(library, batch)
    for seed in range(2, 12):
        library.learn(str(seed), Kind(seed, far=6.0).texts(40), expert=str(seed))
    assert judge(library, batch) == before


def test_cosine_is_on_centred_features():
    """A common part far larger than all differences makes raw cosines 1; the centred ones tell the kinds apart."""
    common = torch.full((SIZE,), 100.0)
    library, kinds = SkillLibrary(SIZE), [Kind(seed) for seed in (1, 2, 3)]
    for index, kind in enumerate(kinds):
        kind.mean = kind.mean + common
        library.learn(str(index), kind.texts(60), expert=str(index))
    new = Kind(7)
    new.mean = new.mean + common
    means = [library[name].mean for name in library.skills]
    assert all(torch.cosine_similarity(new.mean, mean, dim=0) > 0.99 for mean in means)
    assert judge(library, new.texts(32), method="cosine").novel
    found = judge(library, kinds[1].texts(32), method="cosine", similarity_threshold=0.75)
    assert (found.novel, found.nearest, found.threshold) == (False, "1", 0.75)
    assert judge(library, kinds[1].texts(32), method="cosine", similarity_threshold=0.9999).novel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "at least one text"),
        ({"method": "euclid"}, "'euclid' is unknown; choose one of mahalanobis, cosine"),
        ({"false_alarm_rate": 0.0}, "between 0 and 1; it is 0.0"),
        ({"false_alarm_rate": 1.0}, "between 0 and 1; it is 1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    library, (kind,) = known(1, count=20)
    arguments = {"texts": kind.texts(2), **change}
    with pytest.raises(ValueError, match=message):
        judge(library, **arguments)
