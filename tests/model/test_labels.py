"""Laws of the loss: label smoothing is torch's, and what is not predicted has no influence."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference.tiny import FAMILIES, assert_same_gradients, gradients, padded, tiny_moe, tokens
from transformers import TrainingArguments

from dylo_moe.training.trainer import DyLoRATrainer


def batch():
    """Three rows of unequal length; a third of each is its prompt, which is not predicted."""
    rows = [tokens(n, seed=n) for n in (14, 5, 9)]
    ids, mask = padded(rows, side="right")
    labels, _ = padded([torch.where(torch.arange(len(r)) < len(r) // 3, -100, r) for r in rows], side="right", pad=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock_loss(logits, labels, *, smoothing=0.0, num_items=None):
    """torch's own cross-entropy of the next token."""
    logits, labels = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    return total / ((labels != -100).sum() if num_items is None else num_items)


# --- label smoothing


@pytest.mark.parametrize("num_items", [None, 40])
@pytest.mark.parametrize("smoothing", [0.1, 0.9])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_label_smoothing_is_torchs(laws, family, smoothing, num_items):
    model = tiny_moe(family, balance_coefficient=0.0).train()
    kept = {}

    def ours():
        kept["out"] = model(**batch(), label_smoothing=smoothing, num_items_in_batch=num_items)
        kept["out"].loss.backward()

    def theirs():
        logits = model(**batch()).logits
        kept["loss"] = stock_loss(logits, batch()["labels"], smoothing=smoothing, num_items=num_items)
        kept["loss"].backward()

    assert_same_gradients(gradients(model, ours), gradients(model, theirs), relative=1e-3)
    laws.close("label smoothing is torch's", kept["out"].loss, kept["loss"], family=family, atol=2e-6)
    plain = stock_loss(kept["out"].logits, batch()["labels"], num_items=num_items)
    laws.close("lm_loss stays plain beside label smoothing", kept["out"].lm_loss, plain, family=family, atol=2e-6)
    assert (plain - kept["loss"]).abs() > 2e-5


def test_what_stands_at_ignored_positions_does_not_enter_label_smoothing(laws):
    """Reported: NaN there was multiplied by zero."""
    model, inputs = tiny_moe("llama", balance_coefficient=0.0), batch()
    expected = model(**inputs, label_smoothing=0.1).loss
    ignored = F.pad(inputs["labels"][:, 1:] == -100, (0, 1))
    handle = model.base.lm_head.register_forward_hook(
        lambda module, args, logits: logits.masked_fill(ignored[..., None], float("nan"))
    )
    found = gradients(model, lambda: model(**inputs, label_smoothing=0.1).loss.backward())
    laws.close("label smoothing ignores what is not predicted", model(**inputs, label_smoothing=0.1).loss, expected,
               atol=1e-6)  # fmt: skip
    handle.remove()
    expected = gradients(model, lambda: model(**inputs, label_smoothing=0.1).loss.backward())
    assert_same_gradients(found, expected, relative=1e-5)


@pytest.mark.parametrize("sizes", [[1, 1, 1], [2, 1]], ids=str)
def test_label_smoothing_in_pieces_is_that_of_the_whole(sizes):
    model = tiny_moe("llama", balance_coefficient=0.5, z_loss_coefficient=0.1).train()
    inputs = batch()
    totals = {
        "num_items_in_batch": int((inputs["labels"][:, 1:] != -100).sum()),
        "num_tokens_in_batch": int(inputs["attention_mask"].sum()),
        "label_smoothing": 0.2,
    }
    pieces = [
        dict(zip(inputs, parts, strict=True)) for parts in zip(*(t.split(sizes) for t in inputs.values()), strict=True)
    ]
    twin = copy.deepcopy(model)
    whole = gradients(model, lambda: model(**inputs, **totals).loss.backward())
    cut = gradients(twin, lambda: sum(twin(**piece, **totals).loss for piece in pieces).backward())
    assert_same_gradients(cut, whole, relative=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(3, 1), (1, 3)])
