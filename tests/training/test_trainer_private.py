"""What is relied on of the Trainer's private methods, and the faults of its own for which they are overridden.

One of these fails when Transformers changes a method that is overridden, calls it at another moment, or has mended the
fault, so that the override can go.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
from pathlib import Path

import pytest
import torch
from reference.paths import ROOT
from reference.tiny import VOCAB, tiny_base
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.training_args import ParallelMode

from dylo_moe import DyLoRAMoE, RouterConfig
from dylo_moe.commands.stream.stage_trainer import StageTrainer
from dylo_moe.training.sharding import ShardedModel
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.training.trainer_arguments import TrainArguments
from dylo_moe.training.trainer_checkpoints import CheckpointingTrainer

OVERRIDDEN = {
    "_get_train_sampler": ["train_dataset"],
    "_clip_grad_norm": ["model"],
    "_wrap_model": ["model", "training", "dataloader"],
    "_save_checkpoint": ["model", "trial"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
}
"""Private methods of the Trainer that are overridden, and their parameters."""

OURS = (CheckpointingTrainer, DyLoRATrainer, StageTrainer)
SOURCES = ("training/trainer_checkpoints.py", "training/trainer.py", "commands/stream/stage_trainer.py")
PRIVATE = {name for name in dir(Trainer) if name.startswith("_") and not name.startswith("__")}


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, VOCAB, (12,), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]


def arguments(folder, kind=TrainingArguments, **more):
    chosen = {
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
        "remove_unused_columns": False, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps",
        "eval_steps": 1, "prediction_loss_only": True, "disable_tqdm": True, "logging_steps": 1, **more,
    }  # fmt: skip
    return kind(str(folder), **chosen)


def trainer_in(folder, kind=DyLoRATrainer, *, arguments_of=TrainingArguments, **more):
    model = DyLoRAMoE.from_base(tiny_base(), num_experts=2, router=RouterConfig(top_k=1))
    given = arguments(folder, arguments_of, **more)
    return kind(model=model, args=given, train_dataset=rows(), eval_dataset={"a": rows(4)}, domains=["a"])


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.own_model().named_parameters() if p.requires_grad}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- which methods


def test_these_private_methods_are_overridden_and_each_says_why():
    found = {name: vars(kind)[name] for kind in OURS for name in vars(kind).keys() & PRIVATE}
    assert found.keys() == OVERRIDDEN.keys()
    for name, method in found.items():
        assert "Why this private method is overridden:" in method.__doc__, name


def test_no_other_private_method_is_called():
    called = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse((ROOT / "dylo_moe" / source).read_text())):
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
                called.add(node.attr)
    assert called <= OVERRIDDEN.keys()


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_their_parameters_are_as_they_were(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == ["self", *OVERRIDDEN[name]]


# --- when they are called


class Recorder(DyLoRATrainer):
    """Records the calls of the methods that are relied on, in their order."""

    def __init__(self, *args, **kwargs):
        self.calls = []
        super().__init__(*args, **kwargs)

        class Saved(TrainerCallback):
            def on_save(callback, args, state, control, **kwargs):
                self.calls.append("on_save")

            def on_train_end(callback, args, state, control, **kwargs):
                self.calls.append("on_train_end")

        self.add_callback(Saved)


def recorded(name):
    def method(self, *args, **kwargs):
        if name != "_wrap_model" or kwargs.get("training", True):  # an evaluation wraps too
            self.calls.append(name)
        return getattr(super(Recorder, self), name)(*args, **kwargs)

    return method


for each in (*OVERRIDDEN, "create_optimizer", "training_step", "save_model", "evaluate"):
    setattr(Recorder, each, recorded(each))


def test_they_are_called_at_the_moments_that_are_relied_on(tmp_path):
    """The first training is saved at its end only when that was evaluated (SavePoints)."""
    trainer = trainer_in(tmp_path, Recorder, load_best_model_at_end=True, metric_for_best_model="loss")
    trainer.train()
    evaluate = ["evaluate", "evaluate"]  # of all datasets, and of each
    save = ["_save_checkpoint", "save_model", "on_save"]
    step = ["training_step", "_clip_grad_norm"]
    begin = ["_get_train_sampler", "create_optimizer", "_wrap_model"]
    assert trainer.calls == [
        *begin, *step, *evaluate, *save, *step, *evaluate, *save, "_load_best_model", "on_train_end",
    ]  # fmt: skip
    again = trainer_in(tmp_path / "again", Recorder, eval_strategy="no", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.calls == ["_load_from_checkpoint", *begin, *step, "on_train_end"]


# --- the order of the rows


def test_the_order_of_grouped_rows_follows_from_the_epoch_alone(tmp_path):
    trainer = trainer_in(tmp_path, train_sampling_strategy="group_by_length", gradient_accumulation_steps=2)
    stock = Trainer._get_train_sampler(trainer)
    assert type(stock) is LengthGroupedSampler and stock.batch_size == 8 and stock.lengths == [12] * 8
    orders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        orders.append([list(stock), list(trainer._get_train_sampler())])
    assert orders[0][0] != orders[1][0], "the Trainer's own order no longer depends on what was drawn before"
    assert orders[0][1] == orders[1][1]
    loader = trainer.get_train_dataloader()
    batches = [torch.cat([batch["input_ids"] for batch in loader]) for _ in range(2)]
    loader.set_epoch(1)  # the Trainer calls this, and it must reach the sampler
    assert not torch.equal(batches[0], torch.cat([batch["input_ids"] for batch in loader]))


# --- gradients


def test_clipping_the_trained_parameters_clips_all_gradients(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.args.max_grad_norm = 0.1
    model = trainer.own_model()
    model(**trainer.data_collator(rows(4))).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    clipped = []
    for clip in (Trainer._clip_grad_norm, DyLoRATrainer._clip_grad_norm):
        for name, parameter in model.named_parameters():
            parameter.grad = whole[name].clone() if name in whole else None
        norm = clip(trainer, model)
        assert norm > 0.1
        clipped.append({"norm": norm} | {name: p.grad for name, p in model.named_parameters() if name in whole})
    assert same(*clipped) and not same(clipped[0], {"norm": clipped[0]["norm"], **whole})


# --- wrapping


def test_a_model_that_was_evaluated_is_left_alone_by_accelerate(tmp_path, monkeypatch):
    """And one that is wrapped already is trained as it is, by the Trainer and by Accelerate."""
    trainer = trainer_in(tmp_path, eval_strategy="no", save_strategy="no")
    trainer.evaluate()
    prepared = []
    monkeypatch.setattr(trainer.accelerator, "verify_device_map", lambda model: prepared.append(model) or False)
    assert trainer.accelerator.prepare_model(trainer.model) is trainer.model
    assert prepared == [], "Accelerate prepares a model again, so that _wrap_model need not"
    trained = []
    monkeypatch.setattr(DyLoRATrainer, "_wrap_model", lambda self, model, training=True, dataloader=None: (
        ShardedModel(model) if training else model))  # fmt: skip
    monkeypatch.setattr(Trainer, "training_step", lambda self, model, *args: trained.append(model) or torch.zeros(()))
    trainer.train()
    assert len(trained) == 2 and all(type(model) is ShardedModel for model in trained)
    assert trainer.model_wrapped is trained[0]


# --- checkpoints


def interrupt(save, trainer, monkeypatch) -> list[str]:
    """The folders that a save leaves which is interrupted near its end."""

    def interrupted(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_rng_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(trainer, trainer.model, None)
    monkeypatch.undo()
    return sorted(path.name for path in Path(trainer.args.output_dir).iterdir())


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path / "run", eval_strategy="no", save_strategy="no")
    trainer.train()
    assert interrupt(DyLoRATrainer._save_checkpoint, trainer, monkeypatch) == [".checkpoint-2.partial"]
    assert trainer.args.output_dir == str(tmp_path / "run")
    monkeypatch.setattr(CheckpointingTrainer, "save_model", Trainer.save_model)
    left = interrupt(Trainer._save_checkpoint, trainer, monkeypatch)
    assert "checkpoint-2" in left, "the Trainer saves atomically now"


def test_a_checkpoint_holds_the_trainers_files_and_ours(tmp_path):
    """The Trainer's own would pickle its arguments beside the model."""
    trainer = trainer_in(tmp_path / "run", eval_strategy="no", save_strategy="no")
    trainer.train()
    trainer.save_now()
    found = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    of_trainer = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    ours = {"dylora.json", "README.md", "router.safetensors", "gate_start.safetensors", "experts"}
    assert found == of_trainer | ours
    trainer.save_model(str(tmp_path / "model"))
    assert {path.name for path in (tmp_path / "model").iterdir()} == ours - {"gate_start.safetensors"}
    Trainer.save_model(trainer, str(tmp_path / "stock"))
    assert (tmp_path / "stock" / "training_args.bin").is_file()


