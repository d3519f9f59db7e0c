"""The skill library: what it keeps, that it keeps it whole, and that skills do not touch each other."""

import json

import pytest
import safetensors.torch
import torch

from dylo_moe.continual.skill_library import BATCH_SIZES, MIN_SAMPLE_PER_BATCH, SkillLibrary
from dylo_moe.routing.config import BASE

SIZE = 12
SHARES = {"base": 0.25, "a": 0.75}


def texts(seed, count=40, *, shift=0.0, tokens=30):
    """Texts of a kind of its own: a mean, a variance in each direction, and something of each text's own."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(SIZE, generator=generator) + shift
    scale = 0.5 + torch.linspace(0, 1, SIZE)
    own = torch.randn(count, 1, SIZE, generator=generator) * 0.5
    found = mean + own + torch.randn(count, tokens, SIZE, generator=generator) * scale
    return [text[: tokens - index % 5] for index, text in enumerate(found)]


@pytest.fixture
def library():
    found = SkillLibrary(SIZE)
    found.learn("a", texts(1), expert="a", seed=3)
    found.note_shares("a", SHARES)
    found.learn("b", texts(2), expert="b", seed=3)
    return found


def same(one, other):
    left, right = one.tensors(), other.tensors()
    return left.keys() == right.keys() and all(
        torch.equal(left[key].nan_to_num(), right[key].nan_to_num()) for key in left
    )


def test_restoring_is_bit_exact_through_files_and_goes_on_alike(library, tmp_path):
    safetensors.torch.save_file(library.tensors(), tmp_path / "library.safetensors")
    record = json.loads(json.dumps(library.record()))
    restored = SkillLibrary.restore(safetensors.torch.load_file(tmp_path / "library.safetensors"), record)
    assert same(restored, library)
    assert restored.record() == library.record()
    assert restored["a"].shares == SHARES
    for one in (library, restored):
        one.learn("c", texts(3), expert="c", seed=5)
        one.learn("a", texts(4), expert="a", seed=6)
    assert same(restored, library)
    assert restored.distances(texts(5)) == library.distances(texts(5))
    draws = [one.draw("b", 7, torch.Generator().manual_seed(1)) for one in (library, restored)]
    assert torch.equal(*draws)


def test_tensors_that_are_not_of_the_record_are_refused(library):
    tensors = library.tensors()
    tensors["mean.z"] = tensors.pop("mean.a")
    with pytest.raises(ValueError, match=r"missing \['mean.a'\], unexpected \['mean.z'\]"):
        SkillLibrary.restore(tensors, library.record())


def test_learning_and_forgetting_change_no_other_skill(library):
    before, batch = library["a"], texts(7)
    mean, scores, distance = before.mean.clone(), before.scores.clone(), library.distances(batch)["a"]
    library.learn("c", texts(3, shift=3.0), expert="c")
    library.learn("b", texts(4), expert="b")
    library.forget("c")
    after = library["a"]
    assert torch.equal(after.mean, mean)
    assert torch.equal(after.scores.nan_to_num(), scores.nan_to_num())
    assert library.distances(batch)["a"] == distance
    assert library.names == ("a", "b") and "c" not in library


def test_a_skill_learned_in_two_parts_is_the_skill_learned_at_once():
    sample = texts(1, 50)
    parts, whole = SkillLibrary(SIZE), SkillLibrary(SIZE)
    parts.learn("a", sample[:20], expert="a")
    parts.learn("a", sample[20:], expert="a")
    whole.learn("a", sample, expert="a")
    one, other = parts["a"], whole["a"]
    assert (one.num_texts, one.num_tokens) == (other.num_texts, other.num_tokens)
    torch.testing.assert_close(one.mean, other.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.covariance, whole.covariance, atol=1e-5, rtol=1e-5)


def test_mean_and_covariance_are_those_of_the_tokens(library):
    tokens = [torch.cat(texts(seed)).double() for seed in (1, 2)]
    torch.testing.assert_close(library["a"].mean.double(), tokens[0].mean(0), atol=1e-6, rtol=0)
    centred = torch.cat([part - part.mean(0) for part in tokens])
    plain = centred.T @ centred / len(centred)
    expected = plain + 0.2 * plain.diagonal().mean() * torch.eye(SIZE)
    torch.testing.assert_close(library.covariance, expected, atol=1e-5, rtol=1e-5)


def test_draws_have_the_stated_mean_and_covariance(library):
    count = 200_000
    draws = library.draw("b", count, torch.Generator().manual_seed(0)).double()
    tolerance = 6 * float(library.covariance.diagonal().max()) / count**0.5  # six standard errors
    torch.testing.assert_close(draws.mean(0), library["b"].mean.double(), atol=tolerance, rtol=0)
    torch.testing.assert_close(torch.cov(draws.T), library.covariance, atol=2 * tolerance, rtol=0)


def test_one_seed_gives_one_library(library):
    again = SkillLibrary(SIZE)
    torch.manual_seed(99)
    again.learn("a", texts(1), expert="a", seed=3)
    again.learn("b", texts(2), expert="b", seed=3)
    assert same(again, library)
    other = SkillLibrary(SIZE)
    other.learn("a", texts(1), expert="a", seed=4)
    assert not torch.equal(other["a"].scores.nan_to_num(), library["a"].scores.nan_to_num())
    assert torch.equal(other["a"].mean, library["a"].mean)


def test_distance_is_the_mean_product_of_different_texts(library):
    batch = texts(5, 6)
    whitening = library.tensors()["whitening"].double()
    vectors = [(text.double().mean(0) - library["a"].mean.double()) @ whitening for text in batch]
    pairs = [float(one @ other) for i, one in enumerate(vectors) for j, other in enumerate(vectors) if i != j]
    assert library.distances(batch)["a"] == pytest.approx(sum(pairs) / len(pairs))
    assert library.distances(batch[:1])["a"] == pytest.approx(float(vectors[0] @ vectors[0]))


def test_distance_estimates_the_distance_between_kinds_whatever_the_size_of_the_batch():
    """The mean over batches of any size but one is the squared distance of the kind: nothing is added per text."""
    library = SkillLibrary(SIZE)
    library.learn("a", texts(1, 400), expert="a")
    shift = torch.full((SIZE,), 0.7)
    new = [text + shift for text in texts(1, 400)]
    true = float((shift.double() @ library.tensors()["whitening"].double()).square().sum())
    for size in (2, 8, 32):
        found = [library.distances(new[start : start + size])["a"] for start in range(0, 400 - size + 1, size)]
        assert sum(found) / len(found) == pytest.approx(true, rel=0.1), size


def test_scores_are_of_texts_that_the_mean_has_not_seen():
    """With few texts in many directions, a text's distance from a mean it is part of is far too small."""
    library = SkillLibrary(SIZE)
    sample = texts(1, 8)
    library.learn("a", sample, expert="a")
    inside = [library.distances([text])["a"] for text in sample]
    assert float(library["a"].scores[0].mean()) > 1.2 * sum(inside) / len(inside)


