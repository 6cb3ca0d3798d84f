"""`tinylm batch --ray` on a real Ray that the command starts."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from helpers.batch_jobs import lasting, mixed_lines, write_lines
from helpers.terminal import TINYLM
from helpers.train import command_env

from tinylm.batch.engine import BatchEngine, EngineSettings


def test_a_job_on_ray_resumes_with_the_same_answers(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its lines make several tasks for two actors."""
    lines = mixed_lines(300, max_tokens=4)
    expected = [answer.text for answer in BatchEngine(EngineSettings(tiny_model_dir)).answer(lines)]
    source, output = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    begun = "".join(expected[:20]) + expected[20][:60]
    output.write_text(begun)
    command = [TINYLM, "batch", str(source), str(output), "--model", str(tiny_model_dir)]
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        done = subprocess.run(
            [*command, "--ray", "--workers", "2", "--json"],
            env=command_env(Path(directory)), capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["n_lines"], summary["n_kept"], summary["n_answered"]) == (300, 20, 280)
    found = output.read_text()
    assert found.startswith("".join(expected[:20]))
    assert lasting(found) == lasting("".join(expected))
