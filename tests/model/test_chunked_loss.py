"""Laws of the loss in chunks: it is the full logits' loss, token by token and gradient by gradient."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from reference.tiny import (
    COMMON,
    FAMILIES,
    VOCAB,
    assert_same_gradients,
    gradients,
    padded,
    tiny_base,
    tiny_moe,
    tokens,
)
from reference.trainers import train_flags, trainer_for
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import is_liger_kernel_available

from dylo_moe.cli import main
from dylo_moe.commands.train.request import parse_train
from dylo_moe.model.loss import CHUNK_BYTES, FullLogitsNeeded, chunk_loss, chunked_loss, default_chunk_size
from dylo_moe.training.metrics import Meter, token_losses
from dylo_moe.training.trainer import without_fused_loss
from dylo_moe.utils.errors import UsageError

OWN = {"balance_coefficient": 1.0, "z_loss_coefficient": 0.1, "entropy_coefficient": 0.2}
CHUNKS = (1, 7, 1000)
LAW = "a loss in chunks is that of the full logits"


def batch(lengths=(14, 9, 2)):
    """Rows of odd lengths, padded; the first two tokens of each are a prompt."""
    ids, mask = padded([tokens(n, seed=n) for n in lengths], side="right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed():
    """Two texts in a row, their positions starting over."""
    ids = tokens(2, 13, seed=3)
    labels = ids.clone()
    labels[:, [0, 8]] = -100
    positions = torch.cat([torch.arange(8), torch.arange(5)]).expand(2, -1)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def chunked(model, size=7):
    """A copy that computes its loss in chunks."""
    model = copy.deepcopy(model)
    model.loss_chunk_size = size
    return model


def results(model, inputs, **more):
    """The output of a training forward, and the gradients of its loss. A copy does it, which counts its routing."""
    model, kept = copy.deepcopy(model).train(), []

    def backward():
        kept.append(model(**inputs, **more))
        kept[0].loss.backward()

    found = gradients(model, backward)
    return kept[0], found


def agree(laws, model, inputs, *, size=7, family="llama", atol=1e-6, relative=1e-5, **more):
    full, theirs = results(model, inputs, **more)
    out, ours = results(chunked(model, size), inputs, **more)
    for name in ("loss", "lm_loss", "balance_loss", "z_loss"):
        laws.close(LAW, out[name], full[name], family=family, atol=atol)
    expected = token_losses(full, inputs["labels"])
    laws.close(f"{LAW}, token by token", out.token_losses, expected, family=family, atol=10 * atol)
    assert_same_gradients(ours, theirs, relative=relative)
    assert any(gradient.abs().max() > 1e-4 for name, gradient in ours.items() if "lora_A" in name)
    assert out.logits is None and not out.token_losses.requires_grad
    return out, full


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_every_token_of_a_head_alone(laws, size, bias, smoothing):
    """Against PyTorch's cross-entropy in fp64, each token weighted by a number of its own."""
    torch.manual_seed(3)
    head = nn.Linear(17, 53, bias=bias).requires_grad_(False)
    labels, weights = torch.randint(0, 53, (3, 11)), torch.rand(3, 11)
    labels[torch.rand(3, 11) < 0.3] = -100
    ours = (3 * torch.randn(3, 11, 17)).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    found = chunked_loss(ours, head, labels, chunk_size=size, label_smoothing=smoothing)
    logits = copy.deepcopy(head).double()(theirs)[:, :-1].transpose(1, 2)
    plain, smooth = (
        F.pad(F.cross_entropy(logits, labels[:, 1:], reduction="none", label_smoothing=part), (1, 0))
        for part in (0.0, smoothing)
    )
    laws.close("losses in chunks, a head alone", found.plain, plain, atol=2e-6)
    laws.close("losses in chunks, a head alone", found.trained, smooth, atol=2e-6)
    (found.trained * weights).sum().backward()
    (smooth * weights).sum().backward()
    laws.close("gradients of a loss in chunks, a head alone", ours.grad, theirs.grad, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gemma2"}))  # which caps its logits
def test_every_family(laws, family):
    agree(laws, tiny_moe(family, **OWN), batch(), family=family)


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    "counts", [{}, {"num_items_in_batch": 57}, {"num_items_in_batch": 57, "num_tokens_in_batch": 80}]
)
def test_sizes_smoothing_and_counts(laws, size, smoothing, counts):
    agree(laws, tiny_moe("llama", **OWN), batch(), size=size, label_smoothing=smoothing, **counts)


@pytest.mark.parametrize("inputs", [batch, packed], ids=["padded", "packed"])
@pytest.mark.parametrize("router", [{"top_k": 2}, {"granularity": "sequence"}, {"router_layer": 1}], ids=str)
def test_the_router_reads_what_it_read(laws, inputs, router):
    """The base is not given the labels, of which the router of a sequence tells where the prompt ends."""
    out, full = agree(laws, tiny_moe("llama", **OWN, **router), inputs())
    laws.equal("a loss in chunks leaves the routing", out.routing.weights, full.routing.weights)


