"""The settings of one run, and their checks. `workload` turns them into requests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.client import checked_api_key

OPEN_LOOP_CONNECTIONS = 16


@dataclass(frozen=True)
class Mix:
    """Whole numbers with relative shares, as in `16:0.5,64:0.3,128:0.2`: lengths of answers or prompts, delays."""

    values: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, name: str, least: int = 1) -> Mix:
        """Read `64` (always 64) or `16:3,64:1` (16 in three of four cases). Raises ValueError that names `name`."""
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
        """Return (n,) random values with these shares."""
        if len(self.values) == 1:
            return np.full(n, self.values[0])
        shares = np.array(self.shares)
        return np.random.default_rng(seed).choice(self.values, n, p=shares / shares.sum())

    def __str__(self) -> str:
        if len(self.values) == 1:
            return str(self.values[0])
        return ",".join(f"{value}:{share:g}" for value, share in zip(self.values, self.shares, strict=True))


@dataclass(frozen=True)
class Load:
    """One run. Exactly one of `concurrency` (closed loop) and `rate_per_s` (open loop) is set."""

    server: str  # HOST:PORT (gRPC), http://HOST:PORT (OpenAI's completions), engine:DIRECTORY (no server)
    max_tokens: Mix
    concurrency: int | None = None  # clients; each sends its next request after its last answer
    rate_per_s: float | None = None  # requests sent per second, without waiting for answers
    arrivals: str = "poisson"  # or "constant"
    stream: bool = False
    ignore_eos: bool = False  # every answer gets all its tokens, unless the context ends first
    duration_s: float = 60.0  # measured, after the warm-up; `requests` replaces it
    requests: int | None = None  # stop after this number of measured requests
    warmup_s: float = 5.0  # before the measured time
    prompts: tuple[str, ...] = ()  # empty: built-in prompts
    prompt_words: Mix | None = None  # lengths of built-in prompts; None: four short ones
    connections: int | None = None  # None: one per client, or OPEN_LOOP_CONNECTIONS
    timeout_s: float = 60.0  # a call that takes longer counts as DEADLINE_EXCEEDED
    max_in_flight: int = 4096  # open loop: requests beyond this number wait, and their waiting counts
    seed: int = 0
    priority: bool = True  # schedule the load generator before other processes, where that is permitted
    api_key: str | None = dataclasses.field(default=None, repr=False)
    ca: bytes | None = dataclasses.field(default=None, repr=False)  # PEM certificates; None: no TLS

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_key", checked_api_key("api_key", self.api_key))
        if (self.concurrency is None) == (self.rate_per_s is None):
            raise ValueError("a load has either a concurrency (closed loop) or a rate (open loop)")
        if self.arrivals not in ("poisson", "constant"):
            raise ValueError(f"arrivals is {self.arrivals!r}: it must be poisson or constant")
        for name, least in (
            ("concurrency", 1),
            ("duration_s", 0.1),
            ("requests", 1),
            ("warmup_s", 0),
            ("connections", 1),
            ("timeout_s", 0.001),
            ("max_in_flight", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{name} is {value}: it must be a finite number of at least {least}")
        if self.rate_per_s is not None and not 0 < self.rate_per_s <= 1e6:
            raise ValueError(f"rate is {self.rate_per_s:g}: it must be above 0 and at most 1,000,000 a second")

    @property
    def n_connections(self) -> int:
        return self.connections or self.concurrency or OPEN_LOOP_CONNECTIONS

    @property
    def protocol(self) -> str:
        """Return "grpc", "openai" or "engine", by the form of `server`."""
        if self.server.startswith(("http://", "https://")):
            return "openai"
        return "engine" if self.server.startswith("engine:") else "grpc"

    @property
    def comes_first(self) -> bool:
        """Return whether to schedule the load generator before other processes. Never if it contains the engine."""
        return self.priority and self.protocol != "engine"

    @property
    def name(self) -> str:
        """Return "16 clients" or "200/s"."""
        if self.concurrency is not None:
            return f"{self.concurrency} client{'s' if self.concurrency > 1 else ''}"
        return f"{self.rate_per_s:g}/s"

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for a result file: without secrets, and with the number of prompts only."""
        values = dataclasses.asdict(self)
        values |= {"max_tokens": str(self.max_tokens), "prompt_words": str(self.prompt_words or "") or None}
        values |= {"prompts": len(self.prompts) or "built in", "connections": self.n_connections}
        values |= {"api_key": self.api_key is not None, "ca": self.ca is not None}
        values["protocol"] = self.protocol
        return values
