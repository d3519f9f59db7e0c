"""`dylora plan`: its numbers are those of the model, the run and the step that it stands for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from reference.paths import ROOT
from reference.real_steps import evaluation_activations, step_activations
from reference.tiny import LORA, MIXED_LAYERS, tiny_base, tiny_moe, tokens
from reference.trainers import train_flags
from reference.wide import wide_base
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.cli import main
from dylo_moe.commands.plan.base_config import base_config, known_config, known_names
from dylo_moe.commands.plan.memory_account import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    Component,
    MemoryAccount,
    Peak,
    peak_memory,
    settings_of_flags,
)
from dylo_moe.commands.plan.outline import outline
from dylo_moe.commands.plan.request import parse_plan
from dylo_moe.commands.plan.run import Plan, check_flags, make_plan
from dylo_moe.commands.plan.screen import show_plan
from dylo_moe.commands.plan.step_activations import TensorTracker
from dylo_moe.commands.plan.workload import Batch, Workload, workload
from dylo_moe.commands.train.request import parse_train
from dylo_moe.data.collator import Collator
from dylo_moe.data.loading import load_data
from dylo_moe.data.packing import epoch_of
from dylo_moe.model.loss import FullLogitsNeeded, chunk_loss
from dylo_moe.training.build import build_model
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils.errors import UsageError

PUBLISHED = {
    "google/codegemma-2b": 2_506_172_416,
    "google/gemma-2b": 2_506_172_416,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2.5-Coder-1.5B": 1_543_714_304,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "google/gemma-3-270m": 268_098_176,
}


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A base of which nothing but its config is there."""
    folder = tmp_path / "shape"
    tiny_base("llama").config.save_pretrained(folder)
    return folder


def planned(folder: Path, *more: str) -> Plan:
    words = ["--model", str(folder), "--num_experts", "3", "--lora_r", "4", "--datasets", "nowhere.jsonl"]
    return make_plan(parse_plan([*words, "--max_seq_length", "64", "--use_cpu", "true", *more]))


@pytest.mark.parametrize("name", known_names())
def test_a_known_shape_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base_config(name))
    assert model.num_parameters() == PUBLISHED[name]


def test_an_unknown_name_is_told_what_is_known():
    with pytest.raises(ValueError, match=r"'nobody/nothing' could not be .*Known without the hub: .*codegemma-2b"):
        base_config("nobody/nothing")


def test_a_config_in_the_cache_of_the_hub_comes_before_the_one_that_we_bring(tmp_path, monkeypatch):
    commit = tmp_path / "models--google--gemma-2b" / "snapshots" / "1"
    commit.mkdir(parents=True)
    (tmp_path / "models--google--gemma-2b" / "refs").mkdir()
    (tmp_path / "models--google--gemma-2b" / "refs" / "main").write_text("1")
    (commit / "config.json").write_text(known_config("google/gemma-2b").read_text().replace("16384", "4096"))
    assert base_config("google/gemma-2b").intermediate_size == 16_384
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert base_config("google/gemma-2b").intermediate_size == 4096


def test_what_is_counted_is_the_built_model(config_folder):
    """Every component, and nothing is left out; no weights lie in the folder."""
    real = tiny_moe(num_experts=3, lora=LORA)
    base, expert, router = found = planned(config_folder).components
    assert expert == Component("expert", real.experts[0].parameters, True, 3)
    assert router == Component("router", sum(item.numel() for item in real.router.parameters()), True)
    assert base == Component("base", tiny_base("llama").num_parameters(), False)
    assert sum(part.total for part in found) == sum(item.numel() for item in real.parameters())
    assert [path.name for path in config_folder.iterdir()] == ["config.json"]


def test_a_shared_expert_is_counted(config_folder):
    real = tiny_moe(num_experts=3, lora=LORA, shared_rank=6)
    plan, without = (planned(config_folder, *more) for more in (("--shared_r", "6"), ()))
    shared = real.experts.shared.parameters
    assert plan.components[2] == Component("shared expert", shared, True)
    assert sum(part.total for part in plan.components) == sum(item.numel() for item in real.parameters())
    assert plan.checkpoint_bytes - without.checkpoint_bytes == 3 * 4 * shared
    states = [peak(config_folder, *more).parts[OPTIMIZER] for more in (("--shared_r", "6"), ())]
    assert states[0] - states[1] == 2 * 4 * shared


