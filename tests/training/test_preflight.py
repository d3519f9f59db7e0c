"""Mistakes that are known before data or weights are read: one message, status 2, and no folder left behind."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from reference.trainers import train_flags
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.integrations import integration_utils

from dylo_moe.cli import main
from dylo_moe.commands.compare.request import build_compare_parser
from dylo_moe.commands.stream.request import build_stream_parser
from dylo_moe.commands.train import run as train_run
from dylo_moe.commands.train.request import build_train_parser
from dylo_moe.training.callbacks import evaluations_left
from dylo_moe.training.trainer_arguments import RANGES
from dylo_moe.utils.errors import Stopped


@pytest.fixture
def said(tiny_folder, tmp_path, capsys, monkeypatch):
    """What `dylora train` prints on stderr where it is refused; reading data or weights would fail the test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def refused(*more: str) -> str:
        with monkeypatch.context() as patch:
            for reader in ("load_tokenizer", "load_data", "build_model"):
                patch.setattr(train_run, reader, lambda *_, **__: pytest.fail("something was read"))
            status = main(["train", *train_flags(tiny_folder, tmp_path / "out", *more)])
        text = capsys.readouterr().err.strip()
        assert status == 2, text
        assert len(text.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return text

    return refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_experts 0", "num_experts is 0; it must be a whole number of at least 1"),
        ("--top_k 9", "top_k is 9, but num_experts is 2"),
        ("--lora_targets q_proj,q_prj", "q_prj"),
        ("--router_layer 9", "router_layer is 9"),
        ("--lora_alpha 0", "lora_alpha is 0"),
        ("--lora_dropout 1", "lora_dropout is 1.0; it must be a finite number of at least 0 and below 1"),
        ("--learning_rate 0", "learning_rate is 0.0; it must be a finite number above 0"),
        ("--learning_rate nan", "learning_rate is nan; it must be a finite number above 0"),
        ("--num_train_epochs 0", "num_train_epochs is 0.0; it must be a finite number above 0"),
        ("--max_steps 0", "max_steps is 0; it must be"),
        ("--fp16", "fp16 needs a GPU, and use_cpu is given; give bf16, or leave both out for"),
        ("--bf16 --fp16", "bf16 and fp16 are both given; leave one of them out"),
        ("--lr_scheduler_type cosin", "lr_scheduler_type is 'cosin'; did you mean cosine?"),
        ("--lr_scheduler_type cosine_with_min_lr", "lr_scheduler_type cosine_with_min_lr cannot be used"),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"min_lr":1}', "unexpected keyword argument 'min_lr'"),
        ("--lr_scheduler_kwargs {min_lr}", "lr_scheduler_kwargs is '{min_lr}'; it must be JSON"),
        ("--optim lomo", "optim lomo cannot be used"),
        ("--optim adamw", "optim is 'adamw'; did you mean adamw_torch?"),
        ("--report_to mlflow", "report_to is mlflow, whose package is not installed: pip install mlflow"),
        ("--report_to nowhere", "report_to is 'nowhere'; it must be none or one of azure_ml"),
        ("--report_to wandb", "there is no key for Weights & Biases: run `wandb login`"),
        ("--num_experts 99999999999", "num_experts is 99,999,999,999 and lora_r 4: they take"),
        ("--lora_r 999999999999", "lora_r is 999,999,999,999: one expert of that rank does not fit"),
        ("--metric_for_best_model foo", "'foo'; it must be loss, or that of a dataset: low_loss, high_loss"),
        ("--load_best_model_at_end --eval_strategy no", "eval_strategy is no and save_strategy epoch; give both"),
        ("--save_strategy best --eval_strategy no", "save_strategy is best, but eval_strategy is no"),
        ("--output_dir=", "output_dir is ''; name a new folder"),
        (f"--output_dir {__file__}", f"output_dir {__file__} is a file; name a new folder"),
        ("--output_dir /proc/none/run", "output_dir /proc/none/run cannot be made"),
        ("--datasets cmak", "unknown dataset 'cmak'; the nearest known one is 'cmake'"),
        ("--datasets humaneval,cmake", "humaneval is for evaluation only, and never trained on"),
        ("--early_stopping_patience 2 --eval_strategy no", "eval_strategy is no, so nothing is evaluated"),
    ],
)
def test_a_mistake_is_found_before_anything_is_read(said, words, message):
    assert message in said(*words.split())


