"""Text of others as it may be shown: no character of it can steer a terminal, turn lines around or break a page.

Names, data, generated text and messages of other libraries are stored as they are. Where they are shown, by the console
of every `Screen`, by the message that a command ends with, in a log, on a page or in a picture, they go through here.
"""

from __future__ import annotations

import logging
import re

UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters (C0 and C1) without tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # those that change the direction of writing
    "\u2028\u2029"  # line and paragraph separators, at which some viewers break a log line in two
    "\ud800-\udfff\ufffe\uffff"  # halves of a pair, and what XML must not hold
    "]"
)
"""The characters that are not shown."""


def harmless(text: str) -> str:
    """The text with each unsafe character as Python writes it, such as the four letters `\\x1b` for an escape.

    Newlines and tabs stay; the newline of Windows becomes a plain one.
    """
    return UNSAFE.sub(_visible, text.replace("\r\n", "\n")) if UNSAFE.search(text) else text


def harmless_logger(name: str) -> logging.Logger:
    """The logger of a name, whose lines are harmless."""
    logger = logging.getLogger(name)
    logger.addFilter(_with_harmless_text)
    return logger


def _with_harmless_text(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    if UNSAFE.search(said):
        record.msg, record.args = harmless(said), None
    return True


def _visible(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
