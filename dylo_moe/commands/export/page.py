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
