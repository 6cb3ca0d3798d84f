"""Choose the prompt, length and seed of each request, and the times at which an open loop sends them.

They depend only on the settings of the load, so runs with the same seed are the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.load import Load
from tinylm.system.text_files import lines_of, read_text

SHORT_PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "There was once an old bear who lived in the woods. Every morning",
    '"Where are you going?" asked the fox.',
)
PLAN = 4096  # after this number of requests, lengths and long prompts repeat with other seeds
# Long prompts are these words in random order: almost no two have a common prefix, so no cached prefix helps.
TEXT = """
    "It "Please A Every Her In Nobody On Sam The They Tom a all already and apples. back baker bark. basket beach
    bear before began behind big birds boat bread burning but by came cat dark dinner," do down early eating
    everywhere. fire fish. for found friend. full garden gate gave girl, go," gold gone. grass. green had he heard
    her high, hill him house, in it it. king kite, knew lamp leaves. left lit little lived look moon mother mouse
    night. not of old on out oven. owl. path quiet. rain red river roof. said same sea sheep shell silver small
    spring stairs stood the then there they three through tied tired to took tree two under until waited walk. was
    water. went were when who will wished with woke wooden woods
"""
WORDS = TEXT.split()


@dataclass(frozen=True, slots=True)
class Request:
    """One request, independent of the protocol."""

    prompt: str
    max_tokens: int
    seed: int


class Workload:
    """The requests of a run: `workload[n]` is the n-th."""

    def __init__(self, load: Load) -> None:
        self._seed = load.seed
        self._prompts = load.prompts or SHORT_PROMPTS
        self._lengths = load.max_tokens.draw(PLAN, load.seed).tolist()
        if load.prompt_words is not None and not load.prompts:
            words = load.prompt_words.draw(PLAN, load.seed + 1)
            self._prompts = tuple(_prompt(n, load.seed + i) for i, n in enumerate(words.tolist()))

    def __getitem__(self, turn: int) -> Request:
        prompt = self._prompts[turn % len(self._prompts)]
        return Request(prompt, self._lengths[turn % PLAN], self._seed * 1_000_003 + turn)


def arrivals(load: Load) -> np.ndarray:
    """Return when to send each request of an open loop, in ascending seconds from the start of the measured time.

    Negative times belong to the warm-up. `load.requests` sets the number of measured requests, otherwise
    `load.duration_s` limits them. Pauses have the mean 1 / rate. Those of "poisson" are independent and exponentially
    distributed, as with many independent users; those of "constant" are equal. Raises ValueError for a closed loop.
    """
    rate = load.rate_per_s
    if rate is None:
        raise ValueError("rate_per_s is None: only an open loop has arrivals")
    rng = np.random.default_rng(load.seed)
    n_warmup = int(np.ceil(load.warmup_s * rate * 2)) + 20
    n_measured = load.requests or int(np.ceil(load.duration_s * rate + 8 * np.sqrt(load.duration_s * rate))) + 20
    if load.arrivals == "poisson":
        warmup = -np.cumsum(rng.exponential(1 / rate, n_warmup))[::-1]
        measured = np.cumsum(rng.exponential(1 / rate, n_measured))
    else:
        warmup = -np.arange(n_warmup, 0, -1) / rate
        measured = np.arange(n_measured) / rate
    warmup = warmup[warmup >= -load.warmup_s]
    if load.requests is None:
        measured = measured[measured < load.duration_s]
    return np.concatenate([warmup, measured])


def _prompt(n_words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n_words))


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file, one a line: plain text, or in a .jsonl JSON strings or objects with a `prompt`.

    Raises ValueError that names file and line.
    """
    lines = lines_of(read_text(path))
    if path.suffix == ".jsonl":
        prompts = [_json_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} contains no prompt: it must have one a line")
    return tuple(prompts)


def _json_prompt(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'{path}, line {number} has no text: it must be {{"prompt": "..."}} or a string')
    return prompt
