"""The whole of training through its commands: everything appears, and a run that is killed loses nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from helpers.train import DEMO_STEPS as STEPS
from helpers.train import ROOT, SHARD_TOKENS, Demo, command_env, encode_plainly, python, texts_of, tree_bytes

from tinylm import LLM, SamplingParams
from tinylm.tokenizer import Tokenizer
from train.alone import run_alone
from train.config import ConfigError, load_config
from train.core.metrics import read_metrics, write_metrics
from train.core.start_from import load_start
from train.demo_text import demo_text
from train.encode import encode
from train.export import export
from train.prepare import prepare
from train.release.card import attribution_page
from train.release.prompts import load_prompts
from train.run import run
from train.stage import load_tokens
from train.tokenizer import train_tokenizer

SECONDS_TO_WAIT = 400


@pytest.fixture
def one_torch_thread():
    """A second thread waits by spinning: it makes training many times slower beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shards(directory: Path, split: str) -> list[np.ndarray]:
    index = json.loads((directory / "index.json").read_text())
    return [np.load(directory / name) for name in index["collections"]["demo"][split]["shards"]]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_decoding_the_tokens_gives_the_documents_in_order(demo: Demo, split: str):
    tokenizer = Tokenizer(demo.directory / "tokenizer.model")
    tokens = np.concatenate(shards(demo.directory / "tokens", split))
    starts = np.flatnonzero(tokens == tokenizer.boundary_id)
    assert starts[0] == 0
    decoded = [tokenizer.decode(document.tolist()) for document in np.split(tokens, starts[1:])]
    assert decoded == texts_of(demo.config, "demo", split)


def test_encoding_gives_the_same_bytes_every_time(demo: Demo, tmp_path: Path):
    """Those that plain encoding gives, one document after the other: several workers must not change the order."""
    tokens = tmp_path / "tokens"
    encode_plainly(demo.config, tokens, SHARD_TOKENS)
    assert tree_bytes(demo.directory / "tokens") == tree_bytes(tokens)


def test_a_small_limit_gives_several_shards_of_whole_documents(demo: Demo):
    parts = shards(demo.directory / "tokens", "train")
    assert len(parts) > 3
    boundary = Tokenizer(demo.directory / "tokenizer.model").boundary_id
    assert all(len(part) <= SHARD_TOKENS and part[0] == boundary for part in parts)


def assert_whole(metrics: list[dict]) -> None:
    """Every logged and every validated step is there once, in order."""
    assert [line["step"] for line in metrics if "loss" in line] == list(range(10, STEPS + 1, 10))
    assert [line["step"] for line in metrics if "val_bpb" in line] == [80, 160, 240]
    assert [line["step"] for line in metrics] == sorted(line["step"] for line in metrics)


def test_metrics_tell_the_run(demo: Demo):
    metrics = demo.metrics()
    assert_whole(metrics)
    assert all(line["steps"] == STEPS and line["tokens"] == line["step"] * 8 * 128 for line in metrics)
    assert all(line["tokens_per_s"] > 0 for line in metrics if "loss" in line)
    validations = [line for line in metrics if "val_bpb" in line]
    assert all(set(line["val_bpb"]) == {"demo"} and line["sample"] for line in validations)
    scores = [line["val_bpb"]["demo"] for line in validations]
    assert scores[0] > scores[1] > scores[2]
    assert scores[2] < 0.7  # letters by their frequency take more than 4


