"""Draw the pictures of docs/how-it-works.md from committed results.

    python -m docs.making.pictures

`docs.making.measure` and `tinylm bench` write these results.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinylm.system.files import write_file

RESULTS = Path("docs/results")
OUT = Path("docs/images")
Results = dict[str, Any]  # name of the file -> content
BLUE, ORANGE, GREY = "#2f6db3", "#d9822b", "#9aa5b1"


def attention(results: Results) -> Figure:
    """Draw which tokens three heads attend to, on one story."""
    inside = results["pictures"]["inside"]
    labels = [piece.strip() or "␣" for piece in inside["pieces"]]
    figure = Figure((13, 4.9), layout="constrained")
    for axes, head in zip(figure.subplots(1, 3), inside["heads"], strict=True):
        axes.imshow(np.array(head["weights"]), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {head['layer']}, head {head['head']}: {head['looks_at']}", fontsize=10)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
        axes.set_xlabel("attended token", fontsize=8)
    figure.axes[0].set_ylabel("token", fontsize=8)
    return figure


def lens(results: Results) -> Figure:
    """Draw the rank of the answer among all tokens after each layer."""
    inside = results["pictures"]["inside"]
    ranks = np.array(inside["lens"]["ranks"])  # (layers, positions)
    layers = np.arange(1, len(ranks) + 1)
    figure, axes = _axes("rank of the final answer if the model ended after this layer")
    axes.plot(layers, ranks, color=GREY, linewidth=0.6, alpha=0.6)
    axes.plot(layers, np.median(ranks, axis=1), color=BLUE, linewidth=2, label="median of all positions")
    answer = inside["lens"]["answer"].strip()
    axes.plot(layers, ranks[:, -1], color=ORANGE, linewidth=2, label=f'the last position, answer "{answer}"')
    axes.set(yscale="log", xticks=layers, xlabel="layer", ylabel="rank (1 is the most likely)")
    axes.invert_yaxis()
    axes.legend()
    return figure


def rotation(results: Results) -> Figure:
    """Draw how four of a head's pairs of numbers rotate with the position."""
    shape = results["pictures"]["shape"]
    positions = np.arange(shape["context"])
    figure, axes = _axes("rotary positions: cosine of a pair's rotation angle")
    speeds = shape["radians_a_token"]
    for pair, colour in zip((1, 3, 6, len(speeds) - 1), (GREY, BLUE, ORANGE, "black"), strict=True):
        label = f"pair {pair + 1}: {speeds[pair]:.2g} radians per token"
        width = 0.7 if pair < 3 else 1.6
        axes.plot(positions, np.cos(speeds[pair] * positions), color=colour, linewidth=width, label=label)
    axes.set_xlabel("position in the context")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def cache(results: Results) -> Figure:
    """Draw the CPU time of the next token by text length, with and without a KV cache."""
    cache = results["pictures"]["cache"]
    figure, axes = _axes("the next token: with the cache, and reading the whole text again")
    axes.plot(cache["lengths"], cache["without_ms"], "o-", color=ORANGE, label="without a cache")
    axes.plot(cache["lengths"], cache["with_ms"], "o-", color=BLUE, label="with the KV cache")
    axes.set(ylim=(0, None), xlabel="tokens so far", ylabel="CPU ms per token")
    axes.legend()
    return figure


