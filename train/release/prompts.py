"""The fixed prompts of a model's prompts.md, and a model's answers to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from tinylm.engine.completion import Completion
from tinylm.llm import LLM
from tinylm.sampling import MAX_SEED, SamplingParams
from train.config import read_yaml, validated


class Prompt(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(ge=0, le=MAX_SEED)
    text: str


def load_prompts(path: Path) -> list[Prompt]:
    """Read a YAML list of seeds and texts; raise ConfigError that names the file and the wrong entry."""
    return validated(list[Prompt], read_yaml(path), path)


def answers(llm: LLM, prompts: list[Prompt], params: SamplingParams) -> list[Completion | None]:
    """Return a completion for each prompt and its seed; None if the prompt does not fit into the context."""
    completions: list[Completion | None] = []
    for prompt in prompts:
        fits = len(llm.tokenizer.encode_document(prompt.text)) < llm.config.context
        completions.append(llm.generate(prompt.text, replace(params, seed=prompt.seed))[0] if fits else None)
    return completions
