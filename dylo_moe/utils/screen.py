"""What a command says: printed for people, and recorded by the standard `logging` for programs."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, cast

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from dylo_moe.utils.harmless import harmless, harmless_logger
from dylo_moe.utils.harmless_console import HarmlessConsole, harmless_text
from dylo_moe.utils.quiet import is_quiet

SECONDS_BETWEEN_LINES = 15
"""How often a work that takes long says how far it is, where nothing can change in place."""

LOG_WIDTH = 120
"""The width in letters of tables in the log."""


class Screen:
    """Prints what a command says, and writes each of its statements to the logger `dylo_moe.AREA` as well.

    Statements go to stdout, warnings to stderr; where both are one terminal, a warning is printed above a live display.
    With --quiet only warnings, answers and the path of the result are printed. Colours and live displays need a
    terminal, and the variable NO_COLOR turns both off.

    Args:
        area: the last part of the logger's name, such as the command's name.
        console: where everything is printed; None: stdout and stderr.
        is_first: whether this process speaks for all processes of a run; others print and log nothing.
        is_answer: whether all that is said is what the command was asked for, which --quiet does not hide.
        is_logged: whether statements are logged.
    """

    def __init__(
        self,
        area: str,
        *,
        console: Console | None = None,
        is_first: bool = True,
        is_answer: bool = False,
        is_logged: bool = True,
    ) -> None:
        self._answers = console or make_console(quiet=not is_first)
        self._errors = console or make_console(quiet=not is_first, stderr=True)
        self.is_quiet = is_quiet() and not is_answer
        self.console = make_console(quiet=True) if self.is_quiet else self._answers
        self._logger = harmless_logger(f"dylo_moe.{area}")
        self._is_logged = is_logged and is_first

    @property
    def is_live(self) -> bool:
        """Whether a display can change in place: there is a terminal that can, and it is wanted. FORCE_COLOR gives
        colours to a file, but no live display."""
        return self.console.is_interactive and self.console.file.isatty() and not self.console.quiet

    @property
    def is_narrow(self) -> bool:
        """Whether a bar with all its figures has no room in a line."""
        return self.console.width < 120

    @property
    def has_colours(self) -> bool:
        """Whether colours are seen, or recorded for a picture."""
        return self.console.record or self.console.color_system is not None

    def say(self, what: RenderableType = "", style: str = "") -> None:
        """Print a sentence, which is logged at the level INFO, or a table."""
        self._print(self.console, what, style)
        self._log(logging.INFO, what)

    def answer(self, what: RenderableType, style: str = "") -> None:
        """Print what the command was asked for, also with --quiet."""
        self._print(self._answers, what, style)
        self._log(logging.INFO, what)

    def warn(self, sentence: str) -> None:
        """Print a sentence in yellow; it is logged at the level WARNING."""
        self._print(self._errors, sentence, "yellow")
        self._log(logging.WARNING, sentence)

    def note(self, sentence: str) -> None:
        """Print a sentence that a reader of the result should know, as a warning."""
        self.warn(f"Note: {sentence}")

    def progress(self, sentence: str) -> None:
        """Print how far the work is, unless a live display shows it already."""
        if not self.is_live:
            self._print(self.console, sentence, "")
        self._log(logging.INFO, sentence)

    def copyable(self, text: str, *, is_answer: bool = False) -> None:
        """Print lines that are to be copied, such as a command: none is wrapped or coloured.

        Args:
            is_answer: whether this is what the command was asked for, which --quiet does not hide.
        """
        (self._answers if is_answer else self.console).print(Text(harmless(text)), soft_wrap=True)
        self._log(logging.INFO, text)

    def file(self, label: str, path: str | Path) -> None:
        """Print the path of a file or a folder behind its label."""
        self.say(f"{label:12s} {path}")

    def result(self, label: str, path: str | Path) -> None:
        """Print the path of the result, which is all that a command prints with --quiet."""
        if self.is_quiet:
            self._print(self._answers, str(path), "")
            self._log(logging.INFO, f"{label:12s} {path}")
        else:
            self.file(label, path)

    def rule(self, title: str = "") -> None:
        """Print a line across the screen."""
        self.console.rule(Text(harmless(title)), align="left", style="dim")
        if title:
            self._log(logging.INFO, title)

    def status(self, title: str) -> AbstractContextManager[Any]:
        """Say what is being done: on a terminal until the `with` block ends, elsewhere in a line."""
        self.progress(title)
        return self.console.status(Text(harmless(title))) if self.is_live else nullcontext()

    @contextmanager
    def counting(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Say what is being done and how far it is: on a terminal in place, elsewhere in a line now and then.

        Args:
            total: of how many pieces the work consists.

        Yields:
            The function to call with the number of pieces that were done.
        """
        started = said = time.monotonic()
        done = 0
        with self.status(title) as status:

            def advance(count: int = 1) -> None:
                nonlocal done, said
                done += count
                now = time.monotonic()
                left = (now - started) / max(done, 1) * max(total - done, 0)
                text = f"{title}: {done:,} of {total:,}, about {left:.0f} s left"
                if status is not None:
                    status.update(Text(harmless(text)))
                elif now - said >= SECONDS_BETWEEN_LINES:
                    self.progress(text)
                    said = now

            yield advance

    @contextmanager
    def live(self, what: RenderableType) -> Iterator[Live | None]:
        """Show something that changes, on a terminal, until the `with` block ends; yields None elsewhere."""
        if not self.is_live:
            yield None
            return
        with Live(what, console=self.console, transient=True) as live:
            yield live

    def _print(self, console: Console, what: RenderableType, style: str) -> None:
        if not isinstance(what, (str, Text)):
            if console.color_system is None and not console.record:  # a file, whose lines end where their letters do
                what = Text(in_letters(what, width=console.width))
            console.print(what, crop=False, soft_wrap=isinstance(what, Text))
            return
        what = harmless(what) if isinstance(what, str) else harmless_text(what)
        text = Text(what, style) if isinstance(what, str) else what
        # A terminal's lines are wrapped between words. Elsewhere a sentence stays one line, and so does what is to be
        # copied: a sentence with a path or a command that no line can hold.
        is_long = isinstance(what, str) and any(cell_len(word) > console.width for word in what.split())
        console.print(text, soft_wrap=is_long or not (console.is_terminal or console.record))

    def _log(self, level: int, what: RenderableType) -> None:
        if self._is_logged and self._logger.isEnabledFor(level):
            plain = what if isinstance(what, str) else what.plain if isinstance(what, Text) else in_letters(what)
            self._logger.log(level, "%s", plain.strip("\n"), stacklevel=3)


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """A console that prints; with NO_COLOR it prints plain text, also where FORCE_COLOR or a terminal asks for more.

    It reads the environment of now: rich keeps the object that `os.environ` was when rich was imported, and datasets
    puts a copy in its place when it has worked in several processes.
    """
    plain, file = bool(os.environ.get("NO_COLOR")), cast(IO[str], _Stderr()) if stderr else None
    terminal = False if plain else None
    return HarmlessConsole(quiet=quiet, file=file, force_terminal=terminal, _environ=os.environ)


class _Stderr:
    """The stderr of the moment: while a live display is shown on the same terminal, lines are printed above it."""

    def write(self, text: str) -> int:
        return self._file().write(text)

    def flush(self) -> None:
        self._file().flush()

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":  # by which a console would write through a live display, into it
            raise AttributeError(name)
        return getattr(self._file(), name)

    @staticmethod
    def _file() -> Any:
        """What rich puts in place of stderr during a live display, unless stderr leads elsewhere, such as to a file."""
        behind = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        return sys.stderr if behind.isatty() else behind


def in_letters(what: RenderableType, *, width: int = LOG_WIDTH) -> str:
    """What a table and its like look like in plain letters."""
    console = HarmlessConsole(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