def test_memory_of_one_expert_served_and_trained(config_folder):
    plan = planned(config_folder)
    one = plan.components[1].parameters
    trained = sum(part.total for part in plan.components if part.trainable)
    assert (plan.expert_served_bytes, plan.expert_training_bytes) == (2 * one, 4 * 4 * one)
    assert plan.checkpoint_bytes == 3 * 4 * trained


def test_the_tracker_finds_the_peak_of_a_product_by_hand():
    """exp saves its result; its gradient needs another tensor of that size, while the sum's gradient is expanded."""
    with FakeTensorMode(), TensorTracker() as tracker:
        x = torch.empty(1000, requires_grad=True)  # 4000 bytes
        y = x.exp()  # saved: 8000
        z = y * 2.0  # 12000
        del y
        assert tracker.live == 12_000
        total = z.sum()  # and 4
        del z  # the product by a number saves nothing
        assert tracker.live == 8004
        total.backward()  # one number; then 2 * it, then times y: 8000 more than x, y and two numbers
        assert tracker.peak == 4000 * 4 + 8
        del total
        assert tracker.live == 8000  # x and its gradient
        tracker.leave_out([x.grad])
        assert tracker.live == 4000
        assert (tracker.restart(), tracker.peak) == (4000 * 4 + 8, 4000)


def test_views_and_what_is_given_back_count_once():
    with FakeTensorMode(), TensorTracker() as tracker:
        x = torch.empty(10, 10)
        y = x.t()[2:]
        assert tracker.live == 400
        del x
        assert tracker.live == 400
        del y
        assert tracker.live == 0
    assert tracker.peak == 400


DEEP = {"num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("family", "shape", "more"),
    [
        ("llama", {}, ()),
        ("llama", {}, ("--num_experts", "9")),  # of which only the selected are computed, and a few followed
        ("llama", {}, ("--num_experts", "9", "--top_k", "2")),
        ("llama", {}, ("--num_experts", "9", "--router_policy", "uniform")),
        ("llama", {}, ("--num_experts", "9", "--shared_r", "6")),
        ("llama", DEEP, ("--shared_r", "6", "--top_k", "3")),
        ("llama", DEEP, ()),
        ("llama", DEEP, ("--gradient_checkpointing", "true")),
        ("llama", DEEP, ("--router_layer", "2")),  # layers of two kinds: without experts and with
        ("llama", DEEP, ("--router_layer", "final", "--granularity", "sequence")),
        ("gemma3", {**DEEP, "layer_types": MIXED_LAYERS * 3}, ()),
        ("gpt2", DEEP, ("--loss_chunk_size", "8")),
    ],
)
def test_a_step_takes_what_a_real_one_takes(family, shape, more, tmp_path):
    """Bytes of the tensors of a real step through all layers, found with three at most. Padding and the routing's runs
    differ a little, as each expert is taken to get an equal share of the tokens."""
    base = tiny_base(family, **shape)
    base.config.save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--num_experts", "3", "--lora_r", "4", "--use_cpu", "true", *more]
    arguments = parse_train(words)
    account = MemoryAccount(outline(arguments), device="cpu")
    found = account.training(Batch(4, 48), checkpointing=settings_of_flags(account.outline).checkpointing)
    evaluated = account.evaluation(Batch(4, 48))
    real = build_model(arguments.model, arguments.experts, arguments.router, bf16=False, load=lambda *_, **__: base)
    chunk_loss(real, arguments.model.loss_chunk_size)
    if "--gradient_checkpointing" in more:
        real.gradient_checkpointing_enable()
    ids = tokens(4, 48)
    taken, evaluation = step_activations(real, ids), evaluation_activations(real, ids)
    assert found.forward == pytest.approx(taken.forward, rel=0.02)
    assert found.backward == pytest.approx(taken.backward, rel=0.03)
    assert evaluated == pytest.approx(evaluation, rel=0.02)
    assert evaluated <= found.forward  # why an evaluation is looked at only where its batch is larger


