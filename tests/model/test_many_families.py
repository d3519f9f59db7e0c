"""Kinds of bases that once failed, through the laws of benchmarks/bases/families.py, which tries every family."""

import dataclasses
import importlib
import sys

import pytest
import transformers
from reference.paths import ROOT

from dylo_moe.routing.features import causal_sums

pytestmark = pytest.mark.skipif(
    not dataclasses.is_dataclass(transformers.LlamaConfig), reason="the benchmark reads configs as dataclasses"
)
FOLDER = ROOT / "benchmarks" / "bases"

KINDS = {
    "falcon": "reads its dropout from the config in each forward",
    "mixtral": "noise in an MoE base's own router",
    "llama4_text": "an MoE base's own router is a linear that returns a tuple",
    "youtu": "a linear that reads the cache of latents",
    "qwen3_next": "linear attention beside full attention, and MoE experts beside shared linears",
    "lfm3_vl": "a vision tower with a linear that is called as one of the text's layers below the router",
}
READ_IMAGES = {"lfm3_vl"}


@pytest.fixture(scope="module")
def family_laws():
    """The benchmark's modules import each other as scripts of one folder do."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("family_laws")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("family", KINDS)
def test_a_kind_of_base_that_failed_keeps_every_law(family_laws, family):
    outcomes = list(family_laws.try_family(family, wrapper=family in READ_IMAGES))
    wrong = [f"{outcome.law}: {outcome.message}" for outcome in outcomes if outcome.kind != family_laws.PASS]
    assert not wrong
    assert {outcome.law for outcome in outcomes} >= family_laws.LAWS.keys()


def test_a_law_that_does_not_hold_is_told(family_laws, monkeypatch):
    """Else the law above would hold for any model: here the router forgets what it read before."""
    monkeypatch.setattr(
        "dylo_moe.model.routing_hooks.causal_sums",
        lambda tokens, **inputs: causal_sums(tokens, **{**inputs, "state": None}),
    )
    kinds = {outcome.law: outcome.kind for outcome in family_laws.try_family("llama")}
    told = {law for law, kind in kinds.items() if kind == family_laws.WRONG}
    assert told == {"cached = uncached", "cached = uncached, router at layer 1"}
    assert set(kinds.values()) == {family_laws.PASS, family_laws.WRONG}
