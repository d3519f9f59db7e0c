"""docs/sizes.md: its tables are those of benchmarks/deployment/sizes.py, which agree with the model and the plan."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
from reference.paths import ROOT

from dylo_moe.commands.plan.memory_account import peak_memory
from dylo_moe.commands.plan.workload import Batch, Workload

PAGE = (ROOT / "docs" / "sizes.md").read_text(encoding="utf-8")
SMOL, MISTRAL = "HuggingFaceTB/SmolLM2-135M", "mistralai/Mistral-7B-v0.1"


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizes", ROOT / "benchmarks" / "deployment" / "sizes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sizes"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("table", ["parts", "checkpoints", "nodes"])
def test_the_page_has_the_lines_that_the_script_prints(sizes, table):
    assert "\n".join(sizes.TABLES[table]()) in PAGE


def test_the_page_has_every_table_of_the_script(sizes):
    for table in sizes.TABLES:
        assert f"`{table}`" in PAGE


def test_mistral_by_hand(sizes):
    """hidden 4096, 8 of 32 heads for keys and values, MLP 14336, 32 layers; one expert of rank 16."""
    attention, mlp = (4096 + 4096) * 2 + (4096 + 1024) * 2, (4096 + 14_336) * 3
    assert 16 * sizes.shape(MISTRAL).expert == 16 * 32 * (attention + mlp) == 41_943_040
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    of = sizes.shape(MISTRAL)
    assert (of.linears, of.largest_linear, of.layer) == (32 * layer, 4096 * 14_336, layer + 2 * 4096)
    assert of.parameters == of.num_layers * of.layer + 2 * 32_000 * 4096 + 4096
    assert sizes.TRAINED * 41_943_040 == 671_088_640  # weight, gradient, two states: 16 bytes


def test_a_base_in_four_bits_is_what_was_measured(sizes):
    """docs/performance.md: 111.5 MB of tensors, of which 54.9 are linears."""
    of = sizes.shape(SMOL)
    assert of.linears * sizes.NF4 / 1e6 == pytest.approx(54.9, abs=0.2)
    assert (of.linears * sizes.NF4 + 2 * (of.parameters - of.linears)) / 1e6 == pytest.approx(111.5, abs=0.2)


@pytest.mark.parametrize(("num_experts", "checkpointing"), [(4, True), (24, False)])
def test_a_peak_from_four_experts_is_what_the_command_plans(sizes, num_experts, checkpointing):
    """Exact for four, whose step is followed; of more, a few shorter runs of tokens are not seen."""
    batch = Batch(2, 64)
    more = ("--gradient_checkpointing", "true") if checkpointing else ()
    of = sizes.outlined(SMOL, "--num_experts", str(num_experts), "--lora_r", "16", *more)
    planned = peak_memory(of, Workload(0, 0, 0, 0, batch, batch, 0)).total
    computed = sizes.peak_bytes(SMOL, num_experts, 16, batch, checkpointing)
    assert computed == pytest.approx(planned, rel=0.03 if num_experts > 4 else 1e-3)
    assert computed >= 0.999 * planned


def test_the_largest_pool_is_the_largest_that_fits(sizes):
    assert [sizes.most(lambda n, limit=limit: n <= limit) for limit in range(20)] == list(range(20))
