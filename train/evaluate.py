"""Measure an exported model's bits per byte on held-out text, by collection, with TinyLM's own engine.

    python -m train.evaluate --model models/stories-8m --data FILE.parquet [MORE.parquet ...] [--json]

A Parquet file needs a column `text`. The optional column `collection` groups the scores, and `source` (such as a book's
name) tells the interval which documents belong together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from threadpoolctl import threadpool_limits

from tinylm.llm import load
from tinylm.model import Chunk, Model, ModelRunner
from tinylm.system.text_files import BYTE_ORDER_MARK
from tinylm.terminal.output import PlainConsole, one_line_errors
from tinylm.tokenizer import Tokenizer
from tinylm.weights import ModelError
from train.config import ConfigError
from train.release.intervals import ratio_interval
from train.stage import progress

WINDOWS_A_BATCH = 8
STRETCH = 10_000  # characters of a long document that are drawn together


class Document(NamedTuple):
    """A text to score, or a stretch of one."""

    collection: str
    source: str  # such as a book
    text: str


class Score(NamedTuple):
    """The code length of a document under the model's probabilities."""

    tokens: int
    bytes: int
    bits: float
    source: str = ""


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Return a collection's counts, bits per byte and 95 % interval, for JSON."""
    bits, sizes = [score.bits for score in scores], [score.bytes for score in scores]
    sources = [score.source for score in scores]
    return {
        "documents": len(scores),
        "sources": len(set(sources)),
        "tokens": sum(score.tokens for score in scores),
        "bytes": sum(sizes),
        "bits_per_byte": per_byte(scores),
        "interval_95": [round(bound, 5) for bound in ratio_interval(bits, sizes, sources)],
    }


def per_byte(scores: Sequence[Score]) -> float:
    """Return the bits per byte of all these documents together, to five places."""
    return round(sum(score.bits for score in scores) / sum(score.bytes for score in scores), 5)


