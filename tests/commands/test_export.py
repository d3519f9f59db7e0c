"""`dylora export`: what is written is what the checkpoint computes, and what is lost is what a loop measures."""

import copy
import hashlib
import json
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from reference.paths import ROOT
from reference.runs import flags, tiny_run_folder
from reference.tiny import LORA, scramble, tiny_base, tiny_moe, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import four_bit, load_base
from dylo_moe.cli import main
from dylo_moe.commands.export.arguments import mixture_weights
from dylo_moe.commands.export.losses import BASE_ALONE, PER_REQUEST, PLAIN, ROUTED, routed_shares
from dylo_moe.commands.export.merged import bake
from dylo_moe.commands.export.padded_adapter import padded
from dylo_moe.commands.export.request_routing import expert_for, experts_for
from dylo_moe.evaluation.held_out import held_out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose experts were then made different from one another, so that it matters who gets a token."""
    folder = tiny_run_folder(tmp_path_factory.mktemp("export"))
    names = ("--num_epochs", "1", "--eval_subset", "50", "--seed", "5")
    assert main(["train", *flags(folder, folder / "run", *names)]) == 0
    record = json.loads((folder / "run" / "checkpoint" / "dylora.json").read_text())["training"]
    from dylo_moe.model.saving import save_checkpoint

    model = scramble(DyLoRAMoE.from_pretrained(str(folder / "run" / "checkpoint")))
    save_checkpoint(model, folder / "checkpoint", training=record)
    return folder


@pytest.fixture(scope="module")
def adapters(trained):
    """`--to vllm`."""
    output = trained / "adapters"
    assert main(["export", str(trained / "checkpoint"), "--to", "vllm", "--output", str(output)]) == 0
    return output


def checkpoint_of(trained):
    return DyLoRAMoE.from_pretrained(str(trained / "checkpoint"))


def record_of(folder):
    return json.loads((folder / "dylora_export.json").read_text())


def rows_of(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "base")
    return held_out(trained / "checkpoint", tokenizer).rows


def loop_losses(logits_of, rows):
    """Loss per token of each dataset, row by row."""
    found = {}
    for name, items in rows.items():
        total, count = 0.0, 0
        for item in items:
            ids, labels = torch.tensor([item["input_ids"]]), torch.tensor(item["labels"])
            with torch.no_grad():
                losses = F.cross_entropy(
                    logits_of(ids, labels)[0, :-1], labels[1:], reduction="none", ignore_index=-100
                )
            total, count = total + float(losses.sum()), count + int((labels[1:] != -100).sum())
        found[name] = total / count
    return found


def values(record, way):
    return {name: item["value"] for name, item in record["measured"]["ways"][way]["loss"]["datasets"].items()}


# --- one adapter for each expert


def test_stock_peft_gives_each_exported_expert_s_logits(trained, adapters, laws):
    model, ids = checkpoint_of(trained), tokens(3, 13, high=90)
    assert [item["name"] for item in record_of(adapters)["experts"]] == list(model.experts.names)
    for name in model.experts.names:
        stock = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(trained / "base"), adapters / name
        ).eval()
        with torch.no_grad(), model.route_to(name):
            laws.close("an exported expert in stock PEFT", stock(ids).logits, model(ids).logits, atol=1e-5)


def test_the_record_says_what_was_written(trained, adapters):
    record = record_of(adapters)
    files = {path.relative_to(adapters).as_posix() for path in adapters.rglob("*") if path.is_file()}
    assert files == {*record["files"], "dylora_export.json", "README.md"} and len(record["files"]) == 4
    for name, entry in record["files"].items():
        content = (adapters / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    for expert in record["experts"]:  # the run's rank is 4
        config = json.loads((adapters / expert["folder"] / "adapter_config.json").read_text())
        assert (expert["rank"], expert["original_ranks"]) == (8, [4]) and config["r"] == 8
        assert expert["targets"] == sorted(config["target_modules"])
    assert record["vllm"] == {"rules_of": "0.33.0", "max_lora_rank": 8, "max_loras": 2}
    assert record["base"]["id"] == str(trained / "base")
    assert record["serve_command"] in (adapters / "README.md").read_text()


def test_what_is_lost_is_what_a_loop_measures(trained, adapters):
    model, rows, record = checkpoint_of(trained), rows_of(trained), record_of(adapters)

    def forced(choose):
        def logits_of(ids, labels):
            with model.route_to(choose(ids, labels)):
                return model(ids).logits

        return logits_of

    def requested(ids, labels):
        first = int((labels != -100).nonzero()[0])
        name = expert_for(model, ids[0, : first if first > 1 else 32].tolist())
        return None if name == "base" else name

    loops = {
        ROUTED: lambda ids, labels: model(ids).logits,
        BASE_ALONE: forced(lambda ids, labels: None),
        PER_REQUEST: forced(requested),
        "expert_0, always": forced(lambda ids, labels: "expert_0"),
        "expert_1, always": forced(lambda ids, labels: "expert_1"),
    }
    assert record["measured"]["ways"].keys() == loops.keys()
    found = {way: loop_losses(loop, rows) for way, loop in loops.items()}
    for way in loops:
        assert values(record, way) == pytest.approx(found[way], rel=1e-5)
        lost = record["measured"]["ways"][way]["lost"]["datasets"]
        for name in rows:
            assert lost[name]["value"] == pytest.approx(found[way][name] - found[ROUTED][name], abs=1e-5)
    assert len({round(sum(losses.values()), 4) for losses in found.values()}) == len(loops)  # or nothing was compared
    requests = record["measured"]["requests"]
    assert {name: sum(counts.values()) for name, counts in requests.items()} == record["measured"]["num_rows"]
    page = (adapters / "README.md").read_text()
    assert all(f"| {way} | " in page for way in loops) and f"{values(record, ROUTED)[next(iter(rows))]:.3f}" in page


def test_a_request_goes_where_sequence_granularity_sends_it():
    by_token, by_sequence = tiny_moe(), tiny_moe(granularity="sequence")
    by_sequence.router.load_state_dict(by_token.router.state_dict())
    ids, mask = tokens(40, 12), torch.ones(40, 12, dtype=torch.int64)
    lengths = torch.arange(40) % 12 + 1
    mask[:20, 8:] = 0
    lengths[:20].clamp_(max=8)
    chosen = experts_for(by_token, ids, mask, prompt_lengths=lengths)
    with torch.no_grad():
        routing = by_sequence(ids, attention_mask=mask, prompt_lengths=lengths).routing
    assert chosen == tuple(routing.names[place] for place in routing.weights[:, 0].argmax(-1).tolist())
    assert chosen == experts_for(by_sequence, ids, mask, prompt_lengths=lengths) and len(set(chosen)) == 3
    assert expert_for(by_token, ids[30, : lengths[30]].tolist()) == chosen[30]
    with pytest.raises(ValueError, match="'uniform', which prefers no expert"):
        expert_for(tiny_moe(policy="uniform", router_half_life=32.0), [5])
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        expert_for(by_token, [])


def test_a_request_for_the_base_goes_to_the_base(trained, tmp_path):
    model = scramble(DyLoRAMoE.from_base(str(trained / "base"), num_experts=2))
    model.know_skill("words", [{"input_ids": tokens(8, 20, high=90)}])
    model.enable_growth()
    with torch.no_grad():
        model.router.gate_bias["base"].fill_(1e6)
    model.save_pretrained(str(tmp_path / "checkpoint"))
    words = ["--to", "vllm", "--datasets", str(trained / "low.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "checkpoint"), *words]) == 0
    record = record_of(tmp_path / "out")
    assert record["measured"]["requests"] == {"low": {"base": record["measured"]["num_rows"]["low"]}}
    assert values(record, PER_REQUEST) == values(record, BASE_ALONE) != values(record, "expert_0, always")
    assert [item["name"] for item in record["experts"]] == ["expert_0", "expert_1"]


def test_the_page_s_snippet_makes_a_request(trained, adapters, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (adapters / "README.md").read_text(), re.DOTALL)
    exec(snippet.replace("CHECKPOINT", str(trained / "checkpoint")), {})
    docs = ROOT / "docs" / "serving.md"
    assert snippet.replace("CHECKPOINT", "runs/mine/checkpoint") in docs.read_text()
    request = json.loads(capsys.readouterr().out)
    assert request["model"] == expert_for(checkpoint_of(trained), request["prompt"])
    assert request["stop_token_ids"] == [2] and request["max_tokens"] == 128


# --- one plain model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2", "phi3"])
def test_a_merged_expert_is_that_expert(family, tmp_path, laws):
    base = tiny_base(family)
    base.generation_config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.25)
    model, ids = tiny_moe(base), tokens(3, 13)
    with torch.no_grad(), model.route_to("expert_1"):
        wanted = model(ids).logits
    bake(model, {"expert_1": 1.0}).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(base) and plain.generation_config.repetition_penalty == 1.25
    heads = [module.weight.data_ptr() for module in (plain.get_input_embeddings(), plain.get_output_embeddings())]
    assert (heads[0] == heads[1]) == base.config.tie_word_embeddings
    with torch.no_grad():
        laws.close("a merged expert's logits", plain(ids).logits, wanted, family=family, atol=1e-5)
        assert not torch.allclose(tiny_base(family)(ids).logits, wanted, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_mixture_is_the_dense_formula(family, laws):
    model, weights = tiny_moe(family), {"expert_0": 0.5, "expert_2": 0.2, "base": 0.3}
    wanted = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight = layer.base_layer.weight.detach().double()
            for expert in ("expert_0", "expert_2"):
                delta = layer.lora_B[expert].weight.double() @ layer.lora_A[expert].weight.double()
                delta = delta.t() if family == "gpt2" else delta
                weight = weight + weights[expert] * layer.scaling[expert] * delta
            wanted[name.removeprefix("base_model.model.")] = weight.detach()
    plain = bake(model, weights)
    for name, weight in wanted.items():
        laws.close("a merged mixture's weights", plain.get_submodule(name).weight, weight, family=family, atol=1e-6)


def test_an_equal_mixture_is_uniform_routing(laws):
    model, ids = tiny_moe(policy="uniform", router_half_life=32.0), tokens(2, 9)
    with torch.no_grad():
        wanted = model(ids).logits
        plain = bake(model, dict.fromkeys(model.experts.names, 1 / 3))
        laws.close("an equal mixture's logits", plain(ids).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("of_base, dtype", [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", None)])
def test_weights_are_rounded_once(of_base, dtype):
    model = tiny_moe(tiny_base(dtype=getattr(torch, of_base)))
    exact = bake(copy.deepcopy(model).float(), {"expert_0": 1.0})
    rounded = bake(model, {"expert_0": 1.0}, dtype=None if dtype is None else getattr(torch, dtype))
    for (name, weight), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert weight.dtype == torch.float32 and other.dtype == getattr(torch, dtype or of_base)
        assert torch.equal(weight.to(other.dtype), other), name


def test_a_base_in_bits_is_merged_in_full(tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    tiny_base(**wide).save_pretrained(tmp_path / "base")
    packed = load_base(str(tmp_path / "base"), quantization_config=four_bit(torch.float32), dtype=torch.float32)
    model = tiny_moe(packed)
    with pytest.raises(ValueError, match="weights are quantised"):
        bake(model, {"expert_0": 1.0})
    model.save_pretrained(str(tmp_path / "checkpoint"))
    with pytest.warns(UserWarning, match="recognised by its id and revision"):
        full = DyLoRAMoE.from_pretrained(str(tmp_path / "checkpoint"), base=load_base(str(tmp_path / "base")))
    name = "model.layers.0.mlp.up_proj"
    layer = full.base.get_submodule(name)
    wanted = tiny_base(**wide).get_submodule(name).weight + layer.get_delta_weight("expert_0")
    assert torch.allclose(bake(full, {"expert_0": 1.0}).get_submodule(name).weight, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "asked, weights",
    [
        (["--expert", "expert_1", "--dtype", "bfloat16"], {"expert_1": 1.0}),
        (["--mixture", "expert_0=0.25,base=0.75"], {"expert_0": 0.25, "base": 0.75}),
        (["--mixture", "measured"], None),
    ],
)
def test_a_merged_folder_is_a_plain_model_and_says_what_it_loses(asked, weights, trained, tmp_path, capsys):
    output = tmp_path / "plain"
    arguments = ["export", str(trained / "checkpoint"), "--to", "merged", "--output", str(output), *asked]
    assert main(arguments) == 0
    record, rows = record_of(output), rows_of(trained)
    if weights is None:
        held = held_out(trained / "checkpoint", AutoTokenizer.from_pretrained(trained / "base"))
        weights = routed_shares(
            checkpoint_of(trained), held, AutoTokenizer.from_pretrained(trained / "base"), batch_size=1
        )
        shares = [  # every row alone, every dataset alike
            torch.cat(
                [checkpoint_of(trained).route(torch.tensor([item["input_ids"]])).weights[0] for item in items]
            ).mean(0)
            for items in rows.values()
        ]
        assert list(weights.values()) == pytest.approx((sum(shares) / len(shares)).tolist(), abs=1e-6)
    assert record["weights"] == pytest.approx(weights) and sum(record["weights"].values()) == pytest.approx(1)
    assert record["dtype"] == ("bfloat16" if "--dtype" in asked else "float32")
    plain = AutoModelForCausalLM.from_pretrained(output)
    expected = bake(checkpoint_of(trained), record["weights"], dtype=plain.dtype)
    assert all(
        torch.equal(*pair) for pair in zip(plain.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    text = "w1 w50 w2"
    assert AutoTokenizer.from_pretrained(output)(text) == AutoTokenizer.from_pretrained(trained / "base")(text)
    assert record["measured"]["ways"].keys() == {BASE_ALONE, ROUTED, PLAIN}
    measured = loop_losses(lambda ids, labels: plain(ids).logits.float(), rows)
    assert values(record, PLAIN) == pytest.approx(measured, rel=1e-2 if "--dtype" in asked else 1e-5)
    lost = record["measured"]["ways"][PLAIN]["lost"]["mean"]["value"]
    sentence = f"the loss of this model is {abs(lost):.3f} nats per token {'higher' if lost >= 0 else 'lower'}"
    assert sentence in " ".join(capsys.readouterr().out.split()) and sentence in (output / "README.md").read_text()


# --- what is refused, and that nothing is left behind


@pytest.mark.parametrize(
    "text, problem",
    [
        ("a=0.7,b=0.2", r"weights add up to 0\.9; they must add up to 1"),
        ("a=0.7,c=0.3", "'c=0.3' names no member; there are a, b, base"),
        ("a=0.5,a=0.5", "names 'a' twice"),
        ("a=1.5,b=-0.5", "'a=1.5' must be NAME=WEIGHT.*'b=-0.5' must be NAME=WEIGHT"),
        ("a,b=x", "'a' must be NAME=WEIGHT.*'b=x' must be NAME=WEIGHT"),
        ("base=1", "the base alone"),
        ("", "add up to 0"),
    ],
)
def test_a_mixture_is_a_distribution_over_members(text, problem):
    with pytest.raises(ValueError, match=problem):
        mixture_weights(text, ["a", "b"])


@pytest.mark.parametrize(
    "words, problem",
    [
        ("--to vllm", "--output must be given"),
        ("--to merged --output o", "--to merged needs --expert or --mixture, and one of them only; neither is given"),
        ("--to merged --output o --expert a --mixture a=1", "both are given"),
        ("--to merged --output o --expert base", "expert is 'base', the unchanged model"),
        ("--to merged --output o --mixture measured --no_measure", "which --no_measure rules out"),
        (
            "--to vllm --output o --dtype float16 --expert a",
            "change nothing: --dtype, --expert: --to vllm writes every",
        ),
        (
            "--to vllm --output o --no_measure --seed 1 --bf16 true",
            "--bf16, --seed: with --no_measure nothing is measured",
        ),
        ("--to vllm --output o --batch_size 0 --eval_subset 0", "batch_size is 0.*eval_subset is 0"),
        ("--to vllm --output o --expret a", "there is no flag --expret; did you mean --expert?"),
        ("--to onnx --output o", "to is 'onnx'; it must be"),
        ("--to vllm --output o", "there is no checkpoint folder nowhere"),
    ],
)
def test_what_cannot_apply_is_one_line(words, problem, capsys):
    assert main(["export", "nowhere", *words.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dylora export: ")]
    assert re.search(problem.replace("?", r"\?"), line)


def export(folder, output, *words):
    return main(["export", str(folder), "--output", str(output), "--no_measure", *words])


def test_nothing_is_written_over_and_nothing_is_left_behind(trained, tmp_path, capsys, monkeypatch):
    checkpoint = trained / "checkpoint"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert export(checkpoint, tmp_path / "full", "--to", "vllm") == 2
    assert export(checkpoint, tmp_path / "new", "--to", "merged", "--expert", "expert_7") == 2
    said = capsys.readouterr().err
    assert "is not an empty folder" in said and "expert is 'expert_7'; the checkpoint has expert_0, expert_1" in said

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("dylo_moe.commands.export.run.write_json", full)
    for words in (["--to", "vllm"], ["--to", "merged", "--expert", "expert_0"]):
        assert export(checkpoint, tmp_path / "new", *words) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_without_a_measurement_it_says_so(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert export(trained / "checkpoint", tmp_path / "empty", "--to", "vllm") == 0
    assert "was not measured" in capsys.readouterr().err
    assert record_of(tmp_path / "empty")["measured"] is None
    assert "**not measured**" in (tmp_path / "empty" / "README.md").read_text()


def test_a_checkpoint_without_rows_of_its_own_needs_data(trained, tmp_path, capsys):
    scramble(DyLoRAMoE.from_base(str(trained / "base"), num_experts=2)).save_pretrained(str(tmp_path / "bare"))
    arguments = ["export", str(tmp_path / "bare"), "--to", "vllm", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "does not say which rows were held out" in (said := capsys.readouterr().err) and "--no_measure" in said
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--datasets", str(trained / "low.jsonl")]) == 0
    assert list(values(record_of(tmp_path / "out"), ROUTED)) == ["low"]


def test_conv1d_is_not_for_vllm(tmp_path, capsys):
    tiny_base("gpt2").save_pretrained(tmp_path / "base")
    tiny_moe(load_base(str(tmp_path / "base"))).save_pretrained(str(tmp_path / "checkpoint"))
    assert export(tmp_path / "checkpoint", tmp_path / "out", "--to", "vllm") == 2
    said = capsys.readouterr().err
    assert all(f"expert_{index}: its linears are Conv1D, as in GPT-2" in said for index in range(3))


# --- with a shared expert


@pytest.fixture(scope="module")
def with_shared(tmp_path_factory):
    """A checkpoint with a shared expert of another rank and scaling, whose pool has gone on growing."""
    folder = tiny_run_folder(tmp_path_factory.mktemp("shared"))
    torch.manual_seed(1)
    model = DyLoRAMoE.from_base(
        load_base(str(folder / "base")), num_experts=2, lora=LoraConfig(**LORA), shared_rank=6, shared_alpha=5
    )
    scramble(model)
    model.save_pretrained(str(folder / "joint"))
    for name, low in (("low", 3), ("high", 50)):
        model.know_skill(name, [{"input_ids": tokens(8, 20, low=low, high=low + 40)}])
    model.enable_growth()
    model.save_pretrained(str(folder / "growing"))
    return folder


@pytest.mark.parametrize("kind", ["joint", "growing"])
@torch.no_grad()
def test_an_exported_expert_holds_the_shared_one_too(kind, with_shared, tmp_path, laws):
    checkpoint, output, ids = with_shared / kind, tmp_path / "adapters", tokens(3, 13)
    assert main(["export", str(checkpoint), "--to", "vllm", "--no_measure", "--output", str(output)]) == 0
    model, record = DyLoRAMoE.from_pretrained(str(checkpoint)), record_of(output)
    names = [*model.experts.names, *(["shared"] if kind == "growing" else [])]  # which the member `base` has alone
    assert [(item["name"], item["rank"]) for item in record["experts"]] == list(zip(names, [16, 16, 8], strict=False))
    assert record["experts"][0]["original_ranks"] == [4]
    assert "the shared expert, of rank 6, beside its own rank" in record["experts"][0]["notes"][0]
    assert record["serve_command"].count("=./") == len(names)
    for name in names:
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(with_shared / "base"), output / name)
        with model.route_to(name):
            ours = model(input_ids=ids).logits
        laws.close("an exported expert beside a shared one", stock(input_ids=ids).logits, ours, atol=1e-5)
    if kind == "growing":
        model.router.set_row("base", torch.zeros(model.router.hidden_size), torch.tensor(1e4))
        assert expert_for(model, [5, 6]) == "shared"
        assert "`shared` is what serves every request" in (output / "README.md").read_text()


def test_it_is_listed_and_can_be_asked_alone(with_shared, capsys):
    checkpoint = str(with_shared / "growing")
    assert main(["experts", "list", checkpoint]) == 0
    rows = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()}
    parameters = DyLoRAMoE.from_pretrained(checkpoint).experts.shared.parameters
    assert rows["shared"] == f"shared 6 {parameters:,} frozen of every token, beside its experts"
    words = ["generate", "--checkpoint", checkpoint, "--prompt", "w1 w2", "--max_new_tokens", "3"]
    assert main([*words, "--expert", "shared"]) == 0
    assert main([*words, "--expert", "nobody"]) == 2
    assert "and shared is the shared expert alone" in capsys.readouterr().err


@torch.no_grad()
def test_a_merged_model_has_the_shared_expert_whatever_the_mixture(with_shared, tmp_path):
    words = ["export", str(with_shared / "joint"), "--to", "merged", "--no_measure"]
    assert main([*words, "--expert", "expert_1", "--output", str(tmp_path / "merged")]) == 0
    assert record_of(tmp_path / "merged")["weights"] == {"expert_1": 1.0, "shared": 1.0}
    model, ids = DyLoRAMoE.from_pretrained(str(with_shared / "joint")), tokens(2, 11)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with model.route_to("expert_1"):
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_together_no_rank_above_the_server_s_is_written():
    config = {"r": 512, "lora_alpha": 512, "target_modules": ["q_proj"]}
    state = {"base_model.model.q_proj.lora_A.weight": torch.ones(512, 3)}
    state["base_model.model.q_proj.lora_B.weight"] = torch.ones(3, 512)
    with pytest.raises(ValueError, match="its rank is 1024, above 512"):
        padded(config, state, shared=(config, state))
