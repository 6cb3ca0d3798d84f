"""Write the last checkpoint of a run as a model directory: averaged weights, quantized, evaluated, with a model card.

    python -m train.export [--config configs/train.yaml] [KEY=VALUE ...]

Writes `models/<name>/` in the format of `tinylm.weights`, with pages for people: README.md (the model card),
ATTRIBUTION.md, evaluation.json, samples.md, prompts.md, and metrics.jsonl with its curve.png. The whole directory
appears at once. The formats in `export.formats` go to `<workdir>/exports/<name>/`.
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
from train.config import METRICS_FILE, ConfigError, TrainConfig, require, run_stage
from train.core.checkpoint import Checkpoint, last_checkpoint
from train.core.record import Line, loss_curve, metrics_text, read_metrics
from train.data.tokens import load_tokenizer, load_tokens
from train.evaluate import Document, Score, answer, evaluate, per_byte, read_documents, summary
from train.release.card import attribution_page, model_card, prompts_page, samples_page
from train.release.choices import all_questions
from train.release.format_checks import export_files
from train.release.generated_text import judge, training_words, write_stories
from train.release.prompts import Prompt, answers, load_prompts

STORY_CHARS = 2000  # a longer document is no short story
Exporter = Callable[[Path, Path], None]  # (model directory, output directory)
Scores = dict[str, list[Score]]  # by collection


class TrainedModel(NamedTuple):
    """The result of a run, and the held-out text to evaluate it on."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    tensors: dict[str, np.ndarray]  # averaged, float32 by name
    quantized: dict[str, Tensor]  # the same with int8 matrices
    manifest: dict[str, dict[str, Any]]  # of the text, by collection
    passes: dict[str, float]  # through the training text, by collection
    documents: list[Document]  # held out: up to `export.evaluate_bytes` of each collection
    stories: list[Document]  # all held-out documents of at most STORY_CHARS


def load_trained(config: TrainConfig) -> TrainedModel:
    """Return the last checkpoint and its text; raise ConfigError when an earlier stage has to run first."""
    require(config.manifest_path, "train.prepare")
    tokenizer = load_tokenizer(config)
    checkpoint = last_checkpoint(config)
    run_config = checkpoint.config.model_copy(update={"workdir": config.workdir})  # the directory may have moved
    data = load_tokens(run_config)
    checkpoint.check_same_data(config, data)
    tensors = checkpoint.weights()
    manifest = json.loads(config.manifest_path.read_text(encoding="utf-8"))
    held_out = [config.text_file(name, "validation") for name in manifest]
    passes = data.mixture.epochs(checkpoint.step * run_config.run.batch_rows)
    return TrainedModel(
        checkpoint,
        tokenizer,
        tensors,
        {name: quantize_rows(tensor) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()},
        manifest,
        {name: round(number, 2) for name, number in passes.items()},
        read_documents(held_out, config.export.evaluate_bytes),
        [document for document in read_documents(held_out) if len(document.text) <= STORY_CHARS],
    )


def export(config: TrainConfig) -> None:
    """Run the stage. It checks everything that can be wrong before it measures."""
    trained = load_trained(config)
    prompts = load_prompts(config.export.prompts)
    exporters = _load_exporters(config.export.formats)
    directory, exports = config.models_dir / config.name, config.workdir / "exports" / config.name
    check_directory(directory, model_files)
    for name in exporters:
        check_directory(exports / name, partial(export_files, name))
    _check_sample_prompt(config, trained.tokenizer)

    model = Model(config.shape, trained.quantized)
    exact = evaluate(Model(config.shape, trained.tensors), trained.tokenizer, trained.documents, "float32")
    served = evaluate(model, trained.tokenizer, trained.documents, model.arithmetic)
    evaluation = _evaluation(config, trained, model, exact, served)
    lines = read_metrics(config.metrics_path, trained.checkpoint.step)
    save = partial(
        save_model,
        config=config.shape,
        tensors=trained.tensors,
        tokenizer=config.tokenizer_path.read_bytes(),
        extra_files=_extra_files(config, trained, model, prompts, evaluation, lines),
    )
    with tempfile.TemporaryDirectory() as scratch:
        save(Path(scratch) / config.name)
        for name, exporter in exporters.items():  # if one fails, models/<name> stays as it is
            exporter(Path(scratch) / config.name, exports / name)
    save(directory)

    say(f"{directory}: step {trained.checkpoint.step}, {evaluation['tokens_seen']:,} tokens seen")
    before, after = sum(t.nbytes for t in trained.tensors.values()), (directory / "model.safetensors").stat().st_size
    say(f"size: float32 {before:,} bytes, int8 {after:,} bytes ({after / before:.1%})")
    for name in served:
        full, small = per_byte(exact[name]), per_byte(served[name])
        say(f"{name}: bits per byte float32 {full:.4f}, as served {small:.4f} ({small - full:+.4f})")


