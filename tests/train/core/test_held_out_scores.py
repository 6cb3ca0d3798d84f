"""Bits per byte, while training by PyTorch and of an exported model by TinyLM's engine, against slow computations."""

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
from train.evaluate import WINDOWS_A_BATCH, make_runner, score_document, windows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
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
            assert end - start <= context  # what goes in
            assert start == 0 or first - start >= context // 2
            scored += range(first, end + 1)
        assert scored == list(range(1, n_tokens))


def test_a_long_document_is_scored_window_by_window(config: TrainConfig):
    """The document has more windows than the engine computes at once."""
    tokenizer, model, shape = Tokenizer(config.tokenizer_path), random_model(config), config.shape
    text = " ".join(f"Otto the bear had {n} kites." for n in range(30))
    ids = tokenizer.encode_document(text)
    spans = list(windows(len(ids), shape.context))
    assert len(spans) > WINDOWS_A_BATCH
    bits = 0.0
    with torch.no_grad():
        for start, end, first in spans:
            logits = model(torch.tensor([ids[start:end]]))[0].double()
            says = torch.log_softmax(logits, dim=1)
            bits -= sum(float(says[i - 1 - start, ids[i]]) for i in range(first, end + 1)) / math.log(2)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    score = score_document(make_runner(Model(shape, tensors)), tokenizer, text)
    assert (score.tokens, score.bytes) == (len(ids) - 1, len(text))
    assert score.bits == pytest.approx(bits, rel=1e-4)


def test_the_engine_scores_like_pytorch(config: TrainConfig):
    tokenizer, model, shape = Tokenizer(config.tokenizer_path), random_model(config), config.shape
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    runner = make_runner(Model(shape, tensors))
    piece_bytes = torch.tensor([len(piece) for piece in tokenizer.piece_bytes])
    for text in ("Anna had a kite.", "Otto the bear lived on a hill. "):
        ids = tokenizer.encode_document(text)
        assert len(ids) <= shape.context + 1
        score = score_document(runner, tokenizer, text)
        assert (score.tokens, score.bytes) == (len(ids) - 1, len(text))
        expected = bits_per_byte(model, torch.tensor([ids]), piece_bytes)
        assert score.bits / score.bytes == pytest.approx(expected, rel=1e-4)
