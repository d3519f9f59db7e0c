"""The names that the flags of an evaluation take: benchmarks, and ways to ask their problems."""

from __future__ import annotations

HUMANEVAL, MBPP = BENCHMARKS = ("humaneval", "mbpp")
"""The benchmarks of generated code."""

COMPLETION, CHAT = STYLES = ("completion", "chat")
"""How a problem is asked: as a text that the model continues, or as a question in the chat template of the base."""
