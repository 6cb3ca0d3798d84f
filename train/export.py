"""The last checkpoint of a run into a model directory: averaged weights, quantized, evaluated, with its card.

    python -m train.export [--config configs/train.yaml] [KEY=VALUE ...]

Writes `models/<name>/` as `tinylm.weights` defines it, and beside that, for people: README.md (the model card),
ATTRIBUTION.md, evaluation.json, samples.md, prompts.md, and metrics.jsonl with its curve.png. All of it appears at
once, or nothing does. The same weights in the formats of `export.formats` go to `<workdir>/exports/<name>/`, which is
not meant to be committed.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm.llm import LLM
from tinylm.model import Model
from tinylm.system.files import check_directory
from tinylm.terminal.output import say
from tinylm.tokenizer import Tokenizer
from tinylm.weights import Tensor, model_files, quantize_rows, save_model
from train.config import METRICS_FILE, ConfigError, TrainConfig
from train.core.checkpoint import Checkpoint, last_checkpoint
from train.core.curve import draw_curve
from train.core.metrics import metrics_text, read_metrics
from train.evaluate import Document, evaluate, per_byte, read_documents, summary
from train.release.card import attribution_page, model_card, prompts_page, samples_page
from train.release.format_checks import export_files
from train.release.generated_text import judge, training_words, write_stories
from train.release.prompts import answers, load_prompts
from train.stage import load_tokenizer, load_tokens, require, run_stage

Exporter = Callable[[Path, Path], None]  # a model directory, where to write


class TrainedModel(NamedTuple):
    """The end of a run, and the held-out text of the work directory that it is to be judged on."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    tensors: dict[str, np.ndarray]  # averaged, float32 by name
    quantized: dict[str, Tensor]  # the same with int8 matrices
    manifest: dict[str, dict[str, Any]]  # of the text, by collection
    documents: list[Document]


def load_trained(config: TrainConfig) -> TrainedModel:
    """Raises ConfigError when a stage before this one is missing, or was run on something else than the next one."""
    require(config.manifest_path, "train.prepare")
    tokenizer, data = load_tokenizer(config), load_tokens(config)
    checkpoint = last_checkpoint(config)
    checkpoint.check_same_data(config, data)
    tensors = checkpoint.weights()
    manifest = json.loads(config.manifest_path.read_text(encoding="utf-8"))
    held_out = [config.text_dir / f"{name}.validation.parquet" for name in manifest]
    return TrainedModel(
        checkpoint,
        tokenizer,
        tensors,
        {name: quantize_rows(tensor) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()},
        manifest,
        read_documents(held_out, config.export.evaluate_bytes),
    )


def export(config: TrainConfig) -> None:
    """Run the stage."""
    shape = config.shape
    checkpoint, tokenizer, tensors, quantized, manifest, documents = load_trained(config)
    prompts = load_prompts(config.export.prompts)
    exporters = load_exporters(config.export.formats)
    directory, exports = config.models_dir / config.name, config.workdir / "exports" / config.name
    check_directory(directory, model_files)
    for name in exporters:
        check_directory(exports / name, partial(export_files, name))
    check_sample_prompt(config, tokenizer)
    lines = read_metrics(config.metrics_path, checkpoint.step)
    exact = evaluate(Model(shape, tensors), tokenizer, documents, "float32")
    model = Model(shape, quantized)
    served = evaluate(model, tokenizer, documents, model.arithmetic)
    run = checkpoint.config.run
    evaluation = {
        "step": checkpoint.step,
        "tokens_seen": checkpoint.step * run.batch_rows * shape.context,
        "planned_tokens": run.tokens,
        "tokens_by_collection": checkpoint.tokens_by_collection,
        "training_wall_s": round(checkpoint.wall_s, 1),
        "training_machine": checkpoint.machine,
        "seed": checkpoint.config.seed,
        "started_from": checkpoint.started_from,
        "text_sha256": checkpoint.text_sha256,
        "arithmetic": model.arithmetic,
        "collections": {name: summary(scores) for name, scores in served.items()},
        "float32_bits_per_byte": {name: per_byte(scores) for name, scores in exact.items()},
        "generated_text": judge_stories(config, model, tokenizer, documents, manifest),
    }
    params = config.export.sampling(shape.context)
    llm = LLM.from_parts(tokenizer, model)
    samples = [
        (seeded, llm.generate(config.export.sample_prompt, seeded)[0])
        for seeded in (replace(params, seed=seed) for seed in range(config.export.n_samples))
    ]
    answered = list(zip(prompts, answers(llm, prompts, params), strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        curve = Path(scratch) / "curve.png"
        draw_curve(lines, curve)
        extra_files = {
            "README.md": model_card(config, evaluation, manifest).encode(),
            "ATTRIBUTION.md": attribution_page(config, manifest).encode(),
            "evaluation.json": (json.dumps(evaluation, indent=2) + "\n").encode(),
            "samples.md": samples_page(config, samples).encode(),
            "prompts.md": prompts_page(config, answered).encode(),
            "curve.png": curve.read_bytes(),
            METRICS_FILE: metrics_text(lines).encode(),
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
            exporter(Path(scratch) / config.name, exports / name)
    save(directory)

    say(f"{directory}: step {checkpoint.step}, {evaluation['tokens_seen']:,} tokens seen")
    before, after = sum(t.nbytes for t in tensors.values()), (directory / "model.safetensors").stat().st_size
    say(f"size: float32 {before:,} bytes, int8 {after:,} bytes ({after / before:.1%})")
    for name in served:
        full, small = (per_byte(scores[name]) for scores in (exact, served))
        say(f"{name}: bits per byte float32 {full:.4f}, as served {small:.4f} ({small - full:+.4f})")


def check_sample_prompt(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError, before anything is measured, when the samples' prompt leaves no room in the context."""
    size, context = len(tokenizer.encode_document(config.export.sample_prompt)), config.shape.context
    if size >= context:
        raise ConfigError(f"export.sample_prompt has {size} tokens: the context is {context}")


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


def judge_stories(
    config: TrainConfig, model: Model, tokenizer: Tokenizer, documents: list[Document], manifest: dict[str, Any]
) -> dict[str, Any]:
    """The figures of stories that the model makes up from nothing, of held-out text beside them, and their settings."""
    params = config.export.sampling(model.config.context)
    stories = write_stories(model, tokenizer, [replace(params, seed=seed) for seed in range(config.export.n_stories)])
    held_out: dict[str, list[str]] = {}
    for document in documents:
        held_out.setdefault(document.collection, []).append(document.text)
    trained_on = [config.text_dir / f"{name}.train.parquet" for name in manifest]
    settings = {"temperature": params.temperature, "top_p": params.top_p}
    return {**settings, **judge(stories, held_out, training_words(trained_on))}


if __name__ == "__main__":
    run_stage(__doc__, export)
