"""What an exported model says of itself in Markdown: card, attribution, page of samples. Measures nothing."""

from __future__ import annotations

from tinylm.completion import Completion
from tinylm.sampling import SamplingParams
from train.config import TrainConfig


def model_card(config: TrainConfig, evaluation: dict, manifest: dict) -> str:
    """The model's README: every figure in it comes from `evaluation.json` or the prepared text's manifest."""
    shape = config.model_config_
    rows = []
    for name, score in evaluation["collections"].items():
        figures = (
            score["bits_per_byte"],
            evaluation["int8_weights_bits_per_byte"][name],
            evaluation["float32_bits_per_byte"][name],
        )
        numbers = " | ".join(f"{figure:.4f}" for figure in figures)
        rows.append(f"| {name} | {score['documents']:,} | {score['bytes']:,} | {numbers} |")
    weights = {name: entry["weight"] for name, entry in manifest.items()}
    total = sum(weights.values())
    data = []
    for name, entry in manifest.items():
        licences = "; ".join(entry["train"]["licences"]) or "not stated"
        share = f"{weights[name] / total:.0%}" if weights[name] else "none: held-out text only"
        data.append(
            f"| {name} | {share} | {entry['train']['bytes'] / 1e6:.1f} MB | {licences} | {entry['attribution']} |"
        )
    done, planned = evaluation["tokens_seen"], evaluation["planned_tokens"]
    extent = "the whole of the planned run" if done >= planned * 0.999 else f"{done / planned:.0%} of the planned run"
    return f"""# {config.name}

A decoder-only transformer of {shape.n_parameters / 1e6:.2f} million parameters that continues simple English stories:
hidden size {shape.hidden_size}, {shape.n_layers} layers, {shape.n_heads} heads, MLP {shape.mlp_size}, vocabulary \
{shape.vocab_size}, context {shape.context} tokens. Weights are int8 with one scale per output row.

It knows stories and nothing else: it answers no questions, follows no instructions, and what it says of the world is
made up. Its older sources are books of 1840-1925 and carry the views of their time.

## Training
{done:,} tokens seen ({extent}, {evaluation["step"]:,} steps) in {evaluation["training_wall_s"] / 3600:.1f} hours
on {evaluation["training_machine"]}. The weights are the running average that training keeps.

![loss curve](curve.png)

## Held-out text
Bits per byte, by source-disjoint held-out documents; measured by TinyLM's engine when the model was exported
(`evaluation.json`).

| collection | documents | bytes | as served ({evaluation["arithmetic"]}) | int8 weights, float32 arithmetic | float32 |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

## Data, licences, attribution

| collection | share of training tokens | training text | licence | attribution |
| --- | --- | --- | --- | --- |
{chr(10).join(data)}

[ATTRIBUTION.md](ATTRIBUTION.md) names the authors. No text of these collections is part of this directory.
`samples.md` holds what the model wrote, unedited.
"""


def attribution_page(config: TrainConfig, manifest: dict) -> str:
    """Whose text the model was trained on: licences, attribution and every author named in the text's records."""
    parts = [f"# Whose text {config.name} was trained on\n"]
    for name, entry in manifest.items():
        if not entry["weight"]:
            continue  # held-out text only
        licences = "; ".join(entry["train"]["licences"]) or "not stated"
        authors = entry["train"]["author_names"]
        listed = "".join(f"\n- {' '.join(author.split())}" for author in authors)
        named = f"Authors ({len(authors)}):\n{listed}" if authors else "No author is named in its records."
        parts.append(f"## {name}\n\n{entry['attribution'] or entry['source']}\n\nLicence: {licences}\n\n{named}\n")
    return "\n".join(parts)


def samples_page(config: TrainConfig, samples: list[tuple[SamplingParams, Completion]]) -> str:
    """The samples as the model wrote them, one a seed."""
    export = config.export
    parts = [
        f"# Samples of {config.name}\n\nUnedited, one a seed, none left out: prompt {export.sample_prompt!r}, "
        f"temperature {export.sample_temperature}, top_p {export.sample_top_p}, up to the end of the context.\n"
    ]
    for params, completion in samples:
        story = "\n".join("> " + line for line in (export.sample_prompt + completion.text).split("\n"))
        parts.append(
            f"## Seed {params.seed} ({len(completion.token_ids)} tokens, {completion.finish_reason})\n\n{story}\n"
        )
    return "\n".join(parts)
