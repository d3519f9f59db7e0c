"""Laws of a pool that grows with the data: new data is distinguished from known data, and nothing old moves."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from reference.tiny import LORA, force_path, tiny_base, tiny_moe

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.continual.gate_change import GateProbe
from dylo_moe.model.loading import load_into
from dylo_moe.routing.config import BASE

SKILLS = ("ant", "bee", "cat", "dog")
WORDS = 22
"""Token ids of each skill, its own."""


def sample(skill, *, rows=48, seed=0, length=40):
    """Batches of random texts of a skill's own tokens."""
    generator = torch.Generator().manual_seed(1000 * SKILLS.index(skill) + seed)
    low = 3 + SKILLS.index(skill) * WORDS
    ids = torch.randint(low, low + WORDS, (rows, length), generator=generator)
    return [{"input_ids": part} for part in ids.split(16)]


def growing(router=None, **config):
    return DyLoRAMoE.from_base(
        tiny_base(), lora=LoraConfig(**LORA), router=router, allow_expert_growth=True, growth=GrowthConfig(**config)
    ).eval()


@torch.no_grad()
def learn(model, skill, **options):
    """Add a skill and give its expert weights far from zero, as if it had been trained."""
    decision = model.add_skill(skill, sample(skill), **options)
    if decision.action == "grown":
        generator = torch.Generator().manual_seed(SKILLS.index(skill))
        for parameter in model.experts.parameters(decision.expert):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.mature(decision.expert)
    return decision


def grown(*skills, **config):
    model = growing(**config)
    for skill in skills:
        learn(model, skill)
    return model


def state(model, names):
    """What must not move: these experts' matrices and gate rows."""
    found = {name: list(map(torch.clone, model.experts.parameters(name))) for name in names if name != BASE}
    rows = {name: [model.router.gate[name].clone(), model.router.gate_bias[name].clone()] for name in names}
    return {name: [*found.get(name, []), *rows[name]] for name in names}


def logits(model, skill, **options):
    out = model(**sample(skill, seed=1, rows=8, **options)[0])
    return out.logits, out.routing


def share(routing, name):
    """The share of the tokens after the first few that an expert gets."""
    return float(routing.weights[:, 8:, routing.names.index(name)].mean())


def one_by_one(model, skill):
    """The output for each row alone, so that no other row's tokens change the sizes of its products."""
    ids = sample(skill, seed=1, rows=8)[0]["input_ids"]
    return [model(input_ids=row[None]) for row in ids]


# --- an empty pool


def test_a_pool_that_begins_empty_is_the_base(laws):
    model, base = growing(), tiny_base()
    batch = sample("ant")[0]
    laws.equal("an empty pool equals the base", model(**batch).logits, base(**batch).logits)
    assert model.router.names == (BASE,) and len(model.experts) == 0


def test_the_first_skill_is_new_and_trains_nothing_but_its_expert():
    model = growing()
    before = {name: p.clone() for name, p in model.base.named_parameters() if ".lora_" not in name}
    decision = model.add_skill("ant", sample("ant"), rank=2)
    assert (decision.novel, decision.nearest, decision.action, decision.expert) == (True, None, "grown", "ant")
    assert model.experts["ant"].rank == 2 and not model.experts["ant"].mature
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".ant." in name and ".lora_" in name for name in trainable)
    after = {name: p.clone() for name, p in model.base.named_parameters() if ".lora_" not in name}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_library_notes_where_a_new_skills_tokens_go_once_its_row_is_fitted():
    model = grown("ant", "bee")
    for skill in ("ant", "bee"):
        assert model.library[skill].shares[skill] > 0.85
        assert abs(sum(model.library[skill].shares.values()) - 1) < 1e-9


def test_all_of_it_follows_from_the_seed():
    one, other = grown("ant", "bee"), grown("ant", "bee")
    one_state, other_state = one.state_dict(), other.state_dict()
    assert all(torch.equal(one_state[name], other_state[name]) for name in one_state)


# --- what is new, what is known


