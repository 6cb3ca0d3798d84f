"""What trained models say of each training token, written once, to be learnt beside the text: distillation.

    python -m train.teach [--config configs/train.yaml] [KEY=VALUE ...]

The models of `teach.models` read the documents of `teach.collections`, and what they say together goes beside the
shards' tokens: `<workdir>/taught/`, 128 bytes a token. A document that is longer than the context is read in windows
that overlap by half. How much of the loss it is, is for `run.taught` to say. It takes a forward pass of each model;
started again, it keeps what they have said of the same shards, and goes on. What others have said stays until somebody
removes it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.config import INDEX_FILE, ConfigError, TrainConfig
from train.files import file_sha256
from train.soft_targets import N_SOFT, N_TOP, SOFT_DTYPES, read_index, read_soft_targets, soft_paths
from train.stage import load_tokens, progress, run_stage
from train.teachers import Teachers
from train.windows import windows


class Window(NamedTuple):
    """What is read at once of a shard, tokens[start:stop], and from which token on the answers are kept."""

    start: int
    kept: int
    stop: int


class Batch(NamedTuple):
    """Windows of a shard that are read together; the name decides what is drawn of the answers."""

    shard: Path
    windows: list[Window]
    name: str


Ask = Callable[[Iterable[Batch]], Iterable[list[np.ndarray]]]  # what is kept of each, (B, context, N_SOFT) each


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
    settings, directory, context = config.teach, config.taught_dir, config.model_config_.context
    if settings is None:
        print("taught: nothing, since the config has no section `teach`")
        return
    data = load_tokens(config, taught=False)
    shards = [path for name in settings.collections for path in data.to_train_on(name).paths]
    asked = _Asked(config, data.tokenizer_sha256)
    head = {"taught_by": asked.names, "context": context, "seed": config.seed, "kept": [N_TOP, N_SOFT]}
    said = _said_before(directory, head)
    directory.mkdir(parents=True, exist_ok=True)
    with progress("tokens") as bar, asked.in_processes() as ask:
        for shard in shards:
            tokens = np.load(shard, mmap_mode="r")
            task = bar.add_task(shard.stem, total=len(tokens))
            if _is_said(directory, shard):
                bar.update(task, completed=len(tokens))
                continue
            said.pop(shard.name, None)
            _write_index(directory, head, said)  # nothing stands in it that is being written
            for n in _write(directory, shard, _batches(shard, tokens, config, data.boundary_id), ask):
                bar.advance(task, n)
            said[shard.name] = file_sha256(shard)
            _write_index(directory, head, said)
    keep = {directory / INDEX_FILE, *(path for shard in shards for path in soft_paths(directory, shard))}
    for path in set(directory.iterdir()) - keep:
        path.unlink()
    _write_index(directory, head, {shard.name: said[shard.name] for shard in shards})
    print(f"{', '.join(settings.collections)}: taught by {', '.join(asked.names.values())}")


def _said_before(directory: Path, head: dict[str, Any]) -> dict[str, str]:
    """The sha256 of the shards of which these models have spoken already, by name; of a damaged index, none.

    Raises ConfigError where others have, or otherwise.
    """
    if not (directory / INDEX_FILE).exists():
        return {}
    try:
        index = read_index(directory)
    except ConfigError:
        return {}
    for key, value in head.items():
        if (before := index[key]) != value and (key != "taught_by" or before.keys() != value.keys()):
            said = ", ".join(before.values()) if key == "taught_by" else before
            raise ConfigError(
                f"{directory} was made with another {key.replace('_', ' ')}, {said}: "
                f"remove it to ask anew, or give another workdir"
            )
    return index["shards"]


def _is_said(directory: Path, shard: Path) -> bool:
    try:
        read_soft_targets(directory, shard)
    except (ConfigError, FileNotFoundError):
        return False
    return True


def _write_index(directory: Path, head: dict[str, Any], shards: dict[str, str]) -> None:
    new = directory / f"{INDEX_FILE}.partial"
    new.write_text(json.dumps({**head, "shards": shards}, indent=2) + "\n", encoding="utf-8")
    new.replace(directory / INDEX_FILE)


def _batches(shard: Path, tokens: np.ndarray, config: TrainConfig, boundary_id: int) -> list[Batch]:
    """How a shard is read. Every token is kept once, and in order, also a document's last, after which one ends."""
    begins = np.flatnonzero(tokens == boundary_id).tolist()
    lengths = np.diff([*begins, len(tokens)]).tolist()
    found = [
        Window(begin + start, begin + first - 1, begin + end)
        for begin, length in zip(begins, lengths, strict=True)
        for start, end, first in windows(length + 1, config.model_config_.context)
    ]
    size = config.run.micro_rows
    return [
        Batch(shard, found[first : first + size], f"{config.seed} {shard.name} {first // size}")
        for first in range(0, len(found), size)
    ]


