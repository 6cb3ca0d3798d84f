"""Where the story prompt's lines come from: a terminal, with editing, history and completion, or a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from tinylm.system.text_files import standard_input_lines

Words = Callable[[str], Iterable[str] | None]  # what may follow a command; None: a path


class Lines(Protocol):
    interactive: bool

    def read(self) -> str | None:
        """The next line, without its end; None at the end of the input."""
        ...


class PipeLines:
    """Lines of standard input when it is not a terminal."""

    interactive = False

    def __init__(self) -> None:
        self._lines = standard_input_lines()

    def read(self) -> str | None:
        return next(self._lines, None)


class TerminalLines:
    """Ctrl-C at the prompt takes the line back, Ctrl-D ends the input."""

    interactive = True

    def __init__(self, commands: Iterable[str], words: Words, keep_history: bool) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history() if keep_history else InMemoryHistory(),
            completer=CommandCompleter(tuple(commands), words),
            complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
            enable_history_search=False,
        )

    def read(self) -> str | None:
        while True:
            try:
                return self._session.prompt("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None


class CommandCompleter(Completer):
    """Commands after a slash at the line's beginning, and what may follow them."""

    def __init__(self, commands: tuple[str, ...], words: Words) -> None:
        self._commands, self._words = commands, words

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/"):
            return
        command, space, rest = text.partition(" ")
        choices = self._words(command) if space else self._commands
        if choices is None:
            yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
            return
        begun = rest if space else command
        for choice in choices:
            if choice.startswith(begun):
                yield Completion(choice, start_position=-len(begun))


def history_path() -> Path:
    """Where lines are kept from one session to the next, by the XDG base directories."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tinylm" / "history"


def _history() -> History:
    """Return the history in a file that only its owner can read, or a history in memory when there can be no file."""
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return _FileHistory(path)


class _FileHistory(FileHistory):
    """A history whose lines stay in memory when the disk is full or the file is gone: the story matters more."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)
