"""Whether the Hugging Face Hub can be reached, and its errors in one line."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants as hub


def no_way_to_hub() -> bool:
    """Whether the hub's host has no address here, so that asking it would only mean a minute of retries."""
    if hub.HF_HUB_OFFLINE or getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def first_line(error: BaseException) -> str:
    """What an error says first, without its stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .:")
