"""TinyLM's own engine, as a server runs it: `Engine.step` with submitted prompts and all bookkeeping."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path

import numpy as np

from loadtest.bench.peers.runner import DECODE_STEPS, PROMPT_TOKENS, TEMPERATURE, TOP_P, Case, Settings
from tinylm.engine import Engine, Request
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.sampling import SamplingParams
from tinylm.weights import load_model


@cache
def _model(directory: Path, kernels: str, precision: str) -> Model:
    return Model(*load_model(directory), kernels, precision)


class TinyLM:
    version = importlib.metadata.version("tinylm")

    def __init__(self, directory: Path, batch: int, kernels: str, precision: str) -> None:
        self._model = _model(directory, kernels, precision)
        self._engine = Engine(self._model, n_slots=batch, prefill_tokens=max(64, batch * PROMPT_TOKENS))
        self._requests: list[Request] = []
        self._seed = 0

    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [{"kernels": "numba", "precision": "int8"}]

    def start(self, prompts: np.ndarray) -> None:
        """Read all prompts in one or two steps, so that no request is more than a token ahead."""
        for request in self._requests:
            self._engine.cancel(request)
        self._requests = [self._submit(prompt) for prompt in prompts.tolist()]
        while any(not request.tokens for request in self._requests):
            self._engine.step()

    def decode(self, steps: int) -> int:
        return sum(len(self._engine.step()) for _ in range(steps))

    def logits(self, prompts: np.ndarray, following: np.ndarray) -> np.ndarray:
        batch, length = prompts.shape
        runner = ModelRunner(self._model, batch, batch * length, batch)
        last = np.arange(1, batch + 1) * length - 1
        scores = runner.forward(prompts.reshape(-1), [Chunk(i, 0, length) for i in range(batch)], last)
        for column in range(following.shape[1]):
            chunks = [Chunk(i, length + column, 1) for i in range(batch)]
            scores = runner.forward(following[:, column], chunks, np.arange(batch))
        return scores.copy()

    def close(self) -> None:
        pass

    def _submit(self, prompt: list[int]) -> Request:
        self._seed += 1
        params = SamplingParams(max_tokens=DECODE_STEPS + 2, temperature=TEMPERATURE, top_p=TOP_P, seed=self._seed)
        return self._engine.submit(prompt, params)


class TinyLMFloat32(TinyLM):
    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [{"kernels": "numba", "precision": "float32"}]


class TinyLMNumPy(TinyLM):
    @classmethod
    def settings_to_try(cls, case: Case) -> list[Settings]:
        return [{"kernels": "numpy", "precision": precision} for precision in ("float32", "int8")]
