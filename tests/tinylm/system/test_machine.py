"""How many cores a process may use, and the name of the processor, also where the system does not tell."""

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


def test_a_system_without_affinity_allows_all_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    assert machine.allowed_cores() == list(range(os.cpu_count() or 1))
    assert machine.usable_cores() == os.cpu_count()


def test_a_processor_without_a_name_is_described_by_its_architecture(tmp_path: Path) -> None:
    """The file of Linux on ARM has no model name. macOS has no such file."""
    cpuinfo = tmp_path / "cpuinfo"
    unnamed = machine.processor(cpuinfo)
    assert unnamed
    cpuinfo.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n")
    assert machine.processor(cpuinfo) == unnamed
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some processor\n")
    assert machine.processor(cpuinfo) == "Some processor"