@pytest.mark.parametrize("method", ["mahalanobis", "cosine"])
def test_new_skills_grow_and_known_ones_consolidate(method):
    model = growing(novelty=method)
    for count, skill in enumerate(SKILLS, start=1):
        assert learn(model, skill).action == "grown" and len(model.experts) == count
    for skill in SKILLS:
        decision = model.add_skill("again", sample(skill, seed=5))
        assert (decision.novel, decision.action, decision.nearest) == (False, "consolidated", skill), decision
        assert decision.expert == decision.skill == skill
        assert [expert.name for expert in model.experts if expert.trainable] == [skill]
    assert model.router.names == (BASE, *SKILLS)


def test_data_of_a_known_skill_is_skipped_or_grows_where_asked():
    model = grown("ant", "bee", known_skill="skip")
    before = copy.deepcopy(model.state_dict()), model.library.record()
    decision = model.add_skill("again", sample("ant", seed=5))
    assert (decision.action, decision.expert, decision.nearest) == ("skipped", None, "ant")
    assert all(torch.equal(before[0][name], value) for name, value in model.state_dict().items())
    assert before[1] == model.library.record()
    model = grown("ant", "bee", known_skill="grow")
    decision = model.add_skill("again", sample("ant", seed=5))
    assert (decision.novel, decision.action, decision.expert) == (False, "grown", "again")


def test_a_fixed_pool_reports_what_is_new_and_trains_nothing_unless_told():
    model = grown("ant", "bee")
    model.fix_pool()
    before = copy.deepcopy(model.state_dict())
    decision = model.add_skill("cat", sample("cat"))
    assert (decision.novel, decision.action, decision.expert) == (True, "reported", None)
    assert len(model.experts) == 2 and "cat" not in model.library
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    decision = model.add_skill("cat", sample("cat"), expert="bee")
    assert (decision.action, decision.expert, decision.skill) == ("consolidated", "bee", "cat")
    assert model.library["cat"].expert == "bee"


