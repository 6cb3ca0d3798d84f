"""The training commands: their results, their refusals, and a killed run that resumes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from helpers.marked import Mark
from helpers.train import DEMO_STEPS as STEPS
from helpers.train import ROOT, SHARD_TOKENS, Demo, command_env, encode_plainly, python, tree_bytes

from tinylm import LLM, SamplingParams
from train.alone import run_alone
from train.config import ConfigError, load_config
from train.core.checkpoint import load_start
from train.core.record import metrics_text, read_metrics
from train.data.tokens import load_tokens
from train.demo_text import demo_text
from train.encode import encode
from train.export import export
from train.prepare import prepare
from train.run import run
from train.tokenizer import train_tokenizer

SECONDS_TO_WAIT = 400


@pytest.fixture
def one_torch_thread():
    """A waiting PyTorch thread uses a whole core, which makes training beside other work many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_parallel_encoding_equals_plain_encoding(demo: Demo, tmp_path: Path):
    """The workers must not change the order of documents. The demo has several shards."""
    tokens = tmp_path / "tokens"
    encode_plainly(demo.config(), tokens, SHARD_TOKENS)
    assert tree_bytes(demo.directory / "tokens") == tree_bytes(tokens)
    shards = [np.load(path) for path in tokens.glob("demo.train-*.npy")]
    assert len(shards) > 3
    assert all(len(shard) <= SHARD_TOKENS for shard in shards)


def assert_complete(metrics: list[dict]) -> None:
    """Check that every log line and every validation occurs once, in order."""
    assert [line["step"] for line in metrics if "loss" in line] == list(range(10, STEPS + 1, 10))
    assert [line["step"] for line in metrics if "val_bpb" in line] == [80, 160, 240]
    assert [line["step"] for line in metrics] == sorted(line["step"] for line in metrics)


def test_a_run_leaves_metrics_curve_and_checkpoints(demo: Demo):
    metrics = demo.metrics()
    assert_complete(metrics)
    assert all(line["steps"] == STEPS and line["tokens"] == line["step"] * 8 * 128 for line in metrics)
    scores = [line["val_bpb"]["demo"] for line in metrics if "val_bpb" in line]
    assert scores[0] > scores[1] > scores[2]
    assert scores[2] < 0.7  # letters by their frequency take more than 4
    assert is_png(demo.run_dir / "curve.png")
    assert len(list(demo.run_dir.glob("checkpoint_*/state.pt"))) == 2


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000


