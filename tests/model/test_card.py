"""The model card of a checkpoint tells what the checkpoint holds, and no secret; what it says to type works."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from reference.checkpoints import grown
from reference.runs import flags, tiny_run_folder
from reference.tiny import tiny_base, tokens

from dylo_moe import DyLoRAMoE
from dylo_moe.commands.train.request import parse_train
from dylo_moe.commands.train.run import train
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.model.model_card import model_card
from dylo_moe.training.run_info import hardware, run_facts, versions
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.redact import open_settings, short_name, without_secrets

PLANTED = "hf_PlantedPlantedPlantedPlanted"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with a shared expert, in a process that holds secrets."""
    folder = tiny_run_folder(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "WANDB_API_KEY", "USER", "LOGNAME", "HOSTNAME"):
            patch.setenv(name, PLANTED)
        train(parse_train(flags(folder, folder / "out", "--shared_r", "6")))
    return folder / "out"


def manifest(**base: object) -> dict:
    expert = {"name": "a", "rank": 4, "mature": True, "trainable": True, "parameters": 12, "skill": None}
    return {
        "base": {"id": "org/name", "revision": "abc", **base},
        "router": {"top_k": 1, "granularity": "token"},
        "lora": {},
        "experts": [expert],
    }


def tables(card: str) -> dict[str, list[list[str]]]:
    """The cells of each table as Markdown shows them, by the heading above."""
    found: dict[str, list[list[str]]] = {}
    heading, cells, inside = "", [], ""
    for token in MarkdownIt().enable(["table", "strikethrough"]).parse(ModelCard(card).text):
        inside = token.type if token.nesting == 1 else inside
        if token.type == "inline":
            text = "".join(child.content for child in token.children or [] if child.type != "html_inline")
            if inside == "heading_open":
                heading = text
            elif inside in ("td_open", "th_open"):
                cells.append(text)
        elif token.type == "tr_close":
            found.setdefault(heading, []).append(cells)
            cells = []
    return found


# What it tells.


def test_a_runs_card_has_its_facts(finished):
    card = (finished / "checkpoint" / "README.md").read_text()
    facts, found = json.loads((finished / "run.json").read_text()), tables(card)
    held = read_manifest(finished / "checkpoint")
    assert [row[:3] for row in found["Experts"][1:]] == [
        [expert["name"], str(expert["rank"]), f"{expert['parameters']:,}"]
        for expert in [*held["experts"], held["shared"]]
    ]
    assert "One more expert, `shared`, serves every token beside them." in card
    assert [[row[0], row[2], row[3]] for row in found["Data"][1:]] == [
        [item["name"], str(item["train"]), str(item["evaluation"])] for item in facts["data"]
    ]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for row in found["Held-out loss"][1:]:
        losses = [line[f"eval_{row[0]}_loss"] for line in lines if f"eval_{row[0]}_loss" in line]
        assert row[1:3] == [f"{losses[0]:.4f}", f"{losses[-1]:.4f}"]
        assert float(row[3]) == pytest.approx(losses[-1] - losses[0], abs=1e-4)
    settings = dict(found["Settings"][1:])
    for name, value in yaml.safe_load((finished / "config.yaml").read_text()).items():
        if isinstance(value, (int, float)):
            assert settings[name] == json.dumps(value)
    for text in [*facts["versions"].values(), facts["hardware"]["cpu"], "21 optimizer steps"]:
        assert text in card


def test_the_hub_reads_the_front_matter_and_no_licence_is_invented():
    data = ModelCard(model_card(manifest(), None, None, None, None)).data.to_dict()
    assert data["library_name"] == "peft" and data["base_model"] == "org/name"
    assert {"lora", "mixture-of-experts", "dylora-moe"} <= set(data["tags"])
    assert "license" not in data and "license_name" not in data


@pytest.mark.parametrize(
    "base", [{"id": "/data/base"}, {"id": ""}, {"id": "runs/base", "revision": None}, {"id": "../x/y: z"}]
)
def test_a_base_that_is_no_hub_id_is_not_linked(base):
    card = model_card(manifest(**base), None, None, None, None)
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert 'base="BASE"' in card and "/data/" not in card and "../x" not in card


