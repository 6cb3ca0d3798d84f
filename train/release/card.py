"""The Markdown pages of an exported model: card, attribution, samples and answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tinylm.engine.completion import Completion
from tinylm.sampling import SamplingParams
from train.config import TOP_P, TrainConfig
from train.release.prompts import Prompt


def model_card(config: TrainConfig, evaluation: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Return the model's README. Its figures come from `evaluation.json` and from the manifest of the text."""
    shape = config.shape
    done, planned = evaluation["tokens_seen"], evaluation["planned_tokens"]
    extent = "the whole of the planned run" if done >= planned * 0.999 else f"{done / planned:.0%} of the planned run"
    hours = evaluation["training_wall_s"] / 3600
    start = f"Training started from the weights of {source}. " if (source := evaluation["started_from"]) else ""
    return f"""# {config.name}

A decoder-only transformer of {shape.n_parameters / 1e6:.2f} million parameters that continues simple English stories:
hidden size {shape.hidden_size}, {shape.n_layers} layers, {shape.n_heads} heads, MLP {shape.mlp_size}, vocabulary \
{shape.vocab_size}, context {shape.context} tokens. Weights are int8 with one scale per output row.

It knows stories and nothing else: it answers no questions, follows no instructions, and makes up what it says about the
world.

## Training
{done:,} tokens seen ({extent}, {evaluation["step"]:,} steps) in {hours:.1f} hours
on {evaluation["training_machine"]}: {done / hours / 3600:,.0f} tokens/s. {start}The weights are
the running average that training keeps. The hash of the settings begins with `{evaluation["config_sha256"][:12]}`.

![loss curve](curve.png)

## Held-out text
Bits per byte of documents from sources (books, or single stories) that are not in the training text, measured with
TinyLM's engine (`evaluation.json`). Long documents are represented by stretches. The interval comes from 2,000 random
draws of the sources; with fewer than ten sources it is too narrow.

{_held_out_table(evaluation)}

{_choices(evaluation["choices"])}## What it writes
{_generated_text(evaluation["generated_text"])}

## Data, licences, attribution

{_data_table(evaluation, manifest)}

[ATTRIBUTION.md](ATTRIBUTION.md) names the authors. This directory holds no text of these collections, except where the
model repeats it. [samples.md](samples.md) holds unedited samples, and [prompts.md](prompts.md) the answers to prompts
that are the same for every model.
"""


