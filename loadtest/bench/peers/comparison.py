"""Check, tune and measure the peers, case by case and round by round."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.bench.peers import runner
from loadtest.bench.peers.model import reference_logits
from loadtest.bench.peers.runner import Case, Measurement, Settings
from tinylm.config import ModelConfig
from tinylm.terminal.output import PlainConsole

INSTALL = "pip install -e '.[bench,peers]'"
OURS, LLAMA = "tinylm", "llama.cpp"
Rates = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Entry:
    """The module and class of a peer, the packages that it imports, and the check of its logits."""

    module: str  # of this package
    type: str
    packages: tuple[str, ...] = ()
    activation: str = "gelu"
    greatest_error: float = float("inf")
    least_correlation: float = 0.99


_LLAMA = ("llama_cpp", "gguf")
_ONNX = ("onnx", "onnxruntime")
_GENAI = (*_ONNX, "onnxruntime_genai")
_FLOAT32_ERROR = 1e-3

PEERS: dict[str, Entry] = {
    "tinylm": Entry("tinylm_engine", "TinyLM"),
    "tinylm-float32": Entry("tinylm_engine", "TinyLMFloat32", greatest_error=_FLOAT32_ERROR),
    "tinylm-numpy": Entry("tinylm_engine", "TinyLMNumPy"),
    "llama.cpp-q8_0": Entry("llama", "LlamaQ8", _LLAMA, activation="relu2"),
    "llama.cpp-q4_0": Entry("llama", "LlamaQ4", _LLAMA, activation="relu2", least_correlation=0.85),
    "onnxruntime-int8": Entry("onnx_runtime", "OnnxRuntimeInt8", _ONNX),
    "onnxruntime-float32": Entry("onnx_runtime", "OnnxRuntime", _ONNX, greatest_error=_FLOAT32_ERROR),
    "onnxruntime-genai-int8": Entry("onnx_genai", "OnnxGenAI", _GENAI),
    "openvino-int8": Entry("openvino_engine", "OpenVINO", ("openvino",)),
    "ctranslate2-int8": Entry("ctranslate2_engine", "CTranslate2", ("ctranslate2",)),
}


class PeerError(RuntimeError):
    """An error in the process of a peer."""


@dataclass
class _Findings:
    """The process of a peer that works, and what is known of it."""

    process: ProcessPoolExecutor
    version: str = ""
    check: dict[str, float] = field(default_factory=dict)  # how close its logits are to the reference
    settings: dict[Case, Settings] = field(default_factory=dict)
    measured: dict[Case, list[Measurement]] = field(default_factory=dict)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a function of `runner` in the process. Raises PeerError if it fails."""
        try:
            return self.process.submit(function, *arguments).result()
        except Exception as error:
            raise PeerError(f"{type(error).__name__}: {error}") from error


