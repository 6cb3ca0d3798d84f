"""Train the demo model, and measure what the section on training of docs/how-it-works.md shows.

`docs.making.measure` calls it. It uses configs/train-demo.yaml, as `make train-demo` does, but without Ray and in a
temporary directory. All steps take half a minute on one core.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import TrainConfig, load_config
from train.core.loop import Trainer
from train.core.model import GPT
from train.data.tokens import load_tokenizer, load_tokens
from train.demo_text import demo_text
from train.encode import write_tokens
from train.prepare import prepare
from train.tokenizer import train_tokenizer

CONFIG = Path("configs/train-demo.yaml")
WEIGHT = "model.layers.1.mlp.down_proj.weight"
NUDGE = 1e-4  # added to one weight, to see how the loss changes


def training(sentence: str, steps: int | None = None) -> dict[str, Any]:
    """Train the demo model, and return losses in nats per token, the derivative by one weight, and one step's effect.

    steps: after how many steps to stop; None means at the end of the run. The sentence is never trained on.
    """
    threads = torch.get_num_threads()
    with TemporaryDirectory() as directory:
        config = encoded_demo(Path(directory))
        torch.set_num_threads(config.run.threads)
        try:
            return measured(config, sentence, config.steps if steps is None else steps)
        finally:
            torch.set_num_threads(threads)


def encoded_demo(directory: Path) -> TrainConfig:
    """Make the demo's text, tokenizer and tokens in the directory; return the config with this work directory."""
    stories = directory / "stories.txt"
    stories.write_text(demo_text(n_stories=3000, seed=1), encoding="utf-8")
    config = load_config(CONFIG, [f"workdir={directory}", f"prepare.collections.0.source={stories}"])
    prepare(config)
    train_tokenizer(config)
    tokenizer = load_tokenizer(config)

    def encoded(_: TrainConfig, path: Path) -> Iterator[dict[str, Any]]:
        for text in pq.read_table(path)["text"].to_pylist():
            yield {"tokens": tokenizer.encode_document(text), "documents": 1}

    config.tokens_dir.mkdir()
    write_tokens(config, tokenizer, config.tokens_dir, encoded)
    return config


def measured(config: TrainConfig, sentence: str, steps: int) -> dict[str, Any]:
    """Train for a number of steps, and return what `training` does."""
    trainer = Trainer(config, load_tokens(config), None, torch.device("cpu"))
    model, rows = trainer.model, torch.from_numpy(trainer.data.mixture.rows(0, config.run.batch_rows))
    ids = torch.tensor([load_tokenizer(config).encode_document(sentence)])
    slope = derivative(model, rows)
    place = slope["row"], slope["column"]
    curve: dict[str, list[float]] = {"steps": [0], "rows": [loss(model, rows)], "sentence": [loss(model, ids)]}
    weight = model.get_parameter(WEIGHT).detach()
    one_step = {"loss_before": curve["rows"][0], "weight_before": float(weight[place])}
    while trainer.step < steps:
        trainer.take_step()
        if trainer.step == 1:
            one_step |= {"loss_after": loss(model, rows), "weight_after": float(weight[place])}
        if trainer.step % config.run.log_every_steps == 0:
            curve["steps"].append(trainer.step)
            curve["rows"].append(trainer.loss_line()["loss"])  # the mean of the steps since the last one
            curve["sentence"].append(loss(model, ids))
    return {
        "parameters": config.shape.n_parameters,
        "vocab_size": config.shape.vocab_size,
        "batch_rows": len(rows),
        "derivative": slope,
        "one_step": one_step,
        "curve": curve,
    }


@torch.no_grad()
def loss(model: GPT, rows: Tensor) -> float:
    """Return the mean loss of rows (B, T + 1), in nats per token."""
    return round(float(cross_entropy(model, rows)), 6)


def cross_entropy(model: GPT, rows: Tensor) -> Tensor:
    """Return the loss as `train.core.loop` does, in the precision of the model."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def derivative(model: GPT, rows: Tensor) -> dict[str, Any]:
    """Return the derivative of the loss by one element of WEIGHT, by autograd and by a difference, in float64.

    It is the element with the largest derivative.
    """
    model = copy.deepcopy(model).double()
    before = cross_entropy(model, rows)
    weight = model.get_parameter(WEIGHT)
    (slopes,) = torch.autograd.grad(before, weight)
    row, column = np.unravel_index(int(slopes.abs().argmax()), slopes.shape)
    with torch.no_grad():
        weight[row, column] += NUDGE
        after = cross_entropy(model, rows)
    return {
        "weight": WEIGHT,
        "row": int(row),
        "column": int(column),
        "autograd": float(slopes[row, column]),
        "nudge": NUDGE,
        "loss_before": before.item(),
        "loss_after": after.item(),
        "difference": (after - before).item() / NUDGE,
    }
