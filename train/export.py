"""The last checkpoint of a run into a model directory: averaged weights, quantized, evaluated, with its card.

    python -m train.export [--config configs/train.yaml] [KEY=VALUE ...]

Writes `models/<name>/` as `tinylm.weights` defines it, and beside that, for people: README.md (the model card),
ATTRIBUTION.md, evaluation.json, samples.md, prompts.md and curve.png. All of it appears at once, or nothing does. The
same weights in the formats of `export.formats` go to `<workdir>/exports/<name>/`, which is not meant to be committed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinylm.llm import LLM
from tinylm.model import Model
from tinylm.sampling import SamplingParams
from tinylm.tokenizer import Tokenizer
from tinylm.weights import Tensor, quantize_rows, save_model
from train.card import attribution_page, model_card, prompts_page, samples_page
from train.config import ConfigError, Run, TrainConfig
from train.curve import draw_curve
from train.data import TokenData
from train.evaluate import Document, bits_per_byte, evaluate, read_documents, summary
from train.generated import judge, training_words, write_stories
from train.loop import check_state
from train.prompts import answer, load_prompts
from train.run import STATE_FILE, metrics_path
from train.stage import load_tokenizer, require, run_stage

Exporter = Callable[[Path, Path], None]  # a model directory, where to write


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
    require(config.tokens_dir / "index.json", "train.encode")
    tokenizer = load_tokenizer(config)
    prompts = load_prompts(config.export.prompts)
    exporters = load_exporters(config.export.formats)
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
    model = Model(shape, quantized)
    served = evaluate(model, tokenizer, documents, model.arithmetic)
    run = state["config"]["run"]
    evaluation = {
        "step": state["step"],
        "tokens_seen": state["step"] * run["batch_rows"] * shape.context,
        "planned_tokens": run["tokens"],
        "tokens_by_collection": tokens_by_collection(config, state),
        "training_wall_s": round(state["wall_s"], 1),
        "training_machine": state["machine"],
        "arithmetic": model.arithmetic,
        "collections": {name: summary(scores) for name, scores in served.items()},
        "float32_bits_per_byte": {name: bits_per_byte(scores) for name, scores in exact.items()},
        "generated_text": judge_stories(config, model, tokenizer, documents, manifest),
    }
    params = sampling(config, shape.context)
    llm = LLM.from_parts(tokenizer, model)
    samples = [
        (seeded, llm.generate(config.export.sample_prompt, seeded)[0])
        for seeded in (replace(params, seed=seed) for seed in range(config.export.n_samples))
    ]
    answers = list(zip(prompts, answer(llm, prompts, params), strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        curve = Path(scratch) / "curve.png"
        draw_curve(metrics_path(config), curve)
        extra_files = {
            "README.md": model_card(config, evaluation, manifest).encode(),
            "ATTRIBUTION.md": attribution_page(config, manifest).encode(),
            "evaluation.json": (json.dumps(evaluation, indent=2) + "\n").encode(),
            "samples.md": samples_page(config, samples).encode(),
            "prompts.md": prompts_page(config, answers).encode(),
            "curve.png": curve.read_bytes(),
        }
        save = partial(
            save_model,
            config=shape,
            tensors=tensors,
            tokenizer=config.tokenizer_path.read_bytes(),
            extra_files=extra_files,
        )
        save(Path(scratch) / config.name)
        for name, exporter in exporters.items():  # before the model is put in place: one that fails stops it all
            exporter(Path(scratch) / config.name, config.workdir / "exports" / config.name / name)
    directory = config.models_dir / config.name
    save(directory)

    print(f"{directory}: step {state['step']}, {evaluation['tokens_seen']:,} tokens seen")
    before, after = sum(t.nbytes for t in tensors.values()), (directory / "model.safetensors").stat().st_size
    print(f"size: float32 {before:,} bytes, int8 {after:,} bytes ({after / before:.1%})")
    for name in served:
        full, small = (bits_per_byte(scores[name]) for scores in (exact, served))
        print(f"{name}: bits per byte float32 {full:.4f}, as served {small:.4f} ({small - full:+.4f})")


def tokens_by_collection(config: TrainConfig, state: dict[str, Any]) -> dict[str, int]:
    """How many of the tokens seen came from which collection, by the settings that the checkpoint was trained with."""
    run = Run.model_validate(state["config"]["run"])
    data = TokenData(config.tokens_dir, config.model_config_.context, state["config"]["seed"], run.phases)
    return data.mixture.tokens(state["step"] * run.batch_rows)


def load_exporters(formats: Sequence[str]) -> dict[str, Exporter]:
    """The exports to these formats; raises ConfigError when a package that one needs is not installed."""
    exporters = {}
    for name in formats:
        try:
            module = importlib.import_module(f"train.export_{name}")
        except ImportError as error:
            raise ConfigError(
                f"export.formats: {name!r} needs packages that are not installed ({error}): "
                f"pip install 'tinylm[export]', or give export.formats=[]"
            ) from None
        exporters[name] = getattr(module, f"export_{name}")
    return exporters


def sampling(config: TrainConfig, max_tokens: int) -> SamplingParams:
    """How everything is drawn that an exported model shows of itself; the seeds are others' to say."""
    settings = config.export
    return SamplingParams(max_tokens=max_tokens, temperature=settings.sample_temperature, top_p=settings.sample_top_p)


def judge_stories(
    config: TrainConfig, model: Model, tokenizer: Tokenizer, documents: list[Document], manifest: dict
) -> dict:
    """The figures of stories that the model makes up from nothing, of held-out text beside them, and their settings."""
    params = sampling(config, model.config.context)
    stories = write_stories(model, tokenizer, [replace(params, seed=seed) for seed in range(config.export.n_stories)])
    held_out: dict[str, list[str]] = {}
    for document in documents:
        held_out.setdefault(document.collection, []).append(document.text)
    trained_on = [config.text_dir / f"{name}.train.parquet" for name, entry in manifest.items() if entry["weight"]]
    settings = {"temperature": params.temperature, "top_p": params.top_p}
    return {**settings, **judge(stories, held_out, training_words(trained_on))}


if __name__ == "__main__":
    run_stage(__doc__, export)
