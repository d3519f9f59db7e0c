"""The model in a user's own loop, in the stock `transformers.Trainer` and in TRL's `SFTTrainer`: one result."""

from __future__ import annotations

import copy
import gc
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from reference.tiny import VOCAB, base_tensors, padded, tensors, tiny_base, tiny_moe, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from dylo_moe import CheckpointError, DyLoRAMoE

LENGTHS = (5, 30, 12, 3, 21, 8, 17, 24)
LEARNING_RATE = 1e-2
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0}
"""Where two ways are equal but for rounding, which AdamW would blow up for the smallest gradients."""
TIED = ["gemma3", "qwen2"]
"""Their head is their embeddings, over which stock saving of custom modules stumbles."""


@pytest.fixture(autouse=True, scope="module")
def _collect_only_what_is_new():
    """Each `train` collects garbage, which took a fifth of the time over the objects of all imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No telemetry (TRL looks for CI), no progress bars, no deprecations that are not ours."""
    monkeypatch.setenv("CI", "1")
    disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    enable_progress_bars()


def rows() -> list[dict[str, list[int]]]:
    """Eight texts of many lengths; the first two tokens of each are a prompt."""
    texts = [tokens(length, seed=index).tolist() for index, length in enumerate(LENGTHS)]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in texts]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids, mask = padded([torch.tensor(row["input_ids"]) for row in rows], side="right")
    labels, _ = padded([torch.tensor(row["labels"]) for row in rows], side="right", pad=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Rows in their order, two at a time, AdamW at a constant rate; nothing clipped, nothing decayed."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "num_train_epochs": 1, "use_cpu": True,
        "train_sampling_strategy": "sequential", "optim": "adamw_torch", "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, **more,
    }  # fmt: skip


def stock(model: DyLoRAMoE, folder: Path, *, compute_metrics: Any = None, **more: Any) -> Trainer:
    arguments = TrainingArguments(**settings(folder, **more))
    data = {"train_dataset": rows(), "eval_dataset": rows(), "data_collator": collate}
    return Trainer(model=model, args=arguments, compute_metrics=compute_metrics, **data)


def stock_loss(model: DyLoRAMoE, batch: dict[str, Tensor], num_items: int, accumulate: int) -> Tensor:
    """A batch's part of an optimizer step's loss, as the stock Trainer asks for it."""
    return model(**batch, num_items_in_batch=num_items).loss


def trl_loss(model: DyLoRAMoE, batch: dict[str, Tensor], num_items: int, accumulate: int) -> Tensor:
    """As TRL puts it together: tokens count alike in the language model's part, batches in the router's."""
    out = model(**batch)
    predicted = int((batch["labels"][:, 1:] != -100).sum())
    return out.lm_loss * predicted / num_items + (out.loss - out.lm_loss) / accumulate