def test_the_trainer_smooths_labels_and_keeps_the_routers_losses(batch_size, accumulate, tmp_path):
    """Two steps of the Trainer end where a loop by hand ends, and not where one without either part ends."""
    options = {"balance_coefficient": 1.0, "z_loss_coefficient": 0.1, "entropy_coefficient": 0.1}
    inputs = batch()
    rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]

    def by_hand(smoothing, **options):
        model = tiny_moe("llama", **options).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**inputs, label_smoothing=smoothing).loss.backward()
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate, max_steps=2,
        learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True,
        remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True, label_smoothing_factor=0.2,
    )  # fmt: skip
    model = tiny_moe("llama", **options)
    DyLoRATrainer(model=model, args=arguments, train_dataset=rows, domains=["all"]).train()
    ours = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert_same_gradients(ours, by_hand(0.2, **options), relative=1e-5)
    for other in (by_hand(0.0, **options), by_hand(0.2, balance_coefficient=0.0)):
        with pytest.raises(AssertionError):
            assert_same_gradients(ours, other, relative=1e-5)


# --- labels that do not count


@pytest.mark.parametrize(("family", "smoothing"), [("llama", 0.0), *((family, 0.1) for family in FAMILIES)])
def test_tokens_after_the_last_label_have_no_influence(laws, family, smoothing):
    """Whatever they are, and whether they are there at all."""
    model = tiny_moe(family, balance_coefficient=0.0).train()
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[:, 8:] = -100
    other = torch.cat([ids[:, :8], tokens(2, 4, seed=9)], 1)
    texts = {"there": (ids, labels), "other": (other, labels), "cut": (ids[:, :8], labels[:, :8])}
    found, losses = {}, {}

    def backward(text, labels, name):
        losses[name] = model(input_ids=text, labels=labels, label_smoothing=smoothing).loss
        losses[name].backward()

    for name, (text, wanted) in texts.items():
        found[name] = gradients(model, lambda name=name, text=text, wanted=wanted: backward(text, wanted, name))
    for name in ("other", "cut"):
        law = "tokens after the last label have no influence on the loss"
        laws.close(law, losses[name], losses["there"], family=family, atol=1e-6)
        assert_same_gradients(found[name], found["there"], relative=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("known", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": 7, "num_tokens_in_batch": 99}])
def test_a_row_without_labels_counts_for_nothing(laws, known, smoothing):
    model, inputs = tiny_moe("llama", balance_coefficient=0.0).train(), batch()
    inputs["labels"][1] = -100
    rest = {name: tensor[[0, 2]] for name, tensor in inputs.items()}
    found, losses = [], []
    for part in (inputs, rest):

        def backward(part=part):
            losses.append(model(**part, **known, label_smoothing=smoothing).loss)
            losses[-1].backward()

        found.append(gradients(model, backward))
    laws.close("a row without labels counts for nothing", *losses, atol=1e-6)
    assert_same_gradients(*found, relative=1e-4)


@pytest.mark.parametrize("known", [{}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_without_labels_has_a_loss_of_zero(laws, smoothing, known):
    """Reported: where the step was said to predict nothing, the router's losses were 0 / 0."""
    model, inputs = tiny_moe("llama", balance_coefficient=0.5, z_loss_coefficient=0.1).train(), batch()
    inputs["labels"][:] = -100
    out = model(**inputs, **known, label_smoothing=smoothing)
    zero = torch.zeros(())
    laws.equal("nothing to predict is a loss of 0", out.lm_loss, zero)
    routers = 0.5 * out.balance_loss + 0.1 * out.z_loss
    laws.equal("nothing to predict leaves the router's losses alone", out.loss, routers)
    assert (out.balance_loss == 0) == bool(known)
    found = gradients(model, lambda: model(**inputs, **known, label_smoothing=smoothing).lm_loss.backward())
    for gradient in found.values():
        laws.equal("nothing to predict gives no gradient", gradient, torch.zeros_like(gradient))
