"""A run's weights averaged with those of released models that it went on from ("model soups", Wortsman et al. 2022).

Models of which one came of the other lie in one valley of the loss, where the mean of their weights may have the best
of both; between models that were trained apart there is none. The bits per byte at export tell what came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinylm.config import ModelConfig
from tinylm.weights import TENSORS, TOKENIZER, as_float32, load_model
from train.config import ConfigError
from train.data import TokenData
from train.files import file_sha256
from train.restore import read_record

KEY = "export.average_with"


def averaged_with(
    tensors: dict[str, np.ndarray], directories: Sequence[Path], shape: ModelConfig, data: TokenData
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The mean of `tensors` and each model's, all in equal parts, float32 by name; and the models' names by sha256.

    Raises ModelError when a model is damaged, and ConfigError when one has another tokenizer, another shape, no record
    of its run, or was trained on other text: what is held out from one must be from all.
    """
    total = dict(tensors)
    names = {}
    for directory in directories:
        theirs, stored = load_model(directory)
        for what, same in (
            ("is a model of another shape than the config's", theirs == shape),
            ("has another tokenizer than the run", file_sha256(directory / TOKENIZER) == data.tokenizer_sha256),
            ("was trained on other text", read_record(directory, KEY).text_sha256 == data.text_sha256),
        ):
            if not same:
                raise ConfigError(f"{KEY}: {directory} {what}")
        total = {name: tensor + as_float32(stored[name]) for name, tensor in total.items()}
        names[file_sha256(directory / TENSORS)] = directory.resolve().name
    return {name: tensor / np.float32(1 + len(directories)) for name, tensor in total.items()}, names
