"""Find all processes that a test started, directly or indirectly, by a mark in their environment."""

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

NAME = "TINYLM_TEST_MARK"


class Mark:
    """Add `environment` to a process's environment. All its descendants inherit it, even after their parents end."""

    def __init__(self, name: str = NAME) -> None:
        """name: the variable's name. Use another name if the marked process starts tests that use NAME."""
        self.environment = {name: uuid.uuid4().hex}
        self._entry = f"{name}={self.environment[name]}".encode()

    def processes(self, named: str = "") -> list[int]:
        """Return the ids of the marked processes whose program name begins with `named`."""
        return [pid for pid, command in self._all() if Path(command).name.startswith(named)]

    def signal(self, number: int, processes: list[int]) -> None:
        """Send a signal to those of these processes that are marked and still run."""
        for process in set(self.processes()).intersection(processes):
            _send(number, process)

    def kill_all(self) -> None:
        while remaining := self.processes():
            for process in remaining:
                _send(signal.SIGKILL, process)

    def _all(self) -> Iterator[tuple[int, str]]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self._entry not in (entry / "environ").read_bytes().split(b"\0"):
                        continue
                    command = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                except OSError:  # the process has ended, or belongs to another user
                    continue
                if command:  # empty for a zombie
                    yield int(entry.name), command


def _send(number: int, process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process, number)


def resident_mib(process: int) -> float:
    """Return the resident memory of a process in MiB, without pages of files."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {process} has no memory")
