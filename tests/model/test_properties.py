"""Properties of whole models, on drawn texts: what may be relabelled, reordered, split, doubled or padded."""

import contextlib
import copy
import functools
import logging
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference.tiny import force_path, padded, tiny_base, tiny_moe, tokens

from dylo_moe import DyLoRAMoE

NAMES = ("a", "b", "c", "d")
MODES = {"top 1": {"top_k": 1}, "top 2": {"top_k": 2}, "nascent": {"top_k": 1, "temperature": 0.7}}
FAMILIES_DRAWN = ["llama", "gemma3"]

drawn = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
seeds = st.integers(0, 2**31 - 1)
modes = st.sampled_from(list(MODES))
families = st.sampled_from(FAMILIES_DRAWN)
paths = st.sampled_from(["dense", "sparse"])
sides = st.sampled_from(["left", "right"])
lengths = st.lists(st.integers(1, 13), min_size=2, max_size=5)


@functools.cache
def pool(family="llama", mode="top 1", *, twin=False, num_experts=4, rank=4, rslora=False, **options):
    """Made once, and once more for a twin that a test writes into. With "nascent", the last expert is."""
    lora = {"r": rank, "use_rslora": rslora}
    model = tiny_moe(family, names=list(NAMES[:num_experts]), lora=lora, **{**MODES[mode], **options})
    model.experts[-1].mature = mode != "nascent"
    return model


def renamed(state, order):
    """What expert `order[i]` holds, under the name of expert i."""
    new = dict(zip(order, NAMES, strict=True))
    return {".".join(new.get(part, part) for part in key.split(".")): tensor for key, tensor in state.items()}


@contextlib.contextmanager
def on(path):
    """Every forward inside takes this kernel path, and records no gradient."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        force_path(patch, path)
        yield


def texts(lengths, seed):
    return [tokens(length, seed=seed + index) for index, length in enumerate(lengths)]


def batch(rows, side):
    """Padded, with the position ids that learned positions need."""
    ids, mask = padded(rows, side=side)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@drawn
@given(mode=modes, path=paths, seed=seeds, lengths=lengths, order=st.permutations(NAMES))
def test_relabelling_experts_permutes_the_routing_and_nothing_else(laws, mode, path, seed, lengths, order):
    model, other = pool("llama", mode), pool("llama", mode, twin=True)
    other.load_state_dict(renamed(model.state_dict(), order))
    inputs = batch(texts(lengths, seed), "left")
    with on(path):
        ours, theirs = other(**inputs), model(**inputs)
    columns = [NAMES.index(name) for name in order]
    law = "relabelling experts permutes the routing and nothing else"
    laws.close(law, ours.routing.logits, theirs.routing.logits[..., columns], atol=1e-5)
    laws.close(law, ours.routing.weights, theirs.routing.weights[..., columns], atol=1e-5)
    laws.close(law, ours.logits, theirs.logits, atol=1e-5)


@drawn
@given(family=families, mode=modes, path=paths, side=sides, seed=seeds, lengths=lengths, data=st.data())
def test_permuting_rows_permutes_results(laws, family, mode, path, side, seed, lengths, data):
    model, inputs = pool(family, mode), batch(texts(lengths, seed), side)
    order = data.draw(st.permutations(range(len(lengths))))
    with on(path):
        before, after = model(**inputs), model(**{name: tensor[order] for name, tensor in inputs.items()})
    law, real = "permuting rows permutes results", inputs["attention_mask"][order].bool()
    laws.close(law, after.logits[real], before.logits[order][real], family=family, atol=1e-5)
    laws.close(law, after.routing.weights, before.routing.weights[order], family=family, atol=1e-5)


@drawn
@given(family=families, mode=modes, path=paths, side=sides, seed=seeds, lengths=lengths)
def test_a_row_does_not_depend_on_its_batch_or_its_padding(laws, family, mode, path, side, seed, lengths):
    """Each row alone, unpadded; and beside other texts of other lengths."""
    model, rows = pool(family, mode), texts(lengths, seed)
    inputs = batch(rows, side)
    with on(path):
        together = model(**inputs)
        others = model(**batch([rows[0], *texts([9, 2], seed + 99)], side))
        for index, row in enumerate(rows):
            alone, real = model(input_ids=row[None]), inputs["attention_mask"][index].bool()
            law = "a row does not depend on its batch or its padding"
            laws.close(law, together.logits[index, real], alone.logits[0], family=family, atol=1e-5)
            laws.close(law, together.routing.weights[index, real], alone.routing.weights[0], family=family, atol=1e-5)
            if index == 0:
                place = slice(-len(row), None) if side == "left" else slice(0, len(row))
                laws.close(law, others.logits[0, place], alone.logits[0], family=family, atol=1e-5)


@drawn
@given(mode=modes, path=paths, side=sides, seed=seeds, lengths=lengths)
def test_weights_are_the_softmax_over_exactly_the_selected(laws, mode, path, side, seed, lengths):
    """One token at a time, in fp64, from the gate's logits."""
    model, inputs = pool("llama", mode), batch(texts(lengths, seed), side)
    with on(path):
        routing = model(**inputs).routing
    count = {"top 1": 1, "top 2": 2, "nascent": len(NAMES)}[mode]
    expected = torch.zeros_like(routing.weights, dtype=torch.float64)
    for row, token in inputs["attention_mask"].nonzero().tolist():
        logits = routing.logits[row, token].double() / (0.7 if mode == "nascent" else 1.0)
        selected = logits.argsort(descending=True)[:count]
        expected[row, token, selected] = logits[selected].softmax(0)
    laws.close("weights are the softmax over exactly the selected", routing.weights, expected, atol=1e-6)
    assert torch.equal(routing.weights > 0, expected > 1e-38)


