"""What is printed in styles, harmless (`dylo_moe.utils.harmless`): the console of rich, and a text with styles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from dylo_moe.utils.harmless import UNSAFE, harmless


class HarmlessConsole(Console):
    """A console of rich that prints no unsafe character, whoever gives it one, and reads no style from a text.

    Codes that rich itself makes, such as those of colours and live displays, pass.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces that something is printed as; rich calls this for all that it prints."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else harmless(text), style, control)


def harmless_text(text: Text) -> Text:
    """A text as `harmless` shows it; its styles stay where they were."""
    if not UNSAFE.search(text.plain):
        return text
    cuts = {place for found in UNSAFE.finditer(text.plain) for place in found.span()}
    whole = text.blank_copy()
    for piece in text.divide(sorted(cuts - {0, len(text)})):
        if UNSAFE.search(piece.plain):
            piece.plain = harmless(piece.plain)
            piece.spans = [span._replace(end=len(piece.plain)) for span in piece.spans]
        whole.append_text(piece)
    return whole