class Comparison:
    """The peers that work. A peer that fails is left out from then on."""

    def __init__(self, entries: Mapping[str, Entry], directory: Path, core: int, console: PlainConsole) -> None:
        self._entries, self._directory, self._core, self._console = entries, directory, core, console
        self._working: dict[str, _Findings] = {}
        self._left_out: dict[str, str] = {}  # why

    def run(self, cases: Sequence[Case], rounds: int) -> dict[str, Any]:
        """Return the figures of all peers. A progress bar shows the steps."""
        names = list(self._entries)
        steps = [(name, f"start {name}", partial(self._start, name)) for name in names]
        for name, case in itertools.product(names, cases):
            steps.append((name, f"tune {name}, {case.label}", partial(self._tune, name, case)))
        for i, name, case in itertools.product(range(1, rounds + 1), names, cases):
            steps.append((name, f"round {i}: {name}, {case.label}", partial(self._measure, name, case)))
        with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=self._console) as bar:
            task = bar.add_task("", total=len(steps))
            for name, text, act in steps:
                bar.update(task, description=text)
                if name not in self._left_out:
                    try:
                        act()
                    except PeerError as error:
                        self._leave_out(name, str(error))
                bar.advance(task)
        return self._result(cases)

    def close(self) -> None:
        for findings in self._working.values():
            findings.process.shutdown()

    def _start(self, name: str) -> None:
        """Start the process of a peer and check its logits."""
        entry = self._entries[name]
        for package in entry.packages:
            if importlib.util.find_spec(package) is None:
                raise PeerError(f"no package {package}: {INSTALL}")
        findings = _Findings(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        self._working[name] = findings
        findings.version = findings.call(runner.create, entry.module, entry.type, self._directory, self._core)
        findings.check = self._check(findings, entry)

    def _check(self, findings: _Findings, entry: Entry) -> dict[str, float]:
        """Return how close the logits are to the reference under every setting. Raises PeerError if they are not."""
        config = ModelConfig()
        ids = np.random.default_rng(0).integers(config.boundary_id + 1, config.vocab_size, (2, 40))
        wanted = reference_logits(self._directory, ids, entry.activation)
        error, least = 0.0, 1.0
        for settings, logits in findings.call(runner.call, "check", ids[:, :32], ids[:, 32:]):
            error = max(error, float(np.abs(logits - wanted).max()))  # NaN fails below
            if not (np.isfinite(logits).all() and error <= entry.greatest_error):
                raise PeerError(f"with {settings} its logits are off by {error:.2g}")
            correlation = float(np.corrcoef(logits.ravel(), wanted.ravel())[0, 1])
            if correlation < entry.least_correlation:
                raise PeerError(f"with {settings} its logits correlate with the reference by only {correlation:.6f}")
            least = min(least, correlation)
        return {"greatest_error": round(error, 6), "least_correlation": round(least, 6)}

    def _tune(self, name: str, case: Case) -> None:
        findings = self._working[name]
        findings.settings[case] = findings.call(runner.call, "tune", case)

    def _measure(self, name: str, case: Case) -> None:
        findings = self._working[name]
        findings.measured.setdefault(case, []).append(findings.call(runner.call, "measure", case))

    def _leave_out(self, name: str, why: str) -> None:
        if findings := self._working.pop(name, None):
            findings.process.shutdown()
        self._left_out[name] = why
        self._console.print(f"{name} is left out: {why}", style="yellow")

    def _result(self, cases: Sequence[Case]) -> dict[str, Any]:
        peers = {
            name: {
                "version": of.version,
                "check": of.check,
                "cases": {c.label: {"settings": of.settings[c], **_summarize(of.measured[c])} for c in cases},
            }
            for name, of in self._working.items()
        }
        labels = [case.label for case in cases]
        return {
            "work": {
                "model": f"{ModelConfig().n_parameters} random weights",
                "temperature": runner.TEMPERATURE,
                "top_p": runner.TOP_P,
                "prompt_tokens": runner.PROMPT_TOKENS,
                "decode_steps": runner.DECODE_STEPS,
                "prefill_tokens": runner.PREFILL_TOKENS,
            },
            "cases": labels,
            "left_out": self._left_out,
            "peers": peers,
            "ratios": _ratios(rates_of(peers), labels),
        }


def _summarize(rounds: Sequence[Measurement]) -> dict[str, Any]:
    """Return the rounds, and the medians of tokens_per_cpu_s and of cpu_ms, that of a step or of a prompt."""
    return {
        "tokens_per_cpu_s": round(median(m.tokens_per_cpu_s for m in rounds), 1),
        "cpu_ms": round(median(m.cpu_s / m.calls for m in rounds) * 1000, 4),
        "rounds": [{**asdict(m), "tokens_per_cpu_s": round(m.tokens_per_cpu_s, 1)} for m in rounds],
    }


def rates_of(peers: Mapping[str, Any]) -> Rates:
    """Return tokens per CPU second by peer and case, from the peers of a result."""
    return {
        name: {case: figures["tokens_per_cpu_s"] for case, figures in peer["cases"].items()}
        for name, peer in peers.items()
    }


def _ratios(rates: Rates, cases: Sequence[str]) -> Rates:
    """Return the rate of TinyLM over the best rate of the others, and over the best of llama.cpp, by case."""
    found: Rates = {}
    for label, prefix in ((f"{OURS} / best of the others", ""), (f"{OURS} / best of {LLAMA}", LLAMA)):
        others = [name for name in rates if name.startswith(prefix) and not name.startswith(OURS)]
        if OURS in rates and others:
            found[label] = {c: round(rates[OURS][c] / max(rates[name][c] for name in others), 2) for c in cases}
    return found
