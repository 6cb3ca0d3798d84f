"""A mix of whole numbers with shares, as in `16:0.5,64:0.3,128:0.2`: lengths of answers, of prompts, of delays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mix:
    """Numbers, and the share of requests that each is for; shares are relative to their sum."""

    values: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, name: str, least: int = 1) -> Mix:
        """`64` -> always 64; `16:3,64:1` -> three times in four 16. Raises ValueError naming `name`."""
        values, shares = [], []
        for item in text.split(","):
            number, _, share = item.partition(":")
            try:
                values.append(int(number))
                shares.append(float(share) if share else 1.0)
            except ValueError:
                raise ValueError(
                    f"{name} is {text!r}: it must be a whole number, or several with shares as in 16:0.5,64:0.5"
                ) from None
            if values[-1] < least:
                raise ValueError(f"{name} has {values[-1]}: it must be at least {least}")
            if not 0 < shares[-1] < float("inf"):
                raise ValueError(f"{name} gives {values[-1]} the share {share}: it must be above 0")
        return cls(tuple(values), tuple(shares))

    def draw(self, n: int, seed: int) -> np.ndarray:
        """(n,) of the values, each as often as its share says but for the luck of the draw."""
        if len(self.values) == 1:
            return np.full(n, self.values[0])
        shares = np.array(self.shares)
        return np.random.default_rng(seed).choice(self.values, n, p=shares / shares.sum())

    def __str__(self) -> str:
        if len(self.values) == 1:
            return str(self.values[0])
        return ",".join(f"{value}:{share:g}" for value, share in zip(self.values, self.shares, strict=True))
