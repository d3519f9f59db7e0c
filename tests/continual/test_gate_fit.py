"""Gate rows from the library alone: they route what they never saw, and leave the others as they are."""

import inspect
import json
import pydoc_data.topics
import tokenize

import pytest
import torch

from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.base.packages import EMBEDDED_BASE
from dylo_moe.continual.gate_fit import fit_row, refit_rows
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.routing.config import BASE, RouterConfig
from dylo_moe.routing.features import causal_exponential_mean
from dylo_moe.routing.router import Router

SIZE = 16


class Kind:
    """A source of texts: a mean of its own, and a covariance that all kinds share."""

    def __init__(self, seed, *, far=6.0):
        self.generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(SIZE, generator=self.generator)
        self.mean = far * direction / direction.norm() + 2.0

    def texts(self, count):
        return list(self.mean + torch.randn(count, 20, SIZE, generator=self.generator) * torch.linspace(0.5, 1.5, SIZE))


def new_router():
    router = Router(RouterConfig(), hidden_size=SIZE, names=())
    router.add_base()
    return router


def learn(router, library, name, kind, seed=0):
    library.learn(name, kind.texts(40), expert=name, seed=seed)
    router.add_row(name)
    router.set_row(name, *fit_row(router, library, name, seed=seed))


def grown(names, base=True):
    router, library = new_router(), SkillLibrary(SIZE)
    kinds = {name: Kind(index + 1) for index, name in enumerate(names)}
    kinds[BASE] = Kind(100, far=0.0)
    if base:
        library.learn(BASE, kinds[BASE].texts(40), expert=BASE)
    for name in names:
        learn(router, library, name, kinds[name])
    return router, library, kinds


def shares(router, kind):
    """Which members the tokens of new texts of a kind choose."""
    chosen = router.logits(torch.cat(kind.texts(50))).argmax(-1)
    return dict(zip(router.names, (chosen.bincount(minlength=len(router.names)) / len(chosen)).tolist(), strict=True))


def test_each_skill_goes_to_its_own_expert_and_other_text_to_the_base():
    router, _, kinds = grown("abcd")
    for name, kind in kinds.items():
        assert shares(router, kind)[name] > 0.97, (name, shares(router, kind))


def test_older_rows_stay_bit_for_bit_and_so_do_their_logits():
    router, library, kinds = grown("abc")
    before = {key: tensor.clone() for key, tensor in router.state_dict().items() if key.startswith("gate")}
    tokens = torch.cat(kinds["a"].texts(5))
    logits = router.logits(tokens)
    learn(router, library, "d", Kind(9))
    after = router.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(router.logits(tokens)[:, : len(router.names) - 1], logits)


def test_fitting_reads_no_text_and_no_other_state():
    """The library and the router's rows are all that is read: neither changes, and nor does the global random state."""
    router, library, _ = grown("ab")
    state, tensors = router.state_dict(), {key: tensor.clone() for key, tensor in library.tensors().items()}
    before, random_state = {key: tensor.clone() for key, tensor in state.items()}, torch.get_rng_state()
    fit_row(router, library, "b", seed=1)
    refit_rows(router, library)
    assert all(torch.equal(router.state_dict()[key], before[key]) for key in before)
    assert all(torch.equal(library.tensors()[key].nan_to_num(), tensors[key].nan_to_num()) for key in tensors)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_one_seed_gives_one_row_and_another_nearly_the_same():
    router, library, _ = grown("abc")
    one, again, other = (fit_row(router, library, "c", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])
    found = []
    for row in (one, other):
        router.set_row("c", *row)
        found.append(router.logits(torch.cat(Kind(3).texts(50))).argmax(-1))
    assert (found[0] == found[1]).double().mean() > 0.99


def test_rows_fitted_in_turn_route_as_rows_refitted_together():
    router, library, kinds = grown("abcd")
    in_turn = {name: shares(router, kind)[name] for name, kind in kinds.items()}
    rows = refit_rows(router, library)
    assert list(rows) == list("abcd")
    for name, row in rows.items():
        router.set_row(name, *row)
    for name, kind in kinds.items():
        assert shares(router, kind)[name] == pytest.approx(in_turn[name], abs=0.03)


