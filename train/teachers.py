"""What released models say of rows, as a target to learn from beside the text itself: distillation (Hinton et al. 2015).

Models that were trained on the same text err apart, and together say better what comes next than any of them alone;
one model can learn much of that from them. How much of its loss it is, and of which rows, `train.loop` is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.weights import TENSORS, TOKENIZER
from train.config import ConfigError
from train.model import GPT, released_model
from train.stage import file_sha256


class Teachers:
    """Released models that answer together: the mean of their probabilities. There may be none.

    Raises ModelError when one is damaged, and ConfigError when it has another tokenizer or a shorter context.
    """

    def __init__(
        self, directories: Sequence[Path], tokenizer_sha256: str, context: int, device: torch.device | str = "cpu"
    ) -> None:
        self._models = [_load(directory, tokenizer_sha256, context).to(device) for directory in directories]
        self.names = {file_sha256(directory / TENSORS): directory.name for directory in directories}  # by weights

    @torch.no_grad()
    def probabilities(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> of the token after each, (B, T, vocab) float32."""
        first, *others = self._models
        total = F.softmax(first(ids).float(), dim=-1)
        for model in others:
            total += F.softmax(model(ids).float(), dim=-1)
        return total / len(self._models)


def _load(directory: Path, tokenizer_sha256: str, context: int) -> GPT:
    model = released_model(directory)
    if file_sha256(directory / TOKENIZER) != tokenizer_sha256:
        raise ConfigError(f"run.teachers: the tokens were not made with {directory / TOKENIZER}")
    if model.config.context < context:
        raise ConfigError(
            f"run.teachers: {directory} reads {model.config.context} tokens: too few for rows of {context}"
        )
    return model.eval().requires_grad_(False)
