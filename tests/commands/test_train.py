"""`dylora train` and its Trainer: what is counted, what is saved, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from reference.paths import ROOT
from reference.tiny import (
    assert_same_gradients,
    base_tensors,
    gradients,
    padded,
    scramble,
    tiny_base,
    tiny_moe,
    tokens,
)
from reference.trainers import train_flags, trainer_for
from reference.turns import chat, naive_openers, shared_answering
from transformers import PreTrainedTokenizerFast

from dylo_moe import DyLoRAMoE
from dylo_moe.cli import main
from dylo_moe.commands.train.request import parse_train, settings_of
from dylo_moe.commands.train.run import train
from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
from dylo_moe.routing.router import Routing
from dylo_moe.training.alarms import dead_experts
from dylo_moe.training.metrics import Meter, as_metrics, token_losses
from dylo_moe.training.run_folder import new_output_dir, save_config
from dylo_moe.utils.errors import UsageError


@pytest.fixture(scope="module")
def finished_run(tiny_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    train(parse_train(train_flags(tiny_folder, output)))
    return output


def test_the_saved_checkpoint_has_the_loss_that_was_logged(finished_run, tiny_folder):
    """The last logged held-out losses are those of the files on disk, computed anew without the Trainer."""
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    model = DyLoRAMoE.from_pretrained(finished_run / "checkpoint")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder / "base")
    names = [str(tiny_folder / f"{name}.jsonl") for name in ("low", "high")]
    data = load_data(DataConfig(datasets=names, max_seq_length=64), tokenizer, seed=42)
    for name, rows in data.evaluation.items():
        total = count = 0.0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            total += float(F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"))
            count += int((labels[0, 1:] != -100).sum())
        logged = [line[f"eval_{name}_loss"] for line in lines if f"eval_{name}_loss" in line]
        assert logged[-1] == pytest.approx(total / count, rel=1e-5)
        assert logged[-1] < logged[0]


def test_the_base_of_a_run_is_untouched(finished_run, tiny_folder):
    trained = base_tensors(DyLoRAMoE.from_pretrained(finished_run / "checkpoint"))
    plain = tiny_base("llama", eos_token_id=2).state_dict()
    assert trained.keys() == plain.keys()
    assert all(torch.equal(trained[name], plain[name]) for name in plain)


def test_logs_name_losses_shares_and_entropies(finished_run):
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    logs = [line for line in lines if "lm_loss" in line]
    assert logs
    for line in logs:
        assert line["share_expert_0"] + line["share_expert_1"] == pytest.approx(1, abs=1e-4)
        for domain in [name for name in ("low", "high") if f"loss_{name}" in line]:  # a stretch may be one batch
            shares = [line[f"share_{domain}_expert_{index}"] for index in range(2)]
            assert sum(shares) == pytest.approx(1, abs=1e-4)
        # The mean's entropy is never below the mean entropy (Jensen).
        assert 0 <= line["token_entropy"] <= line["average_entropy"] + 1e-6 <= torch.log(torch.tensor(2.0)) + 1e-5
        losses = [line[f"loss_{name}"] for name in ("low", "high") if f"loss_{name}" in line]
        assert min(losses) - 1e-9 <= line["lm_loss"] <= max(losses) + 1e-9
        assert 1 <= line["load_imbalance"] <= 2
        assert line["tokens_per_second"] > 0
        parts = [line[f"grad_norm_{name}"] for name in ("expert_0", "expert_1", "router")]
        assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-4)
        # The logged total is the sum of its parts.
        assert line["loss"] == pytest.approx(line["lm_loss"] + 0.01 * line["balance_loss"], rel=2e-3)


def test_the_saved_settings_are_a_recipe_that_means_the_same(finished_run, tmp_path):
    first = parse_train(["--config", str(finished_run / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    save_config(settings_of(first), tmp_path / "again.yaml")
    again, once = (yaml.safe_load(path.read_text()) for path in (tmp_path / "again.yaml", finished_run / "config.yaml"))
    assert again == once
    assert first.train.num_train_epochs == 3
    assert first.experts.num_experts == 2


def test_a_run_pickles_nothing_but_the_state_of_the_trainer(finished_run):
    files = [path for path in finished_run.rglob("*") if path.is_file()]
    others = [path for path in files if path.name not in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
    assert {path.suffix for path in others} <= {".json", ".jsonl", ".yaml", ".safetensors", ".png", ".svg", ".md"}
    assert not [path for path in files if path.parent.name == "checkpoint" and path.suffix in (".pt", ".pth")]
    assert {path.name for path in finished_run.glob("checkpoint-*")}  # each epoch was saved
    for saved in finished_run.glob("checkpoint-*"):
        DyLoRAMoE.from_pretrained(saved)


@pytest.mark.parametrize(
    "more",
    [
        ["--bf16", "true"],
        ["--gradient_checkpointing", "true", "--gradient_accumulation_steps", "2"],
        ["--router_layer", "1", "--top_k", "2", "--lora_targets", "q_proj,down_proj"],
        ["--router_layer", "0.5", "--z_loss_coefficient", "0.01", "--entropy_coefficient", "0.1"],
    ],
    ids=lambda more: more[0],
)
def test_flags_reach_the_model(tiny_folder, tmp_path, more):
    """What was asked for is what the checkpoint holds, it trained, and the base it stands on is the same."""
    train(parse_train(train_flags(tiny_folder, tmp_path / "out", "--num_epochs", "1", *more)))
    arguments = parse_train(train_flags(tiny_folder, tmp_path / "out", *more))
    model = DyLoRAMoE.from_pretrained(tmp_path / "out" / "checkpoint")
    assert model.router_config == arguments.router
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "adapters")}
    if "--lora_targets" in more:
        assert adapted == {"q_proj", "down_proj"}
    else:
        assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for expert in model.experts:
        assert any(bool(parameter.any()) for parameter in list(model.experts.parameters(expert.name))[1::2])


def test_accumulation_changes_nothing(tmp_path):
    """Two steps on 8 rows at once end where two steps of 8 accumulated rows end, balance loss and all."""
    ends, logs = [], []
    for batch, accumulate in ((8, 1), (1, 8), (2, 4)):
        model = tiny_moe("llama", balance_coefficient=1.0, z_loss_coefficient=0.1, entropy_coefficient=0.1)
        trainer = trainer_for(model, tmp_path, batch=batch, accumulate=accumulate)
        trainer.train()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        logs.append([log for log in trainer.state.log_history if "lm_loss" in log])
    for end, log in zip(ends[1:], logs[1:], strict=True):
        assert_same_gradients(end, ends[0], relative=1e-5)
        for ours, theirs in zip(log, logs[0], strict=True):
            for key in ("loss", "lm_loss", "balance_loss", "loss_a", "loss_b", "token_entropy", "share_expert_1"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_the_trainer_trains_every_expert_it_says_it_trains(tmp_path):
    model = tiny_moe("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_for(model, tmp_path, batch=8, accumulate=1).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_gradient_checkpointing_through_the_trainer(tmp_path):
    ends = []
    for checkpointing in (False, True):
        model = tiny_moe("llama")
        trainer = trainer_for(model, tmp_path, batch=8, accumulate=1)
        trainer.args.gradient_checkpointing = checkpointing
        if checkpointing:
            model.gradient_checkpointing_enable()
        trainer.train()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert_same_gradients(ends[1], ends[0], relative=1e-6)


def test_the_meter_agrees_with_the_definition():
    """Losses, shares and entropies per domain, against loops over single tokens."""
    model = tiny_moe("llama", num_experts=3)
    ids, mask = padded([tokens(9, seed=1), tokens(14, seed=2), tokens(4, seed=3)], side="right")
    labels = ids.masked_fill(mask == 0, -100)
    domain = torch.tensor([1, 0, 1])
    meter = Meter(["a", "b", "never"], model.experts.names)
    with torch.no_grad():
        for part in (slice(0, 2), slice(2, 3)):
            out = model(input_ids=ids[part], attention_mask=mask[part])
            losses = token_losses(out, labels[part])
            meter.add(losses=losses, labels=labels[part], routing=out.routing, domain=domain[part])
        out = model(input_ids=ids, attention_mask=mask)
    reading = meter.read()
    for index, name in enumerate(["a", "b"]):
        losses, counts = [], [0, 0, 0]
        for row in (domain == index).nonzero().flatten().tolist():
            for position in range(int(mask[row].sum())):
                counts[int(out.routing.weights[row, position].argmax())] += 1
                if position > 0:
                    losses.append(F.cross_entropy(out.logits[row, position - 1], ids[row, position]))
        assert reading.domain_losses[name] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        shares = [count / sum(counts) for count in counts]
        assert list(reading.domain_shares[name].values()) == pytest.approx(shares)
    p = out.routing.probabilities[mask.bool()]
    assert reading.token_entropy == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    assert reading.average_entropy == pytest.approx(float(-(p.mean(0) * p.mean(0).log()).sum()), rel=1e-5)
    assert "never" not in reading.domain_losses


def test_where_answers_are_routed_the_meter_counts_no_other_token_and_every_loss():
    """A dataset whose rows hold no answer, and a stretch that consists of such rows, were once left out altogether."""
    model, rows = shared_answering("llama"), [chat(5, 4, seed=1), chat(3, 6, 2, 2, seed=2), tokens(9, high=90)]
    ids, mask = padded(rows, side="right")
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask)
    meter, losses = Meter(["chats", "texts"], model.experts.names), token_losses(out, labels)
    given = {"losses": losses, "labels": labels, "routing": out.routing, "mask": mask}
    meter.add(**given, domain=torch.tensor([0, 0, 1]))
    reading, routed = meter.read(), [place is not None for row in rows for place in naive_openers(row.tolist())]
    assert (reading.num_tokens, reading.num_routed) == (int(mask.sum()), sum(routed))
    assert list(reading.domain_shares) == ["chats"] and sum(reading.shares.values()) == pytest.approx(1)
    assert reading.shares == pytest.approx(reading.domain_shares["chats"])
    assert reading.domain_losses["texts"] == pytest.approx(float(losses[2].sum() / 8))
    meter.reset()
    of_text = {name: value[2:] for name, value in given.items() if name != "routing"}
    routing = Routing(*(part[2:] if isinstance(part, torch.Tensor) else part for part in out.routing))
    meter.add(**of_text, routing=routing, domain=torch.tensor([1]))
    alone = meter.read()
    assert alone.loss == pytest.approx(reading.domain_losses["texts"]) and alone.num_routed == 0
    assert set(alone.shares.values()) == {0.0} and not alone.domain_shares and dead_experts({"texts": alone}) == []
    assert as_metrics(alone)["token_entropy"] == 0


def test_the_gate_starts_at_the_kinds_of_text():
    """Texts of two kinds of words go to two experts before anything is trained, and none to a third way."""
    model = DyLoRAMoE.from_base(tiny_base("llama"), num_experts=2)
    low, high = tokens(20, 40, high=40), tokens(20, 40, seed=1, low=60)
    model.initialize_router([{"input_ids": torch.cat([low, high])}])
    chosen = model.route(torch.cat([tokens(8, 40, seed=2, high=40), tokens(8, 40, seed=3, low=60)])).weights.argmax(-1)
    settled = chosen[:, 20:]
    first = settled[:8].float().mean().round()
    assert (settled[:8] == first).float().mean() > 0.95
    assert (settled[8:] == 1 - first).float().mean() > 0.95
    with pytest.raises(ValueError, match="1 text for 2 experts"):
        model.initialize_router([{"input_ids": low[:1]}])


def test_a_gate_row_moves_only_with_its_gradient():
    """Centering and scaling features is undone in the gradient exactly: finite differences of the loss agree."""
    model = scramble(tiny_moe("llama", top_k=2)).double()
    model.initialize_router([{"input_ids": tokens(6, 20)}])
    ids = tokens(2, 12, seed=4)
    grads = gradients(model, lambda: model(input_ids=ids, labels=ids).loss.backward())
    row = model.router.gate["expert_1"]
    step = 0.02  # the gate computes in fp32
    with torch.no_grad():
        row[3] += step
        above = model(input_ids=ids, labels=ids).loss
        row[3] -= 2 * step
        below = model(input_ids=ids, labels=ids).loss
    assert float((above - below) / (2 * step)) == pytest.approx(float(grads["router.gate.expert_1"][3]), rel=5e-2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_expert", "4"], "no flag --num_expert; did you mean --num_experts"),
        (["--learning-rates", "1"], "did you mean --learning_rate"),
        (["--save_only_model", "true"], "--save_only_model is not offered: training could not resume from it"),
        (["--hub_model_id", "x"], "--hub_model_id is not offered"),
        (["--num_experts", "four"], "four"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["--config", "a.yaml", "--config", "b.yaml"], "given twice"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, message):
    with pytest.raises(UsageError) as raised:
        parse_train(words)
    assert message in str(raised.value)


def test_recipes_are_overridden_and_checked(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_experts: 7\ndatasets: [cmake, cpp_headers]\nnum_epochs: 2\nbf16: false\n")
    parsed = parse_train(["--config", str(recipe), "--num_experts", "5", "--use_cpu", "true"])
    assert (parsed.experts.num_experts, parsed.train.num_train_epochs) == (5, 2)
    assert parsed.data.datasets == ["cmake", "cpp_headers"]
    for text, message in (
        ("num_expert: 7\n", "no flag num_expert; did you mean num_experts"),
        ("- a\n", "it is a list"),
        ("a: [\n", "not valid YAML"),
        ("save_only_model: true\n", "training could not resume from it"),
    ):
        recipe.write_text(text)
        with pytest.raises(UsageError) as raised:
            parse_train(["--config", str(recipe)])
        assert message in str(raised.value)


def test_an_earlier_run_is_never_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="is not empty"):
        new_output_dir(str(tmp_path / "run"))
    assert new_output_dir(str(tmp_path / "other")).is_dir()


def test_runs_without_a_name_get_folders_of_their_own(tmp_path, monkeypatch):
    """A second quickstart must not stumble over the first; the Trainer's own default is one folder for all."""
    monkeypatch.chdir(tmp_path)
    wanted = parse_train(["--use_cpu", "true"]).train.output_dir
    folders = [new_output_dir(wanted) for _ in range(3)]
    assert len(set(folders)) == 3
    assert {folder.parent.name for folder in folders} == {"runs"}


