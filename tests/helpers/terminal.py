"""Run commands on a pseudo-terminal."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pexpect

from helpers.places import Place

TINYLM = str(Path(sys.executable).with_name("tinylm"))
WAIT_S = 60
PROMPT_READY = r"\x1b\[\?2004h"  # the line editor turns on bracketed paste
CONTROL = re.compile(r"\x1b\[[?0-9;]*[a-zA-Z]|\r|\x08")


class Terminal:
    def __init__(self, child: pexpect.spawn) -> None:
        self.child = child
        self.prompt()

    def prompt(self) -> str:
        """Wait for the prompt. Return what was printed before it, without control sequences."""
        return CONTROL.sub("", self.raw_prompt())

    def raw_prompt(self) -> str:
        self.child.expect(PROMPT_READY)
        return self.child.before

    def enter(self, line: str) -> str:
        self.child.sendline(line)
        return self.prompt()


@contextmanager
def terminal(*arguments: str, state: Path, place: Place | None = None, **environment: str) -> Iterator[Terminal]:
    """Yield a terminal in which `tinylm write` runs with these options. Its history goes below `state`.

    place: runs it there, without XDG_STATE_HOME.
    """
    command = [TINYLM, "write", *arguments]
    defaults = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(state)}
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    if place is not None:
        del defaults["XDG_STATE_HOME"]
        command = place.command(*command)
    child = pexpect.spawn(
        command[0], command[1:], env={**inherited, **defaults, **environment}, encoding="utf-8",
        timeout=WAIT_S, dimensions=(40, 400),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores SIGINT
    )  # fmt: skip
    try:
        yield Terminal(child)
    finally:
        child.close(force=True)


def shown_on_terminal(command: list[str], **environment: str) -> bytes:
    """Run a command whose output is a terminal, and return what the terminal gets."""
    reader, output = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    variables = {**plain, "TERM": "xterm-256color", **environment}
    with subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=variables) as process:
        os.close(output)
        shown = b""
        with suppress(OSError):  # the command has ended
            while part := os.read(reader, 65536):
                shown += part
        os.close(reader)
    assert process.returncode in (0, 1)
    return shown
