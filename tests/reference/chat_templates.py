"""Chat templates in the ways of the published ones, written for the tests, and a tokenizer for any template."""

from __future__ import annotations

import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_GENERATION = "{% if add_generation_prompt %}"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + _GENERATION
    + "<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # an empty thought is written too; thoughts before the last question are dropped; tools
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + _GENERATION
    + "<|im_start|>assistant\n{% endif %}"
)
PREFILLED = THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CHANNELS = (  # today's date, a channel for each part of an answer, and another end once an answer is past
    "<|start|>system<|message|>It is {{ strftime_now('%Y-%m-%d') }}.<|end|>"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    + _GENERATION
    + "<|start|>assistant{% endif %}"
)
DROPPED = (  # the generation prompt opens a thought, and whole conversations hold none
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    + _GENERATION
    + "<|Assistant|><think>\n{% endif %}"
)
HEADERS = (  # two line breaks before an answer, which many tokenizers join; a date
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}" + _GENERATION + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TURNS = (  # no system message, another name for the assistant
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + _GENERATION + "<start_of_turn>model\n{% endif %}"
)
INSTRUCTIONS = (  # the system message only in a question that is the last message; a space before an answer
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ENDED_TWICE = (  # eos behind the end of the last turn, but not where the conversation goes on
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    + _GENERATION
    + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ENDLESS = (  # no end of an answer but the next turn
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}"
    "{{ m.content }}{% endfor %}" + _GENERATION + "<|assistant|>{% endif %}"
)
COMMANDS = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN|>{{ m.role }}: {{ m.content }}"
    "<|END_RESPONSE|><|END_OF_TURN|>{% endfor %}" + _GENERATION + "<|START_OF_TURN|>assistant: {% endif %}"
)
PARTS = (  # contents as lists of parts, as of models that see images
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% for part in m.content %}{% if part['type'] == 'text' %} "
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    + _GENERATION
    + "<|im_start|>assistant:{% endif %}"
)
FAMILIES = {
    **{"chatml": CHATML, "thinking": THINKING, "prefilled": PREFILLED, "channels": CHANNELS, "dropped": DROPPED},
    **{"headers": HEADERS, "turns": TURNS, "instructions": INSTRUCTIONS, "ended twice": ENDED_TWICE},
    **{"endless": ENDLESS, "commands": COMMANDS, "parts": PARTS},
}

_MARKS = re.compile(
    r"<\|[A-Za-z_0-9]+\|>|<[A-Za-z_0-9]+\|>|<\|[A-Za-z_0-9]+>|<｜[^｜]+｜>|</?think>|</?tool_call>|</?s>|"
    r"<(?:start|end)_of_\w+>|<bos>|\[/?[A-Z_]+\]|<sop>"
)
_NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|return|>", "<end_of_utterance>")


def tokenizer_for(template: str | dict[str, str], *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few merges, line breaks among them, with the marks of a template as its tokens."""
    source = template if isinstance(template, str) else "".join(template.values())
    marks = {*_MARKS.findall(source), "<|user|>", "<|assistant|>", "<s>", "</s>"}
    eos = next((end for end in _ENDS if end in marks and "eos_token" not in source), "</s>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("t", "h"), ("th", "e"), ("Ġ", "p")]
    vocabulary = [*alphabet, *(left + right for left, right in merges)]
    inner = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(vocabulary)}, merges=merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_tokens([AddedToken(mark, special=mark not in _NOT_SPECIAL, normalized=False) for mark in sorted(marks)])
    if adds_bos:
        add_bos(inner)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, pad_token=eos, chat_template=template
    )


def add_bos(inner: Tokenizer) -> None:
    """Make a tokenizer begin every text with <s>."""
    from tokenizers import processors

    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
