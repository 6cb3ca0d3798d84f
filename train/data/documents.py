"""The documents in token shards, memory-mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np


class Documents:
    """All documents of one collection and split. Each begins with the boundary token."""

    def __init__(self, paths: list[Path], boundary_id: int) -> None:
        self._shards = [np.load(path, mmap_mode="r") for path in paths]
        shard, start, length = [], [], []
        for number, tokens in enumerate(self._shards):
            starts = np.flatnonzero(tokens == boundary_id)
            shard.append(np.full(len(starts), number))
            start.append(starts)
            length.append(np.diff(np.append(starts, len(tokens))))
        self._shard, self._start, self.lengths = (np.concatenate(parts) for parts in (shard, start, length))

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, i: int) -> np.ndarray:
        """Return the i-th document, (lengths[i],) uint16."""
        start = self._start[i]
        return self._shards[self._shard[i]][start : start + self.lengths[i]]