def test_a_new_expert_starts_as_the_nearest_one_or_with_zero_delta():
    model = grown("ant", "bee")
    decision = model.add_skill("cat", sample("cat"))
    pairs = zip(model.experts.parameters("cat"), model.experts.parameters(decision.nearest), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    fresh = grown("ant", "bee", start_from="fresh")
    fresh.add_skill("cat", sample("cat"))
    assert all(not p.any() for name, p in fresh.named_parameters() if ".lora_B.cat." in name)


# --- nothing old moves


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_the_growth_law_holds_over_a_whole_stream(laws, monkeypatch, path):
    """Old experts bit for bit, and the logits of all rows whose tokens keep their experts."""
    force_path(monkeypatch, path)
    model, seen = growing(RouterConfig(top_k=1)), []
    for skill in SKILLS:
        old = {name: state(model, [name])[name][:-2] for name in model.experts.names}
        learn(model, skill)
        for name, values in old.items():
            assert all(map(torch.equal, values, state(model, [name])[name])), name
        seen.append((skill, [(row.logits, row.routing) for row in one_by_one(model, skill)]))
    law = f"rows whose tokens keep their experts, after a whole stream, {path} path"
    num_rows = 0
    for skill, rows in seen:
        for (before, routing), row in zip(rows, one_by_one(model, skill), strict=True):
            was = torch.zeros_like(row.routing.weights)
            was[..., [row.routing.names.index(name) for name in routing.names]] = routing.weights
            if torch.equal(was, row.routing.weights):
                laws.close(law, row.logits, before, atol=0.0 if path == "sparse" else 1e-5)
                num_rows += 1
    assert num_rows > 16


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_frozen_gate_rows_stay_and_so_do_all_rows_that_choose_nothing_new(laws, monkeypatch, path):
    """Old experts and gate rows bit for bit, and the logits of all rows whose tokens choose none of the new ones."""
    force_path(monkeypatch, path)
    model, seen = growing(RouterConfig(top_k=1), gate_rows="frozen"), []
    for skill in SKILLS:
        old = state(model, model.router.names)
        learn(model, skill)
        for name, values in old.items():
            now = state(model, [name])[name]
            assert all(torch.equal(was, is_) for was, is_ in zip(values, now, strict=True)), name
        seen.append((skill, *logits(model, skill)))
    num_rows = 0
    for skill, before, routing in seen:
        after, now = logits(model, skill)
        newer = [index for index, name in enumerate(now.names) if name not in routing.names]
        same = ~(now.weights[..., newer] > 0).flatten(1).any(1) if newer else torch.ones(len(after), dtype=torch.bool)
        num_rows += int(same.sum())
        law = f"rows that choose none of the skills added later, after a whole stream, {path} path"
        laws.close(law, after[same], before[same], atol=0.0 if path == "sparse" else 1e-5)
    assert num_rows > 16


@pytest.mark.parametrize("lengths", [(1, 1), (3, 1), (40, 1), (1, 40)])
@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_first_skill_of_two_texts_is_learned_however_short_they_are(lengths, granularity):
    """Without one of them nothing is left to measure a covariance on: the matrix that remains is rounding."""
    model = growing(RouterConfig(granularity=granularity))
    texts = [{"input_ids": sample("ant", rows=1, length=length)[0]["input_ids"]} for length in lengths]
    assert model.add_skill("ant", texts).action == "grown"
    assert model.router.place_temperatures.isfinite().all()


def test_the_gate_before_a_growth_has_no_row_of_the_new_expert():
    """Its row is random until it is computed, and would take half of the tokens that go to the base."""
    model = grown("ant")
    probe = GateProbe(model.library, seed=0)
    before = probe.choices(model.router)
    model.add_expert("new")
    assert probe.choices(model.router, without="new") == before
    assert "new" in model.router.names


def test_a_model_with_temperatures_takes_a_checkpoint_without(tmp_path):
    """As when a stream that began before there were any is resumed."""
    model = grown("ant")
    temperatures, model.router.place_temperatures = model.router.place_temperatures, None
    model.save_pretrained(str(tmp_path / "old"))
    model.router.place_temperatures = temperatures
    load_into(model, tmp_path / "old")
    assert model.router.place_temperatures is None


def test_an_expert_that_is_told_to_learn_known_data_takes_no_skill_from_another():
    model = grown("ant", "bee")
    decision = model.add_skill("more", sample("ant", seed=5), expert="bee")
    assert (decision.skill, decision.expert) == ("more", "bee")
    assert model.library["ant"].expert == "ant" and model.growth.rows_follow_library


def test_unsure_tokens_are_mixed_and_sure_ones_go_to_one_expert_with_weight_exactly_1(laws):
    """In a forward, in the same way with one token after another from the cache, and by sequence too."""
    model = grown("ant", "bee", "cat")
    ids = torch.cat([sample("ant", seed=1, rows=8)[0]["input_ids"], sample("bee", seed=2, rows=8)[0]["input_ids"]], 1)
    with torch.no_grad():
        whole = model(input_ids=ids)
        first, rest = model(input_ids=ids[:, :40], use_cache=True), []
        for place in range(40, 60):
            step = model(input_ids=ids[:, place : place + 1], past_key_values=first.past_key_values, use_cache=True)
            rest.append(step.routing.weights)
    weights = whole.routing.weights
    counts = (weights > 0).sum(-1)
    assert (weights[counts == 1].amax(-1) == 1).all() and (counts > 1).any() and counts.max() <= 4
    assert (counts[:, :2] > 1).double().mean() > (counts[:, 20:40] > 1).double().mean()
    assert torch.equal(torch.cat([first.routing.weights, *rest], 1) > 0, weights[:, :60] > 0)
    laws.close("mixtures of the cache equal those of a whole forward", torch.cat(rest, 1), weights[:, 40:60], atol=1e-5)
    model.router_config = model.router.config = replace(model.router_config, change_rate=0.0)
    weights = model.route(ids).weights
    model.router_config = model.router.config = replace(model.router_config, granularity="sequence")
    with torch.no_grad():
        routing = model(input_ids=ids, prompt_lengths=torch.full((8,), 2)).routing
    assert torch.equal(routing.weights, routing.weights[:, :1].expand_as(routing.weights))
    laws.close("a sequence is mixed as the last token of its prompt", routing.weights[:, 0], weights[:, 1], atol=1e-6)


def test_the_gate_is_a_function_of_the_library_whatever_the_order_of_the_skills():
    one, other = grown("ant", "bee", "cat"), grown("cat", "ant", "bee")
    for name in ("ant", "bee", "cat"):
        assert torch.equal(one.router.gate[name], other.router.gate[name])
        assert torch.equal(one.router.gate_bias[name], other.router.gate_bias[name])


def test_a_growth_says_which_share_of_each_known_skill_changes_its_expert():
    """A second expert for known text takes about half of it, which is said; a skill of its own takes nothing."""
    model = grown("ant", "bee", known_skill="grow")
    decision = learn(model, "cat")
    assert set(decision.changed) == {"ant", "bee"} and max(decision.lost.values()) < 0.01
    assert decision.lost_too_much(model.growth.config) == []
    before = share(logits(model, "ant")[1], "ant")
    decision = model.add_skill("again", sample("ant", seed=5))
    model.mature("again")
    lost = before - share(logits(model, "ant")[1], "ant")
    assert decision.lost_too_much(model.growth.config) == ["ant"] and lost > 0.3
    assert 0.2 < decision.lost["ant"] < 0.8 and decision.changed["ant"] >= decision.lost["ant"]
    assert "ant" in decision.in_words("again") and decision.changed["bee"] < 0.1


def test_the_gate_of_a_joint_pool_stays_as_it_was_trained_unless_the_library_knows_every_expert():
    model = tiny_moe(num_experts=2)
    model.know_skill("ant", sample("ant"))
    model.enable_growth()
    old = state(model, ["expert_0", "expert_1"])
    learn(model, "cat")
    assert all(map(torch.equal, old[name], state(model, [name])[name]) for name in old)
    assert not model.growth.rows_follow_library and model.router.place_temperatures is None


def test_each_skill_goes_to_its_own_expert_and_unknown_text_to_the_base(laws):
    model = grown("ant", "bee", "cat")
    for skill in ("ant", "bee", "cat"):
        assert share(logits(model, skill)[1], skill) > 0.85
    unknown, routing = logits(model, "dog")
    assert share(routing, BASE) > 0.8
    whole = (routing.weights[..., 0] == 1).all(1)
    base = tiny_base()(**sample("dog", seed=1, rows=8)[0]).logits
    if whole.any():
        laws.close("rows that go to the base as a whole equal it", unknown[whole], base[whole], atol=1e-5)


def test_removing_an_expert_makes_its_skill_new_again():
    model = grown("ant", "bee", "cat")
    old = state(model, ["ant", "cat"])
    model.remove_expert("bee")
    assert model.router.names == (BASE, "ant", "cat") and "bee" not in model.library
    assert all(torch.equal(*pair) for name in old for pair in zip(old[name], state(model, [name])[name], strict=True))
    decision = model.add_skill("bee", sample("bee", seed=5))
    assert decision.novel and decision.action == "grown"


# --- forced routing, copies, checkpoints


def test_the_base_can_be_asked_for_by_route_to(laws):
    model = grown("ant", "bee")
    batch = sample("ant")[0]
    with model.route_to(None):
        out = model(**batch)
    laws.equal("route_to(None) of a grown pool equals the base", out.logits, tiny_base()(**batch).logits)
    assert out.routing.names[0] == BASE and (out.routing.weights[..., 0] == 1).all()


def test_a_checkpoint_comes_back_bit_for_bit_and_goes_on_as_if_it_had_not_been_saved(tmp_path):
    model = grown("ant", "bee")
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), base=tiny_base())
    assert loaded.router.names == model.router.names and loaded.allow_expert_growth
    assert loaded.library.record() == model.library.record()
    for skill in ("cat", "ant"):
        decisions = [copy_.add_skill(skill, sample(skill, seed=3), seed=7) for copy_ in (model, loaded)]
        assert decisions[0] == decisions[1]
    one, other = model.state_dict(), loaded.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_deep_copy_grows_on_its_own():
    model = grown("ant")
    twin = copy.deepcopy(model)
    twin.add_skill("bee", sample("bee"))
    assert model.router.names == (BASE, "ant") and "bee" not in model.library
    assert twin.router.names == (BASE, "ant", "bee")
    assert not model.add_skill("ant", sample("ant", seed=4)).novel


