"""The model card of a checkpoint: README.md, as the Hugging Face hub reads it."""

from __future__ import annotations

import json
import re
from typing import Any

from huggingface_hub import ModelCardData

from dylo_moe.model.manifest import expert_entries
from dylo_moe.routing.config import RANDOM, RESPONSE, SHARED, UNIFORM
from dylo_moe.utils.markdown import code, markdown_table, plain
from dylo_moe.utils.redact import bytes_in_words, open_settings, short_name, without_secrets
from dylo_moe.utils.words import counted

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_card(
    manifest: dict[str, Any],
    facts: dict[str, Any] | None,
    losses: dict[str, dict[str, float]] | None,
    settings: dict[str, Any] | None,
    step: int | None,
) -> str:
    """The text of a checkpoint's README.md.

    Args:
        manifest: what dylora.json holds: base, router, lora, experts.
        facts: as `facts.run_facts` gives them; None: the card has only what the manifest holds.
        losses: held-out losses, "before" and "after" training, of each dataset, in nats per token.
        settings: the run's flags.
        step: optimizer steps that were made.
    """
    facts, losses = facts or {}, losses or {}
    parts = [
        _front_matter(manifest, facts),
        "# A DyLoRA-MoE checkpoint",
        _summary(manifest, facts, step),
        _loading(manifest),
        _experts(manifest),
        _turns(manifest["router"].get("turns")),
        _data(facts),
        _losses(losses),
        _settings(settings),
        _versions(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(manifest: dict[str, Any], facts: dict[str, Any]) -> str:
    """No licence is stated: it follows from the base's and the data's, which a person must judge."""
    base = {"base_model": manifest["base"]["id"], "base_model_relation": "adapter"} if _is_hub(manifest) else {}
    tags = ["lora", "mixture-of-experts", "dylora-moe"]
    data = ModelCardData(**base, library_name="peft", pipeline_tag="text-generation", tags=tags)
    return f"---\n{data.to_yaml()}\n---"


def _is_hub(manifest: dict[str, Any]) -> bool:
    """Whether the base is known by a hub id; a folder may be called like one, but has no revision."""
    return bool(_HUB_ID.fullmatch(manifest["base"]["id"] or "")) and bool(manifest["base"].get("revision"))


def _what(router: dict[str, Any]) -> str:
    """What a router sends as a whole, in words."""
    granularity = router.get("granularity", "token")
    return "answer of a conversation" if granularity == RESPONSE else granularity


def _whom(router: dict[str, Any]) -> str:
    """How many experts, and which, a router sends a token to, in words."""
    if router.get("policy") == UNIFORM:
        return "all of them alike, whatever the text"
    drawn = ", drawn at random" if router.get("policy") == RANDOM else ""
    most = "at most " if router.get("top_p", 1.0) < 1 and router["top_k"] > 1 else ""
    return f"{most}{router['top_k']} of them{drawn}"


def _summary(manifest: dict[str, Any], facts: dict[str, Any], step: int | None) -> str:
    base, experts = manifest["base"], manifest["experts"]
    named = code(short_name(without_secrets(base["id"]))) if base["id"] else "an unnamed base"
    revision = f", revision {code(base['revision'])}" if base.get("revision") else ""
    known = facts.get("base", {})
    kind = f" ({plain(known['class'])}, {known['parameters']:,} parameters)" if known else ""
    bits = {"load_in_4bit": ", held in 4 bits", "load_in_8bit": ", held in 8 bits"}
    kind += next((text for key, text in bits.items() if (base.get("quantization") or {}).get(key)), "")
    sentences = [
        f"{counted(len(experts), 'LoRA expert')} on the frozen {named}{kind}{revision}, and a router that sends each "
        f"{_what(manifest['router'])} to {_whom(manifest['router'])}. The base is not in this folder."
    ]
    if SHARED in manifest:
        of = " of an answer" if manifest["router"].get("granularity") == RESPONSE else ""
        sentences.append(f"One more expert, {code(SHARED)}, serves every token{of} beside them.")
    if facts.get("trainable") is not None:
        sentences.append(f"{facts['trainable']:,} parameters were trained, {facts['frozen']:,} stayed as they were.")
    if step is not None:
        sentences.append(f"Saved after {counted(step, 'optimizer step')}.")
    if facts.get("started"):
        sentences.append(f"The run began at {plain(facts['started'])}.")
    return " ".join(sentences)


def _loading(manifest: dict[str, Any]) -> str:
    base = manifest["base"]["id"] or ""
    is_hub = _is_hub(manifest)
    where = json.dumps(base) if is_hub else '"BASE"'
    rest = "" if is_hub or (base and "/" not in base) else ', base="BASE"'  # one word may be a base's short name
    note = "" if is_hub else "\n\n`BASE` is the folder or hub id of the base."
    if SHARED in manifest:
        note += (
            f"\n\nThat adapter is without {code(SHARED)}, which this model adds to it; `dylora export` writes adapters "
            "that hold both."
        )
    first = json.dumps(f"CHECKPOINT/experts/{manifest['experts'][0]['name']}")
    return f"""## To load it

```python
from dylo_moe import DyLoRAMoE

model = DyLoRAMoE.from_pretrained("CHECKPOINT"{rest})  # this folder
```

One expert alone, as an ordinary adapter of PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({where})
model = PeftModel.from_pretrained(base, {first})
```{note}"""


def _experts(manifest: dict[str, Any]) -> str:
    rows = [
        [expert["name"], expert["rank"], f"{expert['parameters']:,}", _state(expert), expert.get("skill") or ""]
        for expert in expert_entries(manifest)
    ]
    return "## Experts\n\n" + markdown_table(["expert", "rank", "parameters", "state", "grown for"], rows, right={1, 2})


def _state(expert: dict[str, Any]) -> str:
    return ("mature" if expert.get("mature", True) else "nascent") + (
        "" if expert.get("trainable", True) else ", frozen"
    )


def _turns(turns: dict[str, Any] | None) -> str:
    """Who reads and who writes, where routing is decided once for each answer."""
    if turns is None:
        return ""
    opening, at = turns["opening"], turns["adapted_from"]
    endings = " or ".join(_ids(ending) for ending in turns["endings"])
    return f"""## Who reads, and who writes

The unchanged base reads whatever no assistant wrote, so that one cache of a conversation serves every expert. As an
answer begins the router chooses who writes it, once, from all that was read; earlier answers keep theirs. In token ids
of the base's tokenizer:

- the header of an answer is {_ids(opening)}; the answer is recognised by {_ids(opening[: at + 1])}, and its expert
  reads from the last of these on;
- an answer ends with {endings}; the token that completes an end is read by the base again.

A text without this header has no answer, and goes to the base as a whole."""


def _ids(ids: list[int]) -> str:
    return code(" ".join(str(token) for token in ids))


def _data(facts: dict[str, Any]) -> str:
    if not facts.get("data"):
        return ""
    rows = [
        [
            short_name(item["name"]),
            without_secrets(_origin(item["origin"])),
            f"{item['train']:,}",
            f"{item['evaluation']:,}",
            f"{item['share']:.1%}",
            item["licence"] or "not known",
        ]
        for item in facts["data"]
    ]
    titles = ["dataset", "from", "rows trained on", "rows held out", "of an epoch", "licence"]
    return "## Data\n\n" + markdown_table(titles, rows, right={2, 3, 4})


def _origin(origin: str) -> str:
    """The place where a dataset was found; a path becomes its last part, because its folders may name a user."""
    return " ".join(short_name(word) if word.startswith(("/", "~")) else word for word in origin.split(" "))


def _losses(losses: dict[str, dict[str, float]]) -> str:
    before, after = losses.get("before") or {}, losses.get("after") or {}
    names = list(dict.fromkeys([*before, *after]))
    if not names:
        return ""
    rows = []
    for name in names:
        values = [values.get(name) for values in (before, after)]
        change = f"{values[1] - values[0]:+.4f}" if values[0] is not None and values[1] is not None else ""
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        rows.append([short_name(name), *cells, change])
    titles = ["dataset", "before", "after", "change"]
    return "## Held-out loss\n\nNats per token.\n\n" + markdown_table(titles, rows, right={1, 2, 3})


def _settings(settings: dict[str, Any] | None) -> str:
    if not settings:
        return ""
    rows = []
    for name, value in open_settings(settings).items():
        is_list = isinstance(settings[name], list)
        text = ", ".join(short_name(str(item)) for item in settings[name]) if is_list else short_name(value)
        rows.append([code(name), without_secrets(text)])
    return "## Settings\n\n" + markdown_table(["flag", "value"], rows, right=set())


def _versions(facts: dict[str, Any]) -> str:
    versions, hardware = facts.get("versions", {}), facts.get("hardware", {})
    if not versions and not hardware:
        return ""
    lines = [f"- {name} {plain(number)}" for name, number in versions.items()]
    lines += [f"- {text}" for text in map(plain, hardware_lines(hardware))]
    return "## Versions and hardware\n\n" + "\n".join(lines)


def hardware_lines(hardware: dict[str, Any]) -> list[str]:
    """The machine in words, a line for each of its parts that is known."""
    lines = [hardware[name] for name in ("platform", "cpu") if hardware.get(name)]
    if hardware.get("cores"):
        lines.append(counted(hardware["cores"], "core"))
    if hardware.get("memory"):
        lines.append(f"{bytes_in_words(hardware['memory'])} of memory")
    if "gpus" in hardware:
        lines += [f"{gpu['name']}, {bytes_in_words(gpu['memory'])}" for gpu in hardware["gpus"]] or ["no GPU"]
    return lines
