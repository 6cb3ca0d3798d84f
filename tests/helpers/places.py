"""Run commands where little is allowed: as a user without a name or a home, on a read-only file system."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

NAMELESS = 12345  # no line of /etc/passwd has this user id
SCRIPT = """
set -e
mount --bind "$1" "$1"
mount -t tmpfs -o size="$2" tmpfs /dev/shm
mount -o remount,ro,bind /
for name in /tmp /var/tmp; do mountpoint -q "$name" && mount -o remount,ro,bind "$name"; done
cd "$1"
shift 2
exec unshare --user --map-user="$0" --map-group="$0" -- env -u HOME -u USER -u LOGNAME -u XDG_CACHE_HOME "$@"
"""


@dataclass(frozen=True)
class Place:
    """A view of this machine in which only one directory can be written.

    The user has no name and no home directory. /dev/shm is small. Tests that need it are skipped where the system does
    not permit user namespaces.
    """

    writable: Path
    shm_bytes: int = 1 << 20

    def command(self, *command: str) -> list[str]:
        """Return the command line that runs `command` in this place, with `writable` as its working directory."""
        if not _has_namespaces():
            pytest.skip("this system does not permit user namespaces (unshare --user --map-root-user --mount)")
        arguments = [str(NAMELESS), str(self.writable), str(self.shm_bytes), *command]
        return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT, *arguments]


@cache
def _has_namespaces() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "unshare", "--user", f"--map-user={NAMELESS}", "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except FileNotFoundError:
        return False
