"""Tokenizers of every kind of template, and small files of rows."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of help to everyone<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT_TEMPLATE = (  # like Gemma's: no system message, contents trimmed, and an end of turn that is not eos
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ message['role'] }}]{{ message['content'] | trim }}<turn_end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL_TEMPLATE = (  # like those that drop past thoughts: an answer is written otherwise once it is past
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{{ message['content'][:1] }}{% else %}{{ message['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """All bytes and a few merges, so that a response can melt into the prompt before it; pad is eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("t", "h"), ("th", "e"), ("]", "]")]
    tokens = alphabet + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (END, "<|im_start|>", "<turn_end>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=template)


PLAIN, CHAT, STRICT, FORGETFUL = (
    byte_tokenizer(template) for template in (None, CHAT_TEMPLATE, STRICT_TEMPLATE, FORGETFUL_TEMPLATE)
)


def write_rows(path: Path, rows: list[dict]) -> str:
    """JSON lines; returns the path as it is typed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(path: Path, count: int, word: str) -> str:
    """Questions and answers about numbers, none like another."""
    rows = [{"prompt": f"{word} {i}?", "response": f"{word} is {i * i}"} for i in range(count)]
    return write_rows(path, rows)