# --- a pool that was trained jointly


def joint():
    """Two experts with gate rows that no library made."""
    model = tiny_moe(num_experts=2, router_half_life=32.0)
    model.initialize_router([*sample("ant"), *sample("bee")])
    return model


def test_a_joint_pool_goes_on_once_its_skills_are_known(laws):
    model = joint()
    rows = {name: model.router.gate[name].clone() for name in model.router.names}
    before = {skill: logits(model, skill) for skill in ("ant", "bee")}
    for skill in ("ant", "bee"):
        assert model.know_skill(skill, sample(skill)) in rows
    model.enable_growth()
    for name, row in rows.items():
        assert torch.equal(row, model.router.gate[name])
    assert not model.add_skill("x", sample("ant", seed=2)).novel
    decision = learn(model, "cat")
    assert decision.action == "grown"
    for skill, (was, routing) in before.items():
        now, after = logits(model, skill)
        old = [after.names.index(name) for name in routing.names]
        same = (after.weights[..., old] == routing.weights).all(-1)
        assert same.float().mean() > 0.8
        as_before = same.cumprod(1).bool()
        laws.close("tokens of a joint pool before the first that changes", now[as_before], was[as_before], atol=1e-5)
    assert share(logits(model, "cat")[1], "cat") > 0.9


