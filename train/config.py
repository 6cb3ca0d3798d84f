"""The training settings: one pydantic model for `configs/train.yaml`, and `key=value` overrides from the command line.

Every stage reads the same file and takes its own part of it. Paths below `workdir` are laid out here and nowhere else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinylm.config import ModelConfig
from tinylm.sampling import SamplingParams
from tinylm.text_files import read_text
from train.metrics import METRICS_FILE

MAX_VOCAB = 2**16  # token shards are uint16
INDEX_FILE = "index.json"  # beside shards


class ConfigError(ValueError):
    """The settings are unusable; the message names the key and what is wrong with it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Collection(_Section):
    """One body of text: where it comes from, under which licence, and how much of training it makes up."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    source: str  # a file, a glob of files, or a Hugging Face dataset id
    weight: float = Field(ge=0)  # share of the training tokens; 0: all of it is held out, to be validated on
    licence: str = ""
    attribution: str = ""
    text_column: str = "text"
    source_column: str = "source"  # validation is split off by it; a table without it splits by document
    minimum: dict[str, float] = {}  # keep rows whose column is at least this
    validation_share: float | None = Field(default=None, gt=0, lt=1)  # overrides prepare.validation_share


class Prepare(_Section):
    collections: list[Collection] = Field(min_length=1)
    validation_share: float = Field(default=0.02, gt=0, lt=1)
    min_chars: int = Field(default=64, ge=1)  # shorter documents are dropped
    max_documents: int | None = Field(default=None, ge=1)  # of each collection, the first so many

    @model_validator(mode="after")
    def _collections_are_usable(self) -> Prepare:
        names = [collection.name for collection in self.collections]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"collection {sorted(twice)[0]!r} is named twice")
        if not any(collection.weight for collection in self.collections):
            raise ValueError("every collection has weight 0: at least one must be above 0")
        return self


class TokenizerSettings(_Section):
    max_bytes: int = Field(default=40_000_000, ge=1)  # of training text, taken from the collections by weight
    threads: int = Field(default=2, ge=1)


class Encode(_Section):
    shard_tokens: int = Field(default=16_000_000, ge=1)
    batch_documents: int = Field(default=256, ge=1)


DropoutShare = Annotated[float, Field(ge=0, le=0.9)]  # in steps of 1/256


class Run(_Section):
    tokens: int = Field(default=10_000_000, ge=1)  # in the whole run; the learning rate's schedule follows from it
    batch_rows: int = Field(default=16, ge=1)  # rows of one context each, over all workers, for one optimizer step
    micro_rows: int = Field(default=16, ge=1)  # rows that one worker puts through at once
    muon_lr: float = Field(default=0.02, gt=0)  # peak learning rate of the blocks' matrices
    adamw_lr: float = Field(default=3e-3, gt=0)  # peak learning rate of the embedding and the norms
    weight_decay: float = Field(default=0.02, ge=0)  # of the matrices
    dropout: DropoutShare | dict[str, DropoutShare] = 0.0  # or by collection: for text that is gone through many times
    warmup_steps: int = Field(default=100, ge=0)
    constant_share: float = Field(default=0.4, ge=0, le=1)  # of the steps, before the linear decay begins
    log_every_steps: int = Field(default=10, ge=1)
    validate_every_steps: int = Field(default=200, ge=1)
    validate_rows: int = Field(default=32, ge=1)  # of each collection
    checkpoint_every_steps: int = Field(default=100, ge=1)
    checkpoint_every_s: float = Field(default=120, ge=0)  # and not oftener than this
    workers: int = Field(default=1, ge=1)
    threads: int = Field(default=2, ge=1)  # of one worker
    bfloat16: bool = False  # matrix products in it, as always on a GPU: faster on a CPU that has AVX512-BF16 or AMX
    compile: bool = False  # the model's blocks, by torch.compile: half a minute at the start, and a C++ compiler
    sample_prompt: str = "Once upon a time"

    def dropout_of(self, collection: str) -> float:
        """Return the dropout of a collection's rows: 0 if `dropout` does not name it."""
        return self.dropout.get(collection, 0.0) if isinstance(self.dropout, dict) else self.dropout


class Export(_Section):
    evaluate_bytes: int = Field(default=200_000, ge=1)  # of held-out text of each collection, for the model card
    n_samples: int = Field(default=10, ge=0)
    n_stories: int = Field(default=200, ge=1)  # to be judged: how varied they are, how much is copied
    prompts: Path = Path("configs/prompts.yaml")  # whose outputs go into prompts.md
    sample_prompt: str = "Once upon a time"
    sample_temperature: float = Field(default=0.8, ge=0)
    sample_top_p: float = Field(default=0.95, gt=0, le=1)
    formats: tuple[Literal["onnx", "huggingface"], ...] = ("onnx", "huggingface")  # besides our own

    @model_validator(mode="after")
    def _sampling_is_usable(self) -> Export:
        self.sampling(max_tokens=1)  # built for its checks
        return self

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How everything is drawn that an exported model shows of itself; the seeds are others' to say."""
        return SamplingParams(max_tokens=max_tokens, temperature=self.sample_temperature, top_p=self.sample_top_p)


