"""Whether the Hugging Face Hub can be reached, and its errors in one line."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants as hub


def no_way_to_hub() -> bool:
    """Whether the hub's host has no address here, so that a request would only be retried for a minute."""
    if hub.HF_HUB_OFFLINE or getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop at its end."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .:")