def windows(n_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, first) of each window: ids[start:end] go in, and the targets ids[first:end + 1] count.

    The windows overlap by half. Each token but the first is a target once. Beyond the first half context, every target
    has at least half a context before it.
    """
    start, first = 0, 1
    while first < n_tokens:
        end = min(start + context, n_tokens - 1)
        yield start, end, first
        first = end + 1
        start += context // 2


def make_runner(model: Model) -> ModelRunner:
    """Return a runner with room for a batch of windows."""
    size = WINDOWS_A_BATCH * model.config.context
    return ModelRunner(model, WINDOWS_A_BATCH, size, size)


def score_document(runner: ModelRunner, tokenizer: Tokenizer, text: str, source: str = "") -> Score:
    """Return the score of one document. The model sees the boundary token before it."""
    ids = np.array(tokenizer.encode_document(text))
    bits = 0.0
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
        bits += float(nats.sum()) / np.log(2)
    return Score(len(ids) - 1, len(text.encode()), bits, source)


def evaluate(
    model: Model, tokenizer: Tokenizer, documents: Sequence[Document], title: str = "evaluating"
) -> dict[str, list[Score]]:
    """Return the scores of documents by collection, in their order. Shows a progress bar."""
    scores: dict[str, list[Score]] = {}
    runner = make_runner(model)
    # A second BLAS thread waits by spinning, which is many times slower beside other work.
    with progress("bytes") as bar, threadpool_limits(1, user_api="blas"):
        task = bar.add_task(title, total=sum(len(document.text) for document in documents))
        for collection, source, text in documents:
            scores.setdefault(collection, []).append(score_document(runner, tokenizer, text, source))
            bar.advance(task, len(text))
    return scores


def read_documents(paths: Sequence[Path], max_bytes: int | None = None) -> list[Document]:
    """Read Parquet files, up to `max_bytes` of each collection (see `spread`).

    Without a column `collection`, each file is one. Without `source`, each document is its own. Raises ConfigError that
    names the file.
    """
    collections: dict[str, list[Document]] = {}
    for path in paths:
        try:
            names = pq.read_schema(path).names
            if "text" not in names:
                raise ConfigError(f"{path} has no column 'text', only {names}")
            columns = [name for name in ("text", "collection", "source") if name in names]
            table = pq.read_table(path, columns=columns).to_pylist()
        except FileNotFoundError:
            raise ConfigError(f"no such file: {path}") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path} is not a readable Parquet file: {error}") from None
        for number, row in enumerate(table):
            collection, source = row.get("collection"), row.get("source")
            collection = path.stem if collection is None else str(collection)
            source = f"{path}#{number}" if source in (None, "") else str(source)
            text = row["text"] or ""
            if not isinstance(text, str):
                raise ConfigError(f"{path}: column 'text' holds {type(text).__name__}, not text")
            text = text.removeprefix(BYTE_ORDER_MARK)
            if text:
                collections.setdefault(collection, []).append(Document(collection, source, text))
    taken = [document for documents in collections.values() for document in spread(documents, max_bytes)]
    if not taken:
        within = "" if max_bytes is None else f" within {max_bytes} bytes of each collection"
        raise ConfigError(f"no text in {', '.join(map(str, paths))}{within}")
    return taken


def spread(documents: Sequence[Document], max_bytes: int | None) -> list[Document]:
    """Return random stretches of the documents, up to `max_bytes`, taken from each source in turn.

    A stretch is a whole document, or STRETCH characters of a longer one. The same documents give the same stretches, in
    the documents' order. With None, return all documents uncut.
    """
    if max_bytes is None or sum(len(document.text.encode()) for document in documents) <= max_bytes:
        return list(documents)
    step = max(1, min(STRETCH, max_bytes // 4))  # a character has at most four bytes, so one stretch fits
    stretches = [d._replace(text=d.text[i : i + step]) for d in documents for i in range(0, len(d.text), step)]
    turns: dict[str, int] = {}
    order: list[tuple[int, int]] = []  # (turn, stretch): one stretch of each source in a turn
    for i in np.random.default_rng(0).permutation(len(stretches)).tolist():
        turn = turns.setdefault(stretches[i].source, 0)
        turns[stretches[i].source] += 1
        order.append((turn, i))
    taken: list[int] = []
    for _, i in sorted(order, key=itemgetter(0)):
        max_bytes -= len(stretches[i].text.encode())
        if max_bytes < 0:
            break
        taken.append(i)
    return [stretches[i] for i in sorted(taken)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/stories-8m"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE.parquet")
    parser.add_argument("--max-bytes", type=int, help="of each collection, taken from its sources in turn")
    parser.add_argument("--kernels", default="auto", help="numba, numpy or auto (the default)")
    parser.add_argument("--precision", default="auto", help="of activations and KV cache: int8, float32 or auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    with one_line_errors(ConfigError, ModelError):
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Measure the collections of the files and print a table, or JSON."""
    documents = read_documents(arguments.data, arguments.max_bytes)
    try:
        tokenizer, model = load(arguments.model, arguments.kernels, arguments.precision)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    scores = evaluate(model, tokenizer, documents)
    collections = {name: summary(of_collection) for name, of_collection in scores.items()}
    if arguments.json:
        how = {"model": str(arguments.model), "weights": model.weight_type, "arithmetic": model.arithmetic}
        print(json.dumps({**how, "collections": collections}, indent=2))
        return
    table = Table("collection", "documents", "sources", "tokens", "bytes", "bits per byte", "95 % interval")
    for name, figures in collections.items():
        numbers = [f"{figures[key]:,}" for key in ("documents", "sources", "tokens", "bytes")]
        low, high = figures["interval_95"]
        table.add_row(name, *numbers, f"{figures['bits_per_byte']:.4f}", f"{low:.4f} to {high:.4f}")
    PlainConsole().print(table)


if __name__ == "__main__":
    main()