class TrainConfig(_Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # of the model: models/<name>
    workdir: Path = Path("data")
    models_dir: Path = Path("models")
    seed: int = Field(default=1, ge=0, lt=2**32)
    start_from: Path | None = None  # a released model to fine-tune: its weights and its tokenizer
    model: dict[str, Any] = {}  # fields of tinylm.ModelConfig that differ from its defaults
    prepare: Prepare
    tokenizer: TokenizerSettings = TokenizerSettings()
    encode: Encode = Encode()
    run: Run = Run()
    export: Export = Export()

    def resolved(self) -> TrainConfig:
        """Return the same settings with absolute paths, for workers that run in other directories."""
        names = ("workdir", "models_dir", "start_from")
        return self.model_copy(update={name: path.resolve() for name in names if (path := getattr(self, name))})

    @property
    def text_dir(self) -> Path:
        return self.workdir / "text"

    @property
    def manifest_path(self) -> Path:
        return self.text_dir / "manifest.json"

    @property
    def tokenizer_path(self) -> Path:
        return self.workdir / "tokenizer.model"

    @property
    def tokens_dir(self) -> Path:
        return self.workdir / "tokens"

    @property
    def index_path(self) -> Path:
        return self.tokens_dir / INDEX_FILE

    @property
    def runs_dir(self) -> Path:
        return self.workdir / "runs"

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / self.name

    @property
    def metrics_path(self) -> Path:
        return self.run_dir / METRICS_FILE

    @property
    def model_config_(self) -> ModelConfig:
        return ModelConfig(**self.model)

    @property
    def weights(self) -> dict[str, float]:
        return {collection.name: collection.weight for collection in self.prepare.collections}

    @model_validator(mode="after")
    def _dropout_is_usable(self) -> TrainConfig:
        named = set(self.run.dropout) if isinstance(self.run.dropout, dict) else set()
        if unknown := sorted(named - set(self.weights)):
            raise ValueError(f"run.dropout: {unknown[0]!r} is not among the collections, {', '.join(self.weights)}")
        return self

    @model_validator(mode="after")
    def _model_is_usable(self) -> TrainConfig:
        try:
            shape = self.model_config_
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {error}") from None
        if shape.vocab_size > MAX_VOCAB:
            raise ValueError(
                f"model.vocab_size is {shape.vocab_size}: at most {MAX_VOCAB}, since tokens are stored as uint16"
            )
        if shape.context < 2:
            raise ValueError(f"model.context is {shape.context}: training needs at least 2 tokens")
        return self


def load_config(path: Path, overrides: list[str] = []) -> TrainConfig:
    """Read `path` and lay `key=value` overrides over it (`run.tokens=2e6`, `prepare.collections.0.weight=0.5`).

    Raises ConfigError naming the file or key that is wrong.
    """
    try:
        values = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"no such config: {path}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not an override: write key=value, as in run.tokens=2e6")
        try:
            value = _parse_value(text)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: {text!r} is not a value: quote it as YAML does") from None
        _assign(values, key, value)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union's, that of the form that was written
        keys = [str(key) for key in first["loc"]]
        where = ".".join(key for key in keys if not key.startswith(("dict[", "constrained-"))) or "settings"
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        raise ConfigError(f"{path}: {where}: {first['msg']}{given}") from None


def _assign(values: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = values
    for name in parents:
        if isinstance(node, list):
            node = node[_index(node, name, key)]
        elif isinstance(node, dict):
            node = node.setdefault(name, {})
        else:
            raise ConfigError(f"{key}: nothing lies below {name!r}")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"{key}: nothing lies below {parents[-1]!r}")


def _index(node: list, name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"{key}: {name!r} is not an index of a list of {len(node)}")
    return int(name)


def _parse_value(text: str) -> Any:
    """'2e6' -> 2000000, 'true' -> True, '[1, 2]' -> [1, 2], 'abc' -> 'abc'. (YAML alone reads 2e6 as a string.)"""
    try:
        number = float(text)
        return int(number) if number.is_integer() else number
    except (ValueError, OverflowError):
        return yaml.safe_load(text)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every stage shares: `--config FILE` and `KEY=VALUE ...`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/train.yaml"), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="over the config, as in run.tokens=2e6")
    return parser
