"""The shape of a model: one frozen dataclass. Every other module takes its sizes from here."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer: pre-norm, rotary positions, ungated GELU MLP, tied embedding, no biases."""

    vocab_size: int = 4096
    hidden_size: int = 192
    n_layers: int = 16
    n_heads: int = 6
    mlp_size: int = 768
    context: int = 256  # the most tokens of a prompt and its answer together
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    boundary_id: int = 1  # the only special token; it comes before and after every document

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "n_layers", "n_heads", "mlp_size", "context"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:  # a bool is an int, too
                raise ValueError(f"{field} is {value!r}: it must be a whole number of at least 1")
        if self.hidden_size % (2 * self.n_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}: it must be an even multiple of n_heads ({self.n_heads})"
            )
        for field in ("norm_eps", "rope_theta"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{field} is {value!r}: it must be a number above 0")
        if type(self.boundary_id) is not int or not 0 <= self.boundary_id < self.vocab_size:
            raise ValueError(
                f"boundary_id is {self.boundary_id!r}: it must be a whole number from 0 to {self.vocab_size - 1}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads

    @property
    def n_parameters(self) -> int:
        """The number of weights. The embedding counts once, because the output shares it."""
        h = self.hidden_size
        layer = 4 * h * h + 2 * h * self.mlp_size + 2 * h
        return self.vocab_size * h + self.n_layers * layer + h

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Return the config. Raise ValueError, which names an unknown or missing key or a bad value."""
        if not isinstance(values, dict):
            raise ValueError(f"the model's config is {values!r:.40}: it must be an object")
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"unknown key {unknown[0]!r} in the model's config: the keys are {sorted(names)}")
        if missing := sorted(names - set(values)):
            raise ValueError(f"the model's config lacks the key {missing[0]!r}")
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
