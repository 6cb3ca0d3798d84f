"""The training loop without Ray: it learns, it resumes exactly, and its batches add up."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.train import encoded_stories, short_run, train_rank, write_tokens

from tinylm.config import ModelConfig
from tinylm.tokenizer import Tokenizer
from train.config import ConfigError, Run, TrainConfig
from train.core.checkpoint import Checkpoint
from train.core.loop import VALIDATION_ROWS, train
from train.core.schedule import lr_factor, total_steps
from train.core.validation import bits_per_byte
from train.data.tokens import TokenData
from train.stage import load_tokens

STEPS = 24
RUN = short_run(STEPS, validate_every_steps=1000, checkpoint_every_steps=5, checkpoint_every_s=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return encoded_stories(tmp_path_factory.mktemp("loop"), RUN)


def trained(config: TrainConfig, checkpoint: Checkpoint | None = None, save=lambda checkpoint: None, **run: object):
    """Return the averaged weights after a run, and its log lines."""
    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
    lines: list[dict] = []
    data = load_tokens(config)
    model = train(config, data, Tokenizer(config.tokenizer_path), lines.append, save, checkpoint)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, lines


@pytest.fixture(scope="module")
def unbroken(config: TrainConfig):
    return trained(config)


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def assert_close(ours: dict, theirs: dict, atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_the_learning_rate_warms_up_stays_and_decays():
    run = Run(warmup_steps=9, constant_share=0.4)
    factors = [lr_factor(step, 200, run) for step in range(201)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[9:81] == [1.0] * 72
    assert np.diff(factors[80:]) == pytest.approx(np.full(120, -0.98 / 120))  # a straight line
    assert factors[200] == pytest.approx(0.02)
    # All decay, no decay, and more warm-up than steps.
    assert lr_factor(0, 10, Run(warmup_steps=0, constant_share=0)) == 1
    assert lr_factor(9, 10, Run(warmup_steps=0, constant_share=1)) == 1
    assert lr_factor(4, 5, Run(warmup_steps=99, constant_share=1)) == pytest.approx(0.05)


def test_a_run_has_at_least_one_step():
    assert total_steps(Run(tokens=8192, batch_rows=4), ModelConfig(context=256)) == 8
    assert total_steps(Run(tokens=1), ModelConfig()) == 1


def test_training_lowers_the_loss_and_logs_it(config: TrainConfig, unbroken):
    _, lines = unbroken
    by_step = losses(lines)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    # At first every token is nearly equally likely.
    assert by_step[0] == pytest.approx(math.log(400), abs=0.2)
    assert np.mean(by_step[-3:]) < by_step[0] - 1.0
    last = lines[-1]
    assert last["step"] == last["steps"] == STEPS
    assert last["tokens"] == STEPS * 8 * 32
    assert set(last["val_bpb"]) == {"stories"}
    assert last["sample"].startswith("Once upon a time")
    assert last["epochs"]["stories"] > 0


class Killed(Exception):
    pass


@pytest.mark.parametrize("chance", [{}, {"dropout": 0.2}], ids=["plain", "dropout"])
@pytest.mark.parametrize("step", [5, 15])
def test_a_resumed_run_ends_like_an_unbroken_one(
    config: TrainConfig, unbroken, step: int, chance: dict, tmp_path: Path
):
    """A lost moment, average, rate, row or random number moves the weights; one step moves them by 0.02."""
    if chance:
        unbroken = trained(config, **chance)

    def save(checkpoint: Checkpoint) -> None:
        if checkpoint.step == step:
            checkpoint.save(tmp_path / "state.pt")
            raise Killed

    with pytest.raises(Killed):
        trained(config, save=save, **chance)
    weights, lines = trained(config, Checkpoint.load(tmp_path / "state.pt"), **chance)
    assert_close(weights, unbroken[0], atol=1e-6)
    assert losses(lines) == losses(unbroken[1])[step:]


def test_resuming_a_finished_run_changes_nothing(config: TrainConfig, unbroken):
    states: list[Checkpoint] = []
    trained(config, save=states.append)
    assert states[-1].step == STEPS
    weights, lines = trained(config, states[-1])
    assert_close(weights, unbroken[0], atol=1e-6)
    assert lines == []


def test_two_micro_batches_equal_one_batch(config: TrainConfig, unbroken):
    """Rounding changes losses by 0.0001 and weights by 0.0006, one wrong micro-batch by 0.03 and 0.003."""
    weights, lines = trained(config, micro_rows=4)
    assert losses(lines) == pytest.approx(losses(unbroken[1]), abs=1e-3)
    assert_close(weights, unbroken[0], atol=2e-3)


def test_two_workers_equal_one(config: TrainConfig, unbroken, tmp_path: Path):
    """Two gloo ranks with different rows and two micro-batches each reach the weights of one worker with all rows."""
    shared = config.model_copy(update={"run": config.run.model_copy(update={"micro_rows": 2})})
    torch.multiprocessing.spawn(train_rank, (2, shared.model_dump(mode="json"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_close(ranks[0]["weights"], ranks[1]["weights"], atol=0)
    assert ranks[0]["saved_steps"] == ranks[1]["saved_steps"] == [5, 10, 15, 20, STEPS]
    assert losses(ranks[0]["lines"]) == pytest.approx(losses(unbroken[1]), abs=1e-3)
    assert ranks[1]["lines"] == []
    assert_close(ranks[0]["weights"], unbroken[0], atol=2e-3)


def test_validation_uses_no_dropout(config: TrainConfig):
    tokenizer, data = Tokenizer(config.tokenizer_path), load_tokens(config)
    run = config.run.model_copy(update={"dropout": 0.5, "tokens": 8 * 8 * 32})
    lines: list[dict] = []
    model = train(config.model_copy(update={"run": run}), data, tokenizer, lines.append, lambda state: None)
    piece_bytes = torch.tensor([len(piece) for piece in tokenizer.piece_bytes])
    rows = torch.from_numpy(data.validation_rows("stories", VALIDATION_ROWS))
    assert lines[-1]["val_bpb"]["stories"] == round(bits_per_byte(model.eval(), rows, piece_bytes), 4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_gives_the_same_weights(config: TrainConfig):
    """Dropout too: its random numbers are drawn outside of the compiled code."""
    expected, plain = trained(config, dropout=0.2)
    weights, lines = trained(config, dropout=0.2, compile=True)
    assert losses(lines) == pytest.approx(losses(plain), abs=1e-3)
    assert_close(weights, expected, atol=2e-3)


def test_bfloat16_trains_like_float32(config: TrainConfig, unbroken):
    """The blocks' products are in bfloat16, and the weights stay in float32."""
    products: set[torch.dtype] = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: products.add(out.dtype) if isinstance(module, torch.nn.Linear) else None
    )
    with hook:
        weights, lines = trained(config, bfloat16=True, tokens=4 * 8 * 32, constant_share=1)
    assert torch.bfloat16 in products
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert losses(lines) == pytest.approx(losses(unbroken[1])[:4], abs=0.05)


