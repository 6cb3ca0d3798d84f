"""How the commands of tinylm, train and loadtest print text and errors, and which status they end with."""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

INTERRUPTED = 130  # the exit status after Ctrl-C
NO_READER = 141  # the exit status when no process reads the output any more, as after SIGPIPE
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Replace control characters and lone surrogates by U+FFFD. Keep newlines and tabs."""
    return _CONTROL.sub("\ufffd", text)


class PlainConsole(Console):
    """A Rich console for text from models, servers and files.

    It reads no markup and no emoji codes in strings, also in tables. A terminal gets `printable` text, a pipe gets the
    text unchanged. With NO_COLOR, on a dumb terminal and in a pipe, nothing has a style.
    """

    def __init__(self, stderr: bool = False) -> None:
        colors: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, color_system=colors)

    def write(self, text: str, end: str = "\n", style: str | None = None) -> None:
        """Print text at once, without wrapping it."""
        shown = Segment(self._shown(text), self.get_style(style) if style else None)
        self.print(Segments([shown, Segment(end)]), crop=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich calls this for every string that it prints, also for those in tables."""
        return super().render_str(self._shown(text), **options)

    def on_broken_pipe(self) -> None:
        """Leave BrokenPipeError to `one_line_errors`. Rich itself would exit with status 1."""
        raise  # Rich calls this while it handles the error

    def _shown(self, text: str) -> str:
        return printable(text) if self.is_terminal or self.file.isatty() else text


def say(text: str) -> None:
    """Print a line on standard output."""
    PlainConsole().write(text)


@contextmanager
def one_line_errors(*errors: type[Exception]) -> Iterator[None]:
    """Run a command. Print OSError and `errors` as one line, and exit with status 1.

    Exit with INTERRUPTED after Ctrl-C, and with NO_READER when no process reads the output any more (`| head`). Replace
    closed standard streams by the null device.
    """
    reported: tuple[type[Exception], ...] = (OSError, *errors)
    open_closed_streams()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # a failed write is reported below, not by the interpreter
    except KeyboardInterrupt:
        status = INTERRUPTED
        _print_error("")
    except reported as error:
        if isinstance(error, BrokenPipeError) and (_has_no_reader(sys.stdout) or _has_no_reader(sys.stderr)):
            status = NO_READER
        else:
            status = 1
            _print_error(f"error: {error}")
    else:
        return
    _discard_unwritten()
    sys.exit(status)


def open_closed_streams() -> None:
    """Open the null device for each standard stream that was closed when the process began.

    Otherwise the next file that the process opens gets the stream's number, and the output of child processes goes
    into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is the stream's
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115, PTH123


def _has_no_reader(stream: TextIO) -> bool:
    """Return whether a write to the stream would fail because its other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))


def _print_error(text: str) -> None:
    with suppress(OSError):  # standard error may be what failed
        PlainConsole(stderr=True).write(text, style="red")


def _discard_unwritten() -> None:
    """Point a stream that cannot take its output to the null device, so that the interpreter can end quietly."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
