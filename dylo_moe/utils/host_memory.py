"""How much memory this machine has."""

from __future__ import annotations

import os
from pathlib import Path


def host_bytes() -> int:
    """The memory of this machine, or the part of it that its container may use; 0 where the system does not say."""
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(size, int(text)) if text.isdigit() else size
