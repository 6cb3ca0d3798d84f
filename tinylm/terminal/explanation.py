"""Print an explanation as tables: tokens, the answer after each layer, and how the settings choose the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Column, Table

from tinylm.explain.results import CacheUse, Candidate, Lens, Scores, Token
from tinylm.terminal.output import PlainConsole

MOST_REMOVED = 5  # tokens that are listed for each setting


def show_tokens(tokens: Sequence[Token], console: PlainConsole) -> None:
    table = Table("position", "id", "text", "bytes")
    for position, token in enumerate(tokens):
        table.add_row(str(position), str(token.id), repr(token.text), bytes(token.bytes).hex(" "))
    console.print(table)


def show_lens(lens: Lens, norms: np.ndarray, console: PlainConsole) -> None:
    """Print what the model would answer at `lens.position`. norms: (layers + 1, T), as `Explainer.norms` returns."""
    answer = lens.answers[lens.position]
    console.print(f"After each layer, the rank of the model's answer {answer.text!r} and the most likely tokens:")
    table = Table("layer", "length", "rank", "most likely next tokens")
    for layer, (ranks, top) in enumerate(zip(lens.ranks, lens.top, strict=True), 1):
        best = ", ".join(map(_share, top))
        table.add_row(str(layer), f"{norms[layer, lens.position]:.1f}", f"{ranks[lens.position]:,}", best)
    console.print(table)


def show_scores(scores: Scores, top: int, console: PlainConsole) -> None:
    """Print the `top` most likely tokens and the chosen one, and what each setting removed.

    A setting that changes no probability has no column. "share" is the probability that a setting removed.
    """
    shares = scores.probabilities  # (N, stages)
    columns = [0, *(i for i in range(1, shares.shape[1]) if not np.allclose(shares[:, i], shares[:, i - 1]))]
    console.print("The probability of the next token, by the model and after each setting that changes it:")
    table = Table(Column("token", no_wrap=True), "logit", *(_title(scores, i) for i in columns))
    for i, token in enumerate(scores.tokens):
        if i < top or token in (scores.chosen, scores.greedy):
            row = (_percent(share) if share > 0 else "removed" for share in shares[i, columns])
            table.add_row(repr(token.text), f"{scores.logits[i]:.2f}", *row)
    console.print(table)
    table = Table(Column("setting", no_wrap=True), "value", "kept", "removed", "share", "most likely of the removed")
    by_id = {token.id: token for token in scores.tokens}
    for stage in scores.stages[1:]:
        removed = ", ".join(repr(by_id[token].text) for token in stage.removed[:MOST_REMOVED])
        value = "" if stage.value is None else f"{stage.value:g}"
        counts = (f"{stage.n_kept:,}", f"{stage.n_removed:,}", _percent(stage.removed_probability))
        table.add_row(stage.name, value, *counts, removed)
    console.print(table)


def show_summary(scores: Scores, cache: CacheUse, seed: int | None, console: PlainConsole) -> None:
    """Print the next token, the difference to the engine, and the prompt's part of the KV cache."""
    rule = "greedy" if seed is None else f"seed {seed}"
    console.print(f"next token ({rule}): {scores.chosen.text!r}")
    if scores.difference is not None:
        same = "the same token" if scores.difference.same_token else f"token {scores.difference.token}"
        console.print(
            f"the engine ({cache.arithmetic}) takes {same}; its log-probabilities differ by at most "
            f"{scores.difference.largest:.1g}"
        )
    console.print(
        f"KV cache: {cache.used_positions} of {cache.slot_positions} positions of a slot, "
        f"{cache.used_bytes:,} of {cache.slot_bytes:,} bytes"
    )


def _title(scores: Scores, i: int) -> str:
    stage = scores.stages[i]
    return stage.name if stage.value is None else f"{stage.name}\n{stage.value:g}"


def _share(candidate: Candidate) -> str:
    return f"{candidate.token.text!r} {_percent(candidate.probability)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
