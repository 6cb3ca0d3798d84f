"""What the training tests share: small configs, Parquet files, tokens made without Ray, our commands as processes."""

from __future__ import annotations

import hashlib
import json
import os
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
from train.demo_text import demo_text
from train.prepare import prepare
from train.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = {"vocab_size": 400, "hidden_size": 32, "n_layers": 2, "n_heads": 2, "mlp_size": 64, "context": 32}
DEMO_STEPS = 240
SHARD_TOKENS = 20_000
ROW_TOKENS = 8 * TINY_MODEL["context"]  # of one step of a short run


def make_config(workdir: Path, collections: list[dict], **sections: object) -> TrainConfig:
    """A config in `workdir` of the tiny model; collections need a name and a source only."""
    prepare_section = {"collections": [{"weight": 1, **c} for c in collections], **sections.pop("prepare", {})}
    values = {"name": "tiny", "workdir": workdir, "models_dir": workdir / "models", "model": TINY_MODEL}
    return TrainConfig.model_validate({**values, "prepare": prepare_section, **sections})


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def texts_of(config: TrainConfig, collection: str, split: str) -> list[str]:
    return pq.read_table(config.text_dir / f"{collection}.{split}.parquet")["text"].to_pylist()


def tree_bytes(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by its relative name."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def prepared_stories(workdir: Path, n_stories: int = 300, **sections: object) -> TrainConfig:
    """Prepared demo stories and their tokenizer in `workdir`."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "stories.txt").write_text(demo_text(n_stories, seed=3), encoding="utf-8")
    config = make_config(
        workdir,
        [{"name": "stories", "source": str(workdir / "stories.txt")}],
        prepare={"validation_share": 0.1},
        **sections,
    )
    prepare(config)
    train_tokenizer(config)
    return config


def write_tokens(directory: Path, collections: dict[str, dict], shard_tokens: int = 1_000_000, **index: object) -> None:
    """Token shards in the format of `train.encode`: {name: {"train": [documents], "validation": [documents]}}.

    Written anew here, the obvious way: what `train.encode` writes is compared with it.
    """
    directory.mkdir(parents=True)
    entries = {}
    for name, collection in collections.items():
        entry: dict = {}
        for split in ("train", "validation"):
            if split in collection:
                documents = collection[split]
                shards: list[list[int]] = [[]]
                for document in documents:
                    if shards[-1] and len(shards[-1]) + len(document) > shard_tokens:
                        shards.append([])
                    shards[-1] += document
                names = [f"{name}.{split}-{number:05d}.npy" for number in range(len(shards))]
                for file, shard in zip(names, shards, strict=True):
                    np.save(directory / file, np.array(shard, np.uint16))
                n_tokens = sum(map(len, documents))
                entry[split] = {"shards": names, "tokens": n_tokens, "documents": len(documents)}
        entries[name] = entry
    index = {
        "text_sha256": "none",
        "tokenizer_sha256": "none",
        "vocab_size": 400,
        "boundary_id": 1,
        **index,
        "collections": entries,
    }
    (directory / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def encode_plainly(config: TrainConfig, directory: Path, shard_tokens: int = 1_000_000) -> None:
    """The tokens of prepared text, document by document, without Ray."""
    tokenizer = Tokenizer(config.tokenizer_path)
    collections = {}
    for collection in config.prepare.collections:
        collections[collection.name] = {
            split: [tokenizer.encode_document(text) for text in texts_of(config, collection.name, split)]
            for split in ("train", "validation")
        }
    of_text, of_tokenizer = (
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (config.manifest_path, config.tokenizer_path)
    )
    write_tokens(
        directory,
        collections,
        shard_tokens,
        text_sha256=of_text,
        tokenizer_sha256=of_tokenizer,
        vocab_size=tokenizer.vocab_size,
    )


def short_run(steps: int, **more: object) -> dict:
    """Settings of a run of a few steps, validated and saved at its end unless told otherwise."""
    return {
        "tokens": steps * ROW_TOKENS,
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
    """A small set of demo stories in `workdir`, ready to be trained on without Ray."""
    config = prepared_stories(workdir, n_stories=150, run=run)
    encode_plainly(config, config.tokens_dir)
    return config


def command_env(ray_tmpdir: Path) -> dict[str, str]:
    """The environment of our commands in tests: a Ray of their own, never one that runs already."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **env,
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(ray_tmpdir),  # short, for the sockets in it
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # on every machine the same arithmetic
    }


def python(arguments: list[str], ray_tmpdir: Path, timeout_s: float = 300) -> subprocess.CompletedProcess:
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
    """One rank of a gloo process group, as torch.multiprocessing spawns it: train, and keep what came of it."""
    import torch
    import torch.distributed as dist

    from train.core.loop import train
    from train.stage import load_tokens

    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)  # of ranks that don't meet
    dist.init_process_group("gloo", f"file://{directory}/meet", timeout=timeout, rank=rank, world_size=world)
    try:
        config = TrainConfig.model_validate(settings)
        data = load_tokens(config)
        lines: list[dict] = []
        saved_steps: list[int] = []
        model = train(
            config,
            data,
            Tokenizer(config.tokenizer_path),
            lines.append,
            lambda checkpoint: saved_steps.append(checkpoint.step),
        )
        kept = {"weights": model.state_dict(), "lines": lines, "saved_steps": saved_steps}
        torch.save(kept, Path(directory) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@dataclass
class Demo:
    """Where a run of the demo's commands lies, and how to run one more of them."""

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

    def command(self, stage: str, **more: object) -> list[str]:
        return ["-m", f"train.{stage}", "--config", "configs/train-demo.yaml", *self.overrides(**more)]

    def run(self, stage: str, **more: object) -> subprocess.CompletedProcess:
        result = python(self.command(stage, **more), self.ray_tmpdir, timeout_s=400)
        assert result.returncode == 0, f"train.{stage}: {result.stderr[-3000:]}"
        return result

    @property
    def run_dir(self) -> Path:
        return self.directory / "runs" / "demo"

    @property
    def model_dir(self) -> Path:
        return self.directory / "models" / "demo"

    @property
    def config(self) -> TrainConfig:
        return self.config_with()

    def config_with(self, **more: object) -> TrainConfig:
        return load_config(ROOT / "configs/train-demo.yaml", self.overrides(**more))

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in self.metrics_lines()]

    def metrics_lines(self) -> list[str]:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def trained_demo(directory: Path, ray_tmpdir: Path) -> Demo:
    """The demo's stages, one after the other, as `make train-demo` runs them, with less text and fewer steps."""
    demo = Demo(directory, ray_tmpdir)
    text = python(["-m", "train.demo_text", "--out", str(directory / "stories.txt"), "--stories", "600"], ray_tmpdir)
    assert text.returncode == 0, text.stderr
    for stage in ("prepare", "tokenizer", "encode", "run", "export"):
        demo.run(stage)
    return demo
