"""Train a lossless SentencePiece BPE tokenizer on the prepared text.

    python -m train.tokenizer [--config configs/train.yaml] [KEY=VALUE ...]

Reads each collection of `<workdir>/text` in proportion to its weight, and writes `<workdir>/tokenizer.model`.
With `start_from` it copies the tokenizer of that model instead.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import sentencepiece as spm

from tinylm.system.files import check_file, check_own, write_file
from tinylm.terminal.output import say
from tinylm.tokenizer import BOUNDARY_PIECE, Tokenizer
from tinylm.weights import TOKENIZER, load_model
from train.config import ConfigError, TrainConfig, require, run_stage
from train.data.progress import progress

MAX_BYTES = 40_000_000  # of training text
THREADS = 2
ASCII = "".join(map(chr, range(0x21, 0x7F)))  # each is a piece, even if it is rare in the stories


def train_tokenizer(config: TrainConfig) -> None:
    """Run the stage: train a tokenizer, or copy that of the model in `start_from`."""
    require(config.manifest_path, "train.prepare")
    for name in config.weights:  # one may be new in the config
        require(config.text_file(name, "train"), "train.prepare")
    check_own(config.tokenizer_path, _is_trained_here)
    check_file(config.tokenizer_path)
    if config.start_from:
        load_model(config.start_from)  # raises ModelError when the model is damaged
        model = (config.start_from / TOKENIZER).read_bytes()
    else:
        model = _trained_on(config)
    write_file(config.tokenizer_path, model)
    say(f"{config.tokenizer_path}: {Tokenizer(config.tokenizer_path).vocab_size} pieces")


def _is_trained_here(content: bytes) -> bool:
    """Return whether this tokenizer contains the settings that `_trained_on` uses."""
    return ASCII.encode() in content and BOUNDARY_PIECE.encode() in content


def _trained_on(config: TrainConfig) -> bytes:
    """Return a SentencePiece model trained on the prepared text; raise ConfigError when the text is too small."""
    model = io.BytesIO()
    shape = config.shape
    with progress("documents") as bar:
        task = bar.add_task("tokenizer", total=None)
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=_training_lines(config, lambda: bar.advance(task)),
                model_writer=model,
                model_type="bpe",
                vocab_size=shape.vocab_size,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                byte_fallback=True,
                user_defined_symbols=["\n"],
                split_digits=True,
                character_coverage=1.0,
                required_chars=ASCII,
                max_sentence_length=1 << 20,
                unk_id=0,
                eos_id=shape.boundary_id,
                eos_piece=BOUNDARY_PIECE,
                bos_id=-1,
                pad_id=-1,
                num_threads=THREADS,
                minloglevel=1,
            )
        except RuntimeError as error:
            raise ConfigError(f"SentencePiece could not train {shape.vocab_size} pieces: {error}") from None
    return model.getvalue()


def _training_lines(config: TrainConfig, advance: Callable[[], None]) -> Iterator[str]:
    """Yield paragraphs of the training text in a fixed order, as many bytes of each collection as its weight says.

    A collection that is too small for its weight is repeated, as in the training rows. advance: called once for each
    document.
    """
    manifest = json.loads(config.manifest_path.read_text(encoding="utf-8"))
    total = sum(config.weights.values())
    n_bytes = min(MAX_BYTES, sum(manifest[name]["train"]["bytes"] for name in config.weights if config.weights[name]))
    for name, weight in config.weights.items():
        budget = int(n_bytes * weight / total)
        while budget > 0:
            for text in _documents(config.text_file(name, "train")):
                if budget <= 0:
                    break
                budget -= len(text.encode())
                advance()
                yield from (line for line in text.split("\n") if line)


def _documents(path: Path) -> Iterator[str]:
    for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
        yield from batch.column(0).to_pylist()


if __name__ == "__main__":
    run_stage(__doc__, train_tokenizer)
