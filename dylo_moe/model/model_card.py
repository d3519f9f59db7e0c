"""The model card of a checkpoint: README.md, as the Hugging Face hub reads it."""

from __future__ import annotations

import json
import re
from typing import Any

from dylo_moe.routing.config import RANDOM, UNIFORM
from dylo_moe.utils.redact import bytes_in_words, open_settings, short_name, without_secrets

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
        facts: as `facts.run_facts` gives them; None: the card tells what the manifest tells.
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
        _data(facts),
        _losses(losses),
        _settings(settings),
        _versions(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(manifest: dict[str, Any], facts: dict[str, Any]) -> str:
    """No licence is stated: it follows from the base's and the data's, which a person must judge."""
    lines = ["---", "library_name: peft"]
    base = manifest["base"]["id"]
    if _is_hub(manifest):
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    lines += ["pipeline_tag: text-generation", "tags:", "- lora", "- mixture-of-experts", "- dylora-moe"]
    return "\n".join([*lines, "---"])


def _is_hub(manifest: dict[str, Any]) -> bool:
    """A folder may be called like a hub id, but has no revision."""
    return bool(_HUB_ID.fullmatch(manifest["base"]["id"] or "")) and bool(manifest["base"].get("revision"))


def _whom(router: dict[str, Any]) -> str:
    """Which experts a router sends to, in words."""
    if router.get("policy") == UNIFORM:
        return "all of them alike, whatever it is"
    drawn = ", drawn at random" if router.get("policy") == RANDOM else ""
    return f"{router['top_k']} of them{drawn}"


def _summary(manifest: dict[str, Any], facts: dict[str, Any], step: int | None) -> str:
    base, experts = manifest["base"], manifest["experts"]
    named = _code(short_name(without_secrets(base["id"]))) if base["id"] else "an unnamed base"
    revision = f", revision {_code(base['revision'])}" if base.get("revision") else ""
    known = facts.get("base", {})
    kind = f" ({_text(known['class'])}, {known['parameters']:,} parameters)" if known else ""
    bits = {"load_in_4bit": ", held in 4 bits", "load_in_8bit": ", held in 8 bits"}
    kind += next((text for key, text in bits.items() if (base.get("quantization") or {}).get(key)), "")
    count = len(experts)
    many = f"{count} LoRA expert{'s' if count > 1 else ''}"
    sentences = [
        f"{many} on the frozen {named}{kind}{revision}, and a router that sends each "
        f"{manifest['router'].get('granularity', 'token')} to {_whom(manifest['router'])}. The base is not in this "
        "folder."
    ]
    if facts.get("trainable") is not None:
        sentences.append(f"{facts['trainable']:,} parameters were trained, {facts['frozen']:,} stayed as they were.")
    if step is not None:
        sentences.append(f"Saved after {step:,} optimizer step{'' if step == 1 else 's'}.")
    if facts.get("started"):
        sentences.append(f"The run began at {_text(facts['started'])}.")
    return " ".join(sentences)


def _loading(manifest: dict[str, Any]) -> str:
    base = manifest["base"]["id"] or ""
    is_hub = _is_hub(manifest)
    where = json.dumps(base) if is_hub else '"BASE"'
    rest = "" if is_hub or (base and "/" not in base) else ', base="BASE"'  # one word may be a base's short name
    note = "" if is_hub else "\n\n`BASE` is the folder or hub id of the base."
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
        for expert in manifest["experts"]
    ]
    return "## Experts\n\n" + _table(["expert", "rank", "parameters", "state", "grown for"], rows, right={1, 2})


def _state(expert: dict[str, Any]) -> str:
    return ("mature" if expert.get("mature", True) else "nascent") + (
        "" if expert.get("trainable", True) else ", frozen"
    )


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
    return "## Data\n\n" + _table(titles, rows, right={2, 3, 4})


def _origin(origin: str) -> str:
    """The place where a dataset was found, without the folders of the machine."""
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
    return "## Held-out loss\n\nNats per token.\n\n" + _table(titles, rows, right={1, 2, 3})


def _settings(settings: dict[str, Any] | None) -> str:
    if not settings:
        return ""
    rows = []
    for name, value in open_settings(settings).items():
        is_list = isinstance(settings[name], list)
        text = ", ".join(short_name(str(item)) for item in settings[name]) if is_list else short_name(value)
        rows.append([_code(name), without_secrets(text)])
    return "## Settings\n\n" + _table(["flag", "value"], rows, right=set())


def _versions(facts: dict[str, Any]) -> str:
    versions, hardware = facts.get("versions", {}), facts.get("hardware", {})
    if not versions and not hardware:
        return ""
    lines = [f"- {name} {_text(number)}" for name, number in versions.items()]
    lines += [f"- {text}" for text in map(_text, hardware_lines(hardware))]
    return "## Versions and hardware\n\n" + "\n".join(lines)


def hardware_lines(hardware: dict[str, Any]) -> list[str]:
    """The machine in words, a line for each of its parts that is known."""
    lines = [hardware[name] for name in ("platform", "cpu") if hardware.get(name)]
    if hardware.get("cores"):
        lines.append(f"{hardware['cores']} cores")
    if hardware.get("memory"):
        lines.append(f"{bytes_in_words(hardware['memory'])} of memory")
    if "gpus" in hardware:
        lines += [f"{gpu['name']}, {bytes_in_words(gpu['memory'])}" for gpu in hardware["gpus"]] or ["no GPU"]
    return lines


def _table(titles: list[str], rows: list[list[Any]], *, right: set[int]) -> str:
    rule = ["--:" if index in right else "---" for index in range(len(titles))]
    body = [[_text(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, rule, *body])


def _text(value: Any) -> str:
    """A value that a table or sentence of Markdown shows as it is."""
    text = " ".join(str(value).split())
    if text.startswith("`") and text.endswith("`"):
        return text.replace("|", "\\|")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|*`~\[\]]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def _code(value: Any) -> str:
    return "`" + " ".join(str(value).replace("`", "'").split()) + "`"