@pytest.mark.parametrize("load", ["_load_from_checkpoint", "_load_best_model"])
def test_the_trainers_own_loading_finds_none_of_our_weights(load, tmp_path):
    trainer = trainer_in(tmp_path, eval_strategy="no", save_strategy="no")
    trainer.train()
    trainer.save_now()
    folder, saved = str(tmp_path / "checkpoint-2"), weights(trainer)
    trainer.state.best_model_checkpoint = folder
    given = [folder] if load == "_load_from_checkpoint" else []
    with torch.no_grad():
        for parameter in trainer.own_model().parameters():
            if parameter.requires_grad:
                parameter.zero_()
    with contextlib.suppress(ValueError, KeyError, OSError):
        getattr(Trainer, load)(trainer, *given)
    assert not same(weights(trainer), saved), "the Trainer loads our checkpoints by itself now"
    getattr(trainer, load)(*given)
    assert same(weights(trainer), saved)


@pytest.mark.parametrize("hidden", [True, False])
def test_at_a_limit_of_one_the_newest_is_kept_beside_the_best(hidden, tmp_path, monkeypatch):
    """The losses fall, and the highest counts as the best: that of the first evaluation."""
    if not hidden:
        monkeypatch.setattr("dylo_moe.training.trainer_checkpoints.SavePoints.on_train_begin", lambda *args, **kw: None)
    more = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 3, "greater_is_better": True}
    trainer = trainer_in(tmp_path, save_total_limit=1, **more)
    trainer.train()
    assert trainer.state.best_global_step == 1
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == ({"checkpoint-1", "checkpoint-3"} if hidden else {"checkpoint-1"}), "the limit need not be hidden"
    assert trainer.args.save_total_limit == 1


def test_uploads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="upload a checkpoint folder with the `hf` command"):
        trainer_in(tmp_path, push_to_hub=True)


# --- public hooks that replace private ones


@pytest.mark.parametrize("shards_base", [False, True])
def test_a_sharded_base_is_not_moved(shards_base, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda self, model, device: moved.append(model))
    monkeypatch.setattr(TrainArguments, "shards_base", shards_base)
    trainer = trainer_in(tmp_path, arguments_of=TrainArguments, eval_strategy="no", save_strategy="no")
    trainer.train()
    assert len(moved) == (0 if shards_base else 1)


def test_one_process_trains_on_one_gpu(tmp_path):
    """Of a machine with four, which the Trainer would use with `nn.DataParallel`."""
    stock, ours = arguments(tmp_path), arguments(tmp_path, TrainArguments)
    for each in (stock, ours):
        each._n_gpu = 4
    assert (stock.n_gpu, stock.train_batch_size, stock.parallel_mode) == (4, 16, ParallelMode.NOT_DISTRIBUTED)
    assert (ours.n_gpu, ours.train_batch_size, ours.parallel_mode) == (1, 4, ParallelMode.NOT_PARALLEL)
