"""Measure the engine's speed on one core, and compare it with the core's limits: `tinylm bench`.

It measures whole steps, with sampling and Python, in CPU seconds of their thread. `loadtest` measures serving, and
`loadtest.bench.peers` measures other engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from statistics import median
from typing import Any

import numpy as np

from tinylm.config import ModelConfig
from tinylm.engine import Engine
from tinylm.kernels.blas import run_limited
from tinylm.model import Model
from tinylm.sampling import SamplingParams

PROMPT_TOKENS = 32  # of each sequence in a decode step; at most half of the context
DECODE_STEPS = 64
ROUNDS = 5
TEXT_TOKENS = 2000
TIMED_BYTES = 16_000_000  # read between two looks at the clock, which may stand still for some microseconds


@dataclass(frozen=True)
class Decode:
    """The speed of decode steps, over DECODE_STEPS after PROMPT_TOKENS."""

    batch: int  # sequences in a step
    step_ms: float  # median
    tokens_per_s: float
    bytes_per_step: int  # the weights once, and the keys and values at the mean length
    share_of_bandwidth: float  # bytes_per_step divided by the bytes that the core can read in that time
    share_of_peak: float  # multiply-adds of the matmuls divided by the number that the core can do in that time


@dataclass(frozen=True)
class Prefill:
    """The speed of a prompt's prefill, up to the first token of the answer."""

    prompt_tokens: int
    first_token_ms: float  # median
    tokens_per_s: float


@dataclass(frozen=True)
class Report:
    arithmetic: str
    bandwidth_gb_per_s: float  # of one core, on a buffer as large as the weights
    peak_gmac_per_s: float
    decode: list[Decode]
    prefill: list[Prefill]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    model: Model, batches: Sequence[int], prompts: Sequence[int], advance: Callable[[], None] = lambda: None
) -> Report:
    """Measure decoding with each batch size and prefill with each prompt length.

    Call `advance` after each of these measurements. Raise ValueError for a batch size or a prompt length that is out of
    range.
    """
    for field, values, most in (("batches", batches, 1024), ("prompts", prompts, model.config.context - 1)):
        for value in values:
            if not 1 <= value <= most:
                raise ValueError(f"{field} has {value}: each must be 1 to {most}")
    return run_limited(1, lambda: _measure(model, batches, prompts, advance))


def _measure(model: Model, batches: Sequence[int], prompts: Sequence[int], advance: Callable[[], None]) -> Report:
    weight_bytes = model.kernels.weight_bytes(model.weights)
    bandwidth, peak = measure_bandwidth(weight_bytes), model.kernels.measure_peak()
    decode = []
    text = _own_text(model, TEXT_TOKENS + max(prompts, default=0))
    for batch in batches:
        decode.append(_decode(model, text, batch, weight_bytes, bandwidth, peak))
        advance()
    prefill = []
    for n_tokens in prompts:
        prefill.append(_prefill(model, text, n_tokens))
        advance()
    return Report(model.arithmetic, bandwidth / 1e9, peak / 1e9, decode, prefill)


def measure_bandwidth(n_bytes: int) -> float:
    """Return the most bytes per CPU second that one core reads from a buffer of `n_bytes`."""
    buffer = np.ones(n_bytes // 4, np.float32)
    n_reads = -(-TIMED_BYTES // buffer.nbytes)
    seconds: list[float] = []
    while len(seconds) < 100:
        begin = time.thread_time()
        for _ in range(n_reads):
            buffer @ buffer
        seconds.append(time.thread_time() - begin)
    return n_reads * buffer.nbytes / min(seconds)


def matmul_multiply_adds(config: ModelConfig) -> int:
    """Return how many multiply-adds the matmuls of a token need: one for each parameter, without the norms."""
    return config.n_parameters - config.hidden_size * (2 * config.n_layers + 1)


def _own_text(model: Model, n_tokens: int) -> list[int]:
    """Return `n_tokens` tokens that the model wrote. Sampling takes a different time after other text."""
    engine, seed = Engine(model, n_slots=1), 0
    tokens: list[int] = []
    while len(tokens) < n_tokens:
        sequence = engine.submit([model.config.boundary_id], SamplingParams(max_tokens=model.config.context, seed=seed))
        while engine.has_work:
            engine.step()
        tokens += [model.config.boundary_id, *sequence.tokens]
        seed += 1
    return tokens[:n_tokens]


def _decode(model: Model, text: list[int], batch: int, weight_bytes: int, bandwidth: float, peak: float) -> Decode:
    config = model.config
    prompt_tokens = min(PROMPT_TOKENS, config.context // 2)
    # One step computes all prompts. Otherwise the first sequences would end before the last begin.
    engine = Engine(_endless(model), n_slots=batch, prefill_tokens=batch * prompt_tokens)
    prompts = _prompts(text, prompt_tokens, config.vocab_size)
    step_s = median(median(_step_times(engine, prompts)) for _ in range(ROUNDS))
    length = min(prompt_tokens + DECODE_STEPS / 2, config.context)
    n_bytes = weight_bytes + int(batch * length * engine.cache_bytes / (engine.n_slots * config.context))
    multiply_adds = batch * matmul_multiply_adds(config)
    return Decode(
        batch=batch,
        step_ms=step_s * 1e3,
        tokens_per_s=batch / step_s,
        bytes_per_step=n_bytes,
        share_of_bandwidth=n_bytes / step_s / bandwidth,
        share_of_peak=multiply_adds / step_s / peak,
    )


def _endless(model: Model) -> Model:
    """Return the model with another boundary: the last token of the vocabulary, which is very rare.

    Otherwise one of hundreds of sequences would end in almost every step, and the batch would never be full.
    """
    endless = copy(model)
    endless.config = replace(model.config, boundary_id=model.config.vocab_size - 1)
    return endless


def _step_times(engine: Engine, prompts: Iterator[list[int]]) -> list[float]:
    """Return the CPU seconds of DECODE_STEPS decode steps with a full batch, without the steps of prefill."""
    times: list[float] = []
    running: list[Any] = []
    while len(times) < DECODE_STEPS:
        if missing := engine.n_slots - engine.n_running:
            for _ in range(missing):
                running.append(engine.submit(next(prompts), SamplingParams(max_tokens=DECODE_STEPS + 1)))
            engine.step()
            continue
        begin = time.thread_time()
        engine.step()
        times.append(time.thread_time() - begin)
    for sequence in running:
        engine.cancel(sequence)
    return times


def _prompts(text: list[int], n_tokens: int, vocab_size: int) -> Iterator[list[int]]:
    """Yield pieces of the text without end. Each has a different first token, so that none reuses a cached prefix."""
    for i in count():
        begin = 37 * i % (len(text) - n_tokens)
        yield [2 + i % (vocab_size - 2), *text[begin + 1 : begin + n_tokens]]


def _prefill(model: Model, text: list[int], n_tokens: int) -> Prefill:
    engine, times = Engine(model, n_slots=1), []
    for prompt in islice(_prompts(text, n_tokens, model.config.vocab_size), 4 * ROUNDS):
        engine.submit(prompt, SamplingParams(max_tokens=1))
        begin = time.thread_time()
        engine.step()
        times.append(time.thread_time() - begin)
    first_token_s = median(times)
    return Prefill(n_tokens, first_token_s * 1e3, n_tokens / first_token_s)
