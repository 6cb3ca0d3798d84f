"""Stories that a trained model makes up, to train on: the collection `told`, as shards of token ids.

    python -m train.tell [--config configs/train.yaml] [KEY=VALUE ...]

A small collection is soon known by heart, by teachers too; of stories that none of them has read, they say what they
would say of any (Kim et al. 2025, "Pre-training under infinite compute"). Each is begun with the first tokens of one
of the collection `tell.like`, and kept if it ends within the context and `tell.without` is not found in it. Writes
`<workdir>/told/told-00000.npy`, as `train.encode` would, and `index.json`. How much of them is read is for `run.phases`
to say.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import numpy as np

from tinylm.engine import Engine
from tinylm.llm import load
from tinylm.model import Model
from tinylm.tokenizer import Tokenizer
from tinylm.weights import TENSORS, TOKENIZER
from train.config import INDEX_FILE, TOLD, ConfigError, Tell, TrainConfig
from train.data import OF_TOKENS, Documents, read_tokens
from train.encode import TOKEN_DTYPE
from train.files import file_sha256, replace_directory
from train.stage import progress, require, run_stage

N_SLOTS = 16  # stories that are told at once
TRIED = 500  # stories after which a model is given up of which hardly any is kept
LEAST_KEPT = 0.02


def told_stories(
    tokenizer: Tokenizer, model: Model, settings: Tell, like: Documents, context: int, seed: int
) -> Iterator[np.ndarray]:
    """Stories without end, the boundary before each, at most `context` tokens: the same for the same seed.

    Raises ConfigError when hardly any comes to an end, or may be kept.
    """
    engine = Engine(model, n_slots=N_SLOTS)
    rng = np.random.default_rng(seed)
    tried = kept = 0
    while True:
        while engine.n_running + engine.n_waiting < N_SLOTS:
            begin = like.tokens(int(rng.integers(len(like))))[: settings.begin_tokens].tolist()
            engine.submit(begin, settings.sampling(context - len(begin), seed=int(rng.integers(2**32))))
        for sequence in engine.step():
            tried += sequence.finish_reason is not None
            if sequence.finish_reason == "stop":
                story = [*sequence.prompt, *sequence.tokens]
                if settings.without and settings.without.search(tokenizer.decode(story[1:])):
                    continue
                kept += 1
                yield np.array(story, TOKEN_DTYPE)
        if tried >= TRIED and kept < LEAST_KEPT * tried:
            which = f"ended within {context} tokens" + (", without what is not wanted" if settings.without else "")
            raise ConfigError(f"tell.model: of {tried} stories only {kept} {which}: too few")


def tell(config: TrainConfig) -> None:
    """Run the stage, where the config has a section `tell`. What was told before stays until the new is whole."""
    settings = config.tell
    if settings is None:
        print(f"{TOLD}: nothing, since the config has no section `tell`")
        return
    require(config.index_path, "train.encode")
    tokens_index, documents = read_tokens(config.tokens_dir)
    tokenizer, model = load(settings.model)
    if file_sha256(settings.model / TOKENIZER) != tokens_index["tokenizer_sha256"]:
        raise ConfigError(f"tell.model: {settings.model} has another tokenizer than the tokens were made with")
    if settings.like not in documents["train"]:
        raise ConfigError(f"tell.like: {config.tokens_dir} has no tokens of {settings.like!r} to train on")
    context = min(config.model_config_.context, model.config.context)
    if settings.begin_tokens >= context:
        raise ConfigError(f"tell.begin_tokens is {settings.begin_tokens}: the context is {context}")
    stories: list[np.ndarray] = []
    n_tokens = 0
    with progress("tokens") as bar:
        task = bar.add_task(TOLD, total=settings.tokens)
        for story in told_stories(tokenizer, model, settings, documents["train"][settings.like], context, config.seed):
            stories.append(story)
            n_tokens += len(story)
            bar.update(task, completed=min(n_tokens, settings.tokens))
            if n_tokens >= settings.tokens:
                break
    shard = f"{TOLD}-00000.npy"
    index = {key: tokens_index[key] for key in OF_TOKENS} | {
        "told_by": {file_sha256(settings.model / TENSORS): settings.model.resolve().name},
        "settings": settings.model_dump(mode="json") | {"seed": config.seed},
        "collections": {TOLD: {"train": {"shards": [shard], "tokens": n_tokens, "documents": len(stories)}}},
    }
    partial = config.told_dir.with_name("told.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.save(partial / shard, np.concatenate(stories))
    (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    replace_directory(partial, config.told_dir)
    print(f"{TOLD}: {n_tokens:,} tokens in {len(stories):,} stories, begun as those of {settings.like}")


if __name__ == "__main__":
    run_stage(__doc__, tell)
