"""Trained models that say together what comes next, to be learnt from beside the text itself.

Models that were trained on the same text err apart, and together say better what comes next than any of them alone;
one model can learn much of that from them (Hinton et al. 2015, "Distilling the knowledge in a neural network").
`train.teach` asks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.config import ModelConfig
from tinylm.weights import TENSORS, TOKENIZER
from train.config import ConfigError
from train.files import file_sha256
from train.model import GPT, released_model
from train.state import STATE_FILE, averaged_weights, load_state


class Teachers:
    """Models that answer together: the mean of their probabilities.

    directories: of released models, or of runs without Ray, whose averaged weights are taken. Raises ModelError when a
    released model is damaged, and ConfigError when what a run saved is, or one has another tokenizer or too short a
    context. compiled: their blocks by torch.compile, which takes a third off their time on a CPU.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        tokenizer_sha256: str,
        context: int,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        self._models = [_load(directory, tokenizer_sha256, context).to(device) for directory in directories]
        self.names = {file_sha256(_weights_file(d)): d.resolve().name for d in directories}  # by that file's sum
        if len(self.names) < len(directories):
            raise ConfigError(f"teach.models: {', '.join(map(str, directories))}: one of them is named twice")
        if compiled:
            for model in self._models:
                model.compile_blocks()

    @torch.no_grad()
    def probabilities(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> of the token after each, (B, T, vocab) float32."""
        first, *others = self._models
        total = F.softmax(first(ids).float(), dim=-1)
        for model in others:
            total += F.softmax(model(ids).float(), dim=-1)
        return total / len(self._models)


def _weights_file(directory: Path) -> Path:
    return path if (path := directory / STATE_FILE).exists() else directory / TENSORS


def _load(directory: Path, tokenizer_sha256: str, context: int) -> GPT:
    path = _weights_file(directory)
    if path.name == STATE_FILE:
        try:
            state = load_state(path)
            model = GPT(ModelConfig(**state["config"]["model"]))
            model.load_state_dict(averaged_weights(state))
            made_with = state["tokenizer_sha256"]
        except ConfigError as error:
            raise ConfigError(f"teach.models: {error}") from None
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            said = str(error).split("\n")[0]
            raise ConfigError(f"teach.models: {path} is not what a run saved: {type(error).__name__}: {said}") from None
    else:
        model = released_model(directory)
        made_with = file_sha256(directory / TOKENIZER)
    if made_with != tokenizer_sha256:
        raise ConfigError(f"teach.models: {directory} has another tokenizer than the tokens were made with")
    if model.config.context < context:
        raise ConfigError(
            f"teach.models: {directory} reads {model.config.context} tokens: too few for rows of {context}"
        )
    return model.eval().requires_grad_(False)
