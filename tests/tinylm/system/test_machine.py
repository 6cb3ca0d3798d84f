"""How many cores a process may use in a container."""

import os
from pathlib import Path

import pytest

from tinylm.system import machine


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 64), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 64), ("", 64)],
)
def test_the_quota_of_a_container_limits_the_cores(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    assert machine.usable_cores() == 64
    machine.CPU_QUOTA.write_text(f"{quota}\n")
    assert machine.usable_cores() == cores
