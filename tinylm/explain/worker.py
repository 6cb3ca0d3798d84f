"""Answer questions about prompts in a separate process.

    python -m tinylm.explain.worker models/stories-8m int8

The arguments are the model directory and the precision. Each line of standard input is a question, a JSON object. An
answer on standard output is a line with "ok" or "wrong", a number of bytes, and the CPU time of this process until now
in microseconds. Then these bytes follow: the piece in the form of the question, or the message of a ValueError. The
process ends when its input ends, or when it gets no question for IDLE_S.
"""

from __future__ import annotations

import dataclasses
import json
import select
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinylm.explain.engine_answer import EngineAnswer
from tinylm.explain.explainer import Explainer
from tinylm.explain.forms import encoded
from tinylm.explain.results import as_shades
from tinylm.kernels.blas import run_limited
from tinylm.llm import load
from tinylm.sampling import SamplingParams

IDLE_S = 600.0
OK, WRONG = b"ok", b"wrong"


def result(explainer: Explainer, question: Mapping[str, Any]) -> Any:
    """Return the answer to a question, for `encoded`.

    question: "piece" names what to explain, "prompt" is the text, "n_tokens" its length with the boundary, "form" that
    of the answer. "fields" are arguments of the method of `Explainer`; for "scores", there are also "settings" and
    "by_engine". Raise ValueError as that method does.
    """
    prompt, fields = question["prompt"], question["fields"]
    match question["piece"]:
        case "norms":
            return {"norms": explainer.norms(prompt)}
        case "attention":
            layer, head = fields.get("layer"), fields.get("head")
            if head is not None:
                weights = explainer.head(prompt, layer, head)[None]
            else:
                weights = explainer.attention_of_all(prompt) if layer is None else explainer.attention(prompt, layer)
            return {"layer": layer, "head": head, "weights": as_shades(weights)}
        case "lens":
            return explainer.lens(prompt, **fields)
        case "logits":
            scores = explainer.raw_scores(prompt, **fields)
            return {"tokens": scores.tokens, "logits": scores.logits.astype("<f4").tobytes()}
        case "scores":
            by_engine = EngineAnswer.from_json(question["by_engine"])
            return explainer.scores(prompt, _params(question["settings"]), by_engine, **fields)
        case "matmul":
            rounded = explainer.matmul(prompt, **fields)
            own = {field.name: getattr(rounded, field.name) for field in dataclasses.fields(rounded)}
            return {"layer": fields["layer"], "name": fields["name"], **own}
        case piece:
            raise ValueError(f"piece is {piece!r}: there is no such piece of an explanation")


def _params(settings: Mapping[str, Any]) -> SamplingParams:
    """Return the settings of a request from their JSON form, in which the tokens of `logit_bias` are strings."""
    biases = {int(token): value for token, value in settings["logit_bias"].items()}
    return SamplingParams(**{**settings, "logit_bias": biases})


def answer(explainer: Explainer, line: bytes) -> bytes:
    """Return the answer to a line of the input."""
    try:
        question = json.loads(line)
        found = result(explainer, question)
        kind, content = OK, encoded(question["piece"], found, question["n_tokens"], question["form"])
    except ValueError as error:
        kind, content = WRONG, str(error).encode()
    return b"%s %d %d\n%s" % (kind, len(content), time.process_time_ns() // 1000, content)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the service, which then closes the input
    directory, precision = sys.argv[1:]
    tokenizer, model = load(Path(directory), "numpy", precision)
    explainer = Explainer(tokenizer, model)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while select.select([source], [], [], IDLE_S)[0] and (line := source.readline()):
        target.write(answer(explainer, line))
        target.flush()


if __name__ == "__main__":
    run_limited(1, main)
