"""The last checkpoint of a run into a model directory: averaged weights, quantized, evaluated, with its card.

    python -m train.export [--config configs/train.yaml] [KEY=VALUE ...]

Writes `models/<name>/` as `tinylm.weights` defines it, and beside that, for people: README.md (the model card),
ATTRIBUTION.md, evaluation.json, samples.md and curve.png. All of it appears at once, or nothing does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinylm.llm import LLM
from tinylm.model import Model
from tinylm.sampling import SamplingParams
from tinylm.weights import Tensor, quantize_rows, save_model
from train.card import attribution_page, model_card, samples_page
from train.config import ConfigError, TrainConfig
from train.curve import draw_curve
from train.evaluate import evaluate, read_documents
from train.loop import check_state
from train.run import STATE_FILE, metrics_path
from train.stage import load_tokenizer, require, run_stage


def last_state(config: TrainConfig) -> dict[str, Any]:
    """The newest checkpoint that Ray Train has put on record; raises ConfigError when there is none."""
    from ray.train import Result

    require(config.run_dir, "train.run")
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it tells those who resume what a reader needn't know
    try:
        checkpoint = Result.from_path(str(config.run_dir.resolve())).checkpoint
    except RuntimeError:  # Ray's word for a directory without a run in it
        checkpoint = None
    if checkpoint is None:
        raise ConfigError(f"{config.run_dir} holds no checkpoint: run `python -m train.run` first")
    with checkpoint.as_directory() as directory:
        return torch.load(Path(directory) / STATE_FILE, weights_only=True, map_location="cpu")


def averaged_tensors(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """The running average of the weights, float32 by name."""
    prefix = "module."
    return {
        name.removeprefix(prefix): tensor.float().numpy()
        for name, tensor in state["averaged"].items()
        if name.startswith(prefix)
    }


def export(config: TrainConfig) -> None:
    """Run the stage."""
    require(config.text_dir / "manifest.json", "train.prepare")
    tokenizer = load_tokenizer(config)
    state = last_state(config)
    check_state(state, config, hashlib.sha256(config.tokenizer_path.read_bytes()).hexdigest())
    shape = config.model_config_
    tensors = averaged_tensors(state)
    quantized: dict[str, Tensor] = {n: quantize_rows(t) if t.ndim == 2 else t for n, t in tensors.items()}
    manifest = json.loads((config.text_dir / "manifest.json").read_text(encoding="utf-8"))
    documents = read_documents(
        [config.text_dir / f"{name}.validation.parquet" for name in manifest], config.export.evaluate_bytes
    )
    exact = evaluate(Model(shape, tensors), tokenizer, documents, "float32")
    rounded = evaluate(Model(shape, quantized, precision="float32"), tokenizer, documents, "int8 weights")
    model = Model(shape, quantized)
    served = evaluate(model, tokenizer, documents, model.arithmetic)
    run = state["config"]["run"]
    evaluation = {
        "step": state["step"],
        "tokens_seen": state["step"] * run["batch_rows"] * shape.context,
        "planned_tokens": run["tokens"],
        "training_wall_s": round(state["wall_s"], 1),
        "training_machine": state["machine"],
        "arithmetic": model.arithmetic,
        "collections": {name: score.summary() for name, score in served.items()},
        "int8_weights_bits_per_byte": {name: score.summary()["bits_per_byte"] for name, score in rounded.items()},
        "float32_bits_per_byte": {name: score.summary()["bits_per_byte"] for name, score in exact.items()},
    }
    params = [
        SamplingParams(
            max_tokens=shape.context,
            temperature=config.export.sample_temperature,
            top_p=config.export.sample_top_p,
            seed=seed,
        )
        for seed in range(config.export.n_samples)
    ]
    llm = LLM.from_parts(tokenizer, model)
    samples = [(p, llm.generate(config.export.sample_prompt, p)[0]) for p in params]
    directory = config.models_dir / config.name
    with tempfile.TemporaryDirectory() as scratch:
        curve = Path(scratch) / "curve.png"
        draw_curve(metrics_path(config), curve)
        extra_files = {
            "README.md": model_card(config, evaluation, manifest).encode(),
            "ATTRIBUTION.md": attribution_page(config, manifest).encode(),
            "evaluation.json": (json.dumps(evaluation, indent=2) + "\n").encode(),
            "samples.md": samples_page(config, samples).encode(),
            "curve.png": curve.read_bytes(),
        }
    save_model(directory, shape, tensors, config.tokenizer_path.read_bytes(), extra_files=extra_files)

    print(f"{directory}: step {state['step']}, {evaluation['tokens_seen']:,} tokens seen")
    before, after = sum(t.nbytes for t in tensors.values()), (directory / "model.safetensors").stat().st_size
    print(f"size: float32 {before:,} bytes, int8 {after:,} bytes ({after / before:.1%})")
    for name in served:
        full, weights, small = (scores[name].summary()["bits_per_byte"] for scores in (exact, rounded, served))
        print(f"{name}: bits per byte float32 {full:.4f}, int8 weights {weights:.4f} ({weights - full:+.4f}), ", end="")
        print(f"as served ({model.arithmetic}) {small:.4f} ({small - full:+.4f})")


if __name__ == "__main__":
    run_stage(__doc__, export)
