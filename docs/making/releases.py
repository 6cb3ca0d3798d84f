"""Compare releases on text that none of them has read, and write docs/results/releases.json.

    python -m docs.making.releases --config configs/stories-8m.yaml "60.7 M tokens=OLD" "50.0 M tokens=NEW"

Give each release as NAME=DIRECTORY, the oldest first. `git worktree` brings back the directory of an earlier one. Run
`train.prepare` before. Of the stories, only those of sources that came after the first release are scored.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinylm.llm import load
from tinylm.model import Model
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import one_line_errors, say
from tinylm.tokenizer import Tokenizer
from tinylm.weights import ModelError
from train.config import TOP_P, ConfigError, TrainConfig, load_config, require
from train.evaluate import Document, answer, evaluate, read_documents, summary
from train.prepare import prepare
from train.release.choices import all_questions
from train.release.generated_text import Story, judge, training_words, write_stories

OUT = Path("docs/results/releases.json")
STORIES = "tinystories"
NEW_SOURCES = ("tinystories-v2-valid", "tinystories-10m", "tinystories-v2-train", "tinystories-misc")
NOTE = (
    "TinyStories: all held-out documents of the sources {sources}. Other collections: up to {size} bytes of each. "
    "Stories: {n} that begin with '{prompt}' (seeds 0 to {last}, temperature {temperature}, top_p {top_p}). Copies are "
    "searched in the training text of the newest release, and in the whole text of the collections' training sources, "
    "without the limit of openings. The held-out stories are those of the scored ones that begin with the same words."
)


def held_out(config: TrainConfig) -> tuple[list[Document], list[Document]]:
    """Return the held-out stories of new sources, and up to `export.evaluate_bytes` of each other collection."""
    others = [c.name for c in config.prepare.collections if c.name != STORIES]
    stories = [
        document
        for document in read_documents([config.text_file(STORIES, "validation")])
        if document.source.startswith(NEW_SOURCES)
    ]
    files = [config.text_file(name, "validation") for name in others]
    return stories, read_documents(files, config.export.evaluate_bytes)


def all_training_words(config: TrainConfig) -> Iterator[list[str]]:
    """Yield the words of all documents of the training sources, as they are without `same_opening`."""
    collections = [c.model_copy(update={"same_opening": None}) for c in config.prepare.collections]
    section = config.prepare.model_copy(update={"collections": collections})
    with tempfile.TemporaryDirectory() as directory:
        whole = config.model_copy(update={"prepare": section, "workdir": Path(directory)})
        prepare(whole)
        yield from training_words(whole.text_file(c.name, "train") for c in collections)


class Comparison:
    """The text on which all releases are compared."""

    def __init__(self, config: TrainConfig) -> None:
        require(config.manifest_path, "train.prepare")
        self.config = config
        self.stories, self.others = held_out(config)
        self.training = list(training_words(config.text_file(c.name, "train") for c in config.prepare.collections))
        self.all_training = list(all_training_words(config))

    def release(self, directory: Path) -> dict[str, Any]:
        """Return the figures of one release: bits per byte, choices, and what its stories are like."""
        tokenizer, model = load(directory, "auto", "auto")
        scores = evaluate(model, tokenizer, [*self.stories, *self.others])
        return {
            "weights": model.weight_type,
            "arithmetic": model.arithmetic,
            "collections": {name: summary(of_collection) for name, of_collection in scores.items()},
            "choices": answer(model, tokenizer, all_questions(self.stories)),
            "stories": self._of_stories(model, tokenizer),
        }

    def _of_stories(self, model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
        export = self.config.export
        params = export.sampling(model.config.context)
        seeded = [replace(params, seed=seed) for seed in range(export.n_stories)]
        return self._judged(write_stories(model, tokenizer, export.sample_prompt, seeded))

    def of_people(self) -> dict[str, Any]:
        """Return the same figures of the held-out stories that begin with the prompt of the samples."""
        texts = [d.text for d in self.stories if d.text.startswith(self.config.export.sample_prompt)]
        figures = self._judged([Story(text, is_ended=True) for text in texts])
        return {key: figures[key] for key in ("texts", "words", *(key for key in figures if key.startswith("copied")))}

    def _judged(self, stories: Sequence[Story]) -> dict[str, Any]:
        read, whole = (judge(stories, {}, text)["model"] for text in (self.training, self.all_training))
        copied = [key for key in whole if key.startswith("copied_grams")]
        renamed = {key.replace("grams", "grams_of_all_collections"): whole[key] for key in copied}
        return {**read, **renamed}


def ratios(releases: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the bits per byte of each collection beside those of the first release."""
    scores = {
        name: {key: figures["bits_per_byte"] for key, figures in release["collections"].items()}
        for name, release in releases.items()
    }
    first, *later = scores
    return {name: {key: round(scores[name][key] / value, 4) for key, value in scores[first].items()} for name in later}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="of the newest release")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument("releases", nargs="+", metavar="NAME=DIRECTORY")
    with one_line_errors(ConfigError, ModelError):
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Measure the releases one after the other, and write the file."""
    directories = dict(release.split("=", 1) for release in arguments.releases if "=" in release)
    if wrong := [release for release in arguments.releases if "=" not in release]:
        raise ConfigError(f"{wrong[0]!r} is no NAME=DIRECTORY")
    check_file(arguments.out)
    config = load_config(arguments.config)
    comparison = Comparison(config)
    releases = {name: comparison.release(Path(directory)) for name, directory in directories.items()}
    export = config.export
    result = {
        **describe(),
        "command": "python -m docs.making.releases --config CONFIG NAME=DIRECTORY ...",
        "note": NOTE.format(
            sources=", ".join(NEW_SOURCES),
            size=export.evaluate_bytes,
            n=export.n_stories,
            prompt=export.sample_prompt,
            last=export.n_stories - 1,
            temperature=export.sample_temperature,
            top_p=TOP_P,
        ),
        "releases": releases,
        "ratio_of_bits_per_byte": ratios(releases),
        "held_out_stories_from_once_upon_a_time": comparison.of_people(),
    }
    write_file(arguments.out, (json.dumps(result, indent=2) + "\n").encode())
    say(f"{arguments.out}: {len(releases)} releases")


if __name__ == "__main__":
    main()