def peak(folder: Path, *more: str, rows: int = 8, eval_seq: int = 64) -> Peak:
    words = ["--model", str(folder), "--num_experts", "3", "--lora_r", "4", "--use_cpu", "true", *more]
    return peak_memory(outline(parse_train(words)), Workload(0, 0, 0, 0, Batch(rows, 64), Batch(8, eval_seq), 0))


def test_optimizer_states_and_with_accumulation_gradients_are_there_from_the_beginning(config_folder):
    trained = sum(item.nbytes for item in tiny_moe(num_experts=3, lora=LORA).parameters() if item.requires_grad)
    once, twice = peak(config_folder), peak(config_folder, "--gradient_accumulation_steps", "2")
    assert once.parts[OPTIMIZER] == twice.parts[OPTIMIZER] == 2 * trained
    assert (once.parts[GRADIENTS], twice.parts[GRADIENTS]) == (0, trained)
    assert once.parts[ACTIVATIONS] == twice.parts[ACTIVATIONS]


def test_checkpointing_and_smaller_batches_take_less(config_folder):
    usual = peak(config_folder).total
    assert peak(config_folder, "--gradient_checkpointing", "true").total < usual
    assert peak(config_folder, rows=4).total < usual


def test_an_evaluation_with_a_large_batch_is_the_peak(config_folder):
    small, large = (peak(config_folder, eval_seq=seq) for seq in (65, 512))
    assert (small.when, large.when) == ("a training step", "an evaluation")
    assert large.total > small.total


def test_many_experts_take_what_a_few_and_each_further_one_take(config_folder, monkeypatch):
    """Weights to the byte; a step as one in which all experts are followed, though other operations are the largest."""
    words = ["--model", str(config_folder), "--num_experts", "16", "--top_k", "2", "--bf16", "--gradient_checkpointing"]

    def account() -> MemoryAccount:
        return MemoryAccount(outline(parse_plan(words).arguments), device="cpu")

    few = account()
    monkeypatch.setattr("dylo_moe.commands.plan.outline.followed_pools", lambda pool, **_: [pool])
    everything = account()
    assert [len(model.experts) for model in everything.outline.few] == [16] > [len(few.outline.few[-1].experts)]
    assert few.held == everything.held
    found, real = (one.training(Batch(4, 48), checkpointing=True) for one in (few, everything))
    assert found == pytest.approx(real, rel=0.03)
    assert few.evaluation(Batch(4, 48)) == pytest.approx(everything.evaluation(Batch(4, 48)), rel=0.03)


def test_a_million_experts_are_planned_and_endless_steps_refused(config_folder):
    assert planned(config_folder, "--num_experts", "1000000", "--memory_gb", "1e6").components[1].num == 1_000_000
    with pytest.raises(ValueError, match=r"8 x 10,000,000 tokens is too large .* 10,000,000 chunks, .* at most 1,024"):
        planned(config_folder, "--max_seq_length", "10000000", "--loss_chunk_size", "8")
    with pytest.raises(ValueError, match="it has 5,000 rows, and a plan follows at most 4,096"):
        planned(config_folder, "--per_device_train_batch_size", "5000")
    with pytest.raises(ValueError, match="top_k is 100 of 1,000 experts, and a plan follows at most 64, or all"):
        planned(config_folder, "--num_experts", "1000", "--top_k", "100")


def test_nothing_but_the_planner_knows_of_tensors_without_values():
    sources = [path for path in (ROOT / "dylo_moe").rglob("*.py") if "plan" not in path.relative_to(ROOT).parts]
    assert len(sources) > 100
    assert [path for path in sources if "fake_tensor" in path.read_text(encoding="utf-8").lower()] == []


def printed(words: list[str], capsys) -> str:
    """What the command prints, of which no line is wider than a terminal; its sentences in one line each."""
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    return out


