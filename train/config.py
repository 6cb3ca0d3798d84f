"""The training settings: a YAML file, and `KEY=VALUE` overrides from the command line of each stage.

Every stage reads the same file and uses its section. Only this module knows the paths below `workdir`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tinylm.config import ModelConfig
from tinylm.sampling import SamplingParams
from tinylm.system.text_files import read_text
from tinylm.terminal.output import one_line_errors
from tinylm.weights import ModelError

MAX_VOCAB = 2**16  # token shards are uint16
METRICS_FILE = "metrics.jsonl"  # in a run's directory, and in that of its exported model
TOP_P = 0.95  # of every sample of an exported model

T = TypeVar("T")


class ConfigError(ValueError):
    """The user must correct a setting or a file. The message names it and says what is wrong."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Collection(_Section):
    """One body of text, its licence, and its share of the training rows."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    source: str  # a file, a pattern of files, or a Hugging Face dataset id
    weight: float = Field(ge=0)  # share of the training rows, in any unit; 0 holds out the whole collection
    licence: str = ""
    attribution: str = ""
    text_column: str = "text"
    source_column: str = "source"  # documents with the same value stay together; without it, each document is a source
    minimum: dict[str, float] = {}  # keep only rows whose column is at least this
    # Most training documents with the same first 12 words; others lose their first sentences.
    # Left out of the hash when unset, as in configs that lack it.
    same_opening: int | None = Field(default=None, ge=1, exclude_if=lambda limit: limit is None)


class Prepare(_Section):
    collections: list[Collection] = Field(min_length=1)
    validation_share: float = Field(default=0.02, gt=0, lt=1)
    max_documents: int | None = Field(default=None, ge=1)  # keep only the first ones of each collection

    @model_validator(mode="after")
    def _check_collections(self) -> Prepare:
        names = [collection.name for collection in self.collections]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"collection {sorted(twice)[0]!r} is named twice")
        if not any(collection.weight for collection in self.collections):
            raise ValueError("every collection has weight 0: at least one must be above 0")
        return self


class Encode(_Section):
    shard_tokens: int = Field(default=16_000_000, ge=1)


DropoutShare = Annotated[float, Field(ge=0, le=0.9)]  # rounded to 1/256


class Run(_Section):
    tokens: int = Field(default=10_000_000, ge=1)  # of the whole run; the learning rate schedule follows from it
    batch_rows: int = Field(default=16, ge=1)  # rows of one context for an optimizer step, over all workers
    micro_rows: int = Field(default=16, ge=1)  # rows that one worker computes at once
    muon_lr: float = Field(default=0.02, gt=0)  # peak learning rate of the blocks' matrices
    adamw_lr: float = Field(default=3e-3, gt=0)  # peak learning rate of the embedding and the norms
    weight_decay: float = Field(default=0.02, ge=0)  # of the blocks' matrices
    dropout: DropoutShare | dict[str, DropoutShare] = 0.0  # for all rows, or by collection
    warmup_steps: int = Field(default=100, ge=0)
    constant_share: float = Field(default=0.4, ge=0, le=1)  # of the steps, before the linear decay begins
    final_share: float = Field(default=0.0, ge=0, le=1)  # of the steps, at the end, which read only short documents:
    final_max_tokens: dict[str, Annotated[int, Field(ge=1)]] = {}  # at most so many tokens, by collection
    log_every_steps: int = Field(default=10, ge=1)
    validate_every_steps: int = Field(default=200, ge=1)
    checkpoint_every_steps: int = Field(default=100, ge=1)
    checkpoint_every_s: float = Field(default=120, ge=0)  # the least time between two checkpoints
    workers: int = Field(default=1, ge=1)
    threads: int = Field(default=2, ge=1)  # of one worker
    bfloat16: bool = False  # faster on a CPU with AVX512-BF16 or AMX; a GPU always uses it
    compile: bool = False  # compile the model's blocks; needs a C++ compiler and half a minute at the start
    sample_prompt: str = "Once upon a time"

    def dropout_of(self, collection: str) -> float:
        """Return the dropout of a collection's rows: 0 if `dropout` does not name it."""
        return self.dropout.get(collection, 0.0) if isinstance(self.dropout, dict) else self.dropout


class Export(_Section):
    evaluate_bytes: int = Field(default=200_000, ge=1)  # of held-out text of each collection
    n_samples: int = Field(default=10, ge=0)  # stories in samples.md
    n_stories: int = Field(default=300, ge=1)  # stories that are measured
    prompts: Path = Path("configs/prompts.yaml")  # the answers to these go into prompts.md
    sample_prompt: str = "Once upon a time"
    sample_temperature: float = Field(default=0.8, ge=0)
    formats: tuple[Literal["onnx", "huggingface"], ...] = ("onnx", "huggingface")  # besides TinyLM's own

    @model_validator(mode="after")
    def _check_sampling(self) -> Export:
        self.sampling(max_tokens=1)  # SamplingParams raises ValueError
        return self

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Return the settings of an exported model's samples, without a seed."""
        return SamplingParams(max_tokens=max_tokens, temperature=self.sample_temperature, top_p=TOP_P)


