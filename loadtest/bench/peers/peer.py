"""What every engine in the comparison must do, and the work that it gets.

This module knows no engine. The worker creates the engines and measures the time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

PROMPT_TOKENS = 32  # before decoding
DECODE_STEPS = 64  # so decoding runs from position 32 to 96
PREFILL_TOKENS = 192
TEMPERATURE, TOP_P = 0.8, 0.95
LIKELIEST = 64  # tokens of a row that samplers in Python look at first: a nucleus is rarely larger

Settings = dict[str, Any]  # JSON values by name


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of work, for a number of sequences at once."""

    kind: Literal["prefill", "decode"]
    batch: int

    @property
    def label(self) -> str:
        return f"decode {self.batch}" if self.kind == "decode" else f"prefill {PREFILL_TOKENS}"


class Peer(Protocol):
    """An engine with a loaded model and room for a batch of sequences, under one set of settings.

    Sequences never end (see `model`). Prompts are always read whole: nothing of an earlier prompt is reused.
    """

    version: str

    def __init__(self, directory: Path, batch: int, **settings: Any) -> None:
        """directory: of the model, as `tinylm.weights` reads it. The peer may put files beside it."""
        ...

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        """Return settings, the usual ones first. The comparison measures the fastest."""
        ...

    def prefill(self, prompt: np.ndarray) -> int:
        """Read one prompt (T,) from an empty cache, and return its first sampled token."""
        ...

    def start(self, prompts: np.ndarray) -> None:
        """Forget all sequences, read prompts (B, T), and sample a token for each."""
        ...

    def step(self) -> int:
        """Put the last B tokens through the model, sample B more, and return their number."""
        ...

    def logits(self, prompts: np.ndarray, following: np.ndarray) -> np.ndarray:
        """Return scores (B, vocab) after prompts (B, T), read at once, and `following` (B, n), read token by token."""
        ...

    def close(self) -> None:
        """Free what Python does not."""
        ...


class Stepwise(ABC):
    """The common part of peers whose forward pass and sampling are two calls from Python.

    Tokens and logits are arrays or tensors, as the peer prefers.
    """

    @abstractmethod
    def reset(self) -> None:
        """Forget all sequences."""

    @abstractmethod
    def forward(self, ids: Any) -> Any:
        """Read the next tokens (B, T) of each sequence, and return logits (B, vocab) after the last of them."""

    @abstractmethod
    def sample(self, logits: Any) -> Any:
        """Return tokens (B, 1) that are drawn from logits (B, vocab)."""

    def prefill(self, prompt: np.ndarray) -> int:
        self.start(prompt[None])
        return int(self._tokens[0, 0])

    def start(self, prompts: np.ndarray) -> None:
        self.reset()
        self._tokens = self.sample(self.forward(prompts))

    def step(self) -> int:
        self._tokens = self.sample(self.forward(self._tokens))
        return len(self._tokens)

    def logits(self, prompts: np.ndarray, following: np.ndarray) -> np.ndarray:
        self.reset()
        scores = self.forward(prompts)
        for column in range(following.shape[1]):
            scores = self.forward(following[:, column : column + 1])
        return np.asarray(scores, np.float32).copy()

    def close(self) -> None:  # noqa: B027  (not abstract: most peers have nothing to free)
        """Free nothing."""