def test_a_checkpoint_of_other_data_is_refused(config: TrainConfig):
    states: list[Checkpoint] = []
    trained(config, save=states.append, tokens=8 * 32)
    with pytest.raises(ConfigError, match="another tokenizer"):
        trained(config, replace(states[0], tokenizer_sha256="0" * 64))
    with pytest.raises(ConfigError, match="on other text"):
        trained(config, replace(states[0], text_sha256="0" * 64))


def test_resuming_refuses_settings_that_would_change_the_rows(config: TrainConfig):
    """The step number selects the rows: other settings would skip some and repeat others."""
    states: list[Checkpoint] = []
    trained(config, save=states.append, tokens=8 * 8 * 32)
    assert states[-1].tokens_by_collection == {"stories": 8 * 8 * 32}
    with pytest.raises(ConfigError, match=r"run\.batch_rows is 16, but the checkpoint was trained with 8"):
        trained(config, states[-1], batch_rows=16)
    with pytest.raises(ConfigError, match="seed is 2, but the checkpoint was trained with 1"):
        trained(config.model_copy(update={"seed": 2}), states[-1])
    collections = [{**collection.model_dump(), "weight": 2} for collection in config.prepare.collections]
    heavier = config.model_copy(update={"prepare": config.prepare.model_validate({"collections": collections})})
    with pytest.raises(ConfigError, match=r"weight is \{'stories': 2\.0\}, but the checkpoint was trained with"):
        trained(heavier, states[-1])


def test_settings_that_do_not_fit_the_tokens_are_named(config: TrainConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.batch_rows is 8"):
        trained(config, micro_rows=3)
    for key, value, ours in (("vocab_size", 500, 400), ("boundary_id", 2, 1)):
        documents = {"train": [[value if key == "boundary_id" else 1, *range(3, 99)]], "validation": [[1, 2]]}
        write_tokens(tmp_path / key, {"s": documents}, **{key: value})
        data = TokenData.load(tmp_path / key, 32, 1, {"s": 1})
        with pytest.raises(ConfigError, match=f"{key} is {ours}, but the tokens were made with {value}"):
            train(config, data, Tokenizer(config.tokenizer_path), print, print)