def test_a_tracker_that_is_not_installed_has_the_package_of_our_extra(said, monkeypatch):
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    message = "report_to is tensorboard, whose package is not installed: pip install 'tensorboard>=2.18'"
    assert message in said("--report_to", "tensorboard")


def test_all_mistakes_come_in_one_message(said, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    text = said(
        *("--lora_r", "x", "--seed", "-1", "--top_k", "0", "--learning_rate", "-1", "--overlong", "bend", "--fp16"),
        *("--output_dir", str(tmp_path / "used")),
    )
    for part in ("lora_r is 'x'", "seed is -1", "top_k is 0", "learning_rate is -1.0", "overlong is 'bend'", "fp16"):
        assert part in text
    text = said(
        *("--report_to", "mlflow", "--optim", "lomo", "--top_k", "3", "--router_layer", "9"),
        *("--output_dir", str(tmp_path / "used")),
    )
    for part in ("mlflow", "lomo", "top_k is 3", "router_layer is 9", "used is not empty"):
        assert part in text


def test_rows_longer_than_the_learned_positions_are_refused(said, tiny_folder, tmp_path):
    config = GPT2Config(vocab_size=93, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert "--max_seq_length is 64 tokens, but" in said("--model", str(tmp_path / "gpt2"))
    assert "has learned 32 positions" in said("--model", str(tmp_path / "gpt2"))


def test_a_token_without_an_embedding_is_refused_before_weights_are_read(tiny_folder, tmp_path, capsys):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in (tiny_folder / "base").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    (folder / "model.safetensors").write_bytes(b"never read")
    assert main(["train", *train_flags(tiny_folder, tmp_path / "out", "--model", str(folder))]) == 2
    assert "20 embeddings, for ids from 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(tiny_folder, tmp_path, capsys, monkeypatch):
    """With the real error of an allocation that no machine can make."""
    monkeypatch.setattr(train_run, "train_to_end", lambda *_: torch.empty(2**62, dtype=torch.uint8))
    assert main(["train", *train_flags(tiny_folder, tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dylora train: there is not enough memory (")
    for advice in ("--per_device_train_batch_size", "--gradient_accumulation_steps", "`dylora plan`"):
        assert advice in error
    assert not (tmp_path / "out").exists()


def test_a_stop_after_the_last_step_says_that_the_training_is_saved(tiny_folder, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise Stopped(15)

    monkeypatch.setattr(train_run, "sample_of_each", stop)
    assert main(["train", *train_flags(tiny_folder, tmp_path / "out", "--max_steps", "2")]) == 128 + 15
    error = capsys.readouterr().err
    assert f"is over and saved as {tmp_path / 'out' / 'checkpoint'}; evaluate it with: " in error
    assert (tmp_path / "out" / "checkpoint" / "dylora.json").is_file()


def test_more_rows_a_step_than_there_are_is_said(tiny_folder, tmp_path, capsys):
    words = ["--per_device_train_batch_size", "500", "--max_steps", "1"]
    assert main(["train", *train_flags(tiny_folder, tmp_path / "out", *words)]) == 0
    output = capsys.readouterr()
    assert "an optimizer step takes 500 rows, and an epoch has" in output.err
    assert "evaluating after training" in output.out


def test_every_checked_flag_exists():
    for parser in (build_train_parser(), build_stream_parser(), build_compare_parser()):
        assert {f"--{name}" for name in RANGES} <= parser._option_string_actions.keys()


@pytest.mark.parametrize(
    ("strategy", "every", "step", "epoch", "left"),
    [
        ("no", None, 3, 0.3, 1),
        ("epoch", None, 3, 0.3, 5),
        ("epoch", None, 20, 2.0, 4),
        ("epoch", None, 35, 3.5, 2),
        ("steps", 10, 12, 1.2, 4),
        ("steps", 10, 35, 3.5, 2),
    ],
)
def test_the_time_left_counts_the_evaluations_that_are_left(strategy, every, step, epoch, left):
    args = SimpleNamespace(eval_strategy=strategy, eval_delay=0)
    state = SimpleNamespace(max_steps=35, num_train_epochs=4, eval_steps=every, global_step=step, epoch=epoch)
    assert evaluations_left(args, state) == left
