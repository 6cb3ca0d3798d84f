"""Processes that a test started and all that came of them, found by a mark in their environment."""

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

NAME = "TINYLM_TEST_MARK"


class Mark:
    """Put `environment` into that of a process: all its descendants have it, whoever their parents are by then."""

    def __init__(self, name: str = NAME) -> None:
        """name: another than NAME, where what is marked starts tests that have marks of their own."""
        self.environment = {name: uuid.uuid4().hex}
        self._entry = f"{name}={self.environment[name]}".encode()

    def processes(self, named: str = "") -> list[int]:
        """Ids of those whose command line begins with `named`, the directory of the program aside."""
        return [pid for pid, command in self._all() if Path(command).name.startswith(named)]

    def signal(self, number: int, processes: list[int]) -> None:
        """To those of these processes that are marked and have not ended."""
        for process in set(self.processes()).intersection(processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def kill_all(self) -> None:
        while remaining := self.processes():  # just listed, so no check: one that has ended since is no mistake
            for process in remaining:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _all(self) -> Iterator[tuple[int, str]]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self._entry not in (entry / "environ").read_bytes().split(b"\0"):
                        continue
                    command = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                except OSError:  # ended meanwhile, or another user's
                    continue
                if command:  # a zombie has none
                    yield int(entry.name), command


def resident_mib(process: int) -> float:
    """Memory that a process has, without the pages of files that it shares."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {process} has no memory")
