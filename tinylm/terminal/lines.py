"""Read the lines of the story prompt from a terminal, with editing, history and completion, or from a pipe."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from tinylm.system.text_files import standard_input_lines
from tinylm.terminal.commands import CommandCompleter


class Lines(Protocol):
    interactive: bool

    def read(self) -> str | None:
        """Return the next line without its end, or None at the end of the input."""
        ...


class PipeLines:
    """Lines from standard input when it is not a terminal."""

    interactive = False

    def __init__(self) -> None:
        self._lines = standard_input_lines()

    def read(self) -> str | None:
        return next(self._lines, None)


class TerminalLines:
    """Lines from a terminal. Ctrl-C discards the line, Ctrl-D ends the input."""

    interactive = True

    def __init__(self, keep_history: bool) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history() if keep_history else InMemoryHistory(),
            completer=CommandCompleter(),
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
        )

    def read(self) -> str | None:
        while True:
            try:
                return self._session.prompt("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None


def _history() -> History:
    """Return a history in a file that only its owner can read, or in memory when the file cannot be written."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        path = state / "tinylm" / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        return InMemoryHistory()
    return _FileHistory(path)


class _FileHistory(FileHistory):
    """A file history that ignores errors, so that the story continues when the disk is full or the file is gone."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)
