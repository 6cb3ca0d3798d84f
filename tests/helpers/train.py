"""Shared parts of the training tests: small configs, files, tokens made without Ray, and the commands as processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinylm.tokenizer import Tokenizer
from train.config import TrainConfig, load_config
from train.data.tokens import file_sha256
from train.demo_text import demo_text
from train.prepare import prepare
from train.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = {"vocab_size": 400, "hidden_size": 32, "n_layers": 2, "n_heads": 2, "mlp_size": 64, "context": 32}
DEMO_STEPS = 240
SHARD_TOKENS = 20_000
STEP_TOKENS = 8 * TINY_MODEL["context"]  # of a short run


def make_config(workdir: Path, collections: list[dict], **sections: object) -> TrainConfig:
    """Return a config of the tiny model in `workdir`; collections need only a name and a source."""
    prepare_section = {"collections": [{"weight": 1, **c} for c in collections], **sections.pop("prepare", {})}
    values = {"name": "tiny", "workdir": workdir, "models_dir": workdir / "models", "model": TINY_MODEL}
    return TrainConfig.model_validate({**values, "prepare": prepare_section, **sections})


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def tree_bytes(directory: Path) -> dict[str, bytes]:
    """Return the content of every file below a directory by its relative name."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def prepared_stories(workdir: Path, n_stories: int = 300, **sections: object) -> TrainConfig:
    """Prepare demo stories and train their tokenizer in `workdir`."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "stories.txt").write_text(demo_text(n_stories, seed=3), encoding="utf-8")
    collections = [{"name": "stories", "source": str(workdir / "stories.txt")}]
    config = make_config(workdir, collections, prepare={"validation_share": 0.1}, **sections)
    prepare(config)
    train_tokenizer(config)
    return config


def write_tokens(directory: Path, collections: dict[str, dict], shard_tokens: int = 1_000_000, **index: object) -> None:
    """Write {name: {"train": [documents], "validation": [documents]}} in the format of `train.encode`.

    This is a second, simple implementation, which the tests compare with `train.encode`.
    """
    directory.mkdir(parents=True)
    entries: dict[str, dict] = {}
    for name, splits in collections.items():
        entries[name] = {}
        for split, documents in splits.items():
            shards: list[list[int]] = [[]]
            for document in documents:
                if shards[-1] and len(shards[-1]) + len(document) > shard_tokens:
                    shards.append([])
                shards[-1] += document
            names = [f"{name}.{split}-{number:05d}.npy" for number in range(len(shards))]
            for file, shard in zip(names, shards, strict=True):
                np.save(directory / file, np.array(shard, np.uint16))
            entries[name][split] = {"shards": names, "tokens": sum(map(len, documents)), "documents": len(documents)}
    defaults = {"text_sha256": "none", "tokenizer_sha256": "none", "vocab_size": 400, "boundary_id": 1}
    content = json.dumps({**defaults, **index, "collections": entries}, indent=2) + "\n"
    (directory / "index.json").write_text(content, encoding="utf-8")


def encode_plainly(config: TrainConfig, directory: Path, shard_tokens: int = 1_000_000) -> None:
    """Encode prepared text document by document, without Ray."""
    tokenizer = Tokenizer(config.tokenizer_path)
    collections = {
        name: {
            split: [tokenizer.encode_document(text) for text in pq.read_table(path)["text"].to_pylist()]
            for split in ("train", "validation")
            if (path := config.text_file(name, split))
        }
        for name in config.weights
    }
    sums = {"text_sha256": file_sha256(config.manifest_path), "tokenizer_sha256": file_sha256(config.tokenizer_path)}
    write_tokens(directory, collections, shard_tokens, **sums, vocab_size=tokenizer.vocab_size)


def short_run(steps: int, **more: object) -> dict:
    """Return the settings of a run of a few steps, which by default is validated and saved at its end."""
    return {
        "tokens": steps * STEP_TOKENS,
        "batch_rows": 8,
        "micro_rows": 8,
        "warmup_steps": 2,
        "log_every_steps": 1,
        "validate_every_steps": steps,
        "checkpoint_every_steps": steps,
        "threads": 1,
        **more,
    }


def encoded_stories(workdir: Path, run: dict) -> TrainConfig:
    """Make a small set of demo stories in `workdir`, ready for training without Ray."""
    config = prepared_stories(workdir, n_stories=150, run=run)
    encode_plainly(config, config.tokens_dir)
    return config


def command_env(ray_tmpdir: Path) -> dict[str, str]:
    """Return an environment in which a command starts its own Ray and never joins another one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **env,
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(ray_tmpdir),  # a short path, because sockets lie below it
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # the same arithmetic on every machine
    }