def test_metrics_of_a_killed_run_are_cut_at_its_checkpoint(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 3}\n{"step": 20, "loss": 2}\n{"step": 30, "lo', encoding="utf-8")
    assert [line["step"] for line in read_metrics(path)] == [10, 20]
    assert metrics_text(read_metrics(path, up_to_step=10)) == '{"step": 10, "loss": 3}\n'
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_export_refuses_text_that_was_prepared_again(demo: Demo, tmp_path: Path):
    """Text that is prepared again can hold out stories that the model was trained on."""
    changed = demo.copy_to(tmp_path, "tokens", "text", "runs", "tokenizer.model", "stories.txt")
    prepare(changed.config(**{"prepare.validation_share": 0.3}))
    with pytest.raises(ConfigError, match=r"was made from other text: run `python -m train\.encode` again"):
        export(changed.config())


def test_the_fine_tuning_example_learns_the_text(tmp_path: Path, one_torch_thread: None):
    (tmp_path / "my-text").mkdir()
    (tmp_path / "my-text" / "stories.txt").write_text(demo_text(80, seed=3), encoding="utf-8")
    (tmp_path / "prompts.yaml").write_text('[{seed: 1, text: "Once"}]')
    settings = {
        "workdir": tmp_path,
        "models_dir": tmp_path / "models",
        "prepare.collections.0.source": tmp_path / "my-text/*.txt",
        "prepare.validation_share": 0.2,
        "run.tokens": 6 * 4 * 256,
        "run.batch_rows": 4,
        "run.micro_rows": 4,
        "run.warmup_steps": 0,
        "run.log_every_steps": 1,
        "export.evaluate_bytes": 4000,
        "export.n_samples": 1,
        "export.n_stories": 2,
        "export.prompts": tmp_path / "prompts.yaml",
        "export.formats": [],
    }
    config = load_config(ROOT / "configs/fine-tune.yaml", [f"{key}={value}" for key, value in settings.items()])
    prepare(config)
    train_tokenizer(config)
    encode_plainly(config, config.tokens_dir)
    run_alone(config)
    losses = [line["loss"] for line in read_metrics(config.metrics_path) if "loss" in line]
    assert losses[0] < 3.5  # a new model begins at 8.3
    assert losses[-1] < losses[0] - 0.2
    export(config)
    directory = config.models_dir / "my-stories"
    assert LLM(directory).generate("Once upon a time", SamplingParams(max_tokens=5))
    assert (directory / "tokenizer.model").read_bytes() == (config.start_from / "tokenizer.model").read_bytes()
    assert "started from the weights of stories-8m (sha256 " in (directory / "README.md").read_text()
    assert (config.start_from / "ATTRIBUTION.md").read_text() in (directory / "ATTRIBUTION.md").read_text()


def test_fine_tuning_refuses_another_shape_or_tokenizer(demo: Demo):
    with pytest.raises(ConfigError, match=r"start_from: .* has another shape than the config"):
        run(demo.config(name="tuned", start_from="models/stories-8m"))
    with pytest.raises(ConfigError, match="start_from: the tokens were not made with the tokenizer of "):
        load_start(ROOT / "models/stories-8m", load_config(ROOT / "configs/fine-tune.yaml"), load_tokens(demo.config()))


def test_a_run_without_ray_equals_a_run_with_ray(demo: Demo, tmp_path: Path, one_torch_thread: None):
    """It resumes, and is exported after its directory has moved. Neither command resumes a run of the other."""
    alone = demo.copy_to(tmp_path, "tokens", "text", "tokenizer.model")
    settings = {"run.validate_every_steps": 20, "run.constant_share": 1}
    for steps in (20, 40):
        run_alone(alone.config(**settings, **{"run.tokens": steps * 8 * 128}))
    metrics = alone.metrics()
    assert [line["step"] for line in metrics if "loss" in line] == [10, 20, 30, 40]
    assert [line["step"] for line in metrics if "val_bpb" in line] == [20, 40]
    # Up to step 40, both runs have the same rows and the same constant learning rate.
    losses, losses_with_ray = (
        [line["loss"] for line in lines if "loss" in line] for lines in (metrics, demo.metrics())
    )
    assert losses == pytest.approx(losses_with_ray[:4], abs=1e-3)
    assert is_png(alone.run_dir / "curve.png")
    (tmp_path / "moved").mkdir()
    moved = alone.copy_to(tmp_path / "moved", "tokens", "text", "tokenizer.model", "runs")
    shutil.rmtree(alone.directory / "tokens")
    export(moved.config(**{"export.formats": "[]", "seed": 2}))
    evaluation = json.loads((moved.model_dir / "evaluation.json").read_text())
    assert (evaluation["step"], evaluation["seed"]) == (40, 1)  # the seed of the run
    with pytest.raises(ConfigError, match=r"is a run of `python -m train\.alone`: resume it with that command"):
        run(moved.config())
    with pytest.raises(ConfigError, match=r"is a run of `python -m train\.run`: resume it with that command"):
        run_alone(demo.config())


def test_the_exported_model_writes_sentences_of_the_demo(demo: Demo):
    llm = LLM(demo.model_dir)
    assert (llm.config.vocab_size, llm.config.hidden_size, llm.config.n_layers) == (512, 64, 2)
    completion = llm.generate("Once upon a time", SamplingParams(max_tokens=60, temperature=0))[0]
    assert completion.text.startswith(" there was a ")
    assert " lived " in completion.text


def test_the_model_directory_describes_the_model(demo: Demo):
    evaluation = json.loads((demo.model_dir / "evaluation.json").read_text())
    assert (evaluation["step"], evaluation["tokens_seen"]) == (STEPS, STEPS * 8 * 128)
    assert evaluation["tokens_by_collection"] == {"demo": evaluation["tokens_seen"]}
    score = evaluation["collections"]["demo"]["bits_per_byte"]
    assert score == pytest.approx(evaluation["float32_bits_per_byte"]["demo"], abs=0.01)
    assert score == pytest.approx(demo.metrics()[-1]["val_bpb"]["demo"], rel=0.1)  # PyTorch on nearly the same text
    low, high = evaluation["collections"]["demo"]["interval_95"]
    assert low < score < high
    card = (demo.model_dir / "README.md").read_text()
    assert f"| demo | {evaluation['collections']['demo']['documents']} |" in card
    assert f"| demo | {evaluation['tokens_seen']:,} | 100.0% |" in card
    assert evaluation["passes_by_collection"]["demo"] == demo.metrics()[-1]["epochs"]["demo"]
    assert evaluation["config_sha256"] == demo.config().sha256
    assert evaluation["config_sha256"][:12] in card
    assert evaluation["choices"].keys() <= {"endings", "names", "order"}
    assert evaluation["choices"]
    for kind, figures in evaluation["choices"].items():
        low, high = figures["interval_95"]
        assert low <= figures["accuracy"] <= high
        assert f"| {kind} | {figures['questions']} |" in card
    assert f"{score:.4f}" in card
    assert "the whole of the planned run" in card
    for linked in ("curve.png", "ATTRIBUTION.md", "samples.md", "prompts.md", "evaluation.json"):
        assert linked in card
        assert (demo.model_dir / linked).is_file()
    assert (demo.model_dir / "metrics.jsonl").read_text().splitlines() == demo.metrics_lines()
    samples = (demo.model_dir / "samples.md").read_text()
    assert samples.count("> Once upon a time") == 3
    assert [line.split()[2] for line in samples.splitlines() if line.startswith("## Seed ")] == ["1", "2", "3"]
    assert (demo.model_dir / "prompts.md").read_text().count("\n## ") == 40
    assert "Stories made up by TinyLM's own" in (demo.model_dir / "ATTRIBUTION.md").read_text()
    judged = evaluation["generated_text"]
    assert judged["model"]["texts"] == 20
    assert f"{judged['model']['ended']:.1%} of the stories end within the context" in card
    for figures in (judged["model"], judged["held_out"]["demo"]):  # both consist of the grammar's few sentences
        assert 0 < figures["distinct_grams"] < 0.9
        assert figures["longest_run"] >= figures["longest_run_mean"] > 5


def test_the_demo_is_exported_to_every_format(demo: Demo):
    exports = demo.directory / "exports" / "demo"
    for name, file in (("onnx", "model.onnx"), ("huggingface", "model.safetensors")):
        assert (exports / name / file).stat().st_size > demo.config().shape.n_parameters * 4
        assert (exports / name / "ATTRIBUTION.md").is_file()


def test_evaluating_again_gives_the_scores_of_the_card(demo: Demo):
    on_card = json.loads((demo.model_dir / "evaluation.json").read_text())["collections"]["demo"]
    held_out = demo.directory / "text" / "demo.validation.parquet"
    command = ["-m", "train.evaluate", "--model", str(demo.model_dir), "--json", "--data", str(held_out)]
    result = python([*command, "--max-bytes", "10000"], demo.ray_tmpdir)
    again = json.loads(result.stdout)["collections"]["demo"]
    assert again["bits_per_byte"] == pytest.approx(on_card["bits_per_byte"], abs=1e-3)
    assert [again[key] for key in ("documents", "tokens", "bytes")] == [
        on_card[key] for key in ("documents", "tokens", "bytes")
    ]


@pytest.mark.parametrize(
    ("stage", "made_by"),
    [(train_tokenizer, "prepare"), (encode, "prepare"), (run, "encode"), (export, "prepare")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_missing_input_names_the_command_that_makes_it(tmp_path: Path, stage: Callable, made_by: str):
    with pytest.raises(ConfigError, match=re.escape(f"run `python -m train.{made_by}` first")):
        stage(Demo(tmp_path, tmp_path).config())


def test_a_command_that_fails_prints_one_line(demo: Demo):
    result = python(demo.command("export", name="another"), demo.ray_tmpdir)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"error: .* is missing: run `python -m train\.run` first\n", result.stderr)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("run.batch_rows", 10, "is 10"),
        ("run.batch_rows", 16, "is 16"),  # the checkpoint has 8
        ("run.workers", 3, "x 3)"),
        ("model.vocab_size", 600, "is 600"),
        ("model.context", 500_000, "one row of 500001"),
    ],
)
def test_settings_that_do_not_fit_start_no_ray(demo: Demo, key: str, value: int, named: str):
    with pytest.raises(ConfigError, match=re.escape(named)):
        run(demo.config(**{key: value}))
    assert not ray.is_initialized()


