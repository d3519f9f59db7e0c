"""Laws of the router's losses: their formulas, and that cutting a step into micro-batches changes nothing."""

import copy

import pytest
import torch
from reference.router import naive_losses
from reference.tiny import assert_same_gradients, gradients, padded, tiny_base, tiny_moe, tokens

from dylo_moe import DyLoRAMoE

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}
"""The Trainer's default is the fused one."""


def rows():
    """Eight texts of unequal length, each of its own skill (a range of the vocabulary), part of it prompt."""
    texts = [
        tokens(length, seed=length, low=3 + 11 * index, high=14 + 11 * index)
        for index, length in enumerate((17, 4, 9, 12, 6, 21, 3, 8))
    ]
    return [(ids, torch.where(torch.arange(len(ids)) < len(ids) // 3, -100, ids)) for ids in texts]


def whole_batch(side="right"):
    ids, mask = padded([ids for ids, _ in rows()], side=side)
    labels, _ = padded([labels for _, labels in rows()], side=side, pad=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def micro_batches(sizes):
    items, start = rows(), 0
    for size in sizes:
        ids, mask = padded([ids for ids, _ in items[start : start + size]], side="right")
        labels, _ = padded([labels for _, labels in items[start : start + size]], side="right", pad=-100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}
        start += size


def counts():
    batch = whole_batch()
    return int((batch["labels"][:, 1:] != -100).sum()), int(batch["attention_mask"].sum())


def precise_moe(**options):
    return tiny_moe(tiny_base("llama", dtype=torch.float64), num_experts=4, **options).train()


@pytest.mark.parametrize("shares", [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.2, 0.0]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", ["nothing", "items", "tokens"])
def test_losses_equal_their_formulas_over_real_tokens_only(given, side, shares):
    """The loss is over all real tokens by default, or over the predicted ones if only their number is known."""
    model = tiny_moe("llama", num_experts=4, balance_coefficient=0.3, z_loss_coefficient=0.2, entropy_coefficient=-0.1)
    model.router.shares.copy_(torch.tensor(shares))
    batch = whole_batch(side)
    num_items, num_tokens = counts()
    scale = {"nothing": 1.0, "items": 0.5, "tokens": 0.25}[given]
    known = {
        "nothing": {},
        "items": {"num_items_in_batch": num_items * 2},
        "tokens": {"num_tokens_in_batch": num_tokens * 4},
    }[given]
    out = model(**batch, **known)
    counted = batch["attention_mask"].bool()
    if given == "items":
        counted = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    balance, z, entropy = naive_losses(out.routing.logits.detach(), tokens=counted, shares=model.router.shares)
    for name, ours, expected in (
        ("balance", out.balance_loss, balance),
        ("z", out.z_loss, z),
        ("entropy", out.entropy_loss, entropy),
    ):
        torch.testing.assert_close(ours.item(), expected * scale, rtol=1e-4, atol=1e-6, msg=name)
    total = out.lm_loss + 0.3 * out.balance_loss + 0.2 * out.z_loss - 0.1 * out.entropy_loss
    torch.testing.assert_close(out.loss, total)
    plain = tiny_base("llama")
    with model.route_to(None):
        off = model(**batch)
    torch.testing.assert_close(off.lm_loss, plain(**batch).loss)
    assert torch.equal(off.loss, off.lm_loss) and off.balance_loss == off.z_loss == off.entropy_loss == 0


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5], [2, 1, 4, 1]], ids=str)
@pytest.mark.parametrize("known", [("num_items_in_batch", "num_tokens_in_batch"), ("num_items_in_batch",)], ids=str)
@pytest.mark.parametrize("mode", ["top 1", "top 2", "nascent"])
def test_a_step_in_pieces_gives_the_gradient_of_the_whole(mode, known, sizes):
    model = precise_moe(
        top_k=2 if mode == "top 2" else 1, balance_coefficient=0.5, z_loss_coefficient=0.3, entropy_coefficient=0.2
    )
    if mode == "nascent":
        model.experts[2].mature = False
    model.router.shares.copy_(torch.tensor([0.6, 0.1, 0.3, 0.0]))
    totals = {
        name: value
        for name, value in zip(("num_items_in_batch", "num_tokens_in_batch"), counts(), strict=True)
        if name in known
    }
    pieces = copy.deepcopy(model)
    losses = {"whole": 0.0, "pieces": 0.0}

    def backward(model, batches, which):
        for batch in batches:
            loss = model(**batch, **totals).loss
            losses[which] += loss.item()
            loss.backward()

    whole = gradients(model, lambda: backward(model, [whole_batch()], "whole"))
    cut = gradients(pieces, lambda: backward(pieces, micro_batches(sizes), "pieces"))
    torch.testing.assert_close(losses["pieces"], losses["whole"], rtol=1e-5, atol=0)
    assert_same_gradients(cut, whole, relative=1e-5)


def step(model, optimizer, sizes, *, backward="each", set_to_none=True):
    """One optimizer step in micro-batches; returns how often each expert was selected in it, and the f it used."""
    num_items, num_tokens = counts()
    used, shares, losses = 0, [], []
    for batch in micro_batches(sizes):
        out = model(**batch, num_items_in_batch=num_items, num_tokens_in_batch=num_tokens)
        used = used + (out.routing.weights > 0).sum((0, 1))
        shares.append(model.router.shares.clone())
        losses.append(out.loss)
        if backward == "each":
            losses.pop().backward()
    if losses:
        sum(losses).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(torch.equal(shares[0], other) for other in shares), "f moved inside a step"
    return used, shares[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False], ids=["grads to none", "grads to zero"])
@pytest.mark.parametrize("backward", ["each", "together"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_f_is_the_share_of_the_whole_previous_step(optimizer, set_to_none, backward, top_k):
    """A reported bug: the end of a step was recognised by tensor versions, which the fused optimizer does not raise."""
    model = tiny_moe("llama", num_experts=4, top_k=top_k, balance_coefficient=0.5).train()
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    expected = torch.full((4,), 0.25)
    for sizes in ([1] * 8, [3, 5], [8], [2, 6]):
        used, shares = step(model, optimizer, sizes, backward=backward, set_to_none=set_to_none)
        torch.testing.assert_close(shares, expected)
        assert int(used.sum()) == counts()[1] * top_k
        expected = used / used.sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_evaluation_and_generation_between_steps_are_not_counted(optimizer):
    trained = tiny_moe("llama", num_experts=4, balance_coefficient=0.5).train()
    disturbed = copy.deepcopy(trained)
    shares = []
    for model in (trained, disturbed):
        steps = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
        for _ in range(3):
            _, f = step(model, steps, [4, 4])
            if model is disturbed:
                model.eval()
                with torch.no_grad():
                    model(input_ids=tokens(4, 40, seed=3), labels=tokens(4, 40, seed=3))
                model.generate(input_ids=tokens(2, 5), max_new_tokens=3)
                model.train()
        shares.append(f)
    assert torch.equal(*shares)
    assert not torch.equal(shares[0], torch.full((4,), 0.25))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_saved_model_goes_on_with_the_shares_of_its_last_step(optimizer, tmp_path):
    model = tiny_moe("llama", num_experts=4, balance_coefficient=0.5).train()
    make = OPTIMIZERS[optimizer]
    used, _ = step(model, make([p for p in model.parameters() if p.requires_grad]), [3, 5])
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = DyLoRAMoE.from_pretrained(str(tmp_path / "saved"), tiny_base("llama")).train()
    for one in (model, loaded):
        _, shares = step(one, make([p for p in one.parameters() if p.requires_grad]), [8])
        torch.testing.assert_close(shares, used / used.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_counting_goes_on_when_the_model_is_converted_or_grows_between_steps(dtype):
    model = tiny_moe("llama", num_experts=4, balance_coefficient=0.5).train()
    used, _ = step(model, OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad]), [8])
    model.to(dtype)
    _, shares = step(model, OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad]), [3, 5])
    torch.testing.assert_close(shares.double(), (used / used.sum()).double(), rtol=0.01, atol=0)
    model.add_expert("new")
    model.mature("new")
    _, shares = step(model, OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad]), [8])
    torch.testing.assert_close(shares, torch.full_like(shares, 0.2))


def test_the_balance_loss_pushes_towards_equal_use():
    """Descent on it alone: the share of the busiest expert falls."""
    model = tiny_moe("llama", num_experts=4, balance_coefficient=1.0).train()
    with torch.no_grad():
        model.router.gate_bias["expert_1"].fill_(8.0)
    gate = [p for name, p in model.named_parameters() if "router." in name]
    optimizer, busiest = torch.optim.Adam(gate, lr=0.2, foreach=False), []
    for _ in range(30):
        out = model(**whole_batch())
        busiest.append(((out.routing.weights > 0).sum((0, 1)) / out.routing.mask.sum()).max().item())
        out.balance_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert busiest[0] > 0.6 and busiest[-1] < 0.45
