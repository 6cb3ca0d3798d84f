"""The explaining process answers each line of its input, and ends with its input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tinylm.explain.explainer import Explainer
from tinylm.explain.results import as_json
from tinylm.llm import load

PROMPT = "Once upon a time"


def test_each_line_is_answered_until_the_input_ends(stories_dir: Path) -> None:
    questions = [
        {"piece": "norms", "prompt": PROMPT},
        {"piece": "attention", "prompt": PROMPT, "layer": 17, "head": None},
        {"piece": "everything", "prompt": PROMPT},
        {"piece": "norms", "prompt": ""},
        {"piece": "lens", "prompt": PROMPT, "position": 1, "top": 2},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tinylm.explain.worker", str(stories_dir), "int8"],
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    explainer = Explainer(*load(stories_dir, "numpy", "int8"))
    answers = [line.partition(" ") for line in done.stdout.splitlines()]
    assert [(kind, json.loads(value)) for kind, _, value in answers] == [
        ("ok", {"norms": as_json(explainer.norms(PROMPT))}),
        ("wrong", "layer is 17: it must be a whole number, 1 to 16"),
        ("wrong", "piece is 'everything': there is no such piece of an explanation"),
        ("wrong", "prompt has 0 tokens: it must have 1 to 64"),
        ("ok", as_json(explainer.lens(PROMPT, 1, 2))),
    ]
