"""The sums by which the stages compare files."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def matching_files(pattern: str) -> list[Path]:
    """Return the paths that a pattern matches, sorted. What exists under a name with brackets is no pattern."""
    path = Path(pattern)
    if path.exists():
        return [path]
    existing = next((parent for parent in path.parents if parent.exists()), Path())
    rest = str(path.relative_to(existing))
    return sorted(Path(found) for found in glob.glob(str(Path(glob.escape(str(existing)), rest)), recursive=True))  # noqa: PTH207
