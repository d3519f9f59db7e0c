"""`dylora plan`: its numbers are those of the model, the run and the step that it stands for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from reference.tiny import LORA, tiny_base, tiny_moe, tokens
from reference.trainers import train_flags
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.cli import main
from dylo_moe.commands.plan.known_shapes import KNOWN, base_config
from dylo_moe.commands.plan.run import Plan, components, make_plan, peak_memory
from dylo_moe.commands.plan.simulated_step import (
    ACTIVATIONS,
    BASE,
    GRADIENTS,
    OPTIMIZER,
    Batch,
    MemoryTracker,
    Simulation,
)
from dylo_moe.commands.plan.workload import Workload, workload
from dylo_moe.commands.train.request import parse_train
from dylo_moe.data.collator import Collator
from dylo_moe.data.loading import load_data
from dylo_moe.data.packing import epoch_of
from dylo_moe.model.loss import FullLogitsNeeded, chunk_loss
from dylo_moe.training.trainer import DyLoRATrainer

PUBLISHED = {
    "google/codegemma-2b": 2_506_172_416,
    "google/gemma-2b": 2_506_172_416,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2.5-Coder-1.5B": 1_543_714_304,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
}


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A base of which nothing but its config is there."""
    folder = tmp_path / "shape"
    tiny_base("llama").config.save_pretrained(folder)
    return folder


def planned(folder: Path, *more: str) -> Plan:
    words = ["--model", str(folder), "--num_experts", "3", "--lora_r", "4", "--datasets", "nowhere.jsonl"]
    return make_plan(parse_train([*words, "--max_seq_length", "64", "--use_cpu", "true", *more]))


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_shape_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base_config(name))
    assert model.num_parameters() == PUBLISHED[name]


def test_an_unknown_name_is_told_what_is_known():
    with pytest.raises(ValueError, match=r"'nobody/nothing' cannot be had: .*known without the hub: .*codegemma-2b"):
        base_config("nobody/nothing")


def test_what_is_counted_is_the_built_model(config_folder):
    """Every component, and nothing is left out; no weights lie in the folder."""
    real = tiny_moe(num_experts=3, lora=LORA)
    assert planned(config_folder).components == components(real)
    assert sum(part.parameters for part in components(real)) == sum(item.numel() for item in real.parameters())
    assert [path.name for path in config_folder.iterdir()] == ["config.json"]


def test_memory_of_one_expert_served_and_trained(config_folder):
    plan = planned(config_folder)
    (one,) = {part.parameters for part in plan.components[1:-1]}
    trained = sum(part.parameters for part in plan.components if part.trainable)
    assert (plan.expert_served_bytes, plan.expert_training_bytes) == (2 * one, 4 * 4 * one)
    assert plan.checkpoint_bytes == 3 * 4 * trained


def test_the_tracker_finds_the_peak_of_a_product_by_hand():
    """exp saves its result; its gradient needs another tensor of that size, while the sum's gradient is expanded."""
    with FakeTensorMode(), MemoryTracker() as tracker:
        x = torch.empty(1000, requires_grad=True)  # 4000 bytes
        y = x.exp()  # saved: 8000
        z = y * 2.0  # 12000
        del y
        assert sum(tracker.live.values()) == 12_000
        total = z.sum()  # and 4
        del z  # the product by a number saves nothing
        assert sum(tracker.live.values()) == 8004
        total.backward()  # one number; then 2 * it, then times y: 8000 more than x, y and two numbers
        assert sum(tracker.peak.values()) == 4000 * 4 + 8
        del total
        assert sum(tracker.live.values()) == 8000  # x and its gradient


def test_views_and_what_is_given_back_count_once():
    with FakeTensorMode(), MemoryTracker() as tracker:
        x = torch.empty(10, 10)
        y = x.t()[2:]
        assert tracker.live[ACTIVATIONS] == 400
        del x
        assert tracker.live[ACTIVATIONS] == 400
        del y
        assert tracker.live[ACTIVATIONS] == 0
    assert tracker.peak[ACTIVATIONS] == 400


