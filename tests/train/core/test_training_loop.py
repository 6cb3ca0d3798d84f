"""The training loop without Ray: it learns, resumes exactly, and gives the same weights in every arrangement."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.train import encoded_stories, short_run, train_rank, write_tokens

from tinylm.tokenizer import Tokenizer
from train.config import ConfigError, TrainConfig
from train.core.checkpoint import Checkpoint
from train.core.loop import VALIDATION_ROWS, train
from train.core.validation import bits_per_byte
from train.data.tokens import TokenData, load_tokens

STEPS = 24
RUN = short_run(STEPS, validate_every_steps=1000, checkpoint_every_steps=5, checkpoint_every_s=0)
Result = tuple[dict[str, torch.Tensor], list[dict]]  # averaged weights, log lines


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return encoded_stories(tmp_path_factory.mktemp("loop"), RUN)


def with_run(config: TrainConfig, **run: object) -> TrainConfig:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def trained(
    config: TrainConfig,
    checkpoint: Checkpoint | None = None,
    save: Callable[[Checkpoint], None] = lambda checkpoint: None,
    **run: object,
) -> Result:
    lines: list[dict] = []
    data, tokenizer = load_tokens(config), Tokenizer(config.tokenizer_path)
    model = train(with_run(config, **run), data, tokenizer, lines.append, save, checkpoint)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, lines


@pytest.fixture(scope="module")
def checkpoints() -> list[Checkpoint]:
    """The checkpoints of the run of `unbroken`."""
    return []


@pytest.fixture(scope="module")
def unbroken(config: TrainConfig, checkpoints: list[Checkpoint]) -> Result:
    return trained(config, save=checkpoints.append)


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def assert_close(ours: dict, theirs: dict, atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_training_lowers_the_loss_and_logs_it(unbroken: Result):
    _, lines = unbroken
    by_step = losses(lines)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert by_step[0] == pytest.approx(math.log(400), abs=0.2)  # at first every token is nearly equally likely
    assert np.mean(by_step[-3:]) < by_step[0] - 1.0
    last = lines[-1]
    assert last["step"] == last["steps"] == STEPS
    assert last["tokens"] == STEPS * 8 * 32
    assert set(last["val_bpb"]) == {"stories"}
    assert last["sample"].startswith("Once upon a time")
    assert last["epochs"]["stories"] > 0


class Killed(Exception):
    pass


@pytest.mark.parametrize(("step", "settings"), [(5, {}), (15, {}), (15, {"dropout": 0.2})])
def test_a_resumed_run_equals_an_unbroken_run(
    config: TrainConfig, unbroken: Result, step: int, settings: dict, tmp_path: Path
):
    """A lost moment, average, rate, row or random number moves the weights. One step moves them by 0.02."""
    if settings:
        unbroken = trained(config, **settings)

    def save(checkpoint: Checkpoint) -> None:
        if checkpoint.step == step:
            checkpoint.save(tmp_path / "state.pt")
            raise Killed

    with pytest.raises(Killed):
        trained(config, save=save, **settings)
    weights, lines = trained(config, Checkpoint.load(tmp_path / "state.pt"), **settings)
    assert_close(weights, unbroken[0], atol=1e-6)
    assert losses(lines) == losses(unbroken[1])[step:]


def test_resuming_a_finished_run_changes_nothing(config: TrainConfig, unbroken: Result, checkpoints: list[Checkpoint]):
    assert checkpoints[-1].step == STEPS
    weights, lines = trained(config, checkpoints[-1])
    assert_close(weights, unbroken[0], atol=1e-6)
    assert lines == []


def test_two_micro_batches_equal_one_batch(config: TrainConfig, unbroken: Result):
    """Rounding changes losses by 0.0001 and weights by 0.0006. One wrong micro-batch changes them by 0.03 and 0.003."""
    weights, lines = trained(config, micro_rows=4)
    assert losses(lines) == pytest.approx(losses(unbroken[1]), abs=1e-3)
    assert_close(weights, unbroken[0], atol=2e-3)


def test_two_workers_equal_one(config: TrainConfig, unbroken: Result, tmp_path: Path):
    """Two gloo ranks with different rows and two micro-batches each reach the weights of one worker with all rows."""
    settings = with_run(config, micro_rows=2).model_dump(mode="json")
    torch.multiprocessing.spawn(train_rank, (2, settings, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_close(ranks[0]["weights"], ranks[1]["weights"], atol=0)
    assert ranks[0]["saved_steps"] == ranks[1]["saved_steps"] == [5, 10, 15, 20, STEPS]
    assert losses(ranks[0]["lines"]) == pytest.approx(losses(unbroken[1]), abs=1e-3)
    assert ranks[1]["lines"] == []
    assert_close(ranks[0]["weights"], unbroken[0], atol=2e-3)


def test_validation_uses_no_dropout(config: TrainConfig):
    tokenizer, data = Tokenizer(config.tokenizer_path), load_tokens(config)
    lines: list[dict] = []
    model = train(with_run(config, dropout=0.5, tokens=8 * 8 * 32), data, tokenizer, lines.append, lambda state: None)
    piece_bytes = torch.tensor([len(piece) for piece in tokenizer.piece_bytes])
    rows = torch.from_numpy(data.validation_rows("stories", VALIDATION_ROWS))
    assert lines[-1]["val_bpb"]["stories"] == round(bits_per_byte(model.eval(), rows, piece_bytes), 4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_gives_the_same_weights(config: TrainConfig):
    """Compiled code uses attention in blocks and another GELU. A row here has several blocks of queries."""
    long = config.model_copy(update={"model": {**config.model, "n_layers": 1, "context": 150}})
    settings = {"dropout": 0.2, "tokens": 3 * 8 * 150}
    expected, plain = trained(long, **settings)
    weights, lines = trained(long, **settings, compile=True)
    assert losses(lines) == pytest.approx(losses(plain), abs=1e-3)
    assert_close(weights, expected, atol=2e-3)


def test_bfloat16_training_stays_close_to_float32(config: TrainConfig, unbroken: Result):
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


def test_a_checkpoint_of_other_data_is_refused(config: TrainConfig, unbroken: Result, checkpoints: list[Checkpoint]):
    with pytest.raises(ConfigError, match="another tokenizer"):
        trained(config, replace(checkpoints[0], tokenizer_sha256="0" * 64))
    with pytest.raises(ConfigError, match="on other text"):
        trained(config, replace(checkpoints[0], text_sha256="0" * 64))


def test_resuming_refuses_settings_that_change_the_rows(
    config: TrainConfig, unbroken: Result, checkpoints: list[Checkpoint]
):
    """The step number selects the rows. Other settings would skip some rows and repeat others."""
    assert checkpoints[0].tokens_by_collection == {"stories": 5 * 8 * 32}
    with pytest.raises(ConfigError, match=r"run\.batch_rows is 16, but the checkpoint was trained with 8"):
        trained(config, checkpoints[0], batch_rows=16)
    with pytest.raises(ConfigError, match="seed is 2, but the checkpoint was trained with 1"):
        trained(config.model_copy(update={"seed": 2}), checkpoints[0])
    collections = [{**collection.model_dump(), "weight": 2} for collection in config.prepare.collections]
    heavier = config.model_copy(update={"prepare": config.prepare.model_validate({"collections": collections})})
    with pytest.raises(ConfigError, match=r"weight is \{'stories': 2\.0\}, but the checkpoint was trained with"):
        trained(heavier, checkpoints[0])


def test_settings_that_do_not_fit_the_tokens_are_named(config: TrainConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run\.batch_rows is 8"):
        trained(config, micro_rows=3)
    for key, value, ours in (("vocab_size", 500, 400), ("boundary_id", 2, 1)):
        documents = {"train": [[value if key == "boundary_id" else 1, *range(3, 99)]], "validation": [[1, 2]]}
        write_tokens(tmp_path / key, {"s": documents}, **{key: value})
        data = TokenData.load(tmp_path / key, 32, 1, {"s": 1})
        with pytest.raises(ConfigError, match=f"{key} is {ours}, but the tokens were made with {value}"):
            train(config, data, Tokenizer(config.tokenizer_path), print, print)
