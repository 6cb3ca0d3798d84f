"""Describe this machine, and the origin of a measured result: processor, versions, date and git revision."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000" is two cores, "max 100000" is no limit
PACKAGES = ("tinylm", "ray", "numpy", "grpcio")


def describe() -> dict[str, Any]:
    """Return the origin for a result file. A "+" after the revision means uncommitted changes."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    changed = "+" if _output("git", "status", "--porcelain") else ""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": versions,
        "revision": _output("git", "rev-parse", "--short", "HEAD") + changed,
    }


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, and the quota of its container if that is less.

    macOS has no affinity: there it may use all.
    """
    allowed = len(allowed_cores())
    quota = _quota()
    return allowed if math.isinf(quota) else max(1, min(allowed, math.ceil(quota)))


def allowed_cores() -> list[int]:
    """Return the numbers of the cores that the affinity of this process allows, or of all cores without affinity."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _quota() -> float:
    """Return how many cores' time the control group of this process may use, infinity without a limit (cgroup v2)."""
    with suppress(OSError, ValueError):
        quota_us, period_us = CPU_QUOTA.read_text(encoding="utf-8").split()
        return float(quota_us) / float(period_us)  # "max" is no number
    return math.inf


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor, or its architecture if the system does not tell the name.

    Linux names processors with x86 in `cpuinfo`. macOS has no such file, and names the processor with `sysctl`.
    """
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def _output(*command: str) -> str:
    """Return the output of a command, or an empty text if it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