def test_under_gradient_checkpointing(laws):
    model = tiny_moe("llama", **OWN)
    model.gradient_checkpointing_enable()
    agree(laws, model, batch())


@pytest.mark.parametrize("how", ["bf16 base", "autocast", "autocast of a bf16 base"])
def test_in_bfloat16(laws, how):
    """Losses are of logits that are rounded to bf16 in both. What flows back is rounded once more: gradients lie at
    most a quarter farther from those of the same weights in fp32 than full logits' do."""
    model = tiny_moe(tiny_base("llama", dtype=torch.bfloat16 if "base" in how else torch.float32), **OWN)
    _, exact = results(copy.deepcopy(model).float(), batch())
    with torch.autocast("cpu", dtype=torch.bfloat16) if "autocast" in how else contextlib.nullcontext():
        full, theirs = results(model, batch())
        out, ours = results(chunked(model), batch())
    laws.close(f"{LAW}, in bf16", out.loss, full.loss, atol=1e-5)
    laws.close(f"{LAW}, in bf16", out.token_losses, token_losses(full, batch()["labels"]), atol=1e-5)

    def error(found):
        return sum(float((found[name].float() - exact[name]).square().sum()) for name in exact) ** 0.5

    assert 0 < error(ours) <= 1.25 * error(theirs)


def test_no_label_at_all_is_a_loss_of_zero(laws):
    model, inputs = tiny_moe("llama", balance_coefficient=0.0), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    out, found = results(chunked(model), inputs)
    assert out.loss.item() == out.lm_loss.item() == 0.0 and not out.token_losses.any()
    assert not any(gradient.any() for gradient in found.values())


def test_tokens_without_a_label_are_not_computed(monkeypatch):
    """What is multiplied with the head: rows that are predicted, and no row twice."""
    model, inputs, rows = chunked(tiny_moe("llama")), batch(), []
    real = F.linear

    def counted(x, weight, bias=None):
        rows.extend([x.shape[:-1].numel()] if len(weight) == VOCAB else [])
        return real(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    model.train()(**inputs)
    assert sum(rows) == (inputs["labels"][:, 1:] != -100).sum() and max(rows) == 7


def test_large_logits_do_not_overflow(laws):
    """exp of 200 is infinite in fp32."""
    head = nn.Linear(1, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[200.0], [195.0], [-200.0]]))
    hidden, labels = torch.ones(1, 3, 1, requires_grad=True), torch.tensor([[0, 1, 2]])
    found = chunked_loss(hidden, head, labels, chunk_size=1)
    found.trained.sum().backward()
    soft = torch.tensor([200.0, 195.0, -200.0], dtype=torch.float64).softmax(0)
    slope = (soft * torch.tensor([200.0, 195.0, -200.0])).sum() - torch.tensor([195.0, -200.0])
    laws.close("losses in chunks, a head alone", found.plain[0, 1:], torch.tensor([5.006715, 400.006715]), atol=1e-4)
    laws.close("gradients of a loss in chunks, a head alone", hidden.grad[0, :2, 0], slope, atol=1e-4)


def test_without_labels_nothing_changes(laws):
    model, inputs = tiny_moe("llama"), batch()
    del inputs["labels"]
    laws.equal("without labels all logits are there", chunked(model)(**inputs).logits, model(**inputs).logits)
    prompt = {"input_ids": tokens(2, 6), "max_new_tokens": 5, "do_sample": False}
    laws.equal("generation knows no chunks", chunked(model).generate(**prompt), model.generate(**prompt))


def test_switched_off_again_it_is_as_before(laws):
    model = tiny_moe("llama")
    other = chunked(model)
    assert other.loss_chunk_size == 7
    other.loss_chunk_size = None
    laws.equal("switched off, the full logits are back", other(**batch()).logits, model(**batch()).logits)


# --- the Trainer