def test_a_killed_runs_metrics_are_read_up_to_its_checkpoint(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 3}\n{"step": 20, "loss": 2}\n{"step": 30, "lo', encoding="utf-8")
    assert [values["step"] for values in read_metrics(path)] == [10, 20]
    assert [values["step"] for values in read_metrics(path, up_to_step=10)] == [10]
    write_metrics(path, read_metrics(path, up_to_step=10))
    assert path.read_text(encoding="utf-8") == '{"step": 10, "loss": 3}\n'
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_export_refuses_text_that_was_prepared_again(demo: Demo, tmp_path: Path):
    """Text that is prepared anew holds out other stories, some of which the model has been trained on."""
    changed = Demo(tmp_path, demo.ray_tmpdir)
    for name in ("tokens", "text", "runs"):
        shutil.copytree(demo.directory / name, tmp_path / name)
    for name in ("tokenizer.model", "stories.txt"):
        shutil.copy(demo.directory / name, tmp_path)
    changed.run("prepare", **{"prepare.validation_share": 0.3})
    message = only_line_of_failure(changed, "export")
    assert "was made from other text: run `python -m train.encode` again" in message


def test_the_fine_tune_example_learns_the_users_text(tmp_path: Path, one_torch_thread: None):
    """The released model knows English stories at the first step, and writes this text better at the last one."""
    (tmp_path / "my-text").mkdir()
    (tmp_path / "my-text" / "stories.txt").write_text(demo_text(80, seed=3), encoding="utf-8")
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
    (tmp_path / "prompts.yaml").write_text('[{seed: 1, text: "Once"}]')
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


def test_fine_tuning_refuses_tokens_of_another_tokenizer(demo: Demo):
    settings = {"name": "tuned", "start_from": "models/stories-8m"}
    with pytest.raises(ConfigError, match=r"start_from: .* has another shape than the config"):
        run(demo.config_with(**settings))
    with pytest.raises(ConfigError, match="start_from: the tokens were not made with the tokenizer of "):
        load_start(ROOT / "models/stories-8m", load_config(ROOT / "configs/fine-tune.yaml"), load_tokens(demo.config))


def test_a_run_without_ray_is_the_same_run(demo: Demo, tmp_path: Path):
    """Its record, its resuming and its export; and neither command takes up what the other began."""
    alone = Demo(tmp_path, demo.ray_tmpdir)
    shutil.copytree(demo.directory / "tokens", tmp_path / "tokens")
    shutil.copytree(demo.directory / "text", tmp_path / "text")
    shutil.copy(demo.directory / "tokenizer.model", tmp_path)
    settings = {"run.validate_every_steps": 20, "run.constant_share": 1}
    alone.run("alone", **settings, **{"run.tokens": 20 * 8 * 128})
    assert "step 40" in alone.run("alone", **settings, **{"run.tokens": 40 * 8 * 128}).stdout
    metrics = alone.metrics()
    assert [line["step"] for line in metrics if "loss" in line] == [10, 20, 30, 40]
    assert [line["step"] for line in metrics if "val_bpb" in line] == [20, 40]
    # The same rows by the same rates, which are constant yet in both.
    of_both = [[line["loss"] for line in lines if "loss" in line][:4] for lines in (metrics, demo.metrics())]
    assert of_both[0] == pytest.approx(of_both[1], abs=1e-3)
    assert is_png(alone.run_dir / "curve.png")
    alone.run("export", **{"export.formats": "[]", "seed": 2})
    evaluation = json.loads((alone.model_dir / "evaluation.json").read_text())
    assert (evaluation["step"], evaluation["seed"]) == (40, 1)  # the run's own
    assert "is a run of `python -m train.alone`: go on with that" in only_line_of_failure(alone, "run")
    assert "is a run of `python -m train.run`: go on with that" in only_line_of_failure(demo, "alone")


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000


def test_the_run_leaves_checkpoints_and_a_curve(demo: Demo):
    assert is_png(demo.run_dir / "curve.png")
    assert len(list(demo.run_dir.glob("checkpoint_*/state.pt"))) == 2  # run.keep_checkpoints


def test_the_exported_model_writes_the_demos_sentences(demo: Demo):
    llm = LLM(demo.model_dir)
    assert (llm.config.vocab_size, llm.config.hidden_size, llm.config.n_layers) == (512, 64, 2)
    completion = llm.generate("Once upon a time", SamplingParams(max_tokens=60, temperature=0))[0]
    assert completion.text.startswith(" there was a ")
    assert " lived " in completion.text


def test_the_model_directory_tells_people_what_it_is(demo: Demo):
    evaluation = json.loads((demo.model_dir / "evaluation.json").read_text())
    assert (evaluation["step"], evaluation["tokens_seen"]) == (STEPS, STEPS * 8 * 128)
    score = evaluation["collections"]["demo"]["bits_per_byte"]
    assert abs(score - evaluation["float32_bits_per_byte"]["demo"]) < 0.01
    # Another program, on the same weights and nearly the same text.
    assert score == pytest.approx(demo.metrics()[-1]["val_bpb"]["demo"], rel=0.1)
    card = (demo.model_dir / "README.md").read_text()
    assert f"| demo | {evaluation['collections']['demo']['documents']} |" in card
    assert f"{score:.4f}" in card
    assert "the whole of the planned run" in card
    for linked in ("curve.png", "ATTRIBUTION.md", "samples.md", "prompts.md", "evaluation.json"):
        assert linked in card
        assert (demo.model_dir / linked).is_file()
    assert is_png(demo.model_dir / "curve.png")
    assert (demo.model_dir / "metrics.jsonl").read_text().splitlines() == demo.metrics_lines()
    samples = (demo.model_dir / "samples.md").read_text()
    assert samples.count("## Seed ") == 3
    assert samples.count("> Once upon a time") == 3
    assert (demo.model_dir / "prompts.md").read_text().count("\n## ") == len(
        load_prompts(ROOT / "configs/prompts.yaml")
    )
    assert evaluation["tokens_by_collection"] == {"demo": evaluation["tokens_seen"]}
    assert f"| demo | {evaluation['tokens_seen']:,} | 100.0% |" in card
    low, high = evaluation["collections"]["demo"]["interval_95"]
    assert low < score < high
    attribution = (demo.model_dir / "ATTRIBUTION.md").read_text()
    assert "## demo" in attribution
    assert "Stories made up by TinyLM's own train/demo_text.py" in attribution


def test_the_demos_text_is_compared_with_held_out_text(demo: Demo):
    """Its sentences are few: the model has learnt them, and held-out stories are made of them too."""
    judged = json.loads((demo.model_dir / "evaluation.json").read_text())["generated_text"]
    model, held_out = judged["model"], judged["held_out"]["demo"]
    assert model["texts"] == 20
    assert 0 < held_out["texts"] <= 20
    for figures in (model, held_out):
        assert 0 < figures["distinct_grams"] < 0.9
        assert figures["longest_run"] >= figures["longest_run_mean"] > 5


def test_the_demo_is_exported_to_every_format(demo: Demo):
    exports = demo.directory / "exports" / "demo"
    assert {path.name for path in exports.iterdir()} == {"onnx", "huggingface"}
    for name, file in (("onnx", "model.onnx"), ("huggingface", "model.safetensors")):
        assert (exports / name / file).stat().st_size > demo.config.shape.n_parameters * 4
        assert (exports / name / "ATTRIBUTION.md").is_file()


def evaluate(demo: Demo, *arguments: str) -> dict:
    command = ["-m", "train.evaluate", "--model", str(demo.model_dir), "--json", *arguments]
    result = python(command, demo.ray_tmpdir)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)["collections"]