def last_checkpoint_step(run_dir: Path) -> int:
    try:
        record = json.loads((run_dir / "checkpoint_manager_snapshot.json").read_text())
        return record["latest_checkpoint_result"]["metrics"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@pytest.mark.chaos  # a minute
def test_a_killed_run_resumes_from_its_checkpoint(demo: Demo, tmp_path: Path):
    """The driver and every process of its Ray are killed at once in the middle of the run."""
    killed = demo.copy_to(tmp_path, "tokens", "tokenizer.model")
    killed.ray_tmpdir = Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp"))
    mark = Mark()
    driver = subprocess.Popen(
        [sys.executable, *killed.command("run")],
        cwd=ROOT,
        env=command_env(killed.ray_tmpdir) | mark.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while not last_checkpoint_step(killed.run_dir):
            assert driver.poll() is None, "the run ended before its first checkpoint"
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        assert len(mark.processes()) > 5  # of Ray, and the worker
    finally:
        mark.kill_all()
        driver.wait()
    checkpoint, before = last_checkpoint_step(killed.run_dir), killed.metrics_lines()
    assert 0 < checkpoint < STEPS
    with (killed.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 1')  # half a line

    killed.run("run")
    shutil.rmtree(killed.ray_tmpdir, ignore_errors=True)
    assert_complete(killed.metrics())
    # The lines up to the checkpoint still have the times of the first run: their steps were not run again.
    complete = [line for line in before if line.endswith("}")]
    kept = [line for line in complete if json.loads(line)["step"] <= checkpoint]
    assert len(kept) >= checkpoint // 10
    assert killed.metrics_lines()[: len(kept)] == kept
    assert last_checkpoint_step(killed.run_dir) == STEPS
    ours, unbroken = (of.metrics()[-1]["val_bpb"]["demo"] for of in (killed, demo))
    assert ours == pytest.approx(unbroken, rel=0.02)