def test_sizes_that_a_sample_is_too_small_for_have_no_scores():
    library = SkillLibrary(SIZE)
    library.learn("a", texts(1, 40), expert="a")
    known = [bool(row.isfinite().all()) for row in library["a"].scores]
    assert known == [size == 1 or MIN_SAMPLE_PER_BATCH * size <= 20 for size in BATCH_SIZES]


def test_base_is_an_entry_but_no_skill(library):
    covariance = library.covariance
    library.learn(BASE, texts(8, shift=5.0), expert=BASE)
    assert torch.equal(library.covariance, covariance)
    assert BASE in library and library.skills == ("a", "b")
    assert set(library.distances(texts(1))) == {"a", "b"}


def test_what_cannot_be_learned_is_refused_and_changes_nothing(library):
    before = {key: tensor.clone() for key, tensor in library.tensors().items()}
    broken = [*texts(3, 3), torch.zeros(0, SIZE), torch.zeros(4, SIZE + 1), torch.full((2, SIZE), torch.nan)]
    with pytest.raises(ValueError, match=r"text 3 of 'c' .*\[0, 12\].*text 4 .*\[4, 13\].*text 5 .*NaN"):
        library.learn("c", broken, expert="c")
    with pytest.raises(ValueError, match=r"at least two texts.*got 1"):
        library.learn("c", texts(3, 1), expert="c")
    assert "c" not in library
    assert all(torch.equal(library.tensors()[key].nan_to_num(), before[key].nan_to_num()) for key in before)
    with pytest.raises(KeyError, match="no skill 'c'; it knows: a, b"):
        library["c"]
    with pytest.raises(KeyError, match="no skill 'c'"):
        library.forget("c")
    with pytest.raises(ValueError, match="learned no skill yet"):
        _ = SkillLibrary(SIZE).covariance