def test_a_refit_is_the_linear_discriminant():
    """log N(x; m_e, C) - log N(x; m_base, C), for every expert and any x."""
    router, library, kinds = grown("abc")
    for name, row in refit_rows(router, library).items():
        router.set_row(name, *row)
    x = torch.cat(kinds["b"].texts(2))
    means = [library[name].mean.double() for name in router.names]
    densities = [
        torch.distributions.MultivariateNormal(mean, library.covariance).log_prob(x.double()) for mean in means
    ]
    expected = torch.stack(densities, 1) - densities[0][:, None]
    torch.testing.assert_close(router.logits(x).double(), expected, atol=2e-3, rtol=1e-4)


def test_a_refit_does_not_depend_on_names_or_order_bit_for_bit():
    routers = []
    samples = {index: Kind(index).texts(40) for index in (1, 2, 3)}
    for names in ({1: "x", 2: "y", 3: "z"}, {3: "x", 1: "z", 2: "y"}):
        router, library = new_router(), SkillLibrary(SIZE)
        for index, name in names.items():
            library.learn(name, samples[index], expert=name)
            router.add_row(name)
        routers.append({index: refit_rows(router, library)[name] for index, name in names.items()})
    for index in samples:
        assert all(torch.equal(*pair) for pair in zip(routers[0][index], routers[1][index], strict=True))


def test_rows_of_a_joint_training_are_met_as_they_are():
    """Small rows on shifted and scaled features, and a base that joins last: all stay, and all find their text."""
    kinds = {name: Kind(index + 1) for index, name in enumerate("abc")}
    router = Router(RouterConfig(router_half_life=4.0), hidden_size=SIZE, names=("a", "b"))
    router.initialize([text for name in "ab" for text in kinds[name].texts(20)], seed=0)
    owner = {name: max(shares(router, kinds[name]).items(), key=lambda item: item[1])[0] for name in "ab"}
    library = SkillLibrary(SIZE)
    library.learn(BASE, Kind(100, far=0.0).texts(40), expert=BASE)
    for name in "ab":
        library.learn(name, kinds[name].texts(40), expert=owner[name])
    router.add_base()
    router.set_row(BASE, *fit_row(router, library, BASE, seed=0))
    learn(router, library, "c", kinds["c"])
    for name in "abc":
        assert shares(router, kinds[name])[owner.get(name, "c")] > 0.95
    assert shares(router, Kind(100, far=0.0))[BASE] > 0.8


def test_an_expert_of_two_skills_gets_both():
    router, library, kinds = grown("abc")
    more = Kind(7)
    library.learn("more", more.texts(40), expert="c")
    router.set_row("c", *fit_row(router, library, "c", seed=0))
    assert shares(router, more)["c"] > 0.9
    assert shares(router, kinds["c"])["c"] > 0.9
    assert shares(router, kinds["a"])["a"] > 0.9


def test_without_skills_there_is_nothing_to_fit():
    router, library, _ = grown("ab")
    router.add_row("c")
    with pytest.raises(ValueError, match="expert 'c' has no skill in the library"):
        fit_row(router, library, "c", seed=0)
    with pytest.raises(ValueError, match="learned no skill yet"):
        refit_rows(router, SkillLibrary(SIZE))


# Real text


@pytest.mark.end_to_end
def test_on_real_features_each_kind_finds_its_row():
    """Python's own sources, and its English reference, from other parts of each than those that were learned."""
    tokenizer = load_tokenizer(EMBEDDED_BASE)
    embedding = load_base(EMBEDDED_BASE, dtype=torch.float32).get_input_embeddings().weight.detach()

    def features(text):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        rows = ids[: len(ids) // 128 * 128].view(-1, 128)
        mask = torch.ones_like(rows, dtype=torch.bool)
        return list(causal_exponential_mean(embedding[rows], mask=mask, half_life=32.0)[0])

    texts = {
        "python": features("\n".join(map(inspect.getsource, (json.decoder, inspect, tokenize)))),
        "english": features(
            "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:40])
        ),
    }
    router = Router(RouterConfig(), hidden_size=embedding.shape[1], names=())
    router.add_base()
    library = SkillLibrary(embedding.shape[1])
    for name, some in texts.items():
        library.learn(name, some[:60], expert=name)
        router.add_row(name)
        router.set_row(name, *fit_row(router, library, name, seed=0))
    for name, some in texts.items():
        chosen = router.logits(torch.cat([text[32:] for text in some[60:120]])).argmax(-1)
        assert (chosen == router.names.index(name)).double().mean() > 0.9