def eight_bits(results: Results) -> Figure:
    """Draw a stored row of weights, and a matmul's input before and after rounding."""
    pictures = results["pictures"]
    weights, activation = pictures["weights"], pictures["inside"]["activation"]
    before = np.array(activation["before"])
    after = np.array(activation["after"]) * activation["scale"]
    figure = Figure((11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.hist(weights["values"], np.arange(-128, 129, 8), color=BLUE)
    middle.plot(before, after, ".", color=BLUE, markersize=4)
    right.plot(before, before - after, ".", color=ORANGE, markersize=4)
    for side in (-0.5, 0.5):
        right.axhline(side * activation["scale"], color=GREY, linewidth=1)
    for axes, title, xlabel, ylabel in (
        (left, f"row {weights['row']} of a matrix, as stored", f"integer (times {weights['scale']:.5f})", "weights"),
        (middle, "a matmul's input and its rounding", "before", "after"),
        (right, "the error: at most half a step", "before", ""),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.set_ylabel(ylabel, fontsize=8)
    return figure


def next_token(results: Results) -> Figure:
    """Draw the most likely next tokens at several temperatures."""
    shown = results["pictures"]["next_token"]
    figure = Figure((11, 3.4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(shown["settings"]), sharey=True), shown["settings"], strict=True):
        colours = [BLUE if rank < setting["kept_by_top_p"] else GREY for rank in range(len(shown["pieces"]))]
        axes.barh([piece.strip() for piece in shown["pieces"]], setting["probabilities"], color=colours)
        axes.set_title(f"temperature {setting['temperature']:g}", fontsize=10)
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"top_p {shown['top_p']} keeps {setting['kept_by_top_p']:,}", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.axes[0].invert_yaxis()
    return figure


def timeline(results: Results) -> Figure:
    """Draw what each step of an engine with four slots processes of eight requests."""
    line = results["pictures"]["timeline"]
    figure = Figure((11, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(line["sequences"]):
        first = row["steps"][0][0]
        if first > row["arrived"]:
            axes.barh(number, first - row["arrived"], left=row["arrived"], color="none", edgecolor=GREY, hatch="///")
        for step, count, kind in row["steps"]:
            axes.barh(number, 1, left=step, color=ORANGE if kind == "prompt" else BLUE, edgecolor="white")
            if kind == "prompt":
                axes.text(step + 0.5, number, count, ha="center", va="center", fontsize=7, color="white")
    axes.barh([0], [0], color="none", edgecolor=GREY, hatch="///", label="waiting for a slot")
    axes.barh([0], [0], color=ORANGE, label="prompt tokens")
    axes.barh([0], [0], color=BLUE, label="one answer token")
    axes.set_yticks(range(len(line["sequences"])), [f"request {n + 1}" for n in range(len(line["sequences"]))])
    axes.invert_yaxis()
    axes.set_xlabel("step of the engine")
    axes.legend(fontsize=8, loc="lower left")
    return figure


def batches(results: Results) -> Figure:
    """Draw tokens per second by batch size, below two limits: reading bytes and multiplying."""
    bench = results["bench"]
    sizes = np.array([row["batch"] for row in bench["decode"]])
    rate = np.array([row["tokens_per_s"] for row in bench["decode"]])
    reading = rate / np.array([row["share_of_bandwidth"] for row in bench["decode"]])
    multiplying = rate / np.array([row["share_of_peak"] for row in bench["decode"]])
    figure, axes = _axes("one core: tokens per second by number of sequences decoded at once")
    axes.plot(sizes, reading, "--", color=ORANGE, label="limit: reading weights and cache")
    axes.plot(sizes, multiplying, "--", color=GREY, label="limit: multiplying")
    axes.plot(sizes, rate, "o-", color=BLUE, label="measured, with sampling and Python")
    for size, value in zip(sizes, rate, strict=True):
        axes.annotate(f"{value:,.0f}", (size, value), (0, -13), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, sizes)
    axes.set(yscale="log", ylim=(rate.min() * 0.7, None), xlabel="batch size", ylabel="tokens/s")
    axes.legend(fontsize=8)
    return figure


PICTURES = {
    "how-attention": attention,
    "how-lens": lens,
    "how-rotation": rotation,
    "how-cache": cache,
    "how-eight-bits": eight_bits,
    "how-next-token": next_token,
    "how-timeline": timeline,
    "how-batches": batches,
}


def load_results() -> Results:
    """Return the contents of the result files by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def draw(directory: Path) -> list[Path]:
    """Draw every picture as a PNG file in the directory, and return their paths."""
    results = load_results()
    paths = []
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.5}):
        for name, picture in PICTURES.items():
            png = io.BytesIO()
            picture(results).savefig(png, dpi=110, metadata={"Software": None})
            paths.append(directory / f"{name}.png")
            write_file(paths[-1], png.getvalue())
    return paths


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure((7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    return figure, axes


def main() -> None:
    for path in draw(OUT):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
