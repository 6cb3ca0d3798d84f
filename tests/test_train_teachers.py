"""Learning from trained models beside the text: what they say together, what a row's target is, what is refused."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from train_fixtures import encoded_stories, release, short_run

from tinylm.llm import load
from tinylm.model import Chunk, ModelRunner
from tinylm.tokenizer import Tokenizer
from tinylm.weights import TENSORS, ModelError
from train.card import _taught_by as model_card_sentence
from train.config import ConfigError, TrainConfig
from train.loop import mean_loss, taught_targets, train
from train.model import GPT, released_model
from train.stage import file_sha256, load_tokens
from train.state import STATE_FILE
from train.teachers import Teachers

STEPS = 12
RUN = short_run(STEPS, micro_rows=4, average_decay=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return encoded_stories(tmp_path_factory.mktemp("taught"), RUN)


@pytest.fixture(scope="module")
def models(config: TrainConfig) -> list[Path]:
    return [release(config, config.workdir / "teachers" / f"t{seed}", seed) for seed in range(2)]


@pytest.fixture
def rows(config: TrainConfig) -> torch.Tensor:
    return torch.from_numpy(load_tokens(config).mixture.rows(0, 3))


def loaded(config: TrainConfig, directories: list[Path], context: int = 32, compiled: bool = False) -> Teachers:
    return Teachers(directories, file_sha256(config.tokenizer_path), context, compiled=compiled)


def engine_probabilities(directory: Path, ids: torch.Tensor) -> np.ndarray:
    """What TinyLM's own engine says of the same rows, (B, T, vocab)."""
    _, model = load(directory, precision="float32")
    (n, length), chunks = ids.shape, [Chunk(slot, 0, ids.shape[1]) for slot in range(len(ids))]
    runner = ModelRunner(model, n, n * length, n * length)
    logits = runner.forward(ids.numpy().ravel(), chunks, np.arange(n * length)).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).reshape(n, length, -1)


def test_together_they_say_the_mean_of_what_the_engine_says_of_each(config, models, rows):
    ids = rows[:, :-1]
    each = [engine_probabilities(directory, ids) for directory in models]
    assert np.abs(each[0] - each[1]).max() > 0.05
    np.testing.assert_allclose(loaded(config, models).probabilities(ids), np.mean(each, axis=0), atol=1e-4)
    np.testing.assert_allclose(loaded(config, models[:1]).probabilities(ids), each[0], atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_they_say_the_same_of_however_many_rows(config, models, rows):
    plain, compiled = loaded(config, models), loaded(config, models, compiled=True)
    for n in (3, 2, 1):
        said = compiled.probabilities(rows[:n, :-1])
        torch.testing.assert_close(said, plain.probabilities(rows[:n, :-1]), atol=1e-5, rtol=1e-4)


def test_a_target_is_what_teachers_say_by_its_share_and_the_text_else(config, models, rows):
    teachers = loaded(config, models)
    shares = [0.0, 0.25, 1.0]
    targets = taught_targets(rows[:, :-1], rows[:, 1:], shares, teachers)
    said = teachers.probabilities(rows[:, :-1])
    text = torch.nn.functional.one_hot(rows[:, 1:], 400).float()
    for i, share in enumerate(shares):
        torch.testing.assert_close(targets[i], share * said[i] + (1 - share) * text[i])
    # Of a row that is not taught, the loss is that of its tokens.
    model = GPT(config.model_config_)
    inputs, tokens = rows[:1, :-1], rows[:1, 1:]
    torch.testing.assert_close(mean_loss(model, inputs, targets[:1]), mean_loss(model, inputs, tokens))


def test_one_that_says_what_its_teacher_says_has_nothing_to_learn(config, models, rows):
    model = released_model(models[0])
    inputs = rows[:, :-1]
    gradients = {}
    for share in (0.0, 1.0):
        model.zero_grad()
        teachers = loaded(config, models[:1])
        mean_loss(model, inputs, taught_targets(inputs, rows[:, 1:], [share] * len(rows), teachers)).backward()
        gradients[share] = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert gradients[1.0] < 1e-4 * gradients[0.0]


def distance(config: TrainConfig, weights: dict, teacher: Path) -> float:
    """How far a model is from what the teacher says of held-out text, nats a token."""
    ids = torch.from_numpy(load_tokens(config).validation_rows("stories", 8)[:, :-1]).clamp(min=0)
    student = GPT(config.model_config_)
    student.load_state_dict(weights)
    with torch.no_grad():
        log_said = loaded(config, [teacher]).probabilities(ids).log()
        return float((log_said.exp() * (log_said - student(ids).log_softmax(-1))).sum(-1).mean())


def taught(config: TrainConfig, **run: object) -> tuple[dict, dict, list[dict]]:
    """The averaged weights, the last state and the logged lines of a run."""
    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
    lines: list[dict] = []
    states: list[dict] = []
    model = train(config, load_tokens(config), Tokenizer(config.tokenizer_path), lines.append, states.append)
    return model.state_dict(), states[-1], lines


def test_a_run_comes_nearer_to_its_teacher_and_says_who_it_was(config: TrainConfig, models: list[Path], tmp_path: Path):
    plain, state, lines = taught(config)
    assert state["taught_by"] == {}
    weights, state, _ = taught(config, teachers=models[:1], taught={"stories": 0.9})
    assert distance(config, weights, models[0]) < distance(config, plain, models[0]) - 0.1
    assert state["taught_by"] == {file_sha256(models[0] / TENSORS): "t0"}
    # A run teaches as what it releases does.
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / STATE_FILE)
    ids = torch.from_numpy(load_tokens(config).mixture.rows(0, 2)[:, :-1])
    student = GPT(config.model_config_)
    student.load_state_dict(weights)
    said = loaded(config, [tmp_path / "run"]).probabilities(ids)
    torch.testing.assert_close(said, student(ids).softmax(-1).detach())
    # Where no collection is taught, teachers change nothing.
    _, _, same = taught(config, teachers=models, taught={"stories": 0.0})  # refused in a config
    assert [line.get("loss") for line in same] == [line.get("loss") for line in lines]


def test_what_cannot_teach_is_named(config: TrainConfig, models: list[Path], tmp_path: Path):
    with pytest.raises(ModelError, match="nowhere"):
        loaded(config, [tmp_path / "nowhere"])
    short = release(config, tmp_path / "short", 3, context=16)
    with pytest.raises(ConfigError, match=r"run.teachers: .*short reads 16 tokens: too few for rows of 32"):
        loaded(config, [short])
    with pytest.raises(ConfigError, match=r"run.teachers: .*t0 has another tokenizer"):
        Teachers(models, "0" * 64, 32)
    damaged = Path(shutil.copytree(models[0], tmp_path / "damaged"))
    (damaged / TENSORS).write_bytes((models[0] / TENSORS).read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        loaded(config, [models[1], damaged])
    (tmp_path / "cut").mkdir()
    whole = io.BytesIO()
    torch.save({"step": 3}, whole)
    for content in (whole.getvalue(), whole.getvalue()[:-100], b"no state", b""):
        (tmp_path / "cut" / STATE_FILE).write_bytes(content)
        with pytest.raises(ConfigError, match=r"run.teachers: .*cut/state.pt is not what a run saved: \w+: "):
            loaded(config, [tmp_path / "cut"])


def test_a_card_says_who_taught():
    assert model_card_sentence({}) == ""
    sentence = model_card_sentence({"0123456789abcdef": "older", "f" * 64: "another"})
    assert "what other models say of it: older (sha256 0123456789ab), another (sha256 ffffffffffff)." in sentence
