"""One engine in a process of its own, on one core, that lives as long as the comparison and does as it is told.

`Worker` is the parent's side, `serve` the child's. Engines are imported in the child only, so that none shares thread
pools or memory with another, and a missing package or a crash costs one peer.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.peers.peer import DECODE_STEPS, PREFILL_TOKENS, PROMPT_TOKENS, Case, Peer, Settings
from tinylm.config import ModelConfig

TRIALS, TRIAL_CPU_S = 3, 0.1  # of each setting that is not
HOPELESS = 0.75  # of the best so far
VISIT_CPU_S = 0.3  # of a case in a round, at least


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a peer is found, what it needs, and how closely its logits must follow the reference."""

    module: str  # of this package
    type: str
    packages: tuple[str, ...] = ()  # by the names that one imports
    activation: str = "gelu"
    greatest_error: float = float("inf")
    least_correlation: float = 0.99

    def missing(self) -> list[str]:
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


_LLAMA = ("llama_cpp", "gguf")
_ORT = ("onnx", "onnxruntime")
_FLOAT32_ERROR = 1e-3

PEERS: dict[str, Entry] = {
    "tinylm": Entry("ours", "TinyLM"),
    "tinylm-float32": Entry("ours", "TinyLMFloat32", greatest_error=_FLOAT32_ERROR),
    "tinylm-numpy": Entry("ours", "TinyLMNumPy"),
    "llama.cpp-q8_0": Entry("llama", "LlamaQ8", _LLAMA, activation="relu2"),
    "llama.cpp-q4_0": Entry("llama", "LlamaQ4", _LLAMA, activation="relu2", least_correlation=0.85),
    "onnxruntime-int8": Entry("ort", "OnnxRuntimeInt8", _ORT),
    "onnxruntime-float32": Entry("ort", "OnnxRuntime", _ORT, greatest_error=_FLOAT32_ERROR),
    "pytorch-int8": Entry("pytorch", "PyTorchInt8", ("torch",)),
    "pytorch-float32": Entry("pytorch", "PyTorch", ("torch",), greatest_error=_FLOAT32_ERROR),
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """tokens: made by decode steps, or read in prefill; calls: steps or prompts that they came from."""

    tokens: int
    calls: int
    cpu_s: float
    wall_s: float

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.tokens / self.cpu_s


class PeerError(RuntimeError):
    """What went wrong in a peer's process."""


class Worker:
    """A peer's process: started by the constructor, asked by the methods, which raise PeerError when it fails."""

    def __init__(self, entry: Entry, directory: Path, core: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, entry, directory, core), daemon=True)
        self._process.start()
        other.close()
        try:
            self.version: str = self._answer()
        except PeerError:
            self._process.join()
            raise

    def check(self, prompts: np.ndarray, following: np.ndarray) -> list[tuple[Settings, np.ndarray]]:
        """Logits by every setting: see `Peer.logits`."""
        return self._ask("check", prompts, following)

    def tune(self, case: Case) -> Settings:
        """Try all settings on a case; the fastest is what `measure` takes from then on."""
        return self._ask("tune", case)

    def measure(self, case: Case) -> Measurement:
        return self._ask("measure", case)

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _ask(self, *command: Any) -> Any:
        return self._answer(command)

    def _answer(self, command: tuple[Any, ...] | None = None) -> Any:
        try:
            if command is not None:
                self._pipe.send(command)
            good, value = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise PeerError(f"its process ended with status {self._process.exitcode}") from None
        if not good:
            raise PeerError(value)
        return value


def serve(pipe: Connection, entry: Entry, directory: Path, core: int) -> None:
    """Answer each command with (True, value) or (False, what went wrong), until the other end is closed."""
    os.sched_setaffinity(0, {core})
    try:
        bench = Bench(getattr(importlib.import_module(f"loadtest.peers.{entry.module}"), entry.type), directory)
        pipe.send((True, bench.version))
        while True:
            name, *arguments = pipe.recv()
            pipe.send((True, getattr(bench, name)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send((False, f"{type(error).__name__}: {error}"))


class Bench:
    """Holds the clock: a peer's settings, instances and timings, in the peer's process."""

    def __init__(self, peer: type[Peer], directory: Path) -> None:
        self.version = peer.version
        self._peer, self._directory = peer, directory
        self._chosen: dict[Case, Peer] = {}
        self._config = ModelConfig.load(directory / "config.json")
        self._rng = np.random.default_rng(0)

    def check(self, prompts: np.ndarray, following: np.ndarray) -> list[tuple[Settings, np.ndarray]]:
        answers = []
        for settings in self._peer.settings_to_try(Case("decode", len(prompts))):
            peer = self._peer(self._directory, len(prompts), **settings)
            answers.append((settings, peer.logits(prompts, following)))
            peer.close()
        return answers

    def tune(self, case: Case) -> Settings:
        """The trials go round the settings, so that a slow moment of the machine does not fall on one alone."""
        candidates = self._peer.settings_to_try(case)
        peers = [self._peer(self._directory, case.batch, **settings) for settings in candidates]
        best = [0.0] * len(peers)
        left = list(range(len(peers)))
        for _ in range(TRIALS):
            for i in left:
                best[i] = max(best[i], self._time(peers[i], case, TRIAL_CPU_S).tokens_per_cpu_s)
            left = [i for i in left if best[i] > HOPELESS * max(best)]
            if len(left) == 1:
                break
        fastest = best.index(max(best))
        self._chosen[case] = peers[fastest]
        for i, peer in enumerate(peers):
            if i != fastest:
                peer.close()
        return candidates[fastest]

    def measure(self, case: Case) -> Measurement:
        return self._time(self._chosen[case], case, VISIT_CPU_S)

    def _time(self, peer: Peer, case: Case, least_cpu_s: float) -> Measurement:
        """Repeat the case, prompts being new each time, until it has taken so much CPU time of all threads."""
        if case.kind == "prefill":  # once untimed: caches, and what libraries put off until they are used
            peer.prefill(self._prompts(1, PREFILL_TOKENS)[0])
        tokens = calls = 0
        cpu_s = wall_s = 0.0
        while cpu_s < least_cpu_s:
            if case.kind == "prefill":
                prompt = self._prompts(1, PREFILL_TOKENS)[0]
                wall, cpu = time.perf_counter(), time.process_time()
                peer.prefill(prompt)
                n_calls, made = 1, PREFILL_TOKENS
            else:
                peer.start(self._prompts(case.batch, PROMPT_TOKENS))
                wall, cpu = time.perf_counter(), time.process_time()
                made = sum(peer.step() for _ in range(DECODE_STEPS))
                n_calls = DECODE_STEPS
                if made != case.batch * DECODE_STEPS:
                    raise RuntimeError(f"{made} tokens in {n_calls} steps of {case.batch}: a sequence ended early")
            cpu_s += time.process_time() - cpu
            wall_s += time.perf_counter() - wall
            tokens, calls = tokens + made, calls + n_calls
        return Measurement(tokens, calls, cpu_s, wall_s)

    def _prompts(self, batch: int, length: int) -> np.ndarray:
        """(batch, length) random ids, the boundary left out."""
        ids = self._rng.integers(self._config.vocab_size - 1, size=(batch, length))
        return ids + (ids >= self._config.boundary_id)