def test_what_the_card_says_to_type_loads_the_model(tmp_path):
    """The card of a plain save: both snippets, run as they stand, give the saved model and its first expert."""
    model, folder, ids = grown(), tmp_path / "saved", tokens(2, 9)
    model.save_pretrained(str(folder))
    tiny_base().save_pretrained(tmp_path / "base")
    card = (folder / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2 and "Held-out" not in card and "Versions" not in card
    first = next(iter(model.experts)).name
    for snippet, route in zip(snippets, ("learned", first), strict=True):
        scope: dict = {}
        snippet = snippet.replace("CHECKPOINT", str(folder)).replace("BASE", str(tmp_path / "base"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(snippet, scope)
        with torch.no_grad():
            loaded = scope["model"].eval()(input_ids=ids).logits
            if route == "learned":
                wanted = model.eval()(input_ids=ids).logits
            else:
                with model.route_to(route):
                    wanted = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded, wanted)
    assert isinstance(scope["model"].peft_config["default"].r, int)


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)


@given(NAMES, NAMES)
@example("<b>x<!--", "*a*|`b`")
@example("__0__", "~~a~~")
@example("&lt;_y_[z](w)", "\\")
@example("`a`<b>`c`", "`|`")
def test_any_name_is_shown_as_it_is(name, origin):
    """Markdown and HTML in a dataset's name are text."""
    item = {"name": name, "origin": origin, "train": 1, "evaluation": 2, "share": 1.0, "licence": None}
    rows = tables(model_card(manifest(), {"data": [item]}, {"after": {name: 2.0}}, None, 3))
    assert rows["Data"][1][0] == short_name(name)
    if not origin.startswith(("/", "~/")) and "://" not in origin:
        assert rows["Data"][1][1] == origin
    assert rows["Held-out loss"][1][:3] == [short_name(name), "", "2.0000"]
    assert len(rows["Data"][1]) == 6 and rows["Data"][1][2:] == ["1", "2", "100.0%", "not known"]


# What is counted.


def test_the_facts_are_those_of_the_model(finished):
    facts = json.loads((finished / "run.json").read_text())
    base, model = tiny_base("llama", eos_token_id=2), DyLoRAMoE.from_pretrained(finished / "checkpoint")
    assert facts["base"]["parameters"] == facts["frozen"] == sum(value.numel() for value in base.parameters())
    assert facts["base"]["class"] == "LlamaForCausalLM"
    experts = sum(expert.parameters for expert in model.experts.everyone)
    assert facts["shared"] == {"rank": 6, "parameters": model.experts.shared.parameters}
    assert facts["trainable"] == experts + facts["router"]["parameters"]
    assert sum(item["share"] for item in facts["data"]) == pytest.approx(1)
    assert facts["versions"]["torch"] == torch.__version__ == versions()["torch"]
    assert hardware()["memory"] > 2**28 and hardware()["cores"] == os.cpu_count()


# What it must not tell.


def test_no_secret_reaches_the_card_or_the_facts(finished):
    for path in (finished / "run.json", finished / "checkpoint" / "README.md", finished / "checkpoint" / "dylora.json"):
        assert PLANTED not in path.read_text(), path.name
    address = f"https://user:{PLANTED}@host/path?token={PLANTED}&signature=planted"
    held = manifest(id=address)
    item = {"name": "a", "origin": f"file {address}", "train": 1, "evaluation": 2, "share": 1.0, "licence": None}
    card = model_card(
        held, {"data": [item]}, None, {"data_dir": address, "hub_token": "short", "wandb_api_key": "x1y2"}, 1
    )
    assert not re.search("[Pp]lanted|user:|short|x1y2", card) and "host/path" in card


def test_no_home_folder_reaches_the_facts(monkeypatch):
    """A path below it tells a user's name."""
    monkeypatch.setenv("HOME", "/home/someone")
    model, item = grown(), {"train": 3, "evaluation": 1, "search": 0}
    model.base_id = "/home/someone/models/base"
    data = SimpleNamespace(
        counts=[SimpleNamespace(name="d", **item)],
        shares=[SimpleNamespace(name="d", share=1.0, token_share=1.0)],
        readings=[SimpleNamespace(name="d", source=None)],
        unread={"d": {}},
        origins={"d": "file /home/someone/d.jsonl"},
    )
    assert "someone" not in json.dumps(run_facts(model, data))


@given(st.text(max_size=40), st.sampled_from(["https://", "s3://", "git+ssh://"]))
def test_an_address_keeps_its_place_and_loses_its_key(text, scheme):
    secret = "".join(letter for letter in text if letter.isalnum()) or "x"
    shown = without_secrets(f"{scheme}me:{secret}@host.example/a/b")
    assert shown == f"{scheme}host.example/a/b"


def test_settings_that_only_sound_secret_are_shown():
    shown = open_settings({"max_new_tokens": 3, "tokenizer": "x", "hub_token": "y", "api_key": "z", "none": None})
    assert shown == {"max_new_tokens": "3", "tokenizer": "x"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def fails(self: Path, content: bytes) -> int:
        with open(self, "wb") as file:
            file.write(content[:2])
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        with pytest.raises(OSError):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and [file.name for file in tmp_path.iterdir()] == ["run.json"]