@pytest.mark.parametrize("num_experts", [3, 6])
def test_a_simulated_step_takes_what_the_real_one_takes(num_experts):
    """Bytes of storages, on both kernel paths: 3 experts are all computed, of 6 only the selected (where padding and
    the runs of the routing differ a little)."""
    real = tiny_moe(num_experts=num_experts).train()
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny_base().config)
    simulated = Simulation(tiny_moe_on(base, num_experts))
    ids = tokens(4, 32)
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    tracker = MemoryTracker()
    tracker.hold(real.parameters(), BASE)
    tracker.hold(real.base.buffers(), BASE)
    tracker.hold(real.router.buffers(), BASE)
    with tracker:
        out = real(input_ids=ids, attention_mask=mask, labels=ids)
        loss = out.loss
        del out
        loss.backward()
    found = simulated.train_step(Batch(4, 32))
    assert found[ACTIVATIONS] == pytest.approx(tracker.peak[ACTIVATIONS], rel=0.02)
    trained = sum(item.nbytes for item in real.parameters() if item.requires_grad)
    assert found[OPTIMIZER] == 2 * trained
    assert simulated.train_step(Batch(4, 32), micro_batches=2)[GRADIENTS] == trained


def tiny_moe_on(base, num_experts):
    from peft import LoraConfig

    from dylo_moe import DyLoRAMoE, RouterConfig

    router = RouterConfig(router_half_life=1.5)
    return DyLoRAMoE.from_base(base, num_experts=num_experts, lora=LoraConfig(**LORA), router=router)


def test_checkpointing_and_smaller_batches_take_less(config_folder):
    def peak(*more: str, rows: int = 8) -> int:
        words = ["--model", str(config_folder), "--num_experts", "3", "--lora_r", "4", "--use_cpu", "true", *more]
        return peak_memory(parse_train(words), Workload(0, 0, 0, 0, Batch(rows, 64), Batch(1, 8), 0), bf16=False).total

    assert peak("--gradient_checkpointing", "true") < peak()
    assert peak(rows=4) < peak()


def test_without_data_the_reason_is_given_and_the_rest_is_planned(config_folder, capsys):
    words = ["--model", str(config_folder), "--num_experts", "3", "--lora_r", "4", "--datasets", "nowhere.jsonl"]
    assert main(["plan", *words, "--max_seq_length", "64"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"tokens per epoch, steps: not known: \w+", printed)
    assert "estimated peak" in printed and "a training checkpoint" in printed


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


@pytest.mark.parametrize("size", [None, 8])
def test_a_simulated_loss_takes_what_the_real_one_takes(size):
    """A vocabulary that outweighs the rest; every token predicted and some padding, as the simulation assumes."""
    wide = {"vocab_size": 3000}
    real = tiny_moe(tiny_base(**wide)).train()
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny_base(**wide).config)
    simulation = Simulation(tiny_moe_on(base, 3))
    simulation.inside(lambda: chunk_loss(simulation.model, size))
    real.loss_chunk_size = simulation.model.loss_chunk_size
    assert real.loss_chunk_size == size
    ids, tracker = tokens(4, 32), MemoryTracker()
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    tracker.hold([*real.parameters(), *real.base.buffers(), *real.router.buffers()], BASE)
    with tracker:
        loss = real(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
    found = simulation.train_step(Batch(4, 32))[ACTIVATIONS]
    assert found == pytest.approx(tracker.peak[ACTIVATIONS], rel=0.03)
    logits = 4 * 4 * 32 * wide["vocab_size"]
    assert found > 2 * logits if size is None else found < logits


def test_a_plan_of_a_base_that_keeps_full_logits(tmp_path):
    tiny_base("gemma2", head_dim=8, sliding_window=6, final_logit_softcapping=30.0).config.save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--use_cpu", "true", "--loss_chunk_size"]
    load = Workload(0, 0, 0, 0, Batch(2, 16), Batch(1, 8), 0)
    assert peak_memory(parse_train([*words, "0"]), load, bf16=False).total > 0
    with pytest.raises(FullLogitsNeeded):
        peak_memory(parse_train([*words, "7"]), load, bf16=False)
