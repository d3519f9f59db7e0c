"""Laws of one routed linear: every path equals the loop over tokens and experts, forward and backward."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from reference.routed_linear import Delta, call, naive_routed_linear
from reference.tiny import force_path
from torch import nn

from dylo_moe.experts import memory_layout as storage
from dylo_moe.experts.layer import RoutedLinear, compute_dtype
from dylo_moe.experts.memory_layout import pack
from dylo_moe.routing.dispatch import Dense, Grouped
from dylo_moe.routing.forward_context import ContextSlot
from dylo_moe.routing.router import Routing, force_routing, make_dispatch, select_top_k

NAMES = ("a", "b", "c", "d")
RANKS = {"a": 4, "b": 1, "c": 3, "d": 8}
ALPHA = 6
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6, torch.bfloat16: 4e-2}
"""The allowed difference as a share of the largest entry. fp64 is held to fp32's precision because routing weights are
fp32 by contract."""


def routed_linear(*, width=(10, 7), ranks=RANKS, dtype=torch.float32, bias=True, dropout=0.0, base_dtype=None):
    """A packed routed linear with experts far from zero, in training mode."""
    holder = nn.ModuleDict({"linear": nn.Linear(*width, bias=bias)})
    for name, rank in ranks.items():
        config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["linear"])
        inject_adapter_in_model(config, holder, adapter_name=name)
    routed = holder["linear"]
    routed.__class__ = RoutedLinear
    for name in ranks:
        nn.init.normal_(routed.lora_B[name].weight)
        nn.init.normal_(routed.lora_A[name].weight)
    routed.to(dtype)
    routed.base_layer.to(base_dtype or dtype).requires_grad_(False)
    for name in ranks:
        routed.lora_A[name].requires_grad_(True)
        routed.lora_B[name].requires_grad_(True)
    routed.bind(ContextSlot(), NAMES)
    pack(routed)
    return routed.train()


def routing_case(batch, seq, top_k, *, runs=(), padding=False):
    """Routing weights (a leaf, zero where not selected) and the selection, as a router would give them."""
    logits = torch.randn(batch, seq, len(NAMES))
    if runs:
        first, second = runs
        logits = torch.zeros(batch, seq, len(NAMES))
        logits[:, : seq // 2, first] = 9.0
        logits[:, seq // 2 :, second] = 9.0
    mask = torch.ones(batch, seq, dtype=torch.bool)
    if padding:
        mask[0, : seq // 2] = False
        mask[-1, seq - 1 :] = False
    selected = None if top_k == len(NAMES) else logits.topk(top_k, dim=-1).indices
    chosen = torch.ones_like(logits) if selected is None else torch.zeros_like(logits).scatter(-1, selected, 1.0)
    chosen = chosen * mask[..., None]
    raw = (torch.rand(batch, seq, len(NAMES)) + 0.1).requires_grad_()
    return raw, chosen, selected, mask


def naive(routed, x, weights, names=NAMES):
    experts = {
        name: Delta(routed.lora_A[name].weight.double(), routed.lora_B[name].weight.double(), routed.scaling[name])
        for name in routed.lora_A
    }
    base = routed.base_layer
    bias = None if base.bias is None else base.bias.double()
    return naive_routed_linear(
        x.double(), weight=base.weight.double(), bias=bias, experts=experts, names=names, weights=weights.double()
    )


def leaves(routed, x, raw):
    adapters = {
        f"{kind}.{name}": getattr(routed, kind)[name].weight for name in routed.lora_A for kind in ("lora_A", "lora_B")
    }
    return {"x": x, "routing weights": raw, **{name: p for name, p in adapters.items() if p.requires_grad}}


def assert_close(ours, reference, dtype, what):
    scale = reference.abs().max().clamp_min(1e-3)
    error = (ours.double() - reference.double()).abs().max() / scale
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e}"


def check_parity(routed, x, raw, chosen, dispatch_of, *, dtype):
    """Output and all gradients of the routed linear against the naive loop."""
    wanted = leaves(routed, x, raw)
    reference = naive(routed, x, raw * chosen)
    direction = torch.randn(reference.shape, dtype=torch.float64)
    expected = torch.autograd.grad((reference * direction).sum(), list(wanted.values()), allow_unused=True)
    y = call(routed, x, dispatch_of(raw * chosen))
    assert_close(y, reference, dtype, "output")
    ours = torch.autograd.grad((y.double() * direction).sum(), list(wanted.values()), allow_unused=True)
    for name, mine, theirs, leaf in zip(wanted, ours, expected, wanted.values(), strict=True):
        zeros = torch.zeros_like(leaf)
        assert_close(zeros if mine is None else mine, zeros if theirs is None else theirs, dtype, f"gradient of {name}")
    with torch.no_grad():
        top_k = int(chosen.sum(-1).max())
        weights = chosen * (1.0 if top_k == 1 else raw)  # without a gradient, a single expert's weight is 1
        assert_close(call(routed, x, dispatch_of(weights)), naive(routed, x, weights), dtype, "without grad")
    return y


CASES = {
    "many tokens": {"batch": 3, "seq": 17},
    "one token": {"batch": 1, "seq": 1},
    "one token a row": {"batch": 5, "seq": 1},
    "padding": {"batch": 3, "seq": 17, "padding": True},
    "runs": {"batch": 1, "seq": 60, "runs": (2, 1)},
    "runs in order": {"batch": 1, "seq": 60, "runs": (1, 2)},
    "runs and padding": {"batch": 1, "seq": 120, "runs": (1, 2), "padding": True},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_path_equals_the_naive_loop(monkeypatch, case, top_k, path, dtype):
    force_path(monkeypatch, path)
    routed = routed_linear(dtype=dtype)
    raw, chosen, selected, mask = routing_case(top_k=top_k, **CASES[case])
    x = torch.randn(*mask.shape, 10, dtype=dtype, requires_grad=True)

    def dispatch_of(weights):
        routing = Routing(NAMES, weights, mask, None)
        dispatch = make_dispatch(routing, selected, layouts=[routed.layout], dtype=dtype)
        part = dispatch.parts[routed.layout]
        at_hand = NAMES if selected is None else selected[mask].unique()
        assert isinstance(part, Dense if path == "dense" or len(at_hand) == top_k else Grouped)
        if isinstance(part, Grouped):  # nothing is moved where the tokens lie in order already
            assert (part.rows_N is None) == (case == "runs in order" and top_k == 1)
        return dispatch

    y = check_parity(routed, x, raw, chosen, dispatch_of, dtype=dtype)
    assert y.dtype == dtype


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("frozen", [(), ("a", "c")], ids=["all learn", "two learn"])
def test_the_grouped_kernel_equals_the_naive_loop(monkeypatch, frozen, top_k, dtype, device):
    """PyTorch has it for widths of whole 16 bytes."""
    force_path(monkeypatch, "sparse")
    routed = routed_linear(width=(24, 40), ranks=dict.fromkeys(NAMES, 8), dtype=dtype).to(device)
    for name in frozen:
        routed.lora_A[name].requires_grad_(False)
        routed.lora_B[name].requires_grad_(False)
    pack(routed)
    raw, chosen, selected, mask = (tensor.to(device) for tensor in routing_case(3, 17, top_k, padding=True))
    raw = raw.detach().requires_grad_()
    x = torch.randn(3, 17, 24, dtype=dtype, device=device, requires_grad=True)
    calls, real = [], nn.functional.grouped_mm
    monkeypatch.setattr(nn.functional, "grouped_mm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))

    def dispatch_of(weights):
        return make_dispatch(Routing(NAMES, weights, mask, None), selected, layouts=[routed.layout], dtype=dtype)

    check_parity(routed, x, raw, chosen, dispatch_of, dtype=dtype)
    assert len(calls) == (6 if device == "cpu" or dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("width", [(10, 7), (1, 5), (5, 1), (33, 64)], ids=str)
@pytest.mark.parametrize("ranks", [{"b": 5}, {"a": 2, "d": 1}], ids=["one expert here", "two here"])
def test_experts_that_a_layer_does_not_have_add_nothing_there(monkeypatch, ranks, width, top_k, path):
    force_path(monkeypatch, path)
    routed = routed_linear(ranks=ranks, width=width, bias=False)
    raw, chosen, selected, mask = routing_case(2, 11, top_k, padding=True)
    x = torch.randn(2, 11, width[0], requires_grad=True)

    def dispatch_of(weights):
        return make_dispatch(
            Routing(NAMES, weights, mask, None), selected, layouts=[routed.layout], dtype=torch.float32
        )

    check_parity(routed, x, raw, chosen, dispatch_of, dtype=torch.float32)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("experts", [["a", None, "c"], [None, None, None], ["d", "d", "b"], ["b", "b", "b"]], ids=str)
def test_forced_rows_equal_the_naive_loop_and_base_rows_the_base_bit_for_bit(experts, grad):
    routed = routed_linear()
    x = torch.randn(3, 6, 10, requires_grad=grad)
    mask = torch.ones(3, 6, dtype=torch.bool)
    routing, dispatch = force_routing(NAMES, experts, mask=mask, layouts=[routed.layout], dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        y = call(routed, x, dispatch)
    assert_close(y, naive(routed, x, routing.weights), torch.float32, "output")
    base = routed.base_layer(x)
    for row, expert in enumerate(experts):
        assert torch.equal(y[row], base[row]) == (expert is None)


@pytest.mark.parametrize("tokens", [[9, 10], [0], [2, 3, 4, 7], [1, 11]], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_one_expert_on_some_tokens_equals_the_naive_loop_and_the_others_are_the_base_s(tokens, grad):
    """As where an answer's header ends a prompt; without gradients, tokens side by side are not moved."""
    routed, x = routed_linear(), torch.randn(2, 6, 10, requires_grad=grad)
    mask = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(tokens), True).view(2, 6)
    weights, selected = mask[..., None] * torch.eye(4)[2], torch.where(mask[..., None], 2, -1)
    routing = Routing(NAMES, weights, mask, None)
    dispatch = make_dispatch(routing, selected, layouts=[routed.layout], dtype=torch.float32, is_exact=True)
    part = dispatch.parts[routed.layout]
    assert (part.span is not None) == (tokens[-1] - tokens[0] + 1 == len(tokens))
    with torch.set_grad_enabled(grad):
        y = call(routed, x, dispatch)
    assert_close(y, naive(routed, x, weights), torch.float32, "output")
    base = routed.base_layer(x)
    assert torch.equal(y[~mask], base[~mask]) and not torch.isclose(y[mask], base[mask]).all()


