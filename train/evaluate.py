"""Bits per byte of an exported model on held-out text, by collection, computed by TinyLM's own engine.

    python -m train.evaluate --model models/stories-8m --data FILE.parquet [MORE.parquet ...] [--json]

Any Parquet file with a `text` column will do; a `collection` column groups it. A document longer than the context is
read in windows that overlap by half: beyond its first half context, every token has at least that much before it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from tinylm.llm import load
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.tokenizer import Tokenizer
from tinylm.weights import ModelError
from train.config import ConfigError
from train.stage import progress

WINDOWS_A_BATCH = 8


@dataclass
class Score:
    """What a collection's documents cost to write down by the model's probabilities."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    bits: float = 0.0

    def summary(self) -> dict:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bits_per_byte": round(self.bits / self.bytes, 5) if self.bytes else None,
        }


def windows(n_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first) of each window of a document: ids[start:end] go in, targets ids[first:end + 1] are scored.

    Together the windows score every token but the boundary at 0 once.
    """
    start, first = 0, 1
    while first < n_tokens:
        end = min(start + context, n_tokens - 1)
        yield start, end, first
        first = end + 1
        start += context // 2


def make_runner(model: Model) -> ModelRunner:
    """Room for a batch of windows, each of whose tokens is scored."""
    size = WINDOWS_A_BATCH * model.config.context
    return ModelRunner(model, WINDOWS_A_BATCH, size, size)


def score_document(
    runner: ModelRunner, tokenizer: Tokenizer, text: str, advance: Callable[[int], None] = lambda tokens: None
) -> Score:
    """Score of one document, the boundary before it given, by a runner that `make_runner` made."""
    ids = np.array(tokenizer.encode_document(text))
    score = Score(documents=1, tokens=len(ids) - 1, bytes=len(text.encode()))
    spans = list(windows(len(ids), runner.model.config.context))
    for i in range(0, len(spans), WINDOWS_A_BATCH):
        batch = spans[i : i + WINDOWS_A_BATCH]
        chunks = [Chunk(slot, 0, end - start) for slot, (start, end, _) in enumerate(batch)]
        rows, targets, offset = [], [], 0
        for start, end, first in batch:
            rows.append(np.arange(first - 1 - start, end - start) + offset)
            targets.append(ids[first : end + 1])
            offset += end - start
        fed = np.concatenate([ids[start:end] for start, end, _ in batch])
        logits = runner.forward(fed, chunks, np.concatenate(rows)).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        target = np.concatenate(targets)
        nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(target)), target]
        score.bits += float(nats.sum()) / np.log(2)
        advance(len(target))
    return score


def evaluate(
    model: Model, tokenizer: Tokenizer, documents: list[tuple[str, str]], title: str = "evaluating"
) -> dict[str, Score]:
    """Scores by collection of (collection, text) pairs, behind a progress bar."""
    scores: dict[str, Score] = {}
    runner = make_runner(model)
    # One BLAS thread: a second one waits by spinning, and next to any other work that is many times slower.
    with progress("bytes") as bar, threadpool_limits(1, user_api="blas"):
        task = bar.add_task(title, total=sum(len(text) for _, text in documents))
        for collection, text in documents:
            one = score_document(runner, tokenizer, text)
            total = scores.setdefault(collection, Score())
            total.documents += one.documents
            total.tokens += one.tokens
            total.bytes += one.bytes
            total.bits += one.bits
            bar.advance(task, len(text))
    return scores


def read_documents(paths: list[Path], max_bytes: int | None = None) -> list[tuple[str, str]]:
    """(collection, text) pairs of Parquet files, up to `max_bytes` of each collection; raises ConfigError by name."""
    documents = []
    taken: dict[str, int] = {}
    for path in paths:
        try:
            names = pq.read_schema(path).names
            if "text" not in names:
                raise ConfigError(f"{path} has no column 'text', only {names}")
            columns = [name for name in ("text", "collection") if name in names]
            table = pq.read_table(path, columns=columns).to_pylist()
        except FileNotFoundError:
            raise ConfigError(f"no such file: {path}") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path} is not a readable Parquet file: {error}") from None
        for row in table:
            given, text = row.get("collection"), row["text"] or ""
            collection = path.stem if given is None else str(given)
            if not isinstance(text, str):
                raise ConfigError(f"{path}: column 'text' holds {type(text).__name__}, not text")
            size = len(text.encode())
            if text and (
                max_bytes is None or taken.get(collection, 0) + size <= max_bytes or not taken.get(collection)
            ):
                taken[collection] = taken.get(collection, 0) + size
                documents.append((collection, text))
    if not documents:
        raise ConfigError(f"no text in {', '.join(map(str, paths))}")
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/stories-8m"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE.parquet")
    parser.add_argument("--max-bytes", type=int, help="of each collection, the first documents of so much text")
    parser.add_argument("--kernels", default="auto", help="numba, numpy or auto (the default)")
    parser.add_argument("--precision", default="auto", help="of activations and KV cache: int8, float32 or auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    try:
        documents = read_documents(arguments.data, arguments.max_bytes)
        tokenizer, model = load(arguments.model, arguments.kernels, arguments.precision)
    except (ConfigError, ModelError, ValueError) as error:
        sys.exit(f"error: {error}")
    scores = evaluate(model, tokenizer, documents)
    if arguments.json:
        collections = {name: score.summary() for name, score in scores.items()}
        how = {"model": str(arguments.model), "weights": model.weight_type, "arithmetic": model.arithmetic}
        print(json.dumps({**how, "collections": collections}, indent=2))
        return
    table = Table("collection", "documents", "tokens", "bytes", "bits per byte")
    for name, score in scores.items():
        summary = score.summary()
        numbers = [f"{summary[key]:,}" for key in ("documents", "tokens", "bytes")]
        table.add_row(name, *numbers, f"{summary['bits_per_byte']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