def test_without_data_the_reason_is_given_and_the_rest_is_planned(config_folder, capsys):
    words = ["--model", str(config_folder), "--num_experts", "1", "--lora_r", "4", "--datasets", "nowhere.jsonl"]
    out = printed([*words, "--max_seq_length", "64", "--use_cpu", "--shared_r", "6"], capsys)
    assert re.search(r"tokens per epoch, steps: not known: \w+", out)
    assert "1 expert of rank 4, a shared one of rank 6" in " ".join(out.split()) and "a training checkpoint" in out
    assert "estimated peak on cpu: 8 rows of 64 tokens" in out and "Python and libraries" in out


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("mamba", "mixer.out_proj, which PEFT refuses in this family"),
        ("doge", "self_attn.dt_proj, which is fed cached tokens too, 6 in a forward of 2"),
        ("qwen3_moe", "mlp.experts.down_proj, mlp.experts.gate_up_proj, which is a raw parameter, no linear"),
        ("gemma3+images", None),
    ],
)
def test_what_no_expert_adapts_is_said_without_weights(family, said, tmp_path, capsys):
    wide_base(family).config.save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--num_experts", "1", "--datasets", "nowhere.jsonl", "--max_seq_length", "32"]
    out = " ".join(printed([*words, "--use_cpu"], capsys).split())
    assert (said or "everything") in out and ("no expert adapts" in out) == (said is not None)


@pytest.mark.parametrize(
    "more", [(), ("--gradient_accumulation_steps", "3"), ("--packing", "true"), ("--max_steps", "5")]
)
def test_the_steps_are_those_of_the_trainer(more, tiny_folder, tmp_path):
    arguments = parse_train(train_flags(tiny_folder, tmp_path / "out", *more))
    data = load_data(arguments.data, load_tokenizer(arguments.model.model), seed=arguments.train.seed)
    rows = epoch_of(data.train, arguments.data)
    trainer = DyLoRATrainer(
        model=tiny_moe(num_experts=2),
        args=arguments.train,
        train_dataset=rows,
        domains=data.names,
        eval_dataset=data.evaluation,
        data_collator=Collator(load_tokenizer(arguments.model.model)),
    )
    load = workload(arguments)
    assert load.steps == trainer.total_steps
    assert load.tokens == sum(len(rows[index]["input_ids"]) for index in range(len(rows)))


def test_the_command_needs_no_weights_for_the_steps(tiny_folder, tmp_path, capsys):
    (tiny_folder / "base" / "model.safetensors").rename(tmp_path / "weights")
    try:
        assert main(["plan", *train_flags(tiny_folder, tmp_path / "out")]) == 0
    finally:
        (tmp_path / "weights").rename(tiny_folder / "base" / "model.safetensors")
    assert "steps: " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 8])
def test_a_followed_loss_takes_what_the_real_one_takes(size, tmp_path):
    """A vocabulary that outweighs the rest; every token predicted and some padding, as a plan assumes."""
    base = tiny_base(vocab_size=3000)
    base.config.save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--num_experts", "3", "--lora_r", "4", "--lora_dropout", "0"]
    account = MemoryAccount(
        outline(parse_train([*words, "--use_cpu", "true", "--loss_chunk_size", str(size)])), device="cpu"
    )
    real = tiny_moe(base)
    chunk_loss(real, size)
    found = max(account.training(Batch(4, 32), checkpointing=False))
    assert real.loss_chunk_size == account.outline.few[0].loss_chunk_size == (size or None)
    assert found == pytest.approx(max(step_activations(real, tokens(4, 32))), rel=0.03)
    logits = 4 * 4 * 32 * 3000
    assert found < logits if size else found > 2 * logits


def test_a_plan_of_a_base_that_keeps_full_logits(tmp_path):
    tiny_base("gemma2", head_dim=8, sliding_window=6, final_logit_softcapping=30.0).config.save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--use_cpu", "true", "--loss_chunk_size"]
    load = Workload(0, 0, 0, 0, Batch(2, 16), Batch(1, 8), 0)
    assert peak_memory(outline(parse_train([*words, "0"])), load).total > 0
    with pytest.raises(FullLogitsNeeded):
        peak_memory(outline(parse_train([*words, "7"])), load)


# The device, and whether the run fits.