def test_evaluating_again_gives_the_cards_figures(demo: Demo, tmp_path: Path):
    held_out = demo.directory / "text" / "demo.validation.parquet"
    on_card = json.loads((demo.model_dir / "evaluation.json").read_text())["collections"]["demo"]
    again = evaluate(demo, "--data", str(held_out), "--max-bytes", "10000")["demo"]
    assert {key: again[key] for key in ("documents", "tokens", "bytes")} == {
        key: on_card[key] for key in ("documents", "tokens", "bytes")
    }
    assert again["bits_per_byte"] == pytest.approx(on_card["bits_per_byte"], abs=1e-3)


def test_text_alone_is_enough_to_evaluate(demo: Demo, tmp_path: Path):
    """The demo's own stories cost little; the same letters in another order cost a lot."""
    texts = pq.read_table(demo.directory / "text" / "demo.validation.parquet")["text"].to_pylist()[:5]
    own, shuffled = tmp_path / "own.parquet", tmp_path / "shuffled.parquet"
    pq.write_table(pa.table({"text": texts}), own)
    pq.write_table(pa.table({"text": ["".join(sorted(text)) for text in texts]}), shuffled)
    scores = evaluate(demo, "--data", str(own), str(shuffled))
    assert set(scores) == {"own", "shuffled"}
    assert scores["own"]["bytes"] == scores["shuffled"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert scores["own"]["bits_per_byte"] < 0.7
    assert scores["shuffled"]["bits_per_byte"] > 2 * scores["own"]["bits_per_byte"]


def test_attribution_names_every_author_of_text_trained_on():
    def entry(documents: int, authors: list[str], attribution: str) -> dict:
        train = {"documents": documents, "licences": ["CC-BY-4.0", "CC-BY"], "author_names": authors}
        return {"source": "file.parquet", "attribution": attribution, "train": train}

    manifest = {
        "books": entry(5, ["Ann Bee", "Cé\n Dee"], "Picture books"),
        "tales": entry(5, [], ""),
        "held": entry(0, ["Not Trained On"], "Others"),
    }
    page = attribution_page(load_config(ROOT / "configs/train-demo.yaml"), manifest)
    books, tales = page.split("## tales")
    assert "Picture books" in books
    assert "CC-BY-4.0; CC-BY" in books
    assert "Authors (2):\n\n- Ann Bee\n- Cé Dee\n" in books
    assert "file.parquet" in tales
    assert "No author is named" in tales
    assert "Not Trained On" not in page


@pytest.mark.parametrize(
    ("stage", "made_by"),
    [(train_tokenizer, "prepare"), (encode, "prepare"), (run, "encode"), (export, "prepare")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_stage_too_early_names_the_command_to_run_first(tmp_path: Path, stage: Callable, made_by: str):
    with pytest.raises(ConfigError, match=re.escape(f"run `python -m train.{made_by}` first")):
        stage(Demo(tmp_path, tmp_path).config)


def test_exporting_a_missing_run_names_the_command_to_run(demo: Demo):
    assert "run `python -m train.run` first" in only_line_of_failure(demo, "export", name="another")


def only_line_of_failure(demo: Demo, stage: str, **more: object) -> str:
    result = python(demo.command(stage, **more), demo.ray_tmpdir)
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.batch_rows", 10),
        ("run.batch_rows", 16),  # not the checkpoint's
        ("run.workers", 3),
        ("model.vocab_size", 600),
        ("model.context", 500_000),
    ],
)
def test_settings_that_do_not_fit_start_no_worker(demo: Demo, key: str, value: int):
    shown = {"run.workers": "x 3)", "model.context": "one row of 500001"}.get(key, f"is {value}")
    with pytest.raises(ConfigError, match=re.escape(shown)):
        run(demo.config_with(**{key: value}))
    assert not ray.is_initialized()


def processes() -> dict[int, tuple[int, str]]:
    """Every process of this machine: pid -> (parent's pid, command line and environment)."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            words = (directory / "cmdline").read_bytes() + b"\0" + (directory / "environ").read_bytes()
        except OSError:  # gone, or not ours
            continue
        found[int(directory.name)] = (parent, words.decode(errors="replace"))
    return found


def family(root: int, mark: str) -> set[int]:
    """`root`, every process that bears `mark`, and all their descendants: one driver and its Ray, and no other."""
    found = processes()
    members = {root} | {pid for pid, (_, words) in found.items() if mark in words and pid != os.getpid()}
    while more := {pid for pid, (parent, _) in found.items() if parent in members} - members:
        members |= more
    return members


def last_checkpoint_step(run_dir: Path) -> int:
    try:
        record = json.loads((run_dir / "checkpoint_manager_snapshot.json").read_text())
        return record["latest_checkpoint_result"]["metrics"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@pytest.mark.chaos  # a minute
def test_a_killed_run_goes_on_from_its_checkpoint(demo: Demo, tmp_path: Path):
    """Power off: the driver and every process of its Ray are killed at once, amid the run, and it is started again."""
    killed = Demo(tmp_path / "w", Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp")))
    shutil.copytree(demo.directory / "tokens", killed.directory / "tokens")
    shutil.copy(demo.directory / "tokenizer.model", killed.directory)
    driver = subprocess.Popen(
        [sys.executable, *killed.command("run")],
        cwd=ROOT,
        env=command_env(killed.ray_tmpdir),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while not last_checkpoint_step(killed.run_dir):
            assert driver.poll() is None, "the run ended before its first checkpoint"
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
    finally:
        members = family(driver.pid, str(killed.ray_tmpdir))
        os.killpg(driver.pid, signal.SIGKILL)
        for pid in members - {driver.pid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        driver.wait()
    assert len(members) > 5  # Ray's own, and the worker
    checkpoint, before = last_checkpoint_step(killed.run_dir), killed.metrics_lines()
    assert 0 < checkpoint < STEPS
    assert max(json.loads(line)["step"] for line in before[:-1]) < STEPS
    with (killed.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 1')  # as if it had been cut off amid a line

    killed.run("run")
    shutil.rmtree(killed.ray_tmpdir, ignore_errors=True)
    assert_whole(killed.metrics())
    # The lines up to the checkpoint are those of the first run, times of day and all: their steps were not run again.
    kept = [line for line in before[:-1] if json.loads(line)["step"] <= checkpoint]
    assert len(kept) >= checkpoint // 10
    assert killed.metrics_lines()[: len(kept)] == kept
    assert last_checkpoint_step(killed.run_dir) == STEPS
    ours, unbroken = (of.metrics()[-1]["val_bpb"]["demo"] for of in (killed, demo))
    assert ours == pytest.approx(unbroken, rel=0.02)
