"""Execute commands in a fresh clone of HEAD as a person at a terminal does: type, wait, press Ctrl-C.

The clone, its virtual environment, the home directory and Ray's files are in one temporary directory. A mark in the
environment identifies every process that a command starts. Closing the clone ends them all.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import pexpect
import psutil
from helpers.docs_commands import ROOT, Until, Walk, filled
from helpers.marked import Mark

PORTS = {
    "gRPC": 9000,
    "HTTP": 8000,
    "Ray's dashboard": 8265,
    "Ray": 6379,
    "TLS": 9443,
    "Prometheus": 9090,
    "stub": 9100,
}
END_LIMIT_S = 90  # after Ctrl-C
LEFT_LIMIT_S = 30  # until the processes that it started end
LOOK_AGAIN_S = 0.3
INTERRUPTED = {0, 130}  # exit status; the second is a shell's for SIGINT
SHOWN = 6000  # characters of output in an error
# Variables of the test run that a person's shell does not have.
NOT_INHERITED = re.compile(
    r"(VIRTUAL_ENV|PYTHON|PYTEST_|MAKE|MFLAGS|RAY_(?!USAGE)|CHAOS_|TLS_|TINYLM_|NUMBA_|OPENBLAS_).*"
)
CONTROL = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[()][A-Z0-9])|\r(?=\n)")


class WalkError(AssertionError):
    """A command did not do what its page promises. The message has the command and its output."""


class Terminal:
    """A shell command on its own terminal."""

    def __init__(self, text: str, directory: Path, environment: dict[str, str]) -> None:
        self.text = text
        self.mark = Mark("TINYLM_WALK_MARK")
        # A separate job, as in an interactive shell, so that Ctrl-C reaches the command only.
        self._child = pexpect.spawn(
            "bash", ["-m", "-c", f"{text}\nexit $?"], cwd=str(directory), env=environment | self.mark.environment,
            encoding="utf-8", codec_errors="replace", timeout=None, dimensions=(50, 160),
        )  # fmt: skip
        self._pieces: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                self._pieces.append(self._child.read_nonblocking(65536))
        except (pexpect.EOF, OSError, ValueError):  # closed
            pass

    @property
    def output(self) -> str:
        """The output so far, without control sequences."""
        return CONTROL.sub("", "".join(self._pieces))

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        if self._child.isalive():
            return None
        return self._child.exitstatus if self._child.exitstatus is not None else -(self._child.signalstatus or 0)

    def wait_for(self, pattern: str, limit_s: float) -> bool:
        """Return True once the output has the pattern, False if it ends first. An empty pattern waits for the end."""
        deadline = time.monotonic() + limit_s
        while True:
            ended = self.status is not None
            if ended:
                time.sleep(LOOK_AGAIN_S)  # the last output
            if pattern and re.search(pattern, self.output):
                return True
            if ended:
                return False
            if time.monotonic() > deadline:
                self.fail(f"{f'did not print {pattern!r}' if pattern else 'did not end'} within {limit_s:.0f} s")
            time.sleep(LOOK_AGAIN_S)

    def interrupt(self) -> None:
        """Press Ctrl-C. The command and its processes must end without a traceback."""
        before = len(self.output)
        self._child.sendintr()
        self.wait_for("", END_LIMIT_S)
        if self.status not in INTERRUPTED:
            self.fail(f"ended with status {self.status} after Ctrl-C")
        if "Traceback (most recent call last)" in self.output[before:]:
            self.fail("printed a traceback after Ctrl-C")
        self.expect_nothing_left()

    def expect_nothing_left(self) -> None:
        deadline = time.monotonic() + LEFT_LIMIT_S
        while left := self.mark.processes():
            if time.monotonic() > deadline:
                names = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in left]
                self.fail(f"left processes running: {names}")
            time.sleep(LOOK_AGAIN_S)

    def fail(self, why: str) -> None:
        output = self.output
        self.kill()
        raise WalkError(f"`{self.text}` {why}. It printed:\n{output[-SHOWN:]}")

    def kill(self) -> None:
        self.mark.kill_all()
        self._child.close(force=True)


class Clone:
    """A context manager that removes the clone and its processes at the end."""

    def __enter__(self) -> Self:
        for name, port in PORTS.items():
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    raise WalkError(
                        f"port {port} ({name}) is in use: the pages' commands need it, so stop the program that uses it"
                    )
        if any(process.name() == "gcs_server" for process in psutil.process_iter()):
            raise WalkError("another Ray runs on this machine: stop it, because `ray status` would find two")
        self._place = Path(tempfile.mkdtemp(prefix="tw-", dir="/tmp"))  # short: Ray's sockets lie in it
        self.directory = self._place / "tinylm"
        self._running: dict[str, Terminal | WalkError] = {}
        for name in ("home", "ray", "tmp"):
            (self._place / name).mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.directory)], check=True)
        return self

    def __exit__(self, *exception: object) -> None:
        for terminal in self._running.values():
            if isinstance(terminal, Terminal):
                terminal.kill()
        shutil.rmtree(self._place, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """Return a person's environment: the clone's programs on the PATH, an empty home, pip's settings and cache."""
        home, own = Path.home(), str(Path(sys.executable).parent)
        path = [entry for entry in os.environ["PATH"].split(os.pathsep) if entry != own]
        return {
            **{name: value for name, value in os.environ.items() if not NOT_INHERITED.fullmatch(name)},
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(home / ".cache")),
            "XDG_CONFIG_HOME": os.environ.get("XDG_CONFIG_HOME", str(home / ".config")),
            "PATH": os.pathsep.join([str(self.directory / ".venv/bin"), *path]),
            "PYTHON": f"{sys.base_prefix}/bin/python3",  # for `make setup`
            "HOME": str(self._place / "home"),
            "TMPDIR": str(self._place / "tmp"),
            "RAY_TMPDIR": str(self._place / "ray"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "TERM": "xterm",
        }

    def walk(self, shown: str, text: str, how: Walk, rows: dict[str, Walk]) -> None:
        """Execute a command as its walk says. rows: the walks of the commands that must run beside it."""
        for server in how.beside:
            self.keep_running(server, rows)
        if how.until in (Until.SERVES, Until.LEFT_RUNNING):
            self.keep_running(text, rows | {text: how}, shown)
            terminal = self._running.pop(text)
            assert isinstance(terminal, Terminal)
            if how.until is Until.SERVES:
                terminal.interrupt()
            terminal.kill()
            if not self._running:  # `ray stop` would end every Ray of the machine
                (self._place / "ray/ray/ray_current_cluster").unlink(missing_ok=True)
        else:
            terminal = self._start(shown, how)
            try:
                self._end(terminal, how)
            finally:
                terminal.kill()
        self._expect_as_committed(terminal, [how, *(rows[server] for server in how.beside)])

    def keep_running(self, text: str, rows: dict[str, Walk], shown: str = "") -> None:
        """Start a server unless it runs. Raise the same WalkError each time if it does not answer."""
        if text not in self._running:
            how = rows[text]
            for server in how.beside:
                self.keep_running(server, rows)
            terminal = self._start(shown or text, how)
            self._running[text] = terminal
            try:
                if how.until is Until.LEFT_RUNNING:
                    self._expect_end(terminal, how)
                elif how.says and not terminal.wait_for(how.says, how.limit_s):
                    terminal.fail(f"ended with status {terminal.status}")
                self._ask_until_answered(terminal, how)
            except WalkError as error:
                self._running[text] = error
        if isinstance(found := self._running[text], WalkError):
            raise WalkError(str(found))

    def _start(self, shown: str, how: Walk) -> Terminal:
        if how.before:
            try:
                self._shell(how.before, how.environment)
            except subprocess.SubprocessError as error:
                raise WalkError(f"before `{shown}`: {error} {getattr(error, 'output', '')}") from None
        return Terminal(filled(shown, how), self.directory, self.environment() | dict(how.environment))

    def _end(self, terminal: Terminal, how: Walk) -> None:
        if how.until is Until.AT_WORK:
            if terminal.wait_for(how.says, how.limit_s):
                terminal.interrupt()
            elif not (how.refused and re.search(how.refused, terminal.output)):
                terminal.fail(f"ended with status {terminal.status} before it was at work")
        else:
            self._expect_end(terminal, how)
            if how.asked:
                self._ask_until_answered(terminal, how)
        terminal.expect_nothing_left()

    def _expect_end(self, terminal: Terminal, how: Walk) -> None:
        terminal.wait_for("", how.limit_s)
        if terminal.status != 0:
            terminal.fail(f"ended with status {terminal.status}")
        if not re.search(how.says, terminal.output):
            terminal.fail(f"did not print {how.says!r}")

    def _ask_until_answered(self, terminal: Terminal, how: Walk) -> None:
        """Ask a command that ended once, and ask a server until it answers."""
        deadline = time.monotonic() + (how.limit_s if how.until is not Until.END else 0)
        while True:
            try:
                said = re.search(how.says, terminal.output)
                self._shell(how.asked, {**how.environment, "SAID": said[1] if said and said.groups() else ""})
                return
            except subprocess.SubprocessError as error:
                if how.until is Until.SERVES and terminal.status is not None:
                    terminal.fail(f"ended with status {terminal.status}")
                if time.monotonic() > deadline:
                    terminal.fail(f"was asked, by `{how.asked}`: {error} {getattr(error, 'output', '')}")
            time.sleep(1)

    def _shell(self, text: str, environment: Mapping[str, str]) -> None:
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=self.directory, check=True, text=True, timeout=120,
            env=self.environment() | dict(environment),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _expect_as_committed(self, terminal: Terminal, ran: list[Walk]) -> None:
        """Fail if committed files changed that the walks may not rewrite. Restore them all."""
        rewritten = tuple(path for how in ran for path in how.rewrites)
        git = ["git", "-C", str(self.directory)]
        changed = subprocess.run(
            [*git, "diff", "--name-only"], check=True, capture_output=True, text=True
        ).stdout.split()
        subprocess.run([*git, "checkout", "--quiet", "."], check=True)
        if wrong := [path for path in changed if not path.startswith(rewritten)]:
            terminal.fail(f"changed committed files: {wrong}")