@drawn
@given(path=paths, seed=seeds, lengths=lengths)
def test_dense_collaboration_towards_temperature_zero_is_top_1(laws, path, seed, lengths):
    cold, sparse = pool("llama", "nascent", temperature=1e-5), pool("llama", "top 1")
    cold.load_state_dict(sparse.state_dict())
    inputs = batch(texts(lengths, seed), "left")
    with on(path):
        ours, theirs = cold(**inputs), sparse(**inputs)
    first, second = theirs.routing.logits[theirs.routing.mask].topk(2).values.unbind(-1)
    assume((first - second).min() > 1e-3)
    law, real = "dense collaboration towards temperature 0 is top-1", theirs.routing.mask
    laws.close(law, ours.routing.weights, theirs.routing.weights, atol=1e-6)
    laws.close(law, ours.logits[real], theirs.logits[real], atol=1e-5)


@drawn
@given(path=paths, seed=seeds, lengths=lengths)
def test_top_k_of_all_experts_is_the_softmax_over_all(laws, path, seed, lengths):
    every, dense = pool("llama", "top 1", top_k=4), pool("llama", "nascent", temperature=1.0)
    dense.load_state_dict(every.state_dict())
    inputs = batch(texts(lengths, seed), "left")
    with on(path):
        ours, theirs = every(**inputs), dense(**inputs)
    law, mask = "top-k of all experts is the softmax over all", ours.routing.mask
    laws.equal(law, ours.routing.weights, theirs.routing.weights)
    laws.equal(law, ours.logits, theirs.logits)
    laws.close(law, ours.routing.weights[mask], ours.routing.logits.double().softmax(-1)[mask], atol=1e-6)


def with_experts(model, **ranks):
    """A copy of a model of one expert with nascent ones added; routing is dense."""
    model = copy.deepcopy(model)
    for name, rank in ranks.items():
        model.add_expert(name, rank=rank)
    return model


def matrices(model, name):
    """(A, B) of one expert, layer by layer."""
    parameters = list(model.experts.parameters(name))
    return zip(parameters[0::2], parameters[1::2], strict=True)


