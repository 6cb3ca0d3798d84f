"""Bits per byte of PyTorch during training, and of TinyLM's engine, against slow computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.train import encoded_stories, short_run

from tinylm.model import Model
from tinylm.tokenizer import Tokenizer
from train.config import TrainConfig
from train.core.model import GPT
from train.core.validation import bits_per_byte
from train.evaluate import WINDOWS_PER_BATCH, make_runner, score_document, windows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    torch.set_num_threads(1)
    return encoded_stories(tmp_path_factory.mktemp("scores"), short_run(1))


def random_model(config: TrainConfig) -> GPT:
    """Return a model in which every part changes the logits."""
    model = GPT(config.shape)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3, generator=generator)
    return model


@torch.no_grad()
def slow_bits_per_byte(model: GPT, tokenizer: Tokenizer, rows: np.ndarray) -> float:
    """Sum -log2 p(next) token by token in float64, and divide by the bytes of the text."""
    bits = n_bytes = 0.0
    for row in rows.tolist():
        for i in range(1, len(row)):
            if row[i] < 0 or row[i] == tokenizer.boundary_id:
                continue
            logits = model(torch.tensor([row[:i]]))[0, -1].double()
            bits -= float(torch.log_softmax(logits, dim=0)[row[i]]) / math.log(2)
            n_bytes += len(tokenizer.decode_bytes([row[i]]))
    return bits / n_bytes


def test_bits_per_byte_do_not_count_boundaries_and_padding(config: TrainConfig):
    tokenizer, model = Tokenizer(config.tokenizer_path), random_model(config)
    row = (tokenizer.encode_document("A red kite — 😀.") + tokenizer.encode_document("A bear came by to see it."))[:33]
    assert len(row) == 33
    short = [*tokenizer.encode_document("Oh!"), *[-1] * 33][:33]
    assert tokenizer.boundary_id in row[1:]
    rows = np.array([row, short, row[::-1]])
    piece_bytes = torch.tensor([len(piece) for piece in tokenizer.piece_bytes])
    slow = slow_bits_per_byte(model, tokenizer, rows)
    for batch_rows in (1, 2, 16):
        assert bits_per_byte(model, torch.from_numpy(rows), piece_bytes, batch_rows) == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("context", [2, 3, 7, 32])
def test_windows_score_every_token_once_with_half_a_context(context: int):
    for n_tokens in range(2, 4 * context + 3):
        scored: list[int] = []
        for start, end, first in windows(n_tokens, context):
            assert 0 <= start < end <= n_tokens - 1
            assert end - start <= context
            assert start == 0 or first - start >= context // 2
            scored += range(first, end + 1)
        assert scored == list(range(1, n_tokens))


@pytest.mark.parametrize(("sentences", "batches"), [(1, 1), (30, 2)])
def test_the_engine_scores_documents_like_pytorch(config: TrainConfig, sentences: int, batches: int):
    """The longer document has more windows than the engine computes at once."""
    tokenizer, model, shape = Tokenizer(config.tokenizer_path), random_model(config), config.shape
    text = " ".join(f"Otto the bear had {n} kites." for n in range(sentences))
    ids = tokenizer.encode_document(text)
    spans = list(windows(len(ids), shape.context))
    assert math.ceil(len(spans) / WINDOWS_PER_BATCH) >= batches
    bits = 0.0
    with torch.no_grad():
        for start, end, first in spans:
            log_probabilities = torch.log_softmax(model(torch.tensor([ids[start:end]]))[0].double(), dim=1)
            nats = sum(float(log_probabilities[i - 1 - start, ids[i]]) for i in range(first, end + 1))
            bits -= nats / math.log(2)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    score = score_document(make_runner(Model(shape, tensors)), tokenizer, text)
    assert (score.tokens, score.bytes) == (len(ids) - 1, len(text))
    assert score.bits == pytest.approx(bits, rel=1e-4)
