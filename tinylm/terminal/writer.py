"""The loop of the story prompt: a line goes into the story, and the model continues it. Commands begin with a slash.

`source` has the model, `lines` reads the input, and `screen` prints.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

from tinylm.client import ServiceError
from tinylm.sampling import SamplingParams
from tinylm.system.files import write_file
from tinylm.terminal import settings
from tinylm.terminal.commands import COMMANDS, HELP
from tinylm.terminal.lines import Lines
from tinylm.terminal.screen import LEGEND, Screen
from tinylm.terminal.source import Source
from tinylm.terminal.story import Story, Turn, visible_end

GREETING = "Begin a story. An empty line lets the model continue, Ctrl-C stops it, /help lists the commands."


class Writer:
    def __init__(
        self, source: Source, params: SamplingParams, lines: Lines, screen: Screen, colors: bool = False
    ) -> None:
        self._source, self._lines, self._screen = source, lines, screen
        self._params, self._colors = params, colors
        self._story = Story()
        self._has_told_of_context = False
        self._saved_as: set[Path] = set()

    def run(self) -> None:
        """Read lines until they end. Print an error and continue at a terminal; raise it without one."""
        if self._lines.interactive:
            self._screen.about(GREETING)
        while (line := self._lines.read()) is not None:
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if line.split() == ["/quit"]:
                        break
                    self._command(line)
                else:
                    self._add(line.removeprefix("/") if line.startswith("//") else line)
            except (ValueError, ServiceError, OSError) as error:
                if not self._lines.interactive:
                    self._screen.end_line()
                    raise
                self._screen.error(str(error))
            except KeyboardInterrupt:  # between an answer and the next line
                if not self._lines.interactive:
                    raise
        self._screen.end_line()

    def _command(self, line: str) -> None:
        match shlex.split(line):
            case ["/help"]:
                self._screen.about(HELP)
            case ["/new"]:
                self._story, self._has_told_of_context = Story(), False
                self._screen.about("another story")
            case ["/retry"]:
                turn = self._last_turn()
                turn.written = ""
                self._write(turn)
            case ["/undo"]:
                self._last_turn()
                self._story.turns.pop()
                text = self._story.text
                self._screen.about(f"taken back; the story {f'ends: …{text[-60:]}' if text else 'is empty'}")
            case ["/show"]:
                self._screen.story(self._story.text)
                self._screen.end_line()
            case ["/set", name, *words]:
                self._params = settings.changed(self._params, name, words)
            case ["/settings"]:
                self._screen.about(settings.described(self._params))
            case ["/colors", ("on" | "off") as wanted]:
                self._colors = wanted == "on"
                self._screen.about(LEGEND if self._colors else "one colour")
            case ["/save", name]:
                self._save(_without_tilde(name))
            case [name, *_] if name in COMMANDS:
                raise ValueError(f"the form of this command is {name} {COMMANDS[name]}")
            case [name, *_]:
                raise ValueError(f"there is no command {name}: /help lists them")

    def _last_turn(self) -> Turn:
        if not self._story.turns:
            raise ValueError("the story is empty")
        return self._story.turns[-1]

    def _save(self, path: Path) -> None:
        """Write the story to a new file, to one that this session wrote, or into a device or a FIFO."""
        if path not in self._saved_as and (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} exists already: give another name")
        write_file(path, self._story.text + "\n")
        self._saved_as.add(path)
        self._screen.about(f"saved as {path}")

    def _add(self, line: str) -> None:
        turn = self._story.add(line)
        if not self._lines.interactive:  # at a terminal the line is visible already
            self._screen.story(turn.typed)
        self._write(turn)

    def _write(self, turn: Turn) -> None:
        """Let the model continue the story. Ctrl-C ends the request and keeps the text so far."""
        began_at = time.monotonic()
        params = dataclasses.replace(self._params, logprobs=0) if self._colors else self._params
        try:
            with self._source.stream(self._visible(), params) as stream:
                n_before = 0
                for piece in stream:
                    first, turn.written = not turn.written, turn.written + piece
                    shown = piece.lstrip(" ") if first and self._lines.interactive else piece
                    self._screen.story(shown, stream.logprobs[n_before:])
                    n_before = len(stream.logprobs)
                completion = stream.completion
        except KeyboardInterrupt:
            if not self._lines.interactive:
                raise
            self._screen.about("cancelled")
            return
        if self._lines.interactive:
            self._screen.about(status_line(completion, time.monotonic() - began_at))

    def _visible(self) -> str:
        """Return the story, or its end if the context has no room for the whole story and the answer."""
        text = self._story.text
        room = self._source.context - 1 - min(self._params.max_tokens, self._source.context // 2)  # 1: the boundary
        visible = visible_end(text, self._source.token_bytes, room)
        if len(visible) < len(text) and not self._has_told_of_context:
            self._has_told_of_context = True
            self._screen.about(
                f"The story is longer than the model can see ({self._source.context} tokens). "
                f"From now on it sees only the end, “{visible[:40].strip()}…”"
            )
        return visible


def _without_tilde(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f"the home directory of {name} is unknown: give a path without ~") from None


def status_line(completion: Any, seconds: float) -> str:
    """Return how an answer ended and how fast it arrived: `length · 64 tokens · 812 tokens/s`."""
    n_tokens = completion.n_tokens if hasattr(completion, "n_tokens") else len(completion.token_ids)
    ended = ": the story ends here, or your next line continues it" if completion.finish_reason == "stop" else ""
    return f"{completion.finish_reason} · {n_tokens} tokens · {n_tokens / max(seconds, 1e-9):,.0f} tokens/s{ended}"
