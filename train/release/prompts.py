"""The fixed prompts of a model's prompts.md: a YAML file of seeds and texts, and a model's answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tinylm.engine.completion import Completion
from tinylm.llm import LLM
from tinylm.sampling import MAX_SEED, SamplingParams
from tinylm.system.text_files import read_text
from train.config import ConfigError


class Prompt(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(ge=0, le=MAX_SEED)
    text: str


def load_prompts(path: Path) -> list[Prompt]:
    """Read the prompts; raises ConfigError that names the file and the wrong entry."""
    try:
        return TypeAdapter(list[Prompt]).validate_python(yaml.safe_load(read_text(path)))
    except FileNotFoundError:
        raise ConfigError(f"no such file of prompts: {path}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the list of prompts"
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None


def answers(llm: LLM, prompts: list[Prompt], params: SamplingParams) -> list[Completion | None]:
    """Return a completion for each prompt and its seed; None if the prompt does not fit into the context."""
    completions: list[Completion | None] = []
    for prompt in prompts:
        fits = len(llm.tokenizer.encode_document(prompt.text)) < llm.config.context
        completions.append(llm.generate(prompt.text, replace(params, seed=prompt.seed))[0] if fits else None)
    return completions
