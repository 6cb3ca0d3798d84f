"""The benchmarks of the engine. No test judges speed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from loadtest.bench import batch_job
from loadtest.bench.peers.__main__ import main
from loadtest.bench.peers.model import reference_logits, save_random_model
from tinylm import ModelConfig
from tinylm.system.machine import describe


def test_a_peer_is_checked_and_measured(tmp_path: Path) -> None:
    """TinyLM alone: installing the others takes twenty minutes."""
    app = typer.Typer()
    app.command()(main)
    out = tmp_path / "peers.json"
    options = ["--only", "tinylm-float", "--rounds", "1", "--batches", "2", "--out", str(out)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert describe().keys() <= result.keys()
    (peer,) = result["peers"].values()
    assert set(peer["cases"]) == {"decode 2", "prefill 192"}
    assert all(case["tokens_per_cpu_s"] > 0 for case in peer["cases"].values())
    assert peer["check"]["least_correlation"] > 0.99999
    assert (tmp_path / "peers.png").stat().st_size > 1000


def test_batch_jobs_are_measured(tiny_model_dir: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(batch_job.main)
    out = tmp_path / "batch.json"
    options = ["--requests", "5", "--workers", "1", "--model", str(tiny_model_dir), "--out", str(out)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    (measured,) = json.loads(out.read_text())["jobs"]
    assert (measured["n_answered"], measured["n_failed"]) == (5, 0)
    assert measured["answer_tokens_per_s"] > 0


def test_onnx_runtime_computes_the_reference_logits(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from loadtest.bench.peers.onnx_runtime import OnnxRuntime

    config = ModelConfig(hidden_size=64, n_layers=2, n_heads=2, mlp_size=128, context=64)
    save_random_model(tmp_path / "m", config)
    ids = np.random.default_rng(0).integers(config.boundary_id + 1, config.vocab_size, (2, 12))
    logits = OnnxRuntime(tmp_path / "m", 2).logits(ids[:, :8], ids[:, 8:])
    np.testing.assert_allclose(logits, reference_logits(tmp_path / "m", ids, "gelu"), atol=1e-3)