@pytest.mark.parametrize(
    ("words", "device"),
    [
        (["--bf16"], "cuda"),
        (["--fp16"], "cuda"),
        (["--bf16", "true", "--use_cpu"], "cpu"),
        (["--bf16", "--device", "cpu"], "cpu"),
        (["--device", "cuda"], "cuda"),
        ([], "cuda" if torch.cuda.is_available() else "cpu"),
    ],
)
def test_the_device_follows_from_the_flags_whatever_this_machine_has(words, device):
    request = parse_plan(words)
    assert request.device == device
    assert (request.arguments.train.bf16, request.arguments.train.fp16) == ("--bf16" in words, "--fp16" in words)


def test_usual_cards_are_answered_without_what_only_this_process_takes(config_folder, capsys):
    words = ["--model", str(config_folder), "--lora_r", "4", "--datasets", "nowhere.jsonl", "--bf16"]
    out = printed(words, capsys)
    assert "estimated peak on cuda: 8 rows of 512 tokens, --bf16" in out
    assert "Python and libraries" not in out and " ".join(out.split()).count("Nothing was measured on a GPU") == 1
    if not torch.cuda.is_available():
        assert "fits (a tenth is left free): 16 GB yes, 24 GB yes, 40 GB yes, 80 GB yes" in out


def test_what_would_fit_is_planned_again_with_its_flags(config_folder, capsys):
    """A change's memory is that of a plan with it; what lies between two batches that were followed takes no more."""
    words = ["--model", str(config_folder), "--lora_r", "4", "--max_seq_length", "256", "--device", "cuda"]
    request = parse_plan([*words, "--datasets", "nowhere.jsonl", "--memory_gb", "0.02"])
    plan = make_plan(request)
    show_plan(request, plan)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "fits (a tenth is left free): 0.02 GB no" in out
    checkpointing, rows, shorter = plan.changes[1:4]
    assert (checkpointing.flags, shorter.flags) == (("--gradient_checkpointing",), ("--max_seq_length 128",))
    assert rows.flags == ("--per_device_train_batch_size 4", "--gradient_accumulation_steps 2")
    for change, above in ((checkpointing, 0.001), (rows, 0.15), (shorter, 0.35)):  # a mask is much of a tiny model
        given = [word for flag in change.flags for word in flag.split()]
        again = make_plan(parse_plan([*words, "--datasets", "nowhere.jsonl", *given])).total_bytes
        assert again <= 1.001 * change.num_bytes < plan.total_bytes
        assert again == pytest.approx(change.num_bytes, rel=above)
        assert all(flag in out for flag in change.flags)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope/none"], "'nope/none' is no flag; a model is named by --model nope/none, a recipe by --config"),
        (["--model", "nope/none"], "base 'nope/none' could not be loaded: .*Known without the hub"),
        (["--device", "tpu"], "device is 'tpu'; it must be cpu or cuda"),
        (["--fp16", "--use_cpu"], "fp16 needs a GPU, and use_cpu is given"),
        (["--fp16", "--device", "cpu"], "fp16 needs a GPU, and device is cpu"),
        (["--device", "cuda", "--use_cpu"], "device is cuda, but use_cpu is given too"),
        (["--memory_gb", "0"], "memory_gb is 0.0; it must be above 0"),
        (["--bf16", "--fp16"], "bf16 and fp16 are both given"),
        (["--eval_benchmark", "mbpp"], "eval_benchmark_steps is None; with eval_benchmark it must be 1 or more"),
        (["--top_k", "9"], "top_k is 9"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    assert main(["plan", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dylora plan:")]
    assert len(lines) == 1 and re.search(said, lines[0]), lines


def test_what_training_would_refuse_of_its_flags_is_refused_in_one_message():
    with pytest.raises(UsageError) as raised:
        parse_plan(["--device", "tpu", "--memory_gb", "x", "--seed", "y", "--num_experts", "0"])
    for part in ("device is 'tpu'; it must be cpu or cuda", "memory_gb is 'x'", "seed is 'y'", "num_experts is 0"):
        assert part in str(raised.value)
    for words, message in (
        (["--lr_scheduler_type", "cosine_with_min_lr"], "cosine_with_min_lr cannot be used"),
        (["--report_to", "nowhere"], "report_to is 'nowhere'"),
        (["--top_k", "9"], "top_k is 9, but num_experts is 4"),
    ):
        with pytest.raises(ValueError, match=message):
            check_flags(parse_plan(words).arguments)
