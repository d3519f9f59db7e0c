"""Laws of torch.compile: a compiled model computes, learns and counts as the eager one does, in one graph."""

import contextlib
import copy
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from reference.tiny import gradients, padded, tiny_base, tiny_moe, tokens

ONE_LAYER = {"num_hidden_layers": 1}
GEMMA = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
CASES = {
    "gemma3, top 2": ("gemma3", GEMMA, {"top_k": 2}),
    "qwen3, by sequence": ("qwen3", ONE_LAYER, {"granularity": "sequence"}),
    "phi3, final": ("phi3", ONE_LAYER, {"top_k": 2, "router_layer": "final"}),
}
LINEAR = {"phi3": "qkv_proj", "gpt2": "c_attn"}
"""One linear a layer carries experts: the compiler's time goes with their number."""


def batch(seed=0, lengths=(14, 9)):
    ids, mask = padded([tokens(n, seed=n + seed) for n in lengths], side="right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def moe(family, base, router):
    return tiny_moe(tiny_base(family, **base), lora={"target_modules": [LINEAR.get(family, "v_proj")]}, **router)


@pytest.fixture
def compiled():
    """Compiles a copy of a model, without a break in the graph; the compiler forgets everything afterwards."""
    torch._dynamo.reset()
    yield lambda model, **options: torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True, **options)
    torch._dynamo.reset()


def steps(call, model, batches, *, inside=contextlib.nullcontext):
    """Optimizer steps; after each: the logits, the loss, the gradients, and what the router counted."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for inputs in batches:
        kept = {}

        def backward(inputs=inputs, kept=kept):
            with inside():
                kept["out"] = call(**inputs)
            kept["out"].loss.backward()
            kept["grads"] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()

        found = gradients(model, backward)
        out = kept["out"]
        counts = {"shares": model.router.shares.clone(), "step counts": model.router.step_counts.clone()}
        yield {"logits": out.logits, "loss": out.loss, "weights": out.routing.weights, **counts, **found}


def agree(laws, ours, theirs, *, family, bound=1e-6):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() >= other.keys()
        for name in mine.keys() - other.keys():  # an expert that no token chose: zeros here, no gradient there
            laws.equal("a compiled training step is the eager one", mine[name], torch.zeros_like(mine[name]))
        for name, tensor in other.items():
            scale = max(1.0, float(tensor.double().abs().max()))
            laws.close("a compiled training step is the eager one", mine[name] / scale, tensor / scale, family=family,
                       atol=bound)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_training_steps(laws, compiled, case):
    """Logits, loss, routing, every gradient, and the shares of the balance loss, over three optimizer steps."""
    family, base, router = CASES[case]
    model = moe(family, base, router).train()
    fast = compiled(model)
    batches = [batch(seed) for seed in (0, 20, 40)]
    theirs = list(steps(model, model, batches))
    agree(laws, list(steps(fast, fast._orig_mod, batches)), theirs, family=family)
    assert not torch.equal(theirs[0]["shares"], theirs[2]["shares"])
    assert any("lora_A" in name for name in theirs[0])


def test_a_second_shape(laws, compiled):
    """At top-1, with the straight-through gradient."""
    model = moe("llama", ONE_LAYER, {"top_k": 1, "z_loss_coefficient": 0.1}).train()
    fast = compiled(model, dynamic=False)
    batches = [batch(), batch(20), batch(9, (7, 12, 5))]
    agree(laws, list(steps(fast, fast._orig_mod, batches)), list(steps(model, model, batches)), family="llama")


def test_under_route_to(laws, compiled):
    model = moe("llama", ONE_LAYER, {"top_k": 1}).train()
    fast, rows, batches = compiled(model), ["expert_2", None], [batch(), batch(9)]
    theirs = list(steps(model, model, batches, inside=lambda: model.route_to(rows)))
    ours = list(steps(fast, fast._orig_mod, batches, inside=lambda: fast._orig_mod.route_to(rows)))
    agree(laws, ours, theirs, family="llama")
    assert {name.split(".")[-2] for name in theirs[0] if "lora" in name} == {"expert_2"}


def test_under_autocast_with_a_router_at_the_second_layer(laws, compiled):
    model = moe("llama", {}, {"top_k": 2, "router_layer": 1}).train()
    fast, batches = compiled(model), [batch(), batch(9)]

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    theirs = list(steps(model, model, batches, inside=autocast))
    assert theirs[0]["logits"].dtype == torch.bfloat16
    agree(laws, list(steps(fast, fast._orig_mod, batches, inside=autocast)), theirs, family="llama", bound=1e-4)


def test_gpt2_compiles_once_its_kind_of_loss_is_named(laws, compiled):
    """Its config has no loss_type, of which Transformers warns where there are labels, and that breaks the graph."""
    model = moe("gpt2", ONE_LAYER, {"top_k": 1}).train()
    model.base.loss_type = "ForCausalLM"
    fast = compiled(model)
    agree(laws, list(steps(fast, fast._orig_mod, [batch()])), list(steps(model, model, [batch()])), family="gpt2")


HEADER = Path(sysconfig.get_path("include")) / "Python.h"


@pytest.mark.skipif(not (shutil.which("g++") and HEADER.is_file()), reason="inductor needs g++ and Python's headers")
def test_the_default_backend(laws):
    """Forward and backward through inductor's own kernels."""
    torch._dynamo.reset()
    model = moe("llama", ONE_LAYER, {"top_k": 1}).train()
    fast = torch.compile(copy.deepcopy(model), fullgraph=True)
    ours, theirs = list(steps(fast, fast._orig_mod, [batch()])), list(steps(model, model, [batch()]))
    agree(laws, ours, theirs, family="llama", bound=1e-5)
    torch._dynamo.reset()
