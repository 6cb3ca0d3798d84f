"""What trained models say of each training token, written once, to be learnt beside the text: distillation.

    python -m train.teach [--config configs/train.yaml] [KEY=VALUE ...]

The models of `teach.models` read the documents of `teach.collections`, and what they say together goes beside the
shards' tokens: `<workdir>/taught/`, 128 bytes a token. A document that is longer than the context is read in windows
that overlap by half. How much of the loss it is, is for `run.taught` to say. It takes a forward pass of each model;
started again, it keeps what the same models have said of the same shards, and goes on.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.config import INDEX_FILE, ConfigError, TrainConfig
from train.data import OF_TOKENS, read_tokens
from train.files import file_sha256
from train.soft_targets import N_SOFT, N_TOP, SOFT_DTYPES, read_index, soft_paths
from train.stage import progress, require, run_stage
from train.teachers import Teachers
from train.windows import windows

BATCH_ROWS = 16
Ask = Callable[[Iterable[np.ndarray], Iterable[int]], Iterable[list[np.ndarray]]]


def sparse(probabilities: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(..., vocab) -> ids (..., N_SOFT) int64 and probabilities (..., N_SOFT) float32: unbiased, the top ones exact.

    The rest is drawn at even distances from one random place, so that a token is drawn about as often as is right. One
    that is drawn twice stands there twice.
    """
    top = probabilities.topk(min(N_TOP, probabilities.shape[-1]), dim=-1)
    rest = probabilities.scatter(-1, top.indices, 0.0).cumsum(-1)
    mass = rest[..., -1:]
    n_drawn = N_SOFT - top.values.shape[-1]
    random = torch.rand(mass.shape, generator=generator, device=mass.device)
    places = (torch.arange(n_drawn, device=mass.device) + random) / n_drawn * mass
    drawn = torch.searchsorted(rest, places).clamp(max=probabilities.shape[-1] - 1)
    ids = torch.cat([top.indices, drawn], dim=-1)
    return ids, torch.cat([top.values, (mass / n_drawn).expand_as(places)], dim=-1)


def teach(config: TrainConfig) -> None:
    """Run the stage, where the config has a section `teach`, or go on with it."""
    settings = config.teach
    if settings is None:
        print("taught: nothing, since the config has no section `teach`")
        return
    require(config.index_path, "train.encode")
    if config.tell:
        require(config.told_dir / INDEX_FILE, "train.tell")
    index, _ = read_tokens(config.tokens_dir)
    asked = _Asked(config.resolved(), index["tokenizer_sha256"], "cuda" if torch.cuda.is_available() else "cpu")
    shards = dict(_shards(config))
    if missing := sorted(set(settings.collections) - set(shards)):
        raise ConfigError(f"teach.collections: there are no tokens of {missing[0]!r} to train on")
    context = config.model_config_.context
    head = {key: index[key] for key in OF_TOKENS}
    head |= {"taught_by": asked.names, "context": context, "seed": config.seed}
    said = _said_before(config.taught_dir, head)
    config.taught_dir.mkdir(parents=True, exist_ok=True)
    _write_index(config.taught_dir, {**head, "shards": said})
    with progress("tokens") as bar, asked.together() as ask:
        for paths in shards.values():
            for path in paths:
                sha256 = file_sha256(path)
                n_tokens = len(np.load(path, mmap_mode="r"))
                task = bar.add_task(path.stem, total=n_tokens)
                if said.get(path.name) == sha256:
                    bar.update(task, completed=n_tokens)
                    continue
                for n in _write(config.taught_dir, path, index["boundary_id"], context, ask):
                    bar.advance(task, n)
                said[path.name] = sha256
                _write_index(config.taught_dir, {**head, "shards": said})
    print(f"{', '.join(shards)}: taught by {', '.join(asked.names.values())}")


def _shards(config: TrainConfig) -> Iterator[tuple[str, list[Path]]]:
    """The shards to train on of the collections that are taught, where there are any."""
    assert config.teach is not None
    for directory in (config.tokens_dir, *([config.told_dir] if config.tell else [])):
        entries = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["collections"]
        for name in config.teach.collections:
            if "train" in entries.get(name, {}):
                yield name, [directory / shard for shard in entries[name]["train"]["shards"]]


def _said_before(directory: Path, head: dict) -> dict[str, str]:
    """The sha256 of the shards of which the same models have spoken already, by name."""
    if not (directory / INDEX_FILE).exists():
        return {}
    index = read_index(directory)
    return index.pop("shards") if {**index, "shards": 0} == {**head, "shards": 0} else {}