def python(arguments: list[str], ray_tmpdir: Path, timeout_s: float = 400) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` in the repository's root; output as text."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=command_env(ray_tmpdir),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def train_rank(rank: int, world: int, settings: dict, directory: str) -> None:
    """Train as one rank of a gloo process group in a process of torch.multiprocessing; save the results in a file."""
    import torch
    import torch.distributed as dist

    from train.core.loop import train
    from train.data.tokens import load_tokens

    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{directory}/meet", timeout=timeout, rank=rank, world_size=world)
    try:
        config = TrainConfig.model_validate(settings)
        lines: list[dict] = []
        saved_steps: list[int] = []
        model = train(
            config,
            load_tokens(config),
            Tokenizer(config.tokenizer_path),
            lines.append,
            lambda checkpoint: saved_steps.append(checkpoint.step),
        )
        found = {"weights": model.state_dict(), "lines": lines, "saved_steps": saved_steps}
        torch.save(found, Path(directory) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@dataclass
class Demo:
    """The work directory of the demo, with fewer steps, and its commands."""

    directory: Path
    ray_tmpdir: Path

    def overrides(self, **more: object) -> list[str]:
        settings = {
            "workdir": self.directory,
            "models_dir": self.directory / "models",
            "prepare.collections.0.source": self.directory / "stories.txt",
            "model.vocab_size": 512,
            "encode.shard_tokens": SHARD_TOKENS,
            "run.tokens": DEMO_STEPS * 8 * 128,
            "run.validate_every_steps": 80,
            "run.checkpoint_every_steps": 40,
            "run.checkpoint_every_s": 0,
            "export.evaluate_bytes": 10_000,
            "export.n_samples": 3,
            "export.n_stories": 20,
            **more,
        }
        return [f"{key}={value}" for key, value in settings.items()]

    def config(self, **more: object) -> TrainConfig:
        return load_config(ROOT / "configs/train-demo.yaml", self.overrides(**more))

    def command(self, stage: str, **more: object) -> list[str]:
        return ["-m", f"train.{stage}", "--config", "configs/train-demo.yaml", *self.overrides(**more)]

    def run(self, stage: str, **more: object) -> None:
        result = python(self.command(stage, **more), self.ray_tmpdir)
        assert result.returncode == 0, f"train.{stage}: {result.stderr[-3000:]}"

    def copy_to(self, directory: Path, *names: str) -> Demo:
        """Return a demo in another directory with copies of these stages' outputs."""
        for name in names:
            source = self.directory / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, directory / name)
        return Demo(directory, self.ray_tmpdir)

    @property
    def run_dir(self) -> Path:
        return self.directory / "runs" / "demo"

    @property
    def model_dir(self) -> Path:
        return self.directory / "models" / "demo"

    def metrics_lines(self) -> list[str]:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in self.metrics_lines()]


def trained_demo(directory: Path, ray_tmpdir: Path) -> Demo:
    """Run the demo's stages one after the other, as `make train-demo` does, with less text and fewer steps."""
    demo = Demo(directory, ray_tmpdir)
    text = python(["-m", "train.demo_text", "--out", str(directory / "stories.txt"), "--stories", "600"], ray_tmpdir)
    assert text.returncode == 0, text.stderr
    for stage in ("prepare", "tokenizer", "encode", "run", "export"):
        demo.run(stage)
    return demo