def _table(*head: str, rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _held_out_table(evaluation: dict[str, Any]) -> str:
    rows = []
    for name, score in evaluation["collections"].items():
        low, high = score["interval_95"]
        counts = [f"{score[key]:,}" for key in ("documents", "sources", "bytes")]
        exact = evaluation["float32_bits_per_byte"][name]
        rows.append([name, *counts, f"{score['bits_per_byte']:.4f}", f"{low:.4f} to {high:.4f}", f"{exact:.4f}"])
    served = f"as served ({evaluation['arithmetic']})"
    return _table(
        "collection", "documents or stretches", "sources", "bytes", served, "95 % interval", "float32", rows=rows
    )


def _data_table(evaluation: dict[str, Any], manifest: dict[str, Any]) -> str:
    rows = []
    for name, entry in manifest.items():
        licences = "; ".join(sorted({*entry["train"]["licences"], *entry["validation"]["licences"]})) or "not stated"
        seen = ["none: held-out text only", "", "", ""]
        if tokens := evaluation["tokens_by_collection"].get(name, 0):
            share, size = tokens / evaluation["tokens_seen"], entry["train"]["bytes"] / 1e6
            seen = [f"{tokens:,}", f"{share:.1%}", f"{size:.1f} MB", f"{evaluation['passes_by_collection'][name]:.1f}"]
        rows.append([name, *seen, licences, entry["attribution"]])
    head = ("collection", "training tokens", "share", "training text", "passes", "licence", "attribution")
    return _table(*head, rows=rows)


def _choices(figures: dict[str, Any]) -> str:
    """Return the section of the figures of `train.evaluate.answer`; nothing if no story gave a question."""
    rows = []
    for kind, of_kind in figures.items():
        low, high = of_kind["interval_95"]
        rows.append([kind, str(of_kind["questions"]), f"{of_kind['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"])
    if not rows:
        return ""
    return f"""## Choices
Each question has a held-out story as its author wrote it, and a changed one. The model is right if the first is more
likely. A model that guesses is right half of the time.

- Endings: the last sentence is exchanged for that of another story with the same first name.
- Names: one name is exchanged for another of the same length.
- Order: two adjacent sentences are exchanged.

{_table("kind", "questions", "right", "95 % interval", rows=rows)}

"""


def _generated_text(figures: dict[str, Any]) -> str:
    """Return the paragraph and the table of the figures of `train.release.generated_text`."""
    gram, distinct = figures["copied_gram_words"], figures["distinct_gram_words"]
    model, held_out = figures["model"], figures["held_out"]
    writers = {"**the model**": model, **held_out}
    copies = ("longest copy, mean", "longest copy", f"{gram}-word runs copied")
    head = ("writer", "texts", "unpaired", "letters", "distinct", *copies)
    table = _table(*head, rows=[_writer_row(name, of) for name, of in writers.items()])
    sampling = f"temperature {figures['temperature']}, top_p {figures['top_p']}"
    return f"""{model["texts"]} stories that begin with "{figures["prompt"]}" ({sampling}), beside held-out text,
which people wrote, in pieces of the same mean length.

{model["ended"]:.1%} of the stories end within the context.

- Unpaired: the share of whole texts with an odd number of quotation marks.
- Letters: the share of whole texts with letters in place of quotation marks, as in "aThank you!a she said".

- Distinct: the share of distinct {distinct}-word runs among the first {figures["distinct_among_words"]:,} words.
- Longest copy: the longest run of words that the training text has too, in the mean text and in any text.
- Copied: the share of {gram}-word runs that the training text has too. If held-out text has such runs, some text is in
  the collections twice, and its bits per byte are too low.

Case and punctuation do not count.

{table}

The model's longest copy: "{model["longest_run_text"]}"."""


def _writer_row(name: str, figures: dict[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "none" if figures[key] is None else format(figures[key], form)

    mean = "none" if figures["longest_run_mean"] is None else f"{figures['longest_run_mean']:.1f} words"
    longest = f"{figures['longest_run']} words"
    shares = [shown(key, ".1%") for key in ("unpaired_quotes", "letters_for_quotes", "distinct_grams")]
    return [name, str(figures["texts"]), *shares, mean, longest, shown("copied_grams", ".2%")]


def attribution_page(config: TrainConfig, manifest: dict[str, Any]) -> str:
    """Return the licences, the attribution and all authors of the text that the model was trained on."""
    parts = [f"# Whose text {config.name} was trained on\n"]
    for name, entry in manifest.items():
        if not entry["train"]["documents"]:
            continue  # held-out text only
        licences = "; ".join(entry["train"]["licences"]) or "not stated"
        authors = entry["train"]["author_names"]
        listed = "".join(f"\n- {' '.join(author.split())}" for author in authors)
        named = f"Authors ({len(authors)}):\n{listed}" if authors else "No author is named in its records."
        parts.append(f"## {name}\n\n{entry['attribution'] or entry['source']}\n\nLicence: {licences}\n\n{named}\n")
    if config.start_from and (page := config.start_from / "ATTRIBUTION.md").exists():
        parts.append(f"# The model that training started from\n\n{page.read_text(encoding='utf-8')}")
    return "\n".join(parts)


def samples_page(config: TrainConfig, samples: list[tuple[SamplingParams, Completion]]) -> str:
    """Return the page of samples, one for each seed."""
    export = config.export
    parts = [
        f"# Samples of {config.name}\n\nUnedited and complete, one for each seed: prompt {export.sample_prompt!r}, "
        f"temperature {export.sample_temperature}, top_p {TOP_P}, up to the end of the context.\n"
    ]
    for params, completion in samples:
        parts.append(
            f"## Seed {params.seed} ({_extent(completion)})\n\n{_quoted(export.sample_prompt + completion.text)}\n"
        )
    return "\n".join(parts)


def prompts_page(config: TrainConfig, answers: list[tuple[Prompt, Completion | None]]) -> str:
    """Return the page of answers to the fixed prompts, the prompts in bold. None: the prompt is too long."""
    export = config.export
    parts = [
        f"# Answers of {config.name} to {export.prompts.name}\n\nUnedited and complete, one for each prompt: "
        f"temperature {export.sample_temperature}, top_p {TOP_P}, up to the end of the context. Every released model "
        "has the same prompts and seeds.\n"
    ]
    for number, (prompt, completion) in enumerate(answers, 1):
        begun = "\n".join(f"**{line}**" if line else "" for line in prompt.text.strip().split("\n"))
        rest = prompt.text[len(prompt.text.rstrip()) :]
        if completion is None:
            parts.append(f"## {number} (longer than this model's context)\n\n{_quoted(begun)}\n")
        else:
            text = _quoted(begun + rest + completion.text)
            parts.append(f"## {number} (seed {prompt.seed}, {_extent(completion)})\n\n{text}\n")
    return "\n".join(parts)


def _extent(completion: Completion) -> str:
    return f"{len(completion.token_ids)} tokens, {completion.finish_reason}"


def _quoted(text: str) -> str:
    return "\n".join("> " + line for line in text.split("\n"))
