"""What an explanation consists of. `forms` encodes it. Shapes: T tokens of the prompt with the boundary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinylm.explain.engine_answer import Difference


@dataclass(frozen=True, slots=True)
class Token:
    """A token for people and programs."""

    id: int
    text: str  # bytes that are no text become \\xNN; the boundary has its name
    bytes: list[int]  # of the token in UTF-8; none for the boundary


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that can come next."""

    token: Token
    probability: float


@dataclass(frozen=True, slots=True)
class Lens:
    """What the model would answer after each layer (nostalgebraist 2020, "logit lens")."""

    answers: list[Token]  # (T,): the most likely next token after each token, by the whole model
    ranks: np.ndarray  # (layers, T) int: the rank of that answer after each layer; 1 is the most likely token
    position: int  # the token that `top` is about
    top: list[list[Candidate]]  # (layers, top): the most likely next tokens after each layer


@dataclass(frozen=True, slots=True)
class StageReport:
    """One setting of a request, and what it removed."""

    name: str
    value: float | None
    n_kept: int  # tokens that can still be chosen
    n_removed: int
    removed_probability: float  # of all removed tokens together, before this stage
    removed: list[int]  # the ids of the most likely of them


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of the next token, and its probabilities after each setting."""

    stages: list[StageReport]
    tokens: list[Token]  # (N,): the most likely by the model, those that `removed` lists, and the chosen ones
    logits: np.ndarray  # (N,) float32
    probabilities: np.ndarray  # (N, stages) float64
    greedy: Token  # what temperature 0 takes with these penalties and biases
    chosen: Token  # what the seed takes; the greedy token if there is no seed
    difference: Difference | None  # between the reference and an engine's answer, if there is one


@dataclass(frozen=True, slots=True)
class RawScores:
    """The scores of all tokens before all settings."""

    tokens: list[Token]  # those with the highest scores, the highest first
    logits: np.ndarray  # (vocab,) float32


@dataclass(frozen=True, slots=True)
class RoundedInput:
    """The input of a matmul as 8-bit integers: values * scales[:, None]."""

    values: np.ndarray  # (T, in) int8
    scales: np.ndarray  # (T,) float32
    input_error: np.ndarray  # (T,): the length of the rounding error as a share of the float32 input's length
    output_error: np.ndarray  # (T,): the same for the result of the matmul
    input: np.ndarray | None = None  # (in,) float32: of the token, if one was asked for


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What the keys and values of a prompt take in an engine's cache."""

    arithmetic: str  # the kernels and the precision, which determine the format
    slots: int
    slot_positions: int  # tokens that a slot can hold
    slot_bytes: int
    used_positions: int  # the prompt with its boundary
    used_bytes: int


def as_shades(weights: np.ndarray) -> np.ndarray:
    """Return attention weights from 0 to 1 as uint8 from 0 to 255, for pictures."""
    return np.rint(weights * 255).astype(np.uint8)