def own_loop(
    model: DyLoRAMoE,
    batches: list[dict[str, Tensor]],
    *,
    accumulate: int = 1,
    loss: Any = stock_loss,
    sgd: bool = False,
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """A user's own loop; its losses, and everything the model holds after each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    if sgd:
        optimizer = torch.optim.SGD(parameters, lr=SGD["learning_rate"])
    losses, states = [], []
    model.train()
    for start in range(0, len(batches), accumulate):
        step = batches[start : start + accumulate]
        num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
        parts = [loss(model, batch, num_items, accumulate) for batch in step]
        for part in parts:
            part.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(part.item() for part in parts))
        states.append(tensors(model))
    return losses, states


def in_twos(rows: list[dict[str, list[int]]]) -> list[dict[str, Tensor]]:
    return [collate(rows[start : start + 2]) for start in range(0, len(rows), 2)]


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def assert_same_but_for_rounding(ours: DyLoRAMoE, theirs: DyLoRAMoE, start: dict[str, Tensor]) -> None:
    """Each trained tensor, to a millionth of its largest entry and a ten-thousandth of its longest way."""
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            tolerance = 1e-6 * parameter.abs().max() + 1e-4 * (others[name] - start[name]).abs().max()
            assert (parameter - others[name]).abs().max() <= tolerance, name


def assert_only_experts_and_gate_moved(model: DyLoRAMoE, family: str, start: dict[str, Tensor]) -> None:
    """Every trainable tensor moved, and the base is the plain one, bit for bit."""
    for name, parameter in model.named_parameters():
        own = ".lora_" in name or name.startswith("router.gate")
        assert parameter.requires_grad == own, name
        assert torch.equal(parameter, start[name]) != own, name
    assert_same(base_tensors(model), dict(tiny_base(family).state_dict()))


# --- transformers.Trainer


@pytest.mark.parametrize(
    ("family", "accumulate"), [("llama", 1), ("llama", 2), ("gemma3", 2), ("qwen2", 1), ("gpt_neox", 2)]
)
def test_the_stock_trainer_trains_what_a_loop_trains(tmp_path, family, accumulate):
    """Bit for bit, buffers too; what it logs is what the loop saw."""
    looped, model = (tiny_moe(family, balance_coefficient=1.0) for _ in range(2))
    start = tensors(model)
    losses, states = own_loop(looped, in_twos(rows()), accumulate=accumulate)
    trainer = stock(model, tmp_path, gradient_accumulation_steps=accumulate)
    trainer.train()
    assert_same(tensors(model), states[-1])
    assert logged(trainer) == pytest.approx(losses, rel=1e-6)
    assert_only_experts_and_gate_moved(model, family, start)


def test_the_loop_without_counts_is_the_trainers_on_one_batch(tmp_path):
    """`model(...).loss.backward()` alone, where no accumulation asks for more; balance is off, which is averaged
    over all real tokens when nobody says what is predicted."""
    looped, model = (tiny_moe("llama", balance_coefficient=0.0) for _ in range(2))
    start = tensors(model)
    optimizer = torch.optim.AdamW([p for p in looped.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0)
    looped.train()
    for batch in in_twos(rows()):
        looped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stock(model, tmp_path).train()
    assert_same_but_for_rounding(model, looped, start)


@pytest.mark.parametrize("family", TIED)
def test_what_the_stock_trainer_saves_is_the_model_at_that_step(tmp_path, family):
    looped, model = (tiny_moe(family) for _ in range(2))
    _, states = own_loop(looped, in_twos(rows()), accumulate=2)
    more = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    trainer = stock(model, tmp_path, **more)
    trainer.train()
    for step, state in enumerate(states, 1):
        loaded = DyLoRAMoE.from_pretrained(tmp_path / f"checkpoint-{step}", tiny_base(family))
        assert_same(tensors(loaded), state)
    trainer.save_model(str(tmp_path / "end"))
    assert_same(tensors(DyLoRAMoE.from_pretrained(tmp_path / "end", tiny_base(family))), states[-1])


def test_save_model_saves_beside_the_trainers_own_files(tmp_path):
    """Reported: the usual last line, `trainer.save_model()`, failed on the numbered checkpoints in its folder, and
    saving a second time to any folder on the Trainer's own files."""
    model = tiny_moe("qwen2")
    trainer = stock(model, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "notes.txt").write_text("precious")
    for _ in range(2):
        trainer.save_model()
        assert_same(tensors(DyLoRAMoE.from_pretrained(tmp_path, tiny_base("qwen2"))), tensors(model))
        model.remove_expert(model.experts.names[-1])
    assert (tmp_path / "notes.txt").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoint-2", "checkpoint-4", "notes.txt", "training_args.bin"),
        *("dylora.json", "experts", "router.safetensors", "adapter_model.safetensors"),
    }


def test_save_model_takes_the_file_that_a_push_to_the_hub_copied(tmp_path):
    """At each save the Trainer copies the files that it knows into its folder, which then has no manifest of ours."""
    model = tiny_moe("llama")
    trainer = stock(model, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    shutil.copy(tmp_path / "checkpoint-2" / "adapter_model.safetensors", tmp_path)
    trainer.save_model()
    assert_same(tensors(DyLoRAMoE.from_pretrained(tmp_path, tiny_base("llama"))), tensors(model))


def test_save_model_never_mixes_with_anothers_experts(tmp_path):
    """A file that would come to lie among ours, and that we did not write, stays and is named."""
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"experts/mine\.txt"):
        stock(tiny_moe("llama"), tmp_path).save_model()
    assert (tmp_path / "experts" / "mine.txt").read_text() == "precious"