def test_a_joint_pool_whose_skills_are_not_known_does_not_grow():
    with pytest.raises(ValueError, match="know_skill"):
        joint().enable_growth()
    with pytest.raises(ValueError, match="no skill library"):
        joint().add_skill("ant", sample("ant"))


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 2, "allow_expert_growth": True}, "begins without experts"),
        ({"names": ["ant"], "allow_expert_growth": True}, "begins without experts"),
        ({"growth": GrowthConfig()}, "growth has no meaning"),
    ],
)
def test_from_base_refuses_what_cannot_apply(options, message):
    with pytest.raises(ValueError, match=message):
        DyLoRAMoE.from_base(tiny_base(), **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"novelty": "raw"}, "novelty is 'raw'"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate is 0.0"),
        ({"similarity_threshold": 1.0}, "similarity_threshold is 1.0"),
        ({"known_skill": "forget"}, "known_skill is 'forget'"),
        ({"start_from": "zero", "false_alarm_rate": 2}, "false_alarm_rate is 2.*|start_from is 'zero'"),
    ],
)
def test_a_growth_config_checks_itself(value, message):
    with pytest.raises(ValueError, match=message):
        GrowthConfig(**value)


@pytest.mark.parametrize(
    ("name", "message"), [("ant", "already"), ("not a name", "must be 1 to 64"), ("base", "one of")]
)
def test_add_skill_changes_nothing_where_the_name_cannot_be(name, message):
    model = grown("ant")
    before = model.library.record()
    with pytest.raises(ValueError, match=message):
        model.add_skill(name, sample("bee"))
    assert model.library.record() == before and model.router.names == (BASE, "ant")


def test_add_skill_needs_text_and_a_known_expert():
    model = grown("ant")
    for few in ([], sample("bee", rows=1)):
        with pytest.raises(ValueError, match=f"was given {len(few)} text"):
            model.add_skill("bee", few)
    assert model.router.names == (BASE, "ant")
    with pytest.raises(ValueError, match="there is no expert 'nobody'"):
        model.add_skill("bee", sample("bee"), expert="nobody")


def test_growth_with_deeper_routing_and_two_experts_a_token():
    router = RouterConfig(router_layer=1, top_k=2)
    model = DyLoRAMoE.from_base(
        tiny_base(num_hidden_layers=3), lora=LoraConfig(**LORA), router=router, allow_expert_growth=True
    ).eval()
    for skill in ("ant", "bee"):
        learn(model, skill)
    assert share(logits(model, "ant")[1], "ant") > 0.5