def _write(directory: Path, shard: Path, batches: list[Batch], ask: Ask) -> Iterator[int]:
    """Write what is said of a shard; yields how many of its tokens have been read since it last did."""
    n_tokens = batches[-1].windows[-1].stop
    paths = soft_paths(directory, shard)
    partials = [path.with_suffix(".partial") for path in paths]
    with partials[0].open("wb") as ids, partials[1].open("wb") as probabilities:
        for file, dtype in zip((ids, probabilities), SOFT_DTYPES, strict=True):
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (n_tokens, N_SOFT)}
            np.lib.format.write_array_header_1_0(file, header)
        for batch, said in zip(batches, ask(batches), strict=True):
            for file, values in zip((ids, probabilities), said, strict=True):
                for row, (start, kept, stop) in enumerate(batch.windows):
                    file.write(values[row, kept - start : stop - start].tobytes())
            yield sum(window.stop - window.kept for window in batch.windows)
    for written, path in zip(partials, paths, strict=True):
        written.replace(path)


class _Asked:
    """The teachers, in this process, or on a CPU in as many as the run has workers."""

    def __init__(self, config: TrainConfig, tokenizer_sha256: str) -> None:
        assert config.teach is not None
        run, self._context = config.run, config.model_config_.context
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._teachers = Teachers(config.teach.models, tokenizer_sha256, self._context, self._device, run.compile)
        self._config, self._tokenizer_sha256 = config, tokenizer_sha256
        self.names = self._teachers.names

    def say(self, batch: Batch) -> list[np.ndarray]:
        """What is kept of the distributions after the tokens of a batch."""
        tokens = np.load(batch.shard, mmap_mode="r")
        ids = torch.zeros(len(batch.windows), self._context, dtype=torch.int64)  # after a window's end nothing is kept
        for row, (start, _, stop) in enumerate(batch.windows):
            ids[row, : stop - start] = torch.from_numpy(tokens[start:stop].astype(np.int64))
        seed = int.from_bytes(hashlib.sha256(batch.name.encode()).digest()[:7])
        generator = torch.Generator(self._device).manual_seed(seed)
        bfloat16 = self._config.run.bfloat16 or self._device == "cuda"
        with torch.autocast(self._device, torch.bfloat16, enabled=bfloat16):
            found = sparse(self._teachers.probabilities(ids.to(self._device)), generator)
        return [kept.cpu().numpy().astype(dtype) for kept, dtype in zip(found, SOFT_DTYPES, strict=True)]

    @contextmanager
    def in_processes(self) -> Iterator[Ask]:
        """A function that asks of many batches, in their order."""
        run = self._config.run
        if self._device == "cuda" or run.workers == 1:
            torch.set_num_threads(run.threads)
            try:
                yield partial(map, self.say)
            except torch.OutOfMemoryError:
                raise ConfigError(f"run.micro_rows is {run.micro_rows}: too many for the GPU's memory") from None
            return
        of_each = (self._config.model_dump(mode="json"), self._tokenizer_sha256)
        pool = ProcessPoolExecutor(run.workers, multiprocessing.get_context("spawn"), _begin_process, of_each)
        try:
            yield partial(pool.map, _say)
        except BrokenProcessPool:
            raise ConfigError(f"run.workers is {run.workers}: one of them died, for want of memory perhaps") from None
        finally:
            pool.shutdown(cancel_futures=True)


_asked: _Asked | None = None  # of a process that does nothing else


def _begin_process(settings: dict[str, Any], tokenizer_sha256: str) -> None:
    global _asked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = TrainConfig.model_validate(settings)
    torch.set_num_threads(config.run.threads)
    _asked = _Asked(config, tokenizer_sha256)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _say(batch: Batch) -> list[np.ndarray]:
    assert _asked is not None
    return _asked.say(batch)


if __name__ == "__main__":
    run_stage(__doc__, teach)
