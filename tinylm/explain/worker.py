"""Answer questions about prompts in a separate process with the lowest priority.

    python -m tinylm.explain.worker models/stories-8m int8

The arguments are the model directory and the precision. Each line of standard input is a question, a JSON object. Each
line of standard output is the answer: "ok" and a JSON object, or "wrong" and the message of a ValueError as JSON. The
process ends when its input ends, or when it gets no question for IDLE_S.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinylm.explain.engine_answer import EngineAnswer
from tinylm.explain.explainer import Explainer
from tinylm.explain.results import as_base64, as_json, as_shades
from tinylm.kernels.blas import run_limited
from tinylm.llm import load
from tinylm.sampling import SamplingParams

IDLE_S = 600.0
LEAST_PRIORITY = 19  # the largest niceness
OK, WRONG = b"ok", b"wrong"


def answer(explainer: Explainer, question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer to a question, as a JSON object.

    question: "piece" names what to explain, "prompt" is the text. The other fields are arguments of the method of
    `Explainer`. Raise ValueError as that method does.
    """
    prompt = question["prompt"]
    match question["piece"]:
        case "norms":
            return {"norms": as_json(explainer.norms(prompt))}
        case "attention":
            layer, head = question["layer"], question["head"]
            if head is not None:
                weights = explainer.head(prompt, layer, head)[None]
            else:
                weights = explainer.attention_of_all(prompt) if layer is None else explainer.attention(prompt, layer)
            return {"layer": layer, "head": head, "weights": as_json(as_shades(weights))}
        case "lens":
            return as_json(explainer.lens(prompt, question["position"], question["top"]))
        case "logits":
            raw = explainer.raw_scores(prompt, question["top"])
            return {"tokens": as_json(raw.tokens), "logits": as_base64(raw.logits)}
        case "scores":
            by_engine = EngineAnswer.from_json(question["by_engine"])
            return as_json(explainer.scores(prompt, _params(question["settings"]), by_engine, question["top"]))
        case "matmul":
            layer, name, position = question["layer"], question["name"], question["position"]
            return {"layer": layer, "name": name, **as_json(explainer.matmul(prompt, layer, name, position))}
        case piece:
            raise ValueError(f"piece is {piece!r}: there is no such piece of an explanation")


def _params(settings: Mapping[str, Any]) -> SamplingParams:
    """Return the settings of a request from their JSON form, in which the tokens of `logit_bias` are strings."""
    biases = {int(token): value for token, value in settings["logit_bias"].items()}
    return SamplingParams(**{**settings, "logit_bias": biases})


def answer_line(explainer: Explainer, line: bytes) -> bytes:
    """Return the line that answers a line of the input, without its end."""
    value: dict[str, Any] | str
    try:
        kind, value = OK, answer(explainer, json.loads(line))
    except ValueError as error:
        kind, value = WRONG, str(error)
    return kind + b" " + json.dumps(value, separators=(",", ":")).encode()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the service, which then closes the input
    os.nice(LEAST_PRIORITY)
    directory, precision = sys.argv[1:]
    tokenizer, model = load(Path(directory), "numpy", precision)
    explainer = Explainer(tokenizer, model)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while select.select([source], [], [], IDLE_S)[0] and (line := source.readline()):
        target.write(answer_line(explainer, line) + b"\n")
        target.flush()


if __name__ == "__main__":
    run_limited(1, main)