def _write_index(directory: Path, index: dict) -> None:
    new = directory / f"{INDEX_FILE}.partial"
    new.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    new.replace(directory / INDEX_FILE)


def _write(directory: Path, shard: Path, boundary_id: int, context: int, ask: Ask) -> Iterator[int]:
    """Write what is said of a shard; yields how many of its tokens have been read since it last did."""
    tokens = np.load(shard, mmap_mode="r")
    begins = np.flatnonzero(tokens == boundary_id).tolist()
    lengths = np.diff([*begins, len(tokens)]).tolist()
    places = [
        (begin + start, begin + first - 1, begin + end)  # the target after a document's end, too, is to be learnt
        for begin, length in zip(begins, lengths, strict=True)
        for start, end, first in windows(length + 1, context)
    ]
    batches = [places[first : first + BATCH_ROWS] for first in range(0, len(places), BATCH_ROWS)]
    rows = (_rows(tokens, batch, boundary_id, context) for batch in batches)
    paths = soft_paths(directory, shard)
    partials = [path.with_suffix(".partial") for path in paths]
    arrays = [
        np.lib.format.open_memmap(path, "w+", dtype, (len(tokens), N_SOFT))
        for path, dtype in zip(partials, SOFT_DTYPES, strict=True)
    ]
    for batch, said in zip(batches, ask(rows, range(len(batches))), strict=True):
        for array, values in zip(arrays, said, strict=True):
            for row, (start, kept, stop) in enumerate(batch):
                array[kept:stop] = values[row, kept - start : stop - start]
        yield sum(stop - kept for _, kept, stop in batch)
    for array, written, path in zip(arrays, partials, paths, strict=True):
        array.flush()
        written.replace(path)


def _rows(tokens: np.ndarray, batch: list[tuple[int, int, int]], boundary_id: int, context: int) -> np.ndarray:
    """(B, context) int64: each window's tokens; after its end come boundaries, of which nothing is kept."""
    ids = np.full((len(batch), context), boundary_id, np.int64)
    for row, (start, _, stop) in enumerate(batch):
        ids[row, : stop - start] = tokens[start:stop]
    return ids


class _Asked:
    """The teachers, in this process, or on a CPU in as many as the run has workers."""

    def __init__(self, config: TrainConfig, tokenizer_sha256: str, device: str) -> None:
        assert config.teach is not None
        run, context = config.run, config.model_config_.context
        self._teachers = Teachers(config.teach.models, tokenizer_sha256, context, device, run.compile)
        self._config, self._tokenizer_sha256, self._device = config, tokenizer_sha256, device
        self.names = self._teachers.names

    def say(self, ids: np.ndarray, number: int) -> list[np.ndarray]:
        """Of a batch's (B, T) ids what is kept of the distributions after them; its number decides what is drawn."""
        generator = torch.Generator(self._device).manual_seed(self._config.seed * 1_000_003 + number)
        with torch.autocast(self._device, torch.bfloat16, enabled=self._config.run.bfloat16):
            probabilities = self._teachers.probabilities(torch.from_numpy(ids).to(self._device))
        found = (kept.cpu().numpy() for kept in sparse(probabilities, generator))
        return [kept.astype(dtype) for kept, dtype in zip(found, SOFT_DTYPES, strict=True)]

    @contextmanager
    def together(self) -> Iterator[Ask]:
        """A function that asks of many batches, in their order."""
        workers = 1 if self._device == "cuda" else self._config.run.workers
        if workers == 1:
            yield partial(map, self.say)
            return
        settings = self._config.model_dump(mode="json")
        pool = ProcessPoolExecutor(
            workers, get_context("spawn"), _ask_in_this_process, (settings, self._tokenizer_sha256)
        )
        try:
            yield partial(pool.map, _say)
        except BrokenProcessPool:
            raise ConfigError("a worker of train.teach died: give run.workers fewer if memory was short") from None
        finally:
            pool.shutdown(cancel_futures=True)


_asked: _Asked | None = None  # of a process that does nothing else


def _ask_in_this_process(settings: dict, tokenizer_sha256: str) -> None:
    global _asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started this one
    config = TrainConfig.model_validate(settings)
    torch.set_num_threads(config.run.threads)
    _asked = _Asked(config, tokenizer_sha256, "cpu")


def _say(ids: np.ndarray, number: int) -> list[np.ndarray]:
    assert _asked is not None
    return _asked.say(ids, number)


if __name__ == "__main__":
    run_stage(__doc__, teach)
