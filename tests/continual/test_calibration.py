"""How sure the gate is: probabilities that come true at every place of a text, from what the library keeps."""

import pytest
import torch

from dylo_moe.continual.calibration import TEMPERATURES, held_out_nats, place_temperatures
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.routing.features import NUM_PLACES, causal_exponential_mean, places_of

SIZE, HALF_LIFE = 16, 32.0


class Documents:
    """Texts of one kind; every document has a mean of its own, so that texts differ more than their tokens say."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.mean = 0.8 * torch.randn(SIZE, generator=self.generator)

    def draw(self, count, length=100):
        """The router's memory after each token of texts."""
        own = self.mean + 0.5 * torch.randn(count, 1, SIZE, generator=self.generator)
        hidden = own + 2.0 * torch.randn(count, length, SIZE, generator=self.generator)
        mask = torch.ones(count, length, dtype=torch.bool)
        _, states = causal_exponential_mean(hidden, mask=mask, half_life=HALF_LIFE)
        return [states.each(lambda part, row=row: part[row]) for row in range(count)]


def means(texts):
    return [text.mean for text in texts]


def learned(names="abcd"):
    kinds, library = {name: Documents(index) for index, name in enumerate(names)}, SkillLibrary(SIZE)
    for name, kind in kinds.items():
        texts = kind.draw(60)
        library.learn(name, means(texts), expert=name)
        library.note_calibration(name, held_out_nats(library, name, texts, half_life=HALF_LIFE))
    return library, kinds


def posteriors(library, kinds, temperatures):
    """The probability of every kind for new texts, whether the likeliest is right, and the place of each token."""
    rows, bias = library.discriminants(list(kinds))
    found = []
    for index, kind in enumerate(kinds.values()):
        texts = kind.draw(80)
        place = torch.cat([places_of(text.mass[:, 0], half_life=HALF_LIFE) for text in texts])
        p = ((torch.cat(means(texts)).double() @ rows.T + bias) / temperatures.double()[place][:, None]).softmax(-1)
        found.append((p.amax(-1), p.argmax(-1) == index, place))
    return (torch.cat(parts) for parts in zip(*found, strict=True))


def calibration_error(sure, right):
    """The mean distance between how sure and how often right, over ten bins of sureness (Guo et al. 2017)."""
    bins = (sure * 10).long().clamp(max=9)
    return sum(
        float((sure[bins == one].mean() - right[bins == one].double().mean()).abs())
        * float((bins == one).double().mean())
        for one in bins.unique()
    )


def test_posteriors_are_honest_at_every_place():
    library, kinds = learned()
    temperatures = place_temperatures(library)
    sure, right, place = posteriors(library, kinds, temperatures)
    for one in range(NUM_PLACES):
        assert calibration_error(sure[place == one], right[place == one]) < 0.08, one
    naive, right, place = posteriors(library, kinds, torch.ones(NUM_PLACES))
    assert calibration_error(naive[place == 0], right[place == 0]) > 0.3
    assert temperatures[0] > temperatures[-1]


def test_held_out_texts_are_not_in_the_gate_that_judges_them():
    """Against the naive way: for each fold a library that never saw it, and the loss of a softmax."""
    names, everything = "ab", SkillLibrary(SIZE)
    texts = Documents(1).draw(8)
    everything.learn("a", means(Documents(0).draw(8)), expert="a")
    everything.learn("b", means(texts), expert="b")
    found = held_out_nats(everything, "b", texts, half_life=HALF_LIFE)
    expected = torch.zeros(NUM_PLACES, len(TEMPERATURES) + 1, dtype=torch.float64)
    for fold in torch.arange(8).chunk(4):
        library = SkillLibrary(SIZE)
        library.learn("a", means(Documents(0).draw(8)), expert="a")
        library.learn("b", [texts[index].mean for index in range(8) if index not in fold.tolist()], expert="b")
        rows, bias = library.discriminants(list(names))
        for index in fold:
            logits = texts[index].mean.double() @ rows.T + bias
            for token, place in enumerate(places_of(texts[index].mass[:, 0], half_life=HALF_LIFE)):
                losses = [-(logits[token] / temperature).log_softmax(-1)[1] for temperature in TEMPERATURES]
                expected[place] += torch.stack([*losses, torch.tensor(1.0, dtype=torch.float64)])
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("half_life", [4.0, 32.0, 500.0])
def test_a_place_is_told_from_what_a_mean_stands_on(half_life):
    """Tokens 1, 2, 3-4, 5-8 and so on, padding left out, and again from 1 where another packed text begins."""
    mask = torch.ones(1, 200, dtype=torch.bool)
    mask[:, :7] = False
    starts = torch.zeros_like(mask)
    starts[:, 150] = True
    _, states = causal_exponential_mean(torch.randn(1, 200, 8), mask=mask, half_life=half_life, starts=starts)
    places = places_of(states.mass[0, :, 0], half_life=half_life).tolist()

    def place(count):
        return max(0, (count - 1).bit_length()) if count <= 64 else 7

    assert places[7:150] == [place(count) for count in range(1, 144)]
    assert places[150:] == [place(count) for count in range(1, 51)]


def test_a_library_without_measured_losses_leaves_the_gate_as_sure_as_it_is():
    library = SkillLibrary(SIZE)
    library.learn("a", means(Documents(0).draw(8)), expert="a")
    assert torch.equal(place_temperatures(library), torch.ones(NUM_PLACES))