def test_weight_exactly_one_without_gradient_equals_the_weighted_product(monkeypatch):
    """At top_k=1 without gradients the weights are left out of the products; that must not be seen."""
    force_path(monkeypatch, "sparse")
    routed = routed_linear(ranks=dict.fromkeys(NAMES, 4))
    logits = torch.randn(2, 13, len(NAMES))
    weights, selected = select_top_k(logits, top_k=1)
    x, mask = torch.randn(2, 13, 10), torch.ones(2, 13, dtype=torch.bool)
    shortcut = make_dispatch(
        Routing(NAMES, weights, mask, logits), selected, layouts=[routed.layout], dtype=torch.float32
    )
    assert shortcut.parts[routed.layout].weights_N1 is None
    with torch.no_grad():
        assert_close(call(routed, x, shortcut), naive(routed, x, weights), torch.float32, "output")


@pytest.mark.parametrize("top_k", [1, 2])
def test_straight_through_gradient_of_the_gate_is_the_analytic_one(monkeypatch, top_k):
    """k = 1: d loss / d logit_j = p_s ([j = s] - p_j) <dL/dy, delta_s>; k > 1: the softmax over the selected."""
    for path in ("dense", "sparse"):
        force_path(monkeypatch, path)
        routed = routed_linear(dtype=torch.float64)
        logits = torch.randn(2, 9, len(NAMES), requires_grad=True)
        weights, selected = select_top_k(logits, top_k=top_k)
        x, mask = torch.randn(2, 9, 10, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool)
        dispatch = make_dispatch(
            Routing(NAMES, weights, mask, logits), selected, layouts=[routed.layout], dtype=torch.float64
        )
        direction = torch.randn(2, 9, 7, dtype=torch.float64)
        (ours,) = torch.autograd.grad((call(routed, x, dispatch) * direction).sum(), logits)

        one_hot = torch.eye(len(NAMES), dtype=torch.float64)
        base = naive(routed, x, torch.zeros(2, 9, len(NAMES)))
        deltas = [naive(routed, x, one_hot[e].expand(2, 9, -1)) - base for e in range(len(NAMES))]
        gain = torch.stack([(delta * direction).sum(-1) for delta in deltas], -1).detach()
        z = logits.detach().double().requires_grad_()
        kept = z if top_k == 1 else z.gather(-1, selected)
        p = kept.softmax(-1)
        if top_k == 1:
            p = p.gather(-1, selected)
        (expected,) = torch.autograd.grad((p * gain.gather(-1, selected)).sum(), z)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_dropout_of_both_paths_is_the_same_mask(monkeypatch, top_k):
    routed = routed_linear(dropout=0.5)
    raw, chosen, selected, mask = routing_case(2, 19, top_k)
    x, outputs = torch.randn(2, 19, 10), {}
    for path in ("dense", "sparse"):
        force_path(monkeypatch, path)
        dispatch = make_dispatch(
            Routing(NAMES, raw * chosen, mask, None), selected, layouts=[routed.layout], dtype=torch.float32
        )
        torch.manual_seed(3)
        outputs[path] = call(routed, x, dispatch)
    assert_close(outputs["sparse"], outputs["dense"], torch.float32, "sparse against dense")
    torch.manual_seed(3)
    dropped, nothing = nn.functional.dropout(x, 0.5), torch.zeros_like(raw)
    delta = naive(routed, dropped, raw * chosen) - naive(routed, dropped, nothing)
    assert_close(outputs["dense"], naive(routed, x, nothing) + delta, torch.float32, "only the experts' input drops")


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("setting", ["bf16 base, fp32 experts", "autocast"])
def test_mixed_precision_equals_the_naive_loop_in_the_base_dtype(monkeypatch, setting, top_k, path):
    force_path(monkeypatch, path)
    autocast = setting == "autocast"
    routed = routed_linear(base_dtype=torch.float32 if autocast else torch.bfloat16)
    raw, chosen, selected, mask = routing_case(3, 17, top_k, padding=True)
    x = torch.randn(3, 17, 10, dtype=torch.float32 if autocast else torch.bfloat16, requires_grad=True)

    def dispatch_of(weights):
        dtype = compute_dtype(routed.lora_A["a"].weight)
        return make_dispatch(Routing(NAMES, weights, mask, None), selected, layouts=[routed.layout], dtype=dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = check_parity(routed, x, raw, chosen, dispatch_of, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16


# --- storage


def adapter_storages(routed):
    """{address: bytes} of the storages behind a layer's adapters, and the bytes of the matrices themselves."""
    weights = [module.weight for kind in (routed.lora_A, routed.lora_B) for module in kind.values()]
    held = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    return held, sum(weight.numel() * weight.element_size() for weight in weights)


def test_packing_keeps_values_and_identities_and_holds_nothing_twice():
    routed = routed_linear()
    loose = copy.deepcopy(routed)  # a copy's parameters are cloned one by one
    held, needed = adapter_storages(routed)
    assert len(held) == 2 and sum(held.values()) == needed
    assert len(adapter_storages(loose)[0]) == 2 * len(RANKS)
    before = {name: (id(p), p.detach().clone()) for name, p in loose.named_parameters()}
    pack(loose)
    assert len(adapter_storages(loose)[0]) == 2
    for name, p in loose.named_parameters():
        assert id(p) == before[name][0] and torch.equal(p, before[name][1]), name


@pytest.mark.parametrize("frozen", [(), ("a",), ("b", "d")], ids=str)
def test_packed_training_equals_training_with_torch_cat(monkeypatch, frozen):
    """Gradients and several optimizer steps through the view equal those through a concatenation."""
    packed = routed_linear()
    loose = copy.deepcopy(packed)
    loose.context_slot = ContextSlot()
    for routed in (packed, loose):
        for name in frozen:
            routed.lora_A[name].requires_grad_(False)
            routed.lora_B[name].requires_grad_(False)
    optimizers = [
        torch.optim.AdamW([p for p in routed.parameters() if p.requires_grad], lr=0.05) for routed in (packed, loose)
    ]
    raw, chosen, selected, mask = routing_case(2, 13, 2)
    concatenated = []
    monkeypatch.setattr(storage.torch, "cat", lambda *a, **k: concatenated.append(1) or TORCH_CAT(*a, **k))
    force_path(monkeypatch, "dense")
    for step in range(4):
        x = torch.randn(2, 13, 10)
        for routed, optimizer in zip((packed, loose), optimizers, strict=True):
            concatenated.clear()
            dispatch = make_dispatch(
                Routing(NAMES, (raw * chosen).detach(), mask, None),
                selected,
                layouts=[routed.layout],
                dtype=torch.float32,
            )
            optimizer.zero_grad()
            call(routed, x, dispatch).pow(2).sum().backward()
            assert bool(concatenated) == (routed is loose)
            optimizer.step()
        for (name, p), q in zip(packed.named_parameters(), loose.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, n=name, s=step: f"{n}, step {s}: {m}")
            assert (p.grad is None) == (q.grad is None)
    assert len(adapter_storages(packed)[0]) == 2


TORCH_CAT = torch.cat


def test_a_routed_linear_outside_a_forward_says_so():
    with pytest.raises(RuntimeError, match="outside a forward"):
        routed_linear()(torch.randn(1, 2, 10))
