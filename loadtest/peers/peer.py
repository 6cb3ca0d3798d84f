"""What every engine in the comparison must do, and the work that they are given.

Knows none of the engines; the worker makes them and holds the clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

PROMPT_TOKENS = 32  # before a decode
DECODE_STEPS = 64  # so that decoding runs from position 32 to 96
PREFILL_TOKENS = 192
TEMPERATURE, TOP_P = 0.8, 0.95

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
    """An engine that has loaded the model and has room for a batch of sequences, under one set of settings.

    Sequences never end (see `loadtest.peers.model`), and a prompt is always read whole: nothing of an earlier one is
    used again.
    """

    version: str

    def __init__(self, directory: Path, batch: int, **settings: Any) -> None:
        """directory: of the model, as `tinylm.weights` reads it; files made from it may be put beside it."""
        ...

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        """Of these the fastest is measured; the first is the usual one."""
        ...

    def prefill(self, prompt: np.ndarray) -> int:
        """Read one prompt (T,) from nothing; its first token, sampled."""
        ...

    def start(self, prompts: np.ndarray) -> None:
        """Forget all sequences, read these prompts (B, T) and sample a token for each."""
        ...

    def step(self) -> int:
        """Put the B last tokens through the model and sample B more; how many tokens that made."""
        ...

    def logits(self, prompts: np.ndarray, following: np.ndarray) -> np.ndarray:
        """(B, vocab) scores after prompts (B, T) read at once and `following` (B, n) token by token."""
        ...

    def close(self) -> None:
        """Give back what Python would not."""
        ...


class Stepwise(ABC):
    """The part of a peer that is the same wherever forward pass and sampling are two calls from Python.

    Tokens and logits are arrays or tensors, as the peer likes.
    """

    @abstractmethod
    def reset(self) -> None:
        """Forget all sequences."""

    @abstractmethod
    def forward(self, ids: Any) -> Any:
        """The next tokens (B, T) of each sequence -> logits (B, vocab) after the last of them."""

    @abstractmethod
    def sample(self, logits: Any) -> Any:
        """Logits (B, vocab) -> tokens (B, 1) drawn from them."""

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
        return np.array(scores, np.float32)

    def close(self) -> None:  # noqa: B027  (not abstract: most have nothing to give back)
        """Nothing to give back."""
