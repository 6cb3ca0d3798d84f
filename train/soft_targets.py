"""What other models say of each training token, in files beside the token shards: soft targets (Hinton et al. 2015).

Of a distribution over the vocabulary, a few tokens are kept: the likeliest with their probabilities, and some of the
others, drawn by theirs, which stand for all the rest. Learning from these is learning from the whole on average, and
from the likeliest alone it would not be (Anshumann et al. 2025, "Sparse logit sampling"). `train.teach` writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.config import INDEX_FILE, ConfigError
from train.files import file_sha256

N_TOP = 24
N_DRAWN = 8
N_SOFT = N_TOP + N_DRAWN  # tokens that are kept of each distribution: 128 bytes
SOFT_DTYPES = (np.uint16, np.float16)  # of ids and probabilities


class SoftTargets(NamedTuple):
    """Of each of some tokens, what may come after it: ids and probabilities, (..., N_SOFT) each, which sum to 1."""

    ids: np.ndarray
    probabilities: np.ndarray


def soft_paths(directory: Path, shard: Path) -> tuple[Path, Path]:
    """Where what is said of a token shard lies: ids and probabilities, (N, N_SOFT) each."""
    return directory / f"{shard.stem}.ids.npy", directory / f"{shard.stem}.probabilities.npy"


def read_index(directory: Path) -> dict[str, Any]:
    """What `train.teach` says of its files: who said it, and the sha256 of each token shard of which it is."""
    try:
        return json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{directory} is damaged, make it again: {error}") from None


def read_soft_targets(directory: Path, shard: Path) -> SoftTargets:
    """Of one token shard, memory-mapped; raises ConfigError when there is none, or it is of other tokens."""
    if read_index(directory)["shards"].get(shard.name) != file_sha256(shard):
        raise ConfigError(f"{directory} holds nothing of {shard} as it is: run `python -m train.teach` again")
    return SoftTargets(*(np.load(path, mmap_mode="r") for path in soft_paths(directory, shard)))
