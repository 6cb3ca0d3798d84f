"""The explaining process answers each line of its input in the form of the question, and ends with its input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

from tinylm.explain.explainer import Explainer
from tinylm.explain.forms import as_json
from tinylm.llm import load
from tinylm.v1 import tinylm_pb2 as pb

PROMPT = "Once upon a time"


def test_each_line_is_answered_until_the_input_ends(stories_dir: Path) -> None:
    explainer = Explainer(*load(stories_dir, "numpy", "int8"))
    n_tokens = len(explainer.tokens(PROMPT))
    more = {"n_tokens": n_tokens, "form": "json", "fields": {}}
    questions = [
        {"piece": "norms", "prompt": PROMPT, **more},
        {"piece": "norms", "prompt": PROMPT, **more, "form": "message"},
        {"piece": "attention", "prompt": PROMPT, **more, "fields": {"layer": 17}},
        {"piece": "everything", "prompt": PROMPT, **more},
        {"piece": "norms", "prompt": "", **more},
        {"piece": "lens", "prompt": PROMPT, **more, "fields": {"position": 1, "top": 2}},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tinylm.explain.worker", str(stories_dir), "int8"],
        input="".join(json.dumps(question) + "\n" for question in questions).encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    output, answers, cpu_us = io.BytesIO(done.stdout), [], [0]
    while head := output.readline():
        kind, size, used = head.decode().split()
        answers.append((kind, output.read(int(size))))
        cpu_us.append(int(used))
    assert cpu_us == sorted(cpu_us)
    assert 0 < cpu_us[1] <= cpu_us[-1]
    norms = explainer.norms(PROMPT)
    message = pb.ExplainResponse(n_tokens=n_tokens, norms=pb.ExplainResponse.Norms(norms=norms.ravel().tolist()))

    def as_bytes(value: object) -> bytes:
        return json.dumps(value, separators=(",", ":")).encode()

    assert answers == [
        ("ok", as_bytes({"norms": as_json(norms)})),
        ("ok", message.SerializeToString()),
        ("wrong", b"layer is 17: it must be a whole number, 1 to 16"),
        ("wrong", b"piece is 'everything': there is no such piece of an explanation"),
        ("wrong", b"prompt has 0 tokens: it must have 1 to 64"),
        ("ok", as_bytes(as_json(explainer.lens(PROMPT, 1, 2)))),
    ]
