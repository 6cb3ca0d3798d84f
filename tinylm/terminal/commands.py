"""The commands of the story prompt, their help text and their completion."""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from tinylm.terminal import settings

COMMANDS = {
    "/help": "list the commands",
    "/new": "begin another story",
    "/retry": "write the last part again (the same text if a seed is set)",
    "/undo": "remove the last part, with your line before it",
    "/show": "print the story so far",
    "/set": "NAME [VALUE]: change a setting, as in /set temperature 0.7; without a value, use its default",
    "/settings": "print the settings",
    "/colors": "on or off: colour tokens by their probability",
    "/save": "FILE: save the story in a new file",
    "/quit": "leave, as with Ctrl-D",
}
HELP = "\n".join(f"{name:<11}{text}" for name, text in COMMANDS.items()) + (
    "\n\nAny other line goes into the story. Begin it with // if it begins with a slash.\n"
    "An empty line lets the model continue. Ctrl-C stops the model, Ctrl-D leaves."
)
_ARGUMENTS = {"/set": settings.NAMES, "/colors": ("on", "off")}


class CommandCompleter(Completer):
    """Completes a command at the beginning of a line, and the word after it."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, argument = text.partition(" ")
        if command == "/save" and space:
            yield from PathCompleter(expanduser=True).get_completions(Document(argument), complete_event)
        elif text.startswith("/"):
            typed = argument if space else command
            for choice in _ARGUMENTS.get(command, ()) if space else COMMANDS:
                if choice.startswith(typed):
                    yield Completion(choice, start_position=-len(typed))
