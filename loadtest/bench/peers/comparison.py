"""Check, tune and measure the peers, case by case and round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.bench.peers import peer as work
from loadtest.bench.peers.figures import rates_of, ratios, summarize
from loadtest.bench.peers.model import float32_tensors, reference_logits
from loadtest.bench.peers.peer import Case, Settings
from loadtest.bench.peers.worker import Entry, Measurement, PeerError, Worker
from tinylm.config import ModelConfig
from tinylm.terminal.output import PlainConsole

INSTALL = "pip install -e '.[peers]'"


@dataclass
class _Findings:
    """What is known of one peer that works."""

    worker: Worker
    check: dict[str, float]  # how close its logits are to the reference
    settings: dict[Case, Settings] = field(default_factory=dict)
    measured: dict[Case, list[Measurement]] = field(default_factory=dict)


class Comparison:
    """The peers that work. A peer that fails is left out from then on."""

    def __init__(self, entries: Mapping[str, Entry], directory: Path, core: int, console: PlainConsole) -> None:
        self._entries, self._directory, self._core, self._console = entries, directory, core, console
        self._working: dict[str, _Findings] = {}
        self._left_out: dict[str, str] = {}  # why

    def run(self, cases: Sequence[Case], rounds: int) -> dict[str, Any]:
        """Return the figures of all peers. A progress bar shows the steps."""
        names = list(self._entries)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("", total=len(names) * (1 + len(cases) * (1 + rounds)))

            def step(text: str, act: Callable[..., None], name: str, *case: Case) -> None:
                bar.update(task, description=text)
                try:
                    act(name, *case)
                except PeerError as error:
                    self._leave_out(name, str(error))
                bar.advance(task)

            for name in names:
                step(f"start {name}", self._start, name)
            for name in names:
                for case in cases:
                    step(f"tune {name}, {case.label}", self._tune, name, case)
            for i in range(1, rounds + 1):
                for name in names:
                    for case in cases:
                        step(f"round {i}: {name}, {case.label}", self._measure, name, case)
        return self._result(cases)

    def close(self) -> None:
        for findings in self._working.values():
            findings.worker.close()

    def _start(self, name: str) -> None:
        """Start the process of a peer and check its logits."""
        entry = self._entries[name]
        if missing := entry.missing():
            raise PeerError(f"no package {missing[0]}: {INSTALL}")
        worker = Worker(entry, self._directory, self._core)
        self._working[name] = _Findings(worker, check=self._checked(worker, entry))

    def _checked(self, worker: Worker, entry: Entry) -> dict[str, float]:
        """Return how close the logits are under every setting. Raises PeerError if they are too far off."""
        config, tensors = float32_tensors(self._directory)
        ids = np.random.default_rng(0).integers(config.boundary_id + 1, config.vocab_size, (2, 40))
        wanted = np.array([reference_logits(config, tensors, row, entry.activation) for row in ids])
        error, correlation = 0.0, 1.0
        for settings, logits in worker.check(ids[:, :32], ids[:, 32:]):
            error = max(error, float(np.abs(logits - wanted).max()))  # NaN fails below
            correlation = min(correlation, float(np.corrcoef(logits.ravel(), wanted.ravel())[0, 1]))
            if not (np.isfinite(logits).all() and error <= entry.greatest_error):
                raise PeerError(f"with {settings} its logits are off by {error:.2g}")
            if correlation < entry.least_correlation:
                raise PeerError(f"with {settings} its logits correlate with the reference by only {correlation:.3f}")
        return {"greatest_error": round(error, 6), "least_correlation": round(correlation, 6)}

    def _tune(self, name: str, case: Case) -> None:
        if findings := self._working.get(name):
            findings.settings[case] = findings.worker.tune(case)

    def _measure(self, name: str, case: Case) -> None:
        if findings := self._working.get(name):
            findings.measured.setdefault(case, []).append(findings.worker.measure(case))

    def _leave_out(self, name: str, why: str) -> None:
        self._working.pop(name, None)
        self._left_out[name] = why
        self._console.print(f"{name} is left out: {why}", style="yellow")

    def _result(self, cases: Sequence[Case]) -> dict[str, Any]:
        result: dict[str, Any] = {
            "work": {
                "model": f"{ModelConfig().n_parameters} random weights",
                "temperature": work.TEMPERATURE,
                "top_p": work.TOP_P,
                "prompt_tokens": work.PROMPT_TOKENS,
                "decode_steps": work.DECODE_STEPS,
                "prefill_tokens": work.PREFILL_TOKENS,
            },
            "cases": [case.label for case in cases],
            "left_out": self._left_out,
            "peers": {
                name: {
                    "version": of.worker.version,
                    "check": of.check,
                    "cases": {c.label: {"settings": of.settings[c], **summarize(of.measured[c])} for c in cases},
                }
                for name, of in self._working.items()
            },
        }
        result["ratios"] = ratios(rates_of(result), result["cases"])
        return result
