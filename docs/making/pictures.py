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
from matplotlib.patches import Rectangle

from tinylm.system.files import write_file

RESULTS = Path("docs/results")
OUT = Path("docs/images")
Results = dict[str, Any]  # name of the file -> content
BLUE, ORANGE, GREY = "#2f6db3", "#d9822b", "#9aa5b1"


def overview(results: Results) -> Figure:
    """Draw the path from the story to its next token, with the shapes of the arrays and the sections of the page."""
    shape, inside = results["pictures"]["shape"], results["pictures"]["inside"]
    words, hidden, vocab = inside["text"].split(), shape["hidden_size"], f"{shape['vocab_size']:,}"
    n = len(inside["pieces"])
    mlp = f"MLP\n{hidden} → {shape['mlp_size']} → {hidden}"
    steps = (  # title, content, width, shape of what leaves it
        ("text", f"{' '.join(words[:3])}\n…\n{' '.join(words[-2:])}", 1.5, ""),
        ("1 tokens", f"{n} numbers\nbelow {vocab}", 1.5, f"({n})"),
        ("2 embedding", f"{hidden} numbers\nper token", 1.6, f"({n}, {hidden})"),
        (
            f"3, 4 a layer, {shape['layers']} times",
            f"attention\n{shape['heads']} heads of {shape['head_dim']}\n\n{mlp}",
            2.4,
            f"({n}, {hidden})",
        ),
        ("5 scores", "one per token\nthat can follow", 1.7, f"({vocab})"),
        ("6 sampling", f"“{inside['lens']['answer'].strip()}”", 1.4, ""),
    )
    figure = Figure((12, 4.3), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    right, middles = -1.0, []
    for title, content, width, leaving in steps:
        left, right = right + 1.0, right + 1.0 + width
        middles.append((left + right) / 2)
        _box(axes, (left, 1.5), (width, 2.0), title, content, BLUE)
        axes.text(right + 0.5, 2.62, leaving, ha="center", fontsize=9)
        if title != steps[-1][0]:
            _arrow(axes, (right + 0.1, 2.5), (right + 0.9, 2.5))
    axes.plot([middles[-1], middles[-1], middles[1]], [3.9, 4.3, 4.3], color=GREY, linewidth=1.5)
    _arrow(axes, (middles[1], 4.3), (middles[1], 3.9))
    axes.text((middles[1] + middles[-1]) / 2, 4.37, "append the token and repeat", ha="center", fontsize=10)
    axes.text(0, 0.2, "serving adds:", fontsize=10, va="center")
    _box(axes, (1.6, -0.2), (3, 0.8), "7 cache", "keeps keys and values\nof earlier tokens", ORANGE)
    _box(axes, (4.9, -0.2), (3, 0.8), "8 eight bits", "in weights and inputs\nof all matmuls", ORANGE)
    _box(axes, (8.2, -0.2), (3, 0.8), "9 batch", "many requests\nin each step", ORANGE)
    _box(axes, (right - 3, -0.2), (3, 0.8), "11 training", "sets the numbers in the\nembedding and the layers", GREY)
    axes.set(xlim=(-0.1, right + 0.1), ylim=(-0.3, 4.65))
    return figure


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
        axes.set(xscale="log", xlim=(1e-5, 1))
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


def training(results: Results) -> Figure:
    """Draw the loss of the demo model's rows and of the story while it trains."""
    measured = results["pictures"]["training"]
    curve = measured["curve"]
    figure, axes = _axes(f"training of the demo model, {measured['parameters']:,} parameters")
    axes.axhline(np.log(measured["vocab_size"]), linestyle="--", color=GREY, label="every token equally likely")
    axes.plot(
        curve["steps"], curve["sentence"], color=ORANGE, label="our sentence, which the demo's text does not hold"
    )
    axes.plot(curve["steps"], curve["rows"], color=BLUE, label="rows of the demo's text")
    axes.set(ylim=(0, None), xlabel="steps", ylabel="loss per token")
    axes.legend(fontsize=8, loc="center right")
    return figure


PICTURES = {
    "how-overview": overview,
    "how-attention": attention,
    "how-lens": lens,
    "how-rotation": rotation,
    "how-cache": cache,
    "how-eight-bits": eight_bits,
    "how-next-token": next_token,
    "how-timeline": timeline,
    "how-batches": batches,
    "how-training": training,
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


def _box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], title: str, content: str, colour: str
) -> None:
    """Draw a box with its lower left corner here, and its title above."""
    (x, y), (width, height) = corner, size
    axes.add_patch(Rectangle(corner, width, height, facecolor=colour, alpha=0.12))
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.5))
    axes.text(x + width / 2, y + height + 0.1, title, ha="center", fontsize=10, fontweight="bold")
    axes.text(x + width / 2, y + height / 2, content, ha="center", va="center", fontsize=10)


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, begin, arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.5})


def main() -> None:
    for path in draw(OUT):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
