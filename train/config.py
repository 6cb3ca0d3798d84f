"""The training settings: one pydantic model for `configs/train.yaml`, and `key=value` overrides from the command line.

Every stage reads the same file and takes its own part of it. Paths below `workdir` are laid out here and nowhere else.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinylm.config import ModelConfig
from tinylm.sampling import SamplingParams
from train.metrics import METRICS_FILE

MAX_VOCAB = 2**16  # token shards are uint16
INDEX_FILE = "index.json"  # beside shards
TOLD = "told"  # the collection that `train.tell` makes


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


class Tell(_Section):
    """Stories that a trained model makes up, to be trained on as the collection `told` by the phases that name it."""

    model: Path  # a released model, with the tokenizer of the tokens
    like: str  # the collection whose documents' beginnings they go on from
    begin_tokens: int = Field(default=5, ge=1)  # of such a beginning, the boundary among them
    tokens: int = Field(default=1_000_000, ge=1)  # at least so many, in whole stories
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    without: re.Pattern[str] | None = None  # stories in which this is found are not kept

    @model_validator(mode="after")
    def _sampling_is_usable(self) -> Tell:
        self.sampling(max_tokens=1, seed=0)  # built for its checks
        return self

    def sampling(self, max_tokens: int, seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, seed=seed)


class Teach(_Section):
    """What trained models say of each training token of some collections, to be learnt beside the text itself."""

    models: list[Path] = Field(min_length=1)  # released ones, or runs without Ray, with the tokenizer of the tokens
    collections: list[str] = Field(min_length=1)  # `told` may be among them


class Lengths(_Section):
    """Which documents of a collection are read: of at least and at most so many tokens, the boundary among them."""

    least: int = Field(default=1, ge=1)
    most: int = Field(ge=1)

    @model_validator(mode="after")
    def _least_is_not_above(self) -> Lengths:
        if self.least > self.most:
            raise ValueError(f"least is {self.least}, above most, {self.most}")
        return self


class Phase(_Section):
    """A stretch of the run that has a mixture of its own."""

    from_tokens: int = Field(ge=0)  # of the run, up to the next phase
    weights: dict[str, float]  # by collection, in place of theirs; one that is not named has none
    lengths: dict[str, Lengths] = {}  # by collection: what is read of it; of one that is not named, everything


DropoutShare = Annotated[float, Field(ge=0, le=0.9)]  # in steps of 1/256
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Run(_Section):
    tokens: int = Field(default=10_000_000, ge=1)  # in the whole run; the learning rate's schedule follows from it
    batch_rows: int = Field(default=16, ge=1)  # rows of one context each, over all workers, for one optimizer step
    micro_rows: int = Field(default=16, ge=1)  # rows that one worker puts through at once
    phases: list[Phase] = []  # where the mixture changes; before the first, the collections' own weights hold
    restore: Path | None = None  # a released model of this run to go on from, where there is no checkpoint of it
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for matrices, and AdamW for the rest; adamw: for everything
    muon_lr: float = Field(default=0.02, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    adamw_lr: float = Field(default=3e-3, gt=0)
    adamw_betas: tuple[Beta, Beta] = (0.9, 0.98)
    weight_decay: float = Field(default=0.02, ge=0)
    dropout: DropoutShare | dict[str, DropoutShare] = 0.0  # or by collection: for text that is gone through many times
    taught: Share | dict[str, Share] = 0.5  # how much of the loss is what `teach` wrote of a row; or by collection
    grad_clip: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    constant_share: float = Field(default=0.4, ge=0, le=1)  # of the steps, before the linear decay begins
    final_lr: float = Field(default=0.02, ge=0, le=1)  # of the peak, at the last step
    average_decay: float = Field(default=0.99, ge=0, lt=1)  # of the running average of the weights, a step
    log_every_steps: int = Field(default=10, ge=1)
    validate_every_steps: int = Field(default=200, ge=1)
    validate_rows: int = Field(default=32, ge=1)  # of each collection
    checkpoint_every_steps: int = Field(default=100, ge=1)
    checkpoint_every_s: float = Field(default=120, ge=0)  # and not oftener than this
    keep_checkpoints: int = Field(default=2, ge=1)
    workers: int = Field(default=1, ge=1)
    threads: int = Field(default=2, ge=1)  # of one worker
    bfloat16: bool = False  # matrix products in it, as always on a GPU: faster on a CPU that has AVX512-BF16 or AMX
    compile: bool = False  # the model's blocks, by torch.compile: half a minute at the start, and a C++ compiler
    max_failures: int = Field(default=3, ge=0)  # of a worker, before the run gives up
    sample_prompt: str = "Once upon a time"

    def dropout_of(self, collection: str) -> float:
        """One that is not named has none."""
        return _of(self.dropout, collection)


def _of(shares: float | dict[str, float], collection: str) -> float:
    return shares.get(collection, 0.0) if isinstance(shares, dict) else shares


class Export(_Section):
    average_with: list[Path] = []  # released models that the run went on from: the mean of theirs and its weights
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
    model: dict[str, Any] = {}  # fields of tinylm.ModelConfig that differ from its defaults
    prepare: Prepare
    tokenizer: TokenizerSettings = TokenizerSettings()
    encode: Encode = Encode()
    tell: Tell | None = None
    teach: Teach | None = None
    run: Run = Run()
    export: Export = Export()

    def resolved(self) -> TrainConfig:
        """The same with absolute paths, for workers that run elsewhere."""
        run = self.run.model_copy(update={"restore": self.run.restore and self.run.restore.resolve()})
        paths = {"workdir": self.workdir.resolve(), "models_dir": self.models_dir.resolve()}
        return self.model_copy(update={**paths, "run": run})

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
    def told_dir(self) -> Path:
        return self.workdir / "told"

    @property
    def taught_dir(self) -> Path:
        return self.workdir / "taught"

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

    def taught_of(self, collection: str) -> float:
        """How much of a row's loss is what other models say of it. A collection that none was asked of has none."""
        return _of(self.run.taught, collection) if self.teach and collection in self.teach.collections else 0.0

    @property
    def _read(self) -> set[str]:
        """The collections that are trained on, or may be."""
        return {name for name, weight in self.weights.items() if weight} | ({TOLD} if self.tell else set())

    @model_validator(mode="after")
    def _tell_is_usable(self) -> TrainConfig:
        if self.tell and TOLD in self.weights:
            raise ValueError(f"prepare.collections: {TOLD!r} is what `tell` makes: give the collection another name")
        if self.tell and not self.weights.get(self.tell.like):
            raise ValueError(f"tell.like: {self.tell.like!r} is not among the collections with a weight above 0")
        return self

    @model_validator(mode="after")
    def _phases_are_usable(self) -> TrainConfig:
        starts = [phase.from_tokens for phase in self.run.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"run.phases begin at {starts}: each must begin after the one before")
        for phase in self.run.phases:
            if unknown := sorted(set(phase.weights) - self._read):
                without = ", and nothing is told without `tell`" if unknown[0] == TOLD else ""
                raise ValueError(
                    f"run.phases: {unknown[0]!r} is not among the collections with a weight above 0, "
                    f"{', '.join(sorted(self._read))}{without}"
                )
            if min(phase.weights.values(), default=0.0) < 0 or not any(phase.weights.values()):
                raise ValueError(f"run.phases: weights are {phase.weights}: none below 0, and one above")
            if unread := sorted(name for name in phase.lengths if not phase.weights.get(name)):
                raise ValueError(f"run.phases: lengths are given of {unread[0]!r}, which has no weight there")
        return self

    @model_validator(mode="after")
    def _shares_are_usable(self) -> TrainConfig:
        for key, shares in (("dropout", self.run.dropout), ("taught", self.run.taught)):
            named = set(shares) if isinstance(shares, dict) else set()
            if unknown := sorted(named - set(self.weights) - self._read):
                raise ValueError(f"run.{key}: {unknown[0]!r} is not among the collections, {', '.join(self.weights)}")
        return self

    @model_validator(mode="after")
    def _teach_is_usable(self) -> TrainConfig:
        if not self.teach:
            return self
        if unknown := sorted(set(self.teach.collections) - self._read):
            raise ValueError(
                f"teach.collections: {unknown[0]!r} is not among those that are trained on, "
                f"{', '.join(sorted(self._read))}"
            )
        named = set(self.run.taught) if isinstance(self.run.taught, dict) else set()
        if unsaid := sorted(named - set(self.teach.collections)):
            raise ValueError(f"run.taught: {unsaid[0]!r} is not among teach.collections")
        if unlearnt := [name for name in self.teach.collections if not self.taught_of(name)]:
            raise ValueError(
                f"run.taught is {self.run.taught}: nothing would be learnt of what is said of {unlearnt[0]!r}, "
                f"which is among teach.collections"
            )
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such config: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
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
