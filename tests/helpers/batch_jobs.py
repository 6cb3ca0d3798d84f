"""Lines of batch jobs, and their answers without what differs from run to run."""

from __future__ import annotations

import json
import re
from pathlib import Path

_RANDOM = re.compile(r"(?<=batch_req_)[0-9a-f]{32}|(?<=cmpl-)[0-9a-f]{32}|(?<=\"request_id\": \")[0-9a-f]{32}")
_CREATED = re.compile(r"(?<=\"created\": )\d+")


def line_of(custom_id: str, **body: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


def mixed_lines(n: int, max_tokens: int = 12) -> list[str]:
    """Return seeded lines: short and long answers, several answers, scores, and wrong lines."""
    lines = []
    for i in range(n):
        body: dict[str, object] = {"prompt": f"The dog {i}", "max_tokens": 1 + i % max_tokens, "seed": i, "logprobs": 1}
        if i % 7 == 3:
            body |= {"prompt": [f"a {i}", "The fox"], "n": 2, "best_of": 3, "stop": "e"}
        elif i % 7 == 4:
            body |= {"echo": True, "max_tokens": 0}
        elif i % 7 == 5:
            body |= {"top_p": 7}
        lines.append(line_of(f"line {i} \u00e9", **body))
    return lines


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def lasting(text: str) -> str:
    """Replace random ids and the time by zeros."""
    return _CREATED.sub("0", _RANDOM.sub("0" * 32, text))