def test_predictions_are_the_logits_alone(tmp_path):
    """Reported: evaluation with metrics, and `predict`, failed on the parts of the loss and the routing, which the
    Trainer took for predictions."""
    model = tiny_moe("llama")
    seen = []

    def remember(given):
        seen.append(given.predictions)
        return {}

    trainer = stock(model, tmp_path, per_device_eval_batch_size=len(LENGTHS), compute_metrics=remember)
    with torch.no_grad():
        expected = model(**collate(rows()))
    metrics = trainer.evaluate()
    seen.append(trainer.predict(rows()).predictions)
    for predictions in seen:
        torch.testing.assert_close(torch.tensor(predictions), expected.logits)
    assert len(seen) == 3  # `evaluate` and `predict` both ask for metrics
    assert metrics["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-6)


def test_writing_to_the_models_config_writes_the_bases():
    """As tutorials do; and the base's config is otherwise as it was."""
    model = tiny_moe("llama")
    before = dict(model.base.config.to_dict())
    model.config.use_cache = False
    model.config.get_text_config().pad_token_id = 7
    model.config.get_text_config().output_router_logits = True
    assert model.base.config.to_dict() == {**before, "use_cache": False, "pad_token_id": 7}
    assert copy.deepcopy(model.config).to_dict() == model.config.to_dict() == model.base.config.to_dict()


# --- trl.SFTTrainer


def words() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>"])}
    vocabulary |= {f"w{index}": index for index in range(len(vocabulary), VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def texts(kind: str) -> Dataset:
    """The same texts as plain text, as prompts with completions, and as tokens."""
    ids = [tokens(length, seed=index, low=4).tolist() for index, length in enumerate(LENGTHS)]
    if kind == "tokens":
        return Dataset.from_dict({"input_ids": ids, "labels": ids})
    written = [[f"w{index}" for index in text] for text in ids]
    if kind == "text":
        return Dataset.from_dict({"text": [" ".join(text) + " </s>" for text in written]})
    prompts, completions = [" ".join(text[:2]) for text in written], [" " + " ".join(text[2:]) for text in written]
    return Dataset.from_dict({"prompt": prompts, "completion": [f"{text} </s>" for text in completions]})


def sft(model: DyLoRAMoE, folder: Path, *, kind: str = "text", **more: Any) -> Trainer:
    trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
    arguments = trl.SFTConfig(**settings(folder, **{"bf16": False, **SGD, **more}))
    data = {"train_dataset": texts(kind), "eval_dataset": texts(kind), "processing_class": words()}
    return trl.SFTTrainer(model=model, args=arguments, **data)


def trls_batches(trainer: Trainer) -> list[dict[str, Tensor]]:
    data = list(trainer.train_dataset)
    return [trainer.data_collator(data[start : start + 2]) for start in range(0, len(data), 2)]


@pytest.mark.parametrize(
    ("family", "accumulate", "kind"),
    [("llama", 1, "text"), ("llama", 2, "tokens"), ("gemma3", 2, "completions"), ("qwen2", 1, "completions")],
)
def test_sft_trains_what_the_stock_trainer_trains(tmp_path, family, accumulate, kind):
    """On the same batches. Without a balance loss: TRL does not say how many tokens a step predicts."""
    ours, theirs = (tiny_moe(family, balance_coefficient=0.0) for _ in range(2))
    start = tensors(ours)
    first = sft(ours, tmp_path, kind=kind, gradient_accumulation_steps=accumulate)
    first.train()
    assert bool((trls_batches(first)[0]["labels"][:, :2] == -100).all()) == (kind == "completions")
    arguments = TrainingArguments(**settings(tmp_path, gradient_accumulation_steps=accumulate, **SGD))
    data = {"train_dataset": list(first.train_dataset), "data_collator": first.data_collator}
    second = Trainer(model=theirs, args=arguments, **data)
    second.train()
    assert_same_but_for_rounding(ours, theirs, start)
    assert logged(first) == pytest.approx(logged(second), rel=1e-5)
    assert_only_experts_and_gate_moved(ours, family, start)


@pytest.mark.parametrize(("family", "accumulate"), [("qwen2", 1), ("llama", 2)])
def test_sft_trains_the_routers_losses(tmp_path, family, accumulate):
    """Reported: TRL takes log-probabilities from the base instead of our loss, so the balance loss would be lost."""
    own = {"balance_coefficient": 1.0, "z_loss_coefficient": 0.03, "entropy_coefficient": 0.2}
    looped, model, without = tiny_moe(family, **own), tiny_moe(family, **own), tiny_moe(family, **own)
    start = tensors(model)
    trainer = sft(model, tmp_path, gradient_accumulation_steps=accumulate)
    trainer.train()
    losses, _ = own_loop(looped, trls_batches(trainer), accumulate=accumulate, loss=trl_loss, sgd=True)
    assert_same_but_for_rounding(model, looped, start)
    assert torch.equal(model.router.shares, looped.router.shares)
    assert logged(trainer) == pytest.approx(losses, rel=1e-5)
    switched_off = sft(without, tmp_path, gradient_accumulation_steps=accumulate, router_aux_loss_coef=0.0)
    switched_off.train()
    gaps = [loss - other for loss, other in zip(logged(trainer), logged(switched_off), strict=True)]
    assert min(gaps) > 0.5
    assert gaps[0] == pytest.approx(logged(trainer, "aux_loss")[0], rel=1e-5)


def test_sft_with_its_own_defaults(tmp_path):
    """bf16 autocast and gradient checkpointing: as the same in fp32, but for rounding, and the experts stay fp32."""
    rounded, exact = (tiny_moe("gemma3", balance_coefficient=1.0) for _ in range(2))
    start = tensors(rounded)
    first = sft(rounded, tmp_path, bf16=None)
    assert first.args.bf16 and first.args.gradient_checkpointing
    second = sft(exact, tmp_path, gradient_checkpointing=False)
    for trainer in (first, second):
        trainer.train()
    assert logged(first) == pytest.approx(logged(second), rel=5e-3)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    assert_only_experts_and_gate_moved(rounded, "gemma3", start)


def test_what_sft_saves_is_the_model(tmp_path):
    """Numbered checkpoints with the tokenizer in them, and `save_model()` beside TRL's model card."""
    model = tiny_moe("qwen2")
    trainer = sft(model, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "README.md").is_file() and (tmp_path / "checkpoint-4" / "tokenizer.json").is_file()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert_same(tensors(DyLoRAMoE.from_pretrained(folder, tiny_base("qwen2"))), tensors(model))
    first = DyLoRAMoE.from_pretrained(tmp_path / "checkpoint-2", tiny_base("qwen2"))
    assert not torch.equal(first.router.gate["expert_0"], model.router.gate["expert_0"])


def test_sft_evaluates_and_leaves_the_model_as_usable_as_before(tmp_path):
    model = tiny_moe("llama", balance_coefficient=1.0)
    trainer = sft(model, tmp_path, per_device_eval_batch_size=len(LENGTHS))
    trainer.train()
    metrics = trainer.evaluate(texts("text"))
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        out = model.eval()(**batch)
    assert metrics["eval_loss"] == pytest.approx(float(out.loss), rel=1e-5)
    assert metrics["eval_aux_loss"] == pytest.approx(float(out.aux_loss), rel=1e-5)
    model.save_pretrained(str(tmp_path / "end"))
    fresh = DyLoRAMoE.from_pretrained(tmp_path / "end", tiny_base("llama"))
    prompt = {"input_ids": tokens(2, 6), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**prompt), fresh.generate(**prompt))


# --- both


@pytest.mark.parametrize("make", [stock, sft], ids=["stock", "sft"])
def test_gradient_checkpointing_changes_nothing(tmp_path, make):
    """With dropout and two batches a step, bit for bit; TRL switches it on by default."""
    ends = []
    for checkpointing in (False, True):
        model = tiny_moe("llama", balance_coefficient=1.0, lora={"lora_dropout": 0.3})
        trainer = make(model, tmp_path, gradient_checkpointing=checkpointing, gradient_accumulation_steps=2)
        trainer.train()
        assert model.base.is_gradient_checkpointing == checkpointing
        ends.append(tensors(model))
    assert_same(ends[1], ends[0])


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
SELECTIVE = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
NOISE = {"neftune_noise_alpha": 5.0}


@pytest.mark.parametrize(
    ("make", "more", "message"),
    [
        pytest.param(stock, NOISE, "leave neftune_noise_alpha out", id="stock-neftune"),
        pytest.param(stock, REENTRANT, "use_reentrant=True loses the router", id="stock-reentrant"),
        pytest.param(sft, NOISE, "leave neftune_noise_alpha out", id="sft-neftune"),
        pytest.param(sft, REENTRANT, "use_reentrant=True loses the router", id="sft-reentrant"),
        pytest.param(sft, SELECTIVE, "keep each forward's own routing", id="sft-selective"),
    ],
)
def test_what_would_train_something_else_is_refused(tmp_path, make, more, message):
    model = tiny_moe("llama")
    start = tensors(model)
    trainer = make(model, tmp_path, **more)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert_same(tensors(model), start)


RESUMABLE = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}


@pytest.mark.parametrize("make", [stock, sft], ids=["stock", "sft"])
def test_a_stock_trainer_resumes_where_it_was(tmp_path, make):
    """Bit for bit, with dropout and the momentum of AdamW; it was refused, because its files have other names."""
    more = {**RESUMABLE, "optim": "adamw_torch", "learning_rate": LEARNING_RATE}
    own = {"balance_coefficient": 1.0, "lora": {"lora_dropout": 0.3}}
    whole, resumed = (tiny_moe("llama", **own) for _ in range(2))
    make(whole, tmp_path, **more).train()
    make(resumed, tmp_path, **more).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(tensors(resumed), tensors(whole))


def test_a_stock_trainer_does_not_resume_from_a_checkpoint_of_another_model(tmp_path):
    stock(tiny_moe("llama"), tmp_path, **RESUMABLE).train()
    model = tiny_moe("llama", num_experts=2)
    start = tensors(model)
    with pytest.raises(CheckpointError, match="is of another model"):
        stock(model, tmp_path, **RESUMABLE).train(resume_from_checkpoint=True)
    assert_same(tensors(model), start)


@pytest.mark.parametrize("make", [stock, sft], ids=["stock", "sft"])
def test_a_stock_trainer_ends_with_its_best_model(tmp_path, caplog, make):
    """It ended with the last one, and logged that the best one could not be found."""
    model = tiny_moe("llama")
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make(model, tmp_path, **RESUMABLE, **evaluated, metric_for_best_model="eval_loss", greater_is_better=True)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith(f"-{trainer.state.global_step}")  # the greatest loss is no later one
    assert_same(tensors(DyLoRAMoE.from_pretrained(best, tiny_base("llama"))), tensors(model))
    last = DyLoRAMoE.from_pretrained(tmp_path / f"checkpoint-{trainer.state.global_step}", tiny_base("llama"))
    assert not torch.equal(last.router.gate["expert_0"], model.router.gate["expert_0"])
    assert "best model" not in caplog.text


@pytest.mark.parametrize(
    "more",
    [{"padding_free": True, "max_length": None}, {"packing": True, "packing_strategy": "bfd", "max_length": 64}],
    ids=["padding_free", "packing"],
)
def test_packed_texts_train_as_padded_ones(tmp_path, more):
    """Reported: the router's memory ran on from one text of a packed row into the next. One step over all texts, so
    that it does not matter which of them share a row."""
    once = {"per_device_train_batch_size": len(LENGTHS)}
    own = {"balance_coefficient": 1.0, "entropy_coefficient": 0.2}
    packed, padded_ = (tiny_moe("llama", **own) for _ in range(2))
    start = tensors(packed)
    first = sft(packed, tmp_path, **once, **more)
    batch = first.data_collator(list(first.train_dataset))
    assert len(batch["input_ids"]) < len(LENGTHS) and "attention_mask" not in batch
    first.train()
    second = sft(padded_, tmp_path, **once)
    second.train()
    assert first.state.global_step == second.state.global_step == 1
    assert_same_but_for_rounding(packed, padded_, start)
