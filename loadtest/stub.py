"""Starts `loadtest.stub_server` in a process of its own, for tests of the load test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """The address of a stub server with these arguments; it ends with the block. Raises RuntimeError."""
    command = [sys.executable, "-m", "loadtest.stub_server", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("ready on "):
            raise RuntimeError(f"the stub server did not start: {' '.join(command)}")
        yield line.removeprefix("ready on ").strip()
    finally:
        process.terminate()
        process.wait(10)