@pytest.mark.parametrize(("rows", "accumulate", "smoothing"), [(4, 2, 0.0), (3, 1, 0.1)])
def test_our_trainer_logs_and_ends_the_same(tmp_path, rows, accumulate, smoothing):
    """Losses of each dataset in training and in evaluation, and the trained weights."""
    ends, logs = [], []
    for size in (None, 7):
        model = tiny_moe("llama", **OWN)
        model.loss_chunk_size = size
        trainer = trainer_for(model, tmp_path, batch=rows, accumulate=accumulate)
        trainer.args.label_smoothing_factor = smoothing
        trainer.train()
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
        found = trainer.evaluate(trainer.train_dataset)
        found |= {f"eval_{name}": loss for name, loss in trainer.readings["eval"].domain_losses.items()}
        logs.append([log for log in trainer.state.log_history if "lm_loss" in log] + [found])
    assert_same_gradients(ends[1], ends[0], relative=1e-5)
    for ours, theirs in zip(logs[1], logs[0], strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() & {"loss", "lm_loss", "loss_a", "loss_b", "eval_loss", "eval_a", "eval_b"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    assert {"eval_a", "eval_b", "eval_loss"} <= logs[0][-1].keys() and "loss_b" in logs[0][0]


def test_the_meter_counts_a_packed_row_by_its_tokens():
    model, inputs, domain = tiny_moe("llama"), packed(), torch.tensor([0] * 8 + [1] * 5).expand(2, -1)
    readings = []
    for one in (model, chunked(model)):
        meter, out = Meter(["a", "b"], model.experts.names), one(**inputs)
        losses = token_losses(out, inputs["labels"])
        meter.add(losses=losses, labels=inputs["labels"], routing=out.routing, domain=domain)
        readings.append(meter.read())
    assert readings[1].domain_losses == pytest.approx(readings[0].domain_losses, rel=1e-6)
    assert readings[0].domain_losses["a"] != readings[0].domain_losses["b"]


def test_a_loss_without_logits_is_told_where_they_are_needed():
    """As Liger's fused loss leaves it. Stood in for by a base that says nothing of its logits, and like Liger's forward
    refuses the Trainer's `skip_logits` without labels; which a loss in chunks keeps from it."""
    model, inputs = tiny_moe("llama"), batch()
    plain = model.base.forward

    def fused(*args, skip_logits=None, **kwargs):
        assert not skip_logits or kwargs.get("labels") is not None
        out = plain(*args, **kwargs)
        return out if kwargs.get("labels") is None else CausalLMOutputWithPast(loss=out.loss)

    expected = float(model(**inputs).loss)
    model.base.forward = fused
    out = model(**inputs)
    assert float(out.loss) == expected
    with pytest.raises(ValueError, match="loss_chunk_size"):
        token_losses(out, inputs["labels"])
    with pytest.raises(ValueError, match="label_smoothing needs logits"):
        model(**inputs, label_smoothing=0.1)
    model._loss_chunk_size = 7
    assert float(model(**inputs, skip_logits=True).loss) == pytest.approx(expected, rel=1e-6)


def test_our_trainer_takes_ligers_kernels_but_not_its_loss(tmp_path):
    assert without_fused_loss({"rope": False}) == {"rope": False, "fused_linear_cross_entropy": False}
    with pytest.raises(ValueError, match="--loss_chunk_size"):
        without_fused_loss({"fused_linear_cross_entropy": True})
    with pytest.raises(UsageError, match="use_liger_kernel needs"):
        parse_train(["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--use_liger_kernel", "true"])


# --- NaN, and the compiler


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        ("layers.1.self_attn.v_proj.lora_A.expert_1", (0, 0), "weights of expert 'expert_1'"),
        ("router.gate.expert_1", 3, "the gate row of expert 'expert_1'"),
        ("layers.0.mlp.down_proj.base_layer.weight", (7, 1), "the base's model.layers.0.mlp.down_proj.weight"),
        ("lm_head.weight", (50, 3), "the base's lm_head.weight"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_a_weight_that_is_nan_is_named(part, entry, message, train):
    model = chunked(tiny_moe("llama")).train(train)
    next(p for name, p in model.named_parameters() if part in name).data[entry] = float("nan")
    with pytest.raises(ValueError) as caught:
        model(**batch())
    assert message in str(caught.value)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compiled_in_one_graph(laws, smoothing):
    torch._dynamo.reset()
    base = tiny_base("llama", num_hidden_layers=1)
    model = chunked(tiny_moe(base, lora={"target_modules": ["v_proj"]}, **OWN)).train()
    fast = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    out, theirs = results(model, batch(), label_smoothing=smoothing)
    kept = {}

    def backward():
        kept["out"] = fast(**batch(), label_smoothing=smoothing)
        kept["out"].loss.backward()

    ours = gradients(fast._orig_mod, backward)
    laws.close("a compiled loss in chunks is the eager one", kept["out"].loss, out.loss, atol=1e-6)
    laws.close("a compiled loss in chunks is the eager one", kept["out"].token_losses, out.token_losses, atol=1e-5)
    assert_same_gradients(ours, theirs, relative=1e-5)
    torch._dynamo.reset()


# --- where it does not apply


def other_base(model, config, **own):
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**{**COMMON, **own})).eval()


GEMMA2 = {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 30.0}
REFUSED = {
    "capped": (lambda: tiny_base("gemma2", **GEMMA2), "capped, scaled or converted"),
    "scaled": (lambda: other_base("CohereForCausalLM", "CohereConfig", logit_scale=0.5), "capped, scaled or converted"),
    "divided": (lambda: other_base("GraniteForCausalLM", "GraniteConfig", logits_scaling=3.0), "capped, scaled"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_whose_loss_is_another_is_refused(case):
    make, message = REFUSED[case]
    model = tiny_moe(make())
    expected = model(**batch())
    with pytest.raises(FullLogitsNeeded, match=message):
        model.loss_chunk_size = 7
    assert model.loss_chunk_size is None
    assert torch.equal(model(**batch()).loss, expected.loss)


def test_a_base_with_a_loss_of_its_own_is_refused():
    model = tiny_moe("llama")
    model.base.loss_function = lambda logits, labels, **kwargs: logits.float().square().mean()
    with pytest.raises(FullLogitsNeeded, match="where the cross-entropy of its logits is"):
        model.loss_chunk_size = 7


def test_a_head_that_is_trained_is_refused():
    model = tiny_moe("llama")
    model.base.lm_head.weight.requires_grad_(True)
    with pytest.raises(FullLogitsNeeded, match="is trained"):
        model.loss_chunk_size = 7
    model.base.lm_head.weight.requires_grad_(False)
    model.loss_chunk_size = 7
    model.base.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze the head"):
        model(**batch())


def test_a_head_that_was_exchanged_is_told():
    model = chunked(tiny_moe("llama"))
    model.base.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(ValueError, match="another output head"):
        model(**batch())


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "7"])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match="loss_chunk_size is"):
        tiny_moe("llama").loss_chunk_size = size