@settings(drawn, max_examples=8)
@given(
    rank=st.integers(1, 5), rslora=st.booleans(), temperature=st.sampled_from([0.5, 1.0, 3.0]), seed=seeds,
    lengths=lengths,
)  # fmt: skip
def test_an_expert_split_by_rank_is_the_sum_of_its_parts(laws, rank, rslora, temperature, seed, lengths):
    """B A = B1 A1 + B2 A2. The parts share the whole's probability (their logits are lower by T ln 2, so each has
    half its weight, and all others keep theirs), hence twice the B; the pool's scaling does not depend on the rank."""
    start = pool(num_experts=1, rank=6, rslora=rslora, temperature=temperature)
    whole = with_experts(start, whole=6)
    parts = with_experts(start, one=rank, two=6 - rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for row in (whole.router.gate["whole"], whole.router.gate["a"]):
            row.copy_(torch.randn(row.shape, generator=generator) * 3)
        parts.router.gate["a"].copy_(whole.router.gate["a"])
        for (_, b), (down, up) in zip(matrices(whole, "whole"), matrices(whole, "a"), strict=True):
            b.copy_(torch.randn(b.shape, generator=generator) * 0.3)
            assert down.shape[0] == up.shape[1] == 6
        for name, columns in (("one", slice(0, rank)), ("two", slice(rank, None))):
            parts.router.gate[name].copy_(whole.router.gate["whole"])
            parts.router.gate_bias[name].copy_(whole.router.gate_bias["whole"] - temperature * math.log(2))
            for (a, b), (whole_a, whole_b) in zip(matrices(parts, name), matrices(whole, "whole"), strict=True):
                a.copy_(whole_a[columns])
                b.copy_(whole_b[:, columns] * 2)
    inputs = batch(texts(lengths, seed), "right")
    with on("dense"):
        ours, theirs = parts(**inputs), whole(**inputs)
    law = "an expert split by rank is the sum of its parts"
    laws.close(law, ours.routing.weights[..., 1:].sum(-1), theirs.routing.weights[..., 1], atol=1e-6)
    laws.close(law, ours.routing.weights[..., 0], theirs.routing.weights[..., 0], atol=1e-6)
    laws.close(law, ours.logits, theirs.logits, atol=1e-5)


@drawn
@given(path=paths, seed=seeds, lengths=lengths, forced=st.booleans())
def test_an_expert_and_its_double_are_the_expert_alone(laws, path, seed, lengths, forced):
    """Both are selected with equal weights by every token (the gate's doing), at top-2 of four."""
    model = pool("llama", "top 2", twin=True, rank=5)
    with torch.no_grad():
        for (a, b), (double_a, double_b) in zip(matrices(model, "b"), matrices(model, "d"), strict=True):
            double_a.copy_(a)
            double_b.copy_(b)
        model.router.gate["d"].copy_(model.router.gate["b"])
        for name in ("b", "d"):
            model.router.gate_bias[name].fill_(1e3)
    inputs = batch(texts(lengths, seed), "left")
    with on(path):
        both = model(**inputs)
        with model.route_to("d" if forced else "b"):
            alone = model(**inputs)
    real = both.routing.mask
    law = "an expert and its double are the expert alone"
    laws.equal(law, both.routing.weights[real], torch.tensor([0.0, 0.5, 0.0, 0.5]).expand(int(real.sum()), 4))
    laws.close(law, both.logits[real], alone.logits[real], atol=1e-5)


def test_what_happens_to_a_pool_is_logged(caplog):
    caplog.set_level(logging.INFO, "dylo_moe")
    model = DyLoRAMoE.from_base(tiny_base("llama"), num_experts=2)
    model.add_expert("sql")
    model.mature("sql")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dylo_moe.")]
    assert said[0].startswith("DyLoRAMoE has 2 experts, on ")
    assert said[-1] == "expert sql is mature: it routes as the others do"
