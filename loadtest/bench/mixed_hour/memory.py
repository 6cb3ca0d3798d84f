"""Read the memory, open files and threads of a service's processes, and how they grow. Linux only.

The memory of a process is its anonymous memory (Anonymous of /proc/PID/smaps_rollup): what it has allocated, without
pages of files, such as programs, libraries and the weights that replicas share. Its private memory also has the pages
of files that no other process uses at the moment, so it changes when other processes start and end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

PROC = Path("/proc")
SETTLED_MIN = 5  # a process that has started fills its caches; its growth counts after this number of minutes
LIVED_MIN = 10  # the growth of a process counts if it lived at least this long
# Part of a command line -> the role of the process. The first match counts.
ROLES = {
    "raylet/raylet ": "raylet",  # its command line contains those of other processes
    "ServeReplica": "replica",
    "ray::HAProxyManager": "HAProxy manager",
    "ray::ProxyActor": "proxy actor",
    "ray::ServeController": "controller",
    "ray::DashboardAgent": "dashboard agent",
    "dashboard/agent.py": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime environment agent",
    "runtime_env/agent": "runtime environment agent",
    "tinylm.explain.worker": "explaining process",
    "RateLimiter": "counter of key limits",
    "gcs_server": "GCS",
    "haproxy": "HAProxy",
    "dashboard/dashboard.py": "dashboard",
    "ray-dashboard": "dashboard",
    "multiprocessing": "dashboard, helpers",
    "log_monitor": "log monitor",
    "autoscaler": "monitor",
    "tinylm.cli": "tinylm serve",
    "serve run": "serve run",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A process at a moment."""

    minute: int  # of the run
    role: str
    pid: int
    anonymous_kib: int
    private_kib: int  # what no other process uses, also of files
    open_files: int
    threads: int
    cpu_s: float  # that it has used since its start


def samples(minute: int, environment: Mapping[str, str]) -> list[Sample]:
    """Return a sample of each process that has these variables in its environment."""
    found = []
    for pid, command in processes(environment):
        try:
            found.append(_sample(minute, pid, command))
        except OSError:
            continue  # it has ended
    return found


def processes(environment: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """Yield id and command line of each process that has these variables in its environment, or such an ancestor.

    A process that sets its own title, as those of Ray do, can overwrite its environment.
    """
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    found: dict[int, tuple[bool, int, str]] = {}  # process -> whether it has the variables, its parent, its command
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                has_variables = wanted <= set((entry / "environ").read_bytes().split(b"\0"))
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found[int(entry.name)] = has_variables, int(_stat(int(entry.name))[1]), command
            except OSError:  # it has ended, or belongs to another user
                continue
    for pid, (_, _, command) in found.items():
        ancestor = pid
        while ancestor in found and not found[ancestor][0]:
            ancestor = found[ancestor][1]
        if ancestor in found and command:  # the command is empty for a zombie
            yield pid, command


def role_of(command: str) -> str:
    """Return the role of a process with this command line, or the name of its program."""
    named = (role for part, role in ROLES.items() if part in command)
    return next(named, Path(command.split()[0]).name)


def started_at(pid: int) -> int:
    """Return when a process started, in ticks of the clock since the machine's start."""
    return int(_stat(pid)[19])


def _sample(minute: int, pid: int, command: str) -> Sample:
    kib = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in _read(pid, "smaps_rollup").splitlines()[1:])
    }
    stat = _stat(pid)
    return Sample(
        minute, role_of(command), pid, kib["Anonymous"], kib["Private_Clean"] + kib["Private_Dirty"],
        len(list((PROC / str(pid) / "fd").iterdir())), int(stat[17]), (int(stat[11]) + int(stat[12])) / 100,
    )  # fmt: skip


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat that come after the name, which can have spaces."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _read(pid: int, name: str) -> str:
    return (PROC / str(pid) / name).read_text(encoding="utf-8", errors="replace")


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line through points (x, y): the median slope of all pairs.

    The estimator of Theil and Sen (Sen 1968, doi:10.1080/01621459.1968.10480934). Up to 29 % of the points may be
    anything. Raise ValueError for fewer than two points with different x.
    """
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1 :] if a[0] != b[0]]
    if not slopes:
        raise ValueError("slope needs two points with different x")
    return median(slopes)


def summary(taken: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Return the figures of each role, those with most memory first.

    Values per process are means over the processes of the role in that minute. `growth_kib_per_minute` is that of the
    process that grew most, of those that lived LIVED_MIN minutes, None if there was none, and `late_growth_...` the
    same in the second half of their lives. `role_growth_kib_per_minute` is that of the mean process: it also shows
    growth where each process is soon replaced.
    """
    figures: dict[str, dict[str, Any]] = {}
    last = max((sample.minute for sample in taken), default=0)
    for role in {sample.role for sample in taken}:
        own = [sample for sample in taken if sample.role == role]
        minutes = {minute: [s for s in own if s.minute == minute] for minute in sorted({s.minute for s in own})}
        settled = {minute: found for minute, found in minutes.items() if minute >= min(SETTLED_MIN, last)}
        lives = [[s for s in own if s.pid == pid] for pid in {s.pid for s in own}]
        long = [life for life in lives if life[-1].minute - life[0].minute >= LIVED_MIN]
        growths = [_growth(life, life[0].minute + SETTLED_MIN) for life in long]
        late_growths = [_growth(life, (life[0].minute + life[-1].minute) / 2) for life in long]
        means = [(float(minute), mean(s.anonymous_kib for s in found)) for minute, found in settled.items()]
        figures[role] = {
            "processes_at_once": max(len(found) for found in minutes.values()),
            "processes": len(lives),
            "processes_of_10_minutes": len(long),
            "settled": _per_process(settled or minutes, first=True),
            "end": _per_process(minutes, first=False),
            "growth_kib_per_minute": round(max(growths), 1) if growths else None,
            "late_growth_kib_per_minute": round(max(late_growths), 1) if late_growths else None,
            "role_growth_kib_per_minute": round(slope(means), 1) if len(means) > 1 else None,
            "cpu_s": round(sum(life[-1].cpu_s for life in lives), 1),
        }
    return dict(sorted(figures.items(), key=lambda item: -item[1]["end"]["mib"]))


def _growth(life: Sequence[Sample], minute: float) -> float:
    """Return the growth of a process from this minute on, in KiB per minute."""
    return slope([(s.minute, s.anonymous_kib) for s in life if s.minute >= minute])


def _per_process(minutes: Mapping[int, Sequence[Sample]], first: bool) -> dict[str, float]:
    minute = (min if first else max)(minutes)
    found = minutes[minute]
    return {
        "minute": minute,
        "mib": round(mean(s.anonymous_kib for s in found) / 1024, 1),
        "open_files": round(mean(s.open_files for s in found), 1),
        "threads": round(mean(s.threads for s in found), 1),
    }