def _load_exporters(formats: Sequence[str]) -> dict[str, Exporter]:
    """Return the functions that write these formats; raise ConfigError when a package is not installed."""
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


def _check_sample_prompt(config: TrainConfig, tokenizer: Tokenizer) -> None:
    size, context = len(tokenizer.encode_document(config.export.sample_prompt)), config.shape.context
    if size >= context:
        raise ConfigError(f"export.sample_prompt has {size} tokens: it must be shorter than the context, {context}")


def _evaluation(
    config: TrainConfig, trained: TrainedModel, model: Model, exact: Scores, served: Scores
) -> dict[str, Any]:
    """Return the content of evaluation.json."""
    checkpoint = trained.checkpoint
    run_config = checkpoint.config
    return {
        "step": checkpoint.step,
        "tokens_seen": checkpoint.step * run_config.tokens_per_step,
        "planned_tokens": run_config.run.tokens,
        "tokens_by_collection": checkpoint.tokens_by_collection,
        "passes_by_collection": trained.passes,
        "training_wall_s": round(checkpoint.wall_s, 1),
        "training_machine": checkpoint.machine,
        "seed": run_config.seed,
        "config_sha256": run_config.sha256,
        "started_from": checkpoint.started_from,
        "text_sha256": checkpoint.text_sha256,
        "arithmetic": model.arithmetic,
        "collections": {name: summary(scores) for name, scores in served.items()},
        "float32_bits_per_byte": {name: per_byte(scores) for name, scores in exact.items()},
        "choices": answer(model, trained.tokenizer, all_questions(trained.stories)),
        "generated_text": _judge_stories(config, trained, model),
    }


def _judge_stories(config: TrainConfig, trained: TrainedModel, model: Model) -> dict[str, Any]:
    """Return the figures of stories that begin with the sample prompt, of held-out text, and the settings."""
    params = config.export.sampling(model.config.context)
    seeded = [replace(params, seed=seed) for seed in range(config.export.n_stories)]
    stories = write_stories(model, trained.tokenizer, config.export.sample_prompt, seeded)
    held_out: dict[str, list[str]] = {}
    for document in trained.documents:
        held_out.setdefault(document.collection, []).append(document.text)
    training = training_words(config.text_file(name, "train") for name in trained.manifest)
    settings = {"prompt": config.export.sample_prompt, "temperature": params.temperature, "top_p": params.top_p}
    return {**settings, **judge(stories, held_out, training)}


def _extra_files(
    config: TrainConfig,
    trained: TrainedModel,
    model: Model,
    prompts: list[Prompt],
    evaluation: dict[str, Any],
    lines: list[Line],
) -> dict[str, bytes]:
    """Return the files of the model directory besides weights and tokenizer."""
    params = config.export.sampling(config.shape.context)
    llm = LLM.from_parts(trained.tokenizer, model)
    samples = [
        (seeded, llm.generate(config.export.sample_prompt, seeded)[0])
        for seeded in (replace(params, seed=seed) for seed in range(1, config.export.n_samples + 1))
    ]
    answered = list(zip(prompts, answers(llm, prompts, params), strict=True))
    return {
        "README.md": model_card(config, evaluation, trained.manifest).encode(),
        "ATTRIBUTION.md": attribution_page(config, trained.manifest).encode(),
        "evaluation.json": (json.dumps(evaluation, indent=2) + "\n").encode(),
        "samples.md": samples_page(config, samples).encode(),
        "prompts.md": prompts_page(config, answered).encode(),
        "curve.png": loss_curve(lines),
        METRICS_FILE: metrics_text(lines).encode(),
    }


if __name__ == "__main__":
    run_stage(__doc__, export)
