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

from train.config import INDEX_FILE, ConfigError, Teach
from train.files import file_sha256

N_TOP = 24
N_DRAWN = 8
N_SOFT = N_TOP + N_DRAWN  # tokens that are kept of each distribution: 128 bytes
SOFT_DTYPES = (np.uint16, np.float16)  # of ids and probabilities
AGAIN = "run `python -m train.teach` again"


class SoftTargets(NamedTuple):
    """Of each of some tokens, what may come after it: ids and probabilities, (..., N_SOFT) each.

    Those of a token sum to 1, but for rounding, and to 0 where nothing is said.
    """

    ids: np.ndarray
    probabilities: np.ndarray


def soft_paths(directory: Path, shard: Path) -> tuple[Path, Path]:
    """Where what is said of a token shard lies: ids and probabilities, (N, N_SOFT) each."""
    return directory / f"{shard.stem}.ids.npy", directory / f"{shard.stem}.probabilities.npy"


def read_index(directory: Path) -> dict[str, Any]:
    """What `train.teach` says of its files: who was asked and how, and the sha256 of each token shard they are of."""
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        return {key: index[key] for key in ("taught_by", "context", "seed", "kept", "shards")}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{directory} is damaged: {AGAIN}: {type(error).__name__}: {error}") from None


def check_taught(settings: Teach, context: int, directory: Path) -> None:
    """Raise ConfigError when what is said there was said by others, or of another context.

    The models need not be there any more, so that they are known by their directories' names.
    """
    index = read_index(directory)
    for key, value, said in (
        (
            "teach.models",
            sorted(model.resolve().name for model in settings.models),
            sorted(index["taught_by"].values()),
        ),
        ("model.context", context, index["context"]),
    ):
        if value != said:
            raise ConfigError(f"{key} is {value}, but {directory} was made with {said}: {AGAIN}")


def read_soft_targets(directory: Path, shard: Path) -> SoftTargets:
    """Of one token shard, memory-mapped; raises ConfigError when there are none, or of other tokens, or damaged."""
    if read_index(directory)["shards"].get(shard.name) != file_sha256(shard):
        raise ConfigError(f"{directory} holds nothing of {shard} as it is: {AGAIN}")
    try:
        soft = SoftTargets(*(np.load(path, mmap_mode="r") for path in soft_paths(directory, shard)))
    except (EOFError, OSError, ValueError) as error:
        raise ConfigError(f"{directory} is damaged: {AGAIN}: {error}") from None
    shape = (len(np.load(shard, mmap_mode="r")), N_SOFT)
    if any(array.shape != shape for array in soft):
        raise ConfigError(f"{directory} is damaged: {AGAIN}: of {shard.name} it holds {soft.ids.shape}, not {shape}")
    return soft
