"""The README.md of an exported folder: what the folder holds, how to use it, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dylo_moe.commands.export.serving_rules import VLLM_VERSION
from dylo_moe.routing.config import SHARED
from dylo_moe.utils.markdown import markdown_table

NOT_MEASURED = "What is lost against routing each token was **not measured** (--no_measure)."

REQUEST = """\
import json

from dylo_moe import DyLoRAMoE, load_tokenizer
from dylo_moe.commands.export.request_routing import expert_for
from dylo_moe.data.encoding import encode_prompt, text_format
from dylo_moe.evaluation.continuation import end_ids

model = DyLoRAMoE.from_pretrained("CHECKPOINT")  # only its layers before the router are run
tokenizer = load_tokenizer(model.base_id, revision=model.base_revision)
prompt = encode_prompt(text_format(tokenizer), "Write the Python function clamp.")
request = {
    "model": expert_for(model, prompt),
    "prompt": prompt,
    "max_tokens": 128,
    "stop_token_ids": end_ids(tokenizer),
}
print(json.dumps(request))  # the body of a POST to http://localhost:8000/v1/completions
"""
"""An example of a request in Python; CHECKPOINT stands for the checkpoint's folder."""


SHARED_WORDS = "`shared` is what serves every request; requests of no known skill get it alone. "


def vllm_page(record: Mapping[str, Any], losses: str) -> str:
    """Write the page of a folder with an adapter for each expert.

    Args:
        record: the content of dylora_export.json.
        losses: Markdown about what is lost against routing each token.
    """
    experts = [
        [
            item["name"],
            item["rank"],
            ", ".join(map(str, item["original_ranks"])),
            item["skill"] or "",
            item["state"],
        ]
        for item in record["experts"]
    ]
    notes = [f"- {item['name']}: {note}" for item in record["experts"] for note in item["notes"]]
    parts = [
        "# Experts of a DyLoRA-MoE checkpoint, for vLLM",
        f"One plain LoRA adapter for each expert, by the rules of vLLM {VLLM_VERSION}; stock PEFT loads them too. The "
        f"base is {record['base']['id']}, and is not in this folder.",
        "## Serve",
        f"In this folder:\n\n```\n{record['serve_command']}\n```",
        "Each expert is a model by its own name, and `base` is the unchanged base. "
        + SHARED_WORDS * any(item["name"] == SHARED for item in record["experts"])
        + "vLLM rounds adapters to the dtype "
        "that it computes in (`--dtype`), which is half precision where the base's files are fp32.",
        "## Ask",
        "vLLM applies one adapter to a whole request. The checkpoint's router says which one suits a prompt:",
        f"```python\n{REQUEST}```",
        "## What is lost",
        losses,
        "## Experts",
        markdown_table(["name", "rank", "rank in the checkpoint", "skill", "state"], experts),
        "\n".join(notes + [f"- {note}" for note in record["notes"]]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


PEFT_CODE = """\
from peft import PeftModel

from dylo_moe import load_base

model = PeftModel.from_pretrained(load_base("BASE"), "EXPERT", adapter_name="EXPERT")
"""
"""How stock PEFT loads an expert; BASE and EXPERT stand for their names."""

ACTIVATED = """\
Each is an aLoRA adapter (`alora_invocation_tokens` is {invocation}): the base reads the prompt, and the expert acts \
from the header of its answer on, so that the cache of a prompt serves all experts and the base. In a conversation of \
one answer this is what `route_to` gives, token for token. Stock PEFT differs from it in this:

- It acts from the last such header in what it is given, and leaves all tokens before it to the base, earlier \
answers too; the checkpoint leaves each earlier answer to the expert that wrote it.
- It acts to the end of the text, also on what stands behind the end of an answer; the checkpoint leaves that to the \
base.
- Without a whole header in the prompt it does not act at all."""


def peft_page(record: Mapping[str, Any], losses: str) -> str:
    """Write the page of a folder of adapters for stock PEFT; the arguments are those of `vllm_page`."""
    experts = [[item["name"], item["rank"], item["skill"] or "", item["state"]] for item in record["experts"]]
    notes = [f"- {item['name']}: {note}" for item in record["experts"] for note in item["notes"]]
    code = PEFT_CODE.replace("BASE", str(record["base"]["id"])).replace("EXPERT", record["experts"][0]["name"])
    parts = [
        "# Experts of a DyLoRA-MoE checkpoint, for PEFT",
        f"One LoRA adapter for each expert. The base is {record['base']['id']}, and is not in this folder.",
        "## Use",
        f"In this folder:\n\n```python\n{code}```",
        ACTIVATED.format(invocation=record["invocation"]) if record["invocation"] else "",
        "The router stays with the checkpoint: `expert_for` of `dylo_moe.commands.export.request_routing` says which "
        "expert suits a prompt.",
        "## What is lost",
        losses,
        "## Experts",
        markdown_table(["name", "rank", "skill", "state"], experts),
        "\n".join(notes + [f"- {note}" for note in record["notes"]]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def merged_page(record: Mapping[str, Any], losses: str) -> str:
    """Write the page of a plain model that experts were merged into; the arguments are those of `vllm_page`."""
    weights = [[name, f"{weight:.4g}"] for name, weight in record["weights"].items()]
    parts = [
        "# A DyLoRA-MoE checkpoint, merged into a plain model",
        f"The weights of {record['base']['id']} with these experts inside, the same for every token, in "
        f"{record['dtype']}. It needs nothing but Transformers:",
        '```python\nAutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n```',
        markdown_table(["expert", "weight"], weights),
        "## What is lost",
        losses,
        "\n".join(f"- {note}" for note in record["notes"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
