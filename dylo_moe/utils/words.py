"""Small helpers that put values into sentences."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """List the first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def split_at_commas(values: Iterable[object]) -> list[str]:
    """The items of a list of which some may hold several, separated by commas; empty ones are left out."""
    return [part.strip() for value in values for part in str(value).split(",") if part.strip()]


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Join a number and its noun, such as "1 row" or "2,000 rows".

    Args:
        plural: the plural of the noun; by default an s is appended.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def nearest(word: str, known: Collection[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that is most like a mistyped one, of those that begin with it, else of all.

    Args:
        cutoff: the least similarity of the two, from 0 to 1 (`difflib.get_close_matches`); at 0 there is always one.

    Returns:
        None where no known word is that similar.
    """
    longer = [name for name in known if name.startswith(word)] if word else []
    found = difflib.get_close_matches(word, longer or known, n=1, cutoff=0 if longer else cutoff)
    return found[0] if found else None