def test_a_users_mistake_is_one_line_and_status_2(tmp_path, capsys):
    """Bad values that only show late: in the router, the pool, the data, the checkpoint."""
    for words, message in (
        (["train", "--model", str(tmp_path / "nowhere"), "--use_cpu", "true"], "nowhere"),
        (["train", "--top", "1"], "no flag --top"),
        (["generate", "--checkpoint", str(tmp_path / "none"), "--prompt", "x"], "there is no checkpoint folder"),
        (["trian"], "did you mean train"),
    ):
        assert main(words) == 2
        shown = capsys.readouterr().err.strip()
        assert message in shown
        assert len(shown.splitlines()) == 1


def test_bad_settings_lose_nothing(tiny_folder, tmp_path):
    """A run that cannot start leaves no folder behind."""
    for more in (["--top_k", "3"], ["--router_layer", "9"], ["--lora_targets", "no_such_linear"], ["--lora_r", "0"]):
        with pytest.raises(ValueError):
            train(parse_train(train_flags(tiny_folder, tmp_path / "out", *more)))
        assert not (tmp_path / "out").exists()


def test_fewer_training_rows_than_experts_are_told_so(tiny_folder, tmp_path):
    two = tmp_path / "two.jsonl"
    two.write_text('{"text": "w1 w2"}\n{"text": "w3 w4"}\n')
    with pytest.raises(ValueError, match=r"have 1 training row, too few for 2 experts, .* or a smaller --num_experts"):
        train(parse_train(train_flags(tiny_folder, tmp_path / "out", "--datasets", str(two))))
    assert not (tmp_path / "out").exists()


