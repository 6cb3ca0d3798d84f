"""The released model that fine-tuning starts from: its weights, its tokenizer and its name."""

from __future__ import annotations

from pathlib import Path

from tinylm.weights import TENSORS, TOKENIZER
from train.config import ConfigError, TrainConfig
from train.core.model import GPT, released_model
from train.data.tokens import TokenData
from train.files import file_sha256


def load_start(directory: Path, config: TrainConfig, data: TokenData) -> tuple[GPT, str]:
    """Return the released model, and its name with the sum of its weights.

    Raises ModelError when the directory holds no whole model, and ConfigError when its shape or its tokenizer differs.
    """
    model = released_model(directory)
    if model.config != config.shape:
        raise ConfigError(f"start_from: {directory} has another shape than the config: set model to {model.config}")
    if file_sha256(directory / TOKENIZER) != data.tokenizer_sha256:
        raise ConfigError(
            f"start_from: the tokens were not made with the tokenizer of {directory}: "
            f"run `python -m train.tokenizer` and `python -m train.encode` again"
        )
    return model, f"{directory.resolve().name} (sha256 {file_sha256(directory / TENSORS)[:12]})"
