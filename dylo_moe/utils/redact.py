"""Remove from a run's settings what must not be published: credentials, tokens, paths of this machine."""

from __future__ import annotations

import json
import re
from typing import Any

_CREDENTIALS = re.compile(r"(\w+://)[^/\s@]*@")

_QUERY = re.compile(r"(\w+://[^\s?]*)\?[^\s]*")

_TOKEN = re.compile(r"\b(hf_|sk-|ghp_)[A-Za-z0-9_-]{16,}")

SECRET_NAME = re.compile(r"(token|secret|password|passwd|credentials?|api_?key|_key)$", re.IGNORECASE)
"""The names of variables and settings that hold secrets."""


def without_secrets(text: str) -> str:
    """Remove user, password and query of each address, and everything that looks like an access token."""
    return _TOKEN.sub("<removed>", _QUERY.sub(r"\1", _CREDENTIALS.sub(r"\1", text)))


def open_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Turn settings into text to be shown; those whose names say that they are secret are left out."""
    return {
        name: without_secrets(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
        for name, value in settings.items()
        if value is not None and not SECRET_NAME.search(name)
    }


def short_name(name: str) -> str:
    """The name of a dataset or base as it is shown: for a local file or folder, the last part of its path."""
    is_path = name.startswith(("/", ".", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", name) or name.count("/") > 1
    return re.split(r"[\\/]", name.rstrip("/\\"))[-1] or name if is_path else name


def bytes_in_words(size: float) -> str:
    """Show a size in GB of 10^9 bytes."""
    return f"{size / 1e9:,.1f} GB"