class TrainConfig(_Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # of the model: models/<name>
    workdir: Path = Path("data")
    models_dir: Path = Path("models")
    seed: int = Field(default=1, ge=0, lt=2**32)
    start_from: Path | None = None  # a released model to fine-tune: its weights and its tokenizer
    model: dict[str, Any] = {}  # fields of tinylm.ModelConfig that differ from its defaults
    prepare: Prepare
    encode: Encode = Encode()
    run: Run = Run()
    export: Export = Export()

    @model_validator(mode="after")
    def _check_sections_together(self) -> TrainConfig:
        target = self.models_dir / self.name
        if self.start_from and self.start_from.resolve() == target.resolve():
            raise ValueError(f"name is {self.name!r}: {target} is start_from and would be replaced: set another name")
        dropout = self.run.dropout if isinstance(self.run.dropout, dict) else {}
        for key, by_collection in (("dropout", dropout), ("final_max_tokens", self.run.final_max_tokens)):
            if unknown := sorted(by_collection.keys() - self.weights.keys()):
                raise ValueError(f"run.{key}: {unknown[0]!r} is not among the collections, {', '.join(self.weights)}")
        if self.run.final_share and not self.run.final_max_tokens:
            raise ValueError(f"run.final_share is {self.run.final_share}: run.final_max_tokens must name a collection")
        try:
            shape = self.shape
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {error}") from None
        if shape.vocab_size > MAX_VOCAB:
            raise ValueError(
                f"model.vocab_size is {shape.vocab_size}: at most {MAX_VOCAB}, since tokens are stored as uint16"
            )
        if shape.context < 2:
            raise ValueError(f"model.context is {shape.context}: training needs at least 2 tokens")
        return self

    def with_absolute_paths(self) -> TrainConfig:
        """Return the settings with absolute paths, because Ray's workers run in other directories."""
        names = ("workdir", "models_dir", "start_from")
        return self.model_copy(update={name: path.resolve() for name in names if (path := getattr(self, name))})

    @property
    def text_dir(self) -> Path:
        return self.workdir / "text"

    def text_file(self, collection: str, split: str) -> Path:
        return self.text_dir / f"{collection}.{split}.parquet"

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
    def run_dir(self) -> Path:
        return self.workdir / "runs" / self.name

    @property
    def metrics_path(self) -> Path:
        return self.run_dir / METRICS_FILE

    @property
    def shape(self) -> ModelConfig:
        return ModelConfig(**self.model)

    @property
    def weights(self) -> dict[str, float]:
        return {collection.name: collection.weight for collection in self.prepare.collections}

    @property
    def sha256(self) -> str:
        """The hash of all settings but the directories of this machine."""
        values = self.model_dump(mode="json", exclude={"workdir", "models_dir", "start_from"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def tokens_per_step(self) -> int:
        return self.run.batch_rows * self.shape.context

    @property
    def steps(self) -> int:
        """The complete optimizer steps in `run.tokens`, at least one."""
        return max(1, self.run.tokens // self.tokens_per_step)

    @property
    def final_row(self) -> int:
        """The first row of the final steps, which read only short documents."""
        return round(self.steps * (1 - self.run.final_share)) * self.run.batch_rows


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a config and apply `key=value` overrides, such as `run.tokens=2e6` or `prepare.collections.0.weight=0.5`.

    Raises ConfigError with one line that names the file or the key that is wrong.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings")
    for override in overrides:
        _apply(values, override)
    return validated(TrainConfig, values, path)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; raise ConfigError, which names it, when it cannot be read."""
    try:
        return yaml.safe_load(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None


def validated(kind: type[T], values: Any, path: Path) -> T:
    """Return the content of `path` as an object of this type; raise ConfigError, which names the wrong key."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = max(error.errors(), key=lambda found: len(found["loc"]))  # of a union, the form that was meant
    keys = [str(key) for key in first["loc"] if not str(key).startswith(("dict[", "constrained-"))]
    given = "" if isinstance(first["input"], dict | list) else f" (given: {first['input']!r})"
    raise ConfigError(f"{path}: {'.'.join(keys) or 'the whole file'}: {first['msg']}{given}")


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one key of nested settings; raise ConfigError when it is not `key=value` or lies below a plain value."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override: write key=value, as in run.tokens=2e6")
    *parents, last = key.split(".")
    node: Any = values
    try:
        for name in parents:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        node[int(last) if isinstance(node, list) else last] = _parse(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {text!r} is not a value: quote it as YAML does") from None
    except (AttributeError, IndexError, TypeError, ValueError):
        raise ConfigError(f"{key}: the config has no such key") from None


def _parse(text: str) -> Any:
    """'2e6' -> 2000000, 'true' -> True, '[1, 2]' -> [1, 2], 'abc' -> 'abc'. YAML alone reads 2e6 as a string."""
    try:
        number = float(text)
        return int(number) if number.is_integer() else number
    except ValueError:
        return yaml.safe_load(text)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that every stage has: `--config FILE` and `KEY=VALUE ...`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/train.yaml"), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a setting, as in run.tokens=2e6")
    return parser


def run_stage(description: str | None, stage: Callable[[TrainConfig], Any]) -> None:
    """Parse the command line and run the stage. Print an error that the user can correct as one line."""
    with one_line_errors(ConfigError, ModelError):
        arguments = command_line(description).parse_args()
        stage(load_config(arguments.config, arguments.overrides))


def require(path: Path, made_by: str) -> None:
    """Raise ConfigError that names the command to run when a stage's input is missing."""
    if not path.exists():
        raise ConfigError(f"{path} is missing: run `python -m {made_by}` first")