# --- the flag


@pytest.mark.parametrize("vocab_size", [100_000, 128_256, 151_936, 256_000, 10**9])
def test_the_chunk_of_a_vocabulary(vocab_size):
    size = default_chunk_size(vocab_size)
    assert size == 1 or 4 * size * vocab_size <= CHUNK_BYTES < 8 * size * vocab_size


def test_the_flag_is_automatic_a_number_or_off(monkeypatch):
    small = tiny_moe("llama")
    assert chunk_loss(small, None) == "" and small.loss_chunk_size is None
    assert "7 tokens" in chunk_loss(small, 7) and small.loss_chunk_size == 7
    assert chunk_loss(small, 0) == "" and small.loss_chunk_size is None
    monkeypatch.setattr("dylo_moe.model.loss.LARGE_VOCABULARY", VOCAB)
    assert "in chunks of" in chunk_loss(small, None) and small.loss_chunk_size == default_chunk_size(VOCAB)
    odd = tiny_moe(tiny_base("gemma2", **GEMMA2))
    assert "full logits are kept" in chunk_loss(odd, None) and odd.loss_chunk_size is None
    with pytest.raises(FullLogitsNeeded):
        chunk_loss(odd, 7)


def test_the_command_trains_the_same_and_says_so(tiny_folder, tmp_path, capsys):
    """Three steps of SGD: AdamW blows rounding up until tokens are routed otherwise."""
    found, short = {}, ("--optim", "sgd", "--max_steps", "3", "--logging_steps", "1")
    for size in ("0", "16"):
        run = tmp_path / size
        assert main(["train", *train_flags(tiny_folder, run, "--loss_chunk_size", size, *short)]) == 0
        assert ("loss in chunks of 16 tokens" in capsys.readouterr().out) == (size == "16")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[size] = [(key, value) for line in lines for key, value in line.items() if key.endswith("loss")]
    assert [key for key, _ in found["16"]] == [key for key, _ in found["0"]]
    assert [value for _, value in found["16"]] == pytest.approx([value for _, value in found["0"]], rel=1e-5)


# --- on a GPU with Liger's kernels; never run on this project's machines


@pytest.mark.skipif(not (torch.cuda.is_available() and is_liger_kernel_available()), reason="needs a GPU and Liger")
@pytest.mark.parametrize("fused", [False, True])
def test_beside_ligers_kernels(laws, fused):
    """Its norm, rotary embedding and gated product, with and without its own loss, which is then not asked for."""
    from transformers.integrations.liger import apply_liger_kernel

    model = tiny_moe("llama", **OWN).cuda()
    inputs = {name: tensor.cuda() for name, tensor in batch().items()}
    full, theirs = results(model, inputs)
    quick = copy.deepcopy(model)
    apply_liger_kernel(quick, {"fused_linear_cross_entropy": fused})
    own, _ = results(quick, inputs)
    laws.close("Liger's kernels compute our loss", own.loss, full.loss, atol=1e-4)
    out, ours = results(chunked(quick), inputs)
    laws.close("a loss in chunks beside Liger's kernels", out.loss, full.loss, atol=1e-4)
    assert_same_gradients(ours, theirs, relative=1e-3)
