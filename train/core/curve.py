"""The loss curve of a run, drawn from the lines of its metrics file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylm.system.files import as_png, write_file


def draw_curve(lines: Sequence[dict[str, Any]], picture: Path) -> None:
    """Training loss (nats a token) and bits per byte by collection against tokens seen, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "val_bpb" in line]
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([line["tokens"] / 1e6 for line in losses], [line["loss"] for line in losses], linewidth=0.8)
    left.set(xlabel="million tokens seen", ylabel="nats a token", title="training loss")
    for name in validations[-1]["val_bpb"] if validations else []:
        points = [(line["tokens"] / 1e6, line["val_bpb"][name]) for line in validations if name in line["val_bpb"]]
        literal = name.replace("$", r"\$")  # otherwise Matplotlib reads a formula between dollar signs
        right.plot(*zip(*points, strict=True), marker=".", label=f"{literal} {points[-1][1]:.3f}")
    right.set(xlabel="million tokens seen", ylabel="bits per byte", title="held-out text, averaged weights")
    if validations:
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside: the lines leave no room
    for axes in (left, right):
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    write_file(picture, as_png(figure, 110))