def test_train_py_is_dylora_train():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outputs = [
        subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        for command in (
            [sys.executable, "train.py", "--help"],
            [sys.executable, "-m", "dylo_moe.cli", "train", "--help"],
        )
    ]
    assert outputs[0].returncode == outputs[1].returncode == 0
    assert outputs[0].stdout == outputs[1].stdout != ""


@pytest.mark.end_to_end
def test_the_quickstart_on_the_real_model(tmp_path):
    """Two steps of the quickstart's own recipe, then the command that it prints, both as a user types them."""
    words = ["--max_steps", "2", "--eval_subset", "5", "--output_dir", str(tmp_path / "run")]
    trained = subprocess.run(
        [sys.executable, "-m", "dylo_moe.cli", "train", "--config", "recipes/quickstart.yaml", *words],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["max_steps"] == 2
    for name in ("plots/losses.png", "plots/routing.png", "result.svg", "checkpoint/dylora.json"):
        assert (tmp_path / "run" / name).stat().st_size > 500
    answered = subprocess.run(
        [
            *(sys.executable, "-m", "dylo_moe.cli", "generate", "--checkpoint", str(tmp_path / "run" / "checkpoint")),
            *("--prompt", "Write the Python function `clamp`.", "--max_new_tokens", "8"),
        ],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert answered.returncode == 0, answered.stderr
    assert "⟨expert_" in answered.stdout
